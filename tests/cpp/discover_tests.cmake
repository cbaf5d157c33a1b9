# CTest runs this file for each test program (`program`, `name`). It adds one CTest test for each TEST_P, TYPED_TEST and
# TEST of the program, with all parameters or types in one process: to start a process for each of them would take
# longer than most of them run.

if(NOT EXISTS ${program})
    add_test(${name}_NOT_BUILT ${name}_NOT_BUILT)
    return()
endif()
execute_process(
    COMMAND ${program} --gtest_list_tests
    OUTPUT_VARIABLE output
    COMMAND_ERROR_IS_FATAL ANY
)
# Characters of CMake's lists occur in comments, which describe parameters.
string(REGEX REPLACE "[][;]" "" output "${output}")
string(REPLACE "\n" ";" lines "${output}")
set(tests "")
foreach(line IN LISTS lines)
    string(REGEX REPLACE " *#.*" "" line "${line}")
    if(line MATCHES "^([A-Za-z0-9_/]+)\\.$")
        # The types of a typed suite have numbers: Suite/0, Suite/1.
        string(REGEX REPLACE "/[0-9]+$" "/*" suite "${CMAKE_MATCH_1}")
    elseif(line MATCHES "^  ([A-Za-z0-9_]+)(/?)")
        set(filter ${suite}.${CMAKE_MATCH_1})
        if(CMAKE_MATCH_2)
            string(APPEND filter "/*")
        endif()
        list(APPEND tests ${filter})
    endif()
endforeach()
list(REMOVE_DUPLICATES tests)
if(NOT tests)
    message(FATAL_ERROR "${program} --gtest_list_tests names no tests")
endif()
foreach(filter IN LISTS tests)
    string(REPLACE "/*" "" test ${filter})
    add_test(${test} ${program} --gtest_filter=${filter})
    set_tests_properties(
        ${test}
        PROPERTIES
            SKIP_REGULAR_EXPRESSION "\\[  PASSED  \\] 0 tests\\.\n(\\[  SKIPPED \\] [^\n]*\n)+$"
    )
endforeach()
