// Refuses compiler flags under which our arithmetic is not what it says: a NaN might not be seen as
// one, sums might change their order. cmake/StrictMath.cmake keeps them away from our build; this
// is for builds of any other kind.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error "cpumoe needs strict arithmetic: compile without -ffast-math, -Ofast and their parts"
#endif
