# This script writes OUTPUT, a header with the version and the build id, from the variables that
# INPUTS sets (cmake/BuildId.cmake). It does not touch a header that would not change.

cmake_minimum_required(VERSION 3.25)
include(${INPUTS})
set(text "${version}\n${settings}\n")
foreach(file IN LISTS files)
    file(SHA256 ${root}/${file} digest)
    string(APPEND text "${file} ${digest}\n")
endforeach()
string(SHA256 digest "${text}")
string(SUBSTRING ${digest} 0 16 digest)
file(
    CONFIGURE
    OUTPUT ${OUTPUT}
    CONTENT
        "#define CPUMOE_VERSION \"@version@\"
#define CPUMOE_BUILD_ID \"@version@+@digest@\"
"
    @ONLY
)
