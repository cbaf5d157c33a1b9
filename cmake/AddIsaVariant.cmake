# Turns the tables of Variants.cmake into one module library per ISA and the headers that list them.

include(CheckCXXCompilerFlag)
include(CheckCXXSourceCompiles)

set(CPUMOE_GENERATED_DIR ${CMAKE_BINARY_DIR}/generated)
set(CPUMOE_ALL_ISAS "")
set(CPUMOE_FORMATS "")

# avx512_bf16 -> Avx512Bf16
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

# A row of the ISA table: CPUMOE_<name>_FEATURES (its parent's included) and CPUMOE_<name>_OBSTACLE,
# why it cannot be built here (empty: it can).
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

# Whether the compiler knows a CPU feature: to generate code for it and to detect it.
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

macro(cpumoe_format name)
    list(APPEND CPUMOE_FORMATS ${name})
endmacro()

# The variants to build: CPUMOE_ISAS, or all that this compiler and architecture can.
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

# isa_table.inc: CPUMOE_ISA_ROW(name, built, features...) per known ISA; feature_table.inc:
# CPUMOE_FEATURE_ROW(name) per CPU feature that this architecture can have; format_table.inc:
# CPUMOE_FORMAT_ROW(name, Class) per format.
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
        cpumoe_class_name(${format} class)
        string(APPEND format_rows "CPUMOE_FORMAT_ROW(${format}, ${class})\n")
    endforeach()
    file(CONFIGURE OUTPUT ${CPUMOE_GENERATED_DIR}/format_table.inc CONTENT "${format_rows}")
endfunction()

# Target cpumoe_variant_<isa>: the module library cpumoe_<isa>.so, compiled for one ISA. It consists of
# parts, which CPUMOE_VARIANT_PARTS lists: pairs of templates <part>_format.cc.in and
# <part>_table.cc.in. The former is configured once per format, with @isa@, @isa_class@, @format@ and
# @format_class@, and defines <format_class>Entry(); the latter once, with @declarations@ and @entries@
# of them all. All parts of a format share a translation unit, because compiling its kernels takes
# longer than all else. Only these translation units get the ISA's flags; the build id, which is data, is
# all else that is linked into the library.
function(cpumoe_add_isa_variant isa)
    set(target cpumoe_variant_${isa})
    set(folder ${CPUMOE_GENERATED_DIR}/${target})
    cpumoe_class_name(${isa} isa_class)
    set(declarations "")
    set(entries "")
    set(sources "")
    foreach(format IN LISTS CPUMOE_FORMATS)
        cpumoe_class_name(${format} format_class)
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

    add_library(${target} MODULE ${sources} $<TARGET_OBJECTS:cpumoe_build_id>)
    target_link_libraries(${target} PRIVATE cpumoe_options)
    set_target_properties(${target} PROPERTIES PREFIX "" OUTPUT_NAME cpumoe_${isa})
    foreach(feature IN LISTS CPUMOE_${isa}_FEATURES)
        target_compile_options(${target} PRIVATE -m${feature})
    endforeach()
    # Where panel loops begin in a line of the decoded instructions' cache must not depend on what else
    # is compiled: they were 2 % slower on Zen 3 at 32 bytes into one.
    target_compile_options(
        ${target}
        PRIVATE $<$<NOT:$<CONFIG:Debug>>:-O3> $<$<NOT:$<CONFIG:Debug>>:-falign-loops=64>
    )
    # Lines are enough in kernels: keeping track of their variables would be a quarter of the time.
    target_compile_options(${target} PRIVATE $<$<CONFIG:RelWithDebInfo>:-g1>)
    # False alarms of GCC 12: it mentions alignment attributes that template arguments drop (ours are
    # unharmed), and calls the undefined pass-through operands of its own AVX-512 header uninitialized.
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

# Kernels are many inlined lambdas, and compiling them under AddressSanitizer takes longer than running
# all tests. What makes it several times slower, for kernels and the operators compiled with them: its
# checks for uses after a scope, its checks of accesses in line (calls find the same), and
# UndefinedBehaviorSanitizer's checks of pointers, most of whose findings are bad accesses as well.
# Alignment, which AddressSanitizer does not see, is checked.
function(cpumoe_sanitize_kernels sources)
    set(options
        -fno-sanitize-address-use-after-scope
        -fno-sanitize=null,object-size,pointer-overflow
    )
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
        list(APPEND options --param=asan-instrumentation-with-call-threshold=0)
    endif()
    # A target's own options would come before those of cpumoe_options, which turn all checks on.
    set_source_files_properties(${sources} PROPERTIES COMPILE_OPTIONS "${options}")
endfunction()
