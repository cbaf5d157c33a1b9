# Says what cpumoe needs, before a build fails halfway.

if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    message(
        FATAL_ERROR
        "cpumoe needs Linux (futexes, huge pages), and this is ${CMAKE_SYSTEM_NAME}"
    )
endif()

# The first versions that have the vector extensions and the CPU feature names that the code uses.
set(CPUMOE_OLDEST_GNU 12)
set(CPUMOE_OLDEST_Clang 19)
set(CPUMOE_OLDEST "${CPUMOE_OLDEST_${CMAKE_CXX_COMPILER_ID}}")
if(NOT CPUMOE_OLDEST OR CMAKE_CXX_COMPILER_VERSION VERSION_LESS CPUMOE_OLDEST)
    message(
        FATAL_ERROR
        "cpumoe needs GCC ${CPUMOE_OLDEST_GNU} or Clang ${CPUMOE_OLDEST_Clang} or later, and "
        "${CMAKE_CXX_COMPILER} is ${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}; set the "
        "environment variable CXX to one of these and remove ${CMAKE_BINARY_DIR}"
    )
endif()
