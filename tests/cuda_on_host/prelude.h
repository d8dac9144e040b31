// The standard headers of run_pass.cpp, compiled once for each build: half the time of a fault.
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>
