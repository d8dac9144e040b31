// The loops for x86-64 machines with AVX2 and F16C. A pragma enables these instructions, not a
// flag, so that templates of the standard library, included before it, keep to the baseline.
#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define FCRN_AVX2
#define FCRN_INSTRUCTION_SET avx2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#include "cell_loops.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
