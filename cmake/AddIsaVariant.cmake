# Turns the tables of Variants.cmake into one module library per ISA, and into the headers that list
# ISAs, features and formats.

include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

set(CPUMOE_GENERATED_DIR ${CMAKE_BINARY_DIR}/generated)
set(CPUMOE_ALL_ISAS "")
set(CPUMOE_FORMATS "")

# Turns avx512_bf16 into Avx512Bf16.
function(cpumoe_class_name name out)
    string(REPLACE "_" ";" parts ${name})
    set(class "")
    foreach(part IN LISTS parts)
        string(SUBSTRING ${part} 0 1 first)
        string(SUBSTRING ${part} 1 -1 rest)
        string(TOUPPER ${first} first)
        string(APPEND class ${first}${rest})
    endforeach()
    set(${out} ${class} PARENT_SCOPE)
endfunction()

# A row of the ISA table. It sets CPUMOE_<name>_FEATURES (which includes the parent's features) and
# CPUMOE_<name>_OBSTACLE (why the ISA cannot be built here, empty if it can).
macro(cpumoe_isa name)
    cmake_parse_arguments(isa "" "PARENT" "ARCHITECTURES;FEATURES" ${ARGN})
    list(APPEND CPUMOE_ALL_ISAS ${name})
    set(CPUMOE_${name}_FEATURES ${CPUMOE_${isa_PARENT}_FEATURES} ${isa_FEATURES})
    set(CPUMOE_${name}_OBSTACLE "${CPUMOE_${isa_PARENT}_OBSTACLE}")
    if(NOT "any" IN_LIST isa_ARCHITECTURES AND NOT CPUMOE_ARCHITECTURE IN_LIST isa_ARCHITECTURES)
        set(CPUMOE_${name}_OBSTACLE "not for ${CPUMOE_ARCHITECTURE}")
    endif()
    foreach(feature IN LISTS isa_FEATURES)
        if(NOT CPUMOE_${name}_OBSTACLE)
            cpumoe_check_feature(${feature} CPUMOE_${name}_OBSTACLE)
        endif()
    endforeach()
endmacro()

# Checks whether the compiler can generate code for a CPU feature and can detect the feature.
function(cpumoe_check_feature feature obstacle)
    string(MAKE_C_IDENTIFIER ${feature} id)
    check_cxx_compiler_flag(-m${feature} CPUMOE_HAVE_FLAG_${id})
    check_cxx_source_compiles(
        "int main() { return __builtin_cpu_supports(\"${feature}\"); }"
        CPUMOE_CAN_DETECT_${id}
    )
    if(NOT CPUMOE_HAVE_FLAG_${id})
        set(${obstacle} "the compiler does not know -m${feature}" PARENT_SCOPE)
    elseif(NOT CPUMOE_CAN_DETECT_${id})
        set(${obstacle}
            "a program that detects ${feature} cannot be built; CMake's log says why"
            PARENT_SCOPE
        )
    endif()
endfunction()

# A row of the format table. It sets CPUMOE_<name>_CLASS.
macro(cpumoe_format name)
    cmake_parse_arguments(format "" "CLASS" "" ${ARGN})
    list(APPEND CPUMOE_FORMATS ${name})
    set(CPUMOE_${name}_CLASS "${format_CLASS}")
    if(NOT format_CLASS)
        cpumoe_class_name(${name} CPUMOE_${name}_CLASS)
    endif()
endmacro()

# Selects the variants to build: CPUMOE_ISAS, or all that this compiler and architecture can build.
function(cpumoe_select_isas out)
    set(selected "")
    set(left_out "")
    foreach(isa IN LISTS CPUMOE_ALL_ISAS)
        if(NOT CPUMOE_${isa}_OBSTACLE)
            list(APPEND selected ${isa})
        else()
            list(APPEND left_out "${isa} (${CPUMOE_${isa}_OBSTACLE})")
        endif()
    endforeach()
    string(REPLACE "," ";" wanted "${CPUMOE_ISAS}")
    list(REMOVE_DUPLICATES wanted)
    foreach(isa IN LISTS wanted)
        if(NOT isa IN_LIST CPUMOE_ALL_ISAS)
            message(FATAL_ERROR "CPUMOE_ISAS: unknown ISA \"${isa}\"; known are ${CPUMOE_ALL_ISAS}")
        endif()
        if(CPUMOE_${isa}_OBSTACLE)
            message(FATAL_ERROR "CPUMOE_ISAS: ${isa} cannot be built: ${CPUMOE_${isa}_OBSTACLE}")
        endif()
    endforeach()
    if(wanted)
        set(selected ${wanted})
        set(left_out "")
    endif()
    list(JOIN selected ", " names)
    message(STATUS "ISA variants: ${names}")
    if(left_out)
        list(JOIN left_out ", " left_out)
        message(STATUS "ISA variants that cannot be built here: ${left_out}")
    endif()
    set(${out} ${selected} PARENT_SCOPE)
endfunction()

# Writes three headers. isa_table.inc has CPUMOE_ISA_ROW(name, built, features...) for each known
# ISA. feature_table.inc has CPUMOE_FEATURE_ROW(name) for each CPU feature that this architecture
# can have. format_table.inc has CPUMOE_FORMAT_ROW(name, Class) for each format.
function(cpumoe_write_tables built)
    set(isa_rows "")
    set(testable "")
    foreach(isa IN LISTS CPUMOE_ALL_ISAS)
        set(is_built false)
        if(isa IN_LIST built)
            set(is_built true)
        endif()
        set(features "")
        foreach(feature IN LISTS CPUMOE_${isa}_FEATURES)
            string(APPEND features ", \"${feature}\"")
        endforeach()
        if(NOT CPUMOE_${isa}_OBSTACLE)
            list(APPEND testable ${CPUMOE_${isa}_FEATURES})
        endif()
        string(APPEND isa_rows "CPUMOE_ISA_ROW(\"${isa}\", ${is_built}${features})\n")
    endforeach()
    file(CONFIGURE OUTPUT ${CPUMOE_GENERATED_DIR}/isa_table.inc CONTENT "${isa_rows}")
    list(REMOVE_DUPLICATES testable)
    list(TRANSFORM testable REPLACE "(.+)" "CPUMOE_FEATURE_ROW(\"\\1\")\n")
    list(JOIN testable "" testable)
    file(CONFIGURE OUTPUT ${CPUMOE_GENERATED_DIR}/feature_table.inc CONTENT "${testable}")
    set(format_rows "")
    foreach(format IN LISTS CPUMOE_FORMATS)
        string(APPEND format_rows "CPUMOE_FORMAT_ROW(${format}, ${CPUMOE_${format}_CLASS})\n")
    endforeach()
    file(CONFIGURE OUTPUT ${CPUMOE_GENERATED_DIR}/format_table.inc CONTENT "${format_rows}")
endfunction()

# Adds the target cpumoe_variant_<isa>, which is the module library cpumoe_<isa>.so, compiled for
# one ISA.
#
# The library consists of parts, which CPUMOE_VARIANT_PARTS lists. A part is a pair of templates,
# <part>_format.cc.in and <part>_table.cc.in. The format template is configured once per format,
# with @isa@, @isa_class@, @format@ and @format_class@, and defines <format_class>Entry(). The table
# template is configured once, with the @declarations@ and @entries@ of all formats.
#
# All parts of a format share a translation unit, because compiling the format's kernels takes
# longer than anything else. Only these translation units get the ISA's flags. Besides them, the
# build id and cpumoe_variant_common are linked into the library. cpumoe_variant_common is compiled
# once, for any CPU of the architecture.
function(cpumoe_add_isa_variant isa)
    set(target cpumoe_variant_${isa})
    set(folder ${CPUMOE_GENERATED_DIR}/${target})
    cpumoe_class_name(${isa} isa_class)
    set(declarations "")
    set(entries "")
    set(sources "")
    foreach(format IN LISTS CPUMOE_FORMATS)
        set(format_class ${CPUMOE_${format}_CLASS})
        set(includes "")
        foreach(part IN LISTS CPUMOE_VARIANT_PARTS)
            cmake_path(GET part FILENAME name)
            configure_file(${part}_format.cc.in ${folder}/${format}/${name}.inc @ONLY)
            string(APPEND includes "#include \"${format}/${name}.inc\"\n")
        endforeach()
        file(CONFIGURE OUTPUT ${folder}/${format}.cc CONTENT "${includes}")
        list(APPEND sources ${folder}/${format}.cc)
        string(APPEND declarations "FormatEntry ${format_class}Entry();\n")
        list(APPEND entries "${format_class}Entry()")
    endforeach()
    list(JOIN entries ", " entries)
    set(feature_checks "")
    foreach(feature IN LISTS CPUMOE_${isa}_FEATURES)
        string(TOUPPER "__${feature}__" macro)
        string(REPLACE "-" "_" macro ${macro})
        string(
            APPEND feature_checks
            "#ifndef ${macro}\n#error \"compiled without ${feature}\"\n#endif\n"
        )
    endforeach()
    foreach(part IN LISTS CPUMOE_VARIANT_PARTS)
        cmake_path(GET part FILENAME name)
        configure_file(${part}_table.cc.in ${folder}/${name}_table.cc @ONLY)
        list(APPEND sources ${folder}/${name}_table.cc)
    endforeach()

    add_library(
        ${target}
        MODULE
        ${sources}
        $<TARGET_OBJECTS:cpumoe_build_id>
        $<TARGET_OBJECTS:cpumoe_variant_common>
    )
    target_link_libraries(${target} PRIVATE cpumoe_options)
    # Reading what all formats include takes a fifth of their compile time.
    target_precompile_headers(
        ${target}
        PRIVATE
            <kernels/${isa}/ops-inl.h>
            <linear/linear_operator-inl.h>
            <moe/moe_operator-inl.h>
            <variant/variant_api.h>
    )
    set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME cpumoe_${isa})
    foreach(feature IN LISTS CPUMOE_${isa}_FEATURES)
        target_compile_options(${target} PRIVATE -m${feature})
    endforeach()
    # Aligns panel loops, so that their place in a line of the decoded instructions' cache does not
    # depend on other code. At 32 bytes into a line they were 2 % slower on Zen 3.
    target_compile_options(
        ${target}
        PRIVATE $<$<NOT:$<CONFIG:Debug>>:-O3> $<$<NOT:$<CONFIG:Debug>>:-falign-loops=64>
    )
    # In kernels, line numbers suffice. Debug information about variables would take a quarter of
    # the compile time.
    target_compile_options(${target} PRIVATE $<$<CONFIG:RelWithDebInfo>:-g1>)
    # Disables false alarms of GCC 12. It warns about alignment attributes that template arguments
    # drop (ours are unharmed), and calls undefined pass-through operands of its own AVX-512 header
    # uninitialized.
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        target_compile_options(
            ${target}
            PRIVATE -Wno-ignored-attributes -Wno-maybe-uninitialized -Wno-uninitialized
        )
    endif()
    if(CPUMOE_SANITIZE MATCHES "address")
        cpumoe_sanitize_kernels("${sources}")
    endif()
endfunction()

# Turns off the slowest checks of sanitizers for kernels and the operators that are compiled with
# them. Kernels are many inlined lambdas, and compiling them under AddressSanitizer takes longer
# than running all tests.
#
# Three checks make the compilation several times slower: AddressSanitizer's check for uses after a
# scope, its inline checks of accesses (calls find the same faults), and
# UndefinedBehaviorSanitizer's checks of pointers (most of its findings are bad accesses as well).
# Alignment, which AddressSanitizer does not see, is still checked.
function(cpumoe_sanitize_kernels sources)
    set(options
        -fno-sanitize-address-use-after-scope
        -fno-sanitize=null,object-size,pointer-overflow
    )
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        list(APPEND options --param=asan-instrumentation-with-call-threshold=0)
    endif()
    # Options of the source files come last. A target's own options would come before those of
    # cpumoe_options, which turn all checks on.
    set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "${options}")
endfunction()
