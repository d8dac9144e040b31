// The loops for x86-64 machines with AVX2 and F16C; setup.py compiles this file with both.
#define FCRN_INSTRUCTION_SET avx2
#include "cell_loops.h"
