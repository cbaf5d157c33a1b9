# The target cpumoe_strict_math has options that overrule all fast-math flags from outside
# (CXXFLAGS, LDFLAGS). A NaN must be recognised, sums have one order, and subnormal numbers are not
# zero.

include(CheckCXXCompilerFlag)

add_library(cpumoe_strict_math INTERFACE)
# Without contraction, a multiply-add is rounded once only where the code says so. Activations are
# then rounded to equal int8 on every ISA.
target_compile_options(
    cpumoe_strict_math
    INTERFACE
        -fno-fast-math
        -fno-unsafe-math-optimizations
        -fno-finite-math-only
        -fno-associative-math
        -fno-reciprocal-math
        -fsigned-zeros
        -ffp-contract=off
        $<$<CXX_COMPILER_ID:GNU>:-fno-single-precision-constant>
        $<$<CXX_COMPILER_ID:Clang>:-fhonor-nans>
        $<$<CXX_COMPILER_ID:Clang>:-fhonor-infinities>
        $<$<CXX_COMPILER_ID:Clang>:-fno-approx-func>
        $<$<CXX_COMPILER_ID:Clang>:-fdenormal-fp-math=ieee>
)
# With a fast-math flag or -Ofast, compilers link start-up code that makes the whole process flush
# subnormal numbers to zero. The last flag counts, and only libraries come after the flags of
# LDFLAGS.
target_link_libraries(
    cpumoe_strict_math
    INTERFACE -O2 -fno-fast-math -fno-unsafe-math-optimizations
)
check_cxx_compiler_flag(-mno-daz-ftz CPUMOE_HAVE_DAZ_FTZ)
if(CPUMOE_HAVE_DAZ_FTZ)
    target_link_libraries(cpumoe_strict_math INTERFACE -mno-daz-ftz)
endif()
