# The version of the package, and the build id by which _core recognises variant libraries of its
# own build.
#
# The version is defined only in pyproject.toml.
#
# The build id is "<version>+<16 hexadecimal digits>". The digits are a hash of all C++ sources and
# CMake files in cpp/ and cmake/, of the compiler's version and of its flags. They therefore change
# whenever the interface between _core and a variant changes, and also when only a kernel changes. A
# library that is out of date is refused even if its interface still fits. Tests, CPUMOE_ISAS and
# the folder's name do not count. Two builds of equal sources have equal ids, and can exchange
# libraries.
#
# The hash is a build step, because an id computed by `cmake` would be out of date after an edit. An
# edit costs this step, one small translation unit and one link per library, besides the compilation
# of the edited files.

set(CPUMOE_BUILD_ID_SCRIPT ${CMAKE_CURRENT_LIST_DIR}/WriteBuildId.cmake)

function(cpumoe_read_version out)
    set(file ${PROJECT_SOURCE_DIR}/pyproject.toml)
    set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${file})
    file(STRINGS ${file} version REGEX "^version = \"[^\"]+\"$")
    list(LENGTH version count)
    if(NOT count EQUAL 1)
        message(FATAL_ERROR "${file}: expected one line 'version = \"...\"', got ${count}")
    endif()
    string(REGEX REPLACE "^version = \"(.+)\"$" "\\1" version ${version})
    set(${out} ${version} PARENT_SCOPE)
endfunction()

# Adds the rule that makes build_id.inc, which defines CPUMOE_VERSION and CPUMOE_BUILD_ID. One
# target of the calling folder may have the file among its sources.
function(cpumoe_write_build_id version)
    set(root ${PROJECT_SOURCE_DIR})
    set(names CMakeLists.txt *.cc *.h *.in)
    list(TRANSFORM names PREPEND ${root}/cpp/)
    file(GLOB_RECURSE files RELATIVE ${root} CONFIGURE_DEPENDS ${names} ${root}/cmake/*.cmake)
    list(APPEND files CMakeLists.txt)
    string(TOUPPER "CMAKE_CXX_FLAGS_${CMAKE_BUILD_TYPE}" flags)
    set(settings
        "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION} ${CPUMOE_ARCHITECTURE} ${CMAKE_CXX_FLAGS} ${${flags}} ${CPUMOE_SANITIZE}"
    )
    set(inputs ${CPUMOE_GENERATED_DIR}/build_id_inputs.cmake)
    set(output ${CPUMOE_GENERATED_DIR}/build_id.inc)
    file(
        CONFIGURE
        OUTPUT ${inputs}
        CONTENT
            "set(version [==[@version@]==])
set(settings [==[@settings@]==])
set(root [==[@root@]==])
set(files [==[@files@]==])
"
        @ONLY
    )
    list(TRANSFORM files PREPEND ${root}/)
    add_custom_command(
        OUTPUT ${output}
        COMMAND
            ${CMAKE_COMMAND} -D INPUTS=${inputs} -D OUTPUT=${output} -P ${CPUMOE_BUILD_ID_SCRIPT}
        DEPENDS ${inputs} ${files}
        COMMENT "Hashing the sources for the build id"
        VERBATIM
    )
endfunction()
