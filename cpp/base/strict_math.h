// Refuses compiler flags that would change our arithmetic: under them a NaN may not be recognised
// as one, and sums may be reordered. cmake/StrictMath.cmake keeps these flags away from our own
// build. This header protects every other build.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "cpumoe needs strict arithmetic: compile without -ffast-math, -Ofast and their parts"
#endif
