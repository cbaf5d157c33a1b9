#!/usr/bin/env bash
# Installs libcpumoe.so into a temporary prefix, then builds and runs the program that the documentation shows: with the
# C compiler alone, and as a CMake project. The prefix has moved before that, because a package is built in one place
# and used in another.
#
#   bash install_test.sh CMAKE BUILD_FOLDER C_COMPILER OBJDUMP PROGRAM.c
set -euo pipefail

cmake=$1 build=$2 compiler=$3 objdump=$4 program=$5
project=$(cd "$(dirname "$0")" && pwd)/user_project
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset LD_LIBRARY_PATH CPUMOE_ISA

fail() {
    echo "$*" >&2
    exit 1
}

"$cmake" --install "$build" --prefix "$work/made" >"$work/log" || fail "$(cat "$work/log")"
mv "$work/made" "$work/prefix"
mkdir "$work/elsewhere"
cd "$work/elsewhere"
cp "$program" program.c

echo "== what is installed"
library=$(find "$work/prefix" -name libcpumoe.so)
[[ -n $library ]] || fail "no libcpumoe.so"
folder=$(dirname "$library")
[[ -f $work/prefix/include/cpumoe.h ]] || fail "no include/cpumoe.h"
compgen -G "$folder/cpumoe_*.so" >/dev/null || fail "no variant library in $folder"
[[ -z $(find "$work/prefix" -name '*.py' -o -name '_core*') ]] || fail "the prefix has Python's files"
soname=$("$objdump" -p "$library" | awk '$1 == "SONAME" { print $2 }')
[[ $soname =~ ^libcpumoe\.so\.[0-9]+\.[0-9]+$ ]] || fail "soname: expected libcpumoe.so.MAJOR.MINOR, got $soname"
for file in "$library" "$folder"/cpumoe_*.so; do
    "$objdump" -p "$file" >headers
    if grep NEEDED headers | grep -i python; then fail "$file needs Python"; fi
    if grep -E 'RPATH|RUNPATH' headers; then fail "$file looks for libraries in fixed folders"; fi
done

echo "== pkg-config and $compiler"
if command -v pkg-config >/dev/null; then
    export PKG_CONFIG_PATH=$folder/pkgconfig
    read -ra flags <<<"$(pkg-config --cflags --libs cpumoe) -Wl,-rpath,$(pkg-config --variable=libdir cpumoe)"
else
    echo "there is no pkg-config, so its file is not checked"
    flags=("-I$work/prefix/include" "-L$folder" -lcpumoe "-Wl,-rpath,$folder")
fi
"$compiler" -std=c11 -Wall -Wextra -Werror -pedantic program.c "${flags[@]}" -lm -o program
./program
"$objdump" -p program >headers
grep -q "NEEDED *$soname" headers || fail "the program does not need $soname"
ldd program >needed || fail "ldd cannot read the program"
if grep -iE 'python|not found' needed; then fail "the program needs what it should not, or misses something"; fi

echo "== find_package"
unset PKG_CONFIG_PATH
"$cmake" -S "$project" -B project -D CMAKE_PREFIX_PATH="$work/prefix" -D CMAKE_C_COMPILER="$compiler" \
    -D WANTED_VERSION="${soname#libcpumoe.so.}" -D PROGRAM="$PWD/program.c" >log || fail "$(cat log)"
"$cmake" --build project >log || fail "$(cat log)"
project/program
