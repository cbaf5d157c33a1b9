#!/usr/bin/env bash
# Runs C++ tests on an emulated machine with four NUMA nodes: two with CPUs and memory, one whose CPU has no memory, and
# one that has memory alone. Checks that pages lie on their nodes, with and without permission to bind them.
#
#   cmake --preset dev && cmake --build --preset dev
#   bash tests/numa.sh                    downloads Debian's packages of QEMU and a kernel into a temporary folder
#   bash tests/numa.sh FOLDER             keeps them there, or uses those that it finds there
#
# Needs Debian or Ubuntu with apt-get, 400 MB of disk, and no privileges: packages are unpacked, not installed. Takes
# two to ten minutes on two cores. Exit status 77: the packages cannot be had here. LIB names another folder of
# programs than build/dev/lib.
set -euo pipefail
cd "$(dirname "$0")/.."

lib=${LIB:-build/dev/lib}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
packages=$(realpath -m "${1:-$work/packages}")

unavailable() {
    echo "$1; the tests on emulated NUMA nodes were not run" >&2
    exit 77
}

if [[ ! -e $packages/complete ]]; then
    command -v apt-get >/dev/null || unavailable "there is no apt-get"
    wanted=(qemu-system-x86 busybox-static linux-image-cloud-amd64)
    names=$(apt-get install -s --no-install-recommends "${wanted[@]}" 2>/dev/null |
        awk '/^Inst (qemu|seabios|ipxe|lib|busybox|linux-image-[0-9])/ { print $2 }') ||
        unavailable "apt-get does not know QEMU"
    mkdir -p "$packages/archives" "$packages/root"
    # shellcheck disable=SC2086 # the names are words
    (cd "$packages/archives" && apt-get download $names >/dev/null) || unavailable "packages cannot be downloaded"
    for archive in "$packages"/archives/*.deb; do dpkg -x "$archive" "$packages/root"; done
    touch "$packages/complete"
fi
root=$packages/root
busybox=$root/bin/busybox
kernel=$(echo "$root"/boot/vmlinuz-*)

# The files of the emulated machine: a shell, the tests, and what they link.
disk=$work/disk
mkdir -p "$disk"/{bin,proc,sys,tmp,tests}
cp "$busybox" "$disk/bin/busybox"
for program in threading_test engine_test; do
    [[ -x $lib/$program ]] || { echo "$lib/$program is missing; build the preset dev first" >&2; exit 1; }
    cp "$lib/$program" "$disk/tests/"
done
for isa in generic avx2; do
    if [[ -e $lib/cpumoe_$isa.so ]]; then cp "$lib/cpumoe_$isa.so" "$disk/tests/"; fi
done
ldd "$disk"/tests/* | awk '/=> \// { print $3 } /^\t\/.*ld-linux/ { print $1 }' | sort -u | while read -r file; do
    mkdir -p "$disk$(dirname "$file")"
    cp -L "$file" "$disk$file"
done
cat >"$disk/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t tmpfs tmp /tmp
echo always >/sys/kernel/mm/transparent_hugepage/enabled
for node in /sys/devices/system/node/node[0-9]*; do
    echo "$(/bin/busybox basename "$node"): CPUs $(/bin/busybox cat "$node/cpulist")," \
        "$(/bin/busybox awk '/MemTotal/ { print $4, $5 }' "$node/meminfo")"
done
failed=0
run() {
    "/tests/$1" --gtest_brief=1 "--gtest_filter=$2" || failed=1
}
run threading_test 'Topology.ThisMachine:NodePool*:Shapes/NodePool*'
run engine_test 'MemoryNode*:RealNodes*'
echo "numa tests: status $failed"
/bin/busybox poweroff -f
INIT
chmod +x "$disk/init"
(cd "$disk" && find . | "$busybox" cpio -o -H newc 2>/dev/null) | gzip -1 >"$work/initrd"

libraries=$root/lib/x86_64-linux-gnu:$root/usr/lib/x86_64-linux-gnu
# A busy host makes the emulated timer late, which a kernel takes for a fault unless it is told not to look.
LD_LIBRARY_PATH=$libraries timeout 1200 "$root/usr/bin/qemu-system-x86_64" \
    -L "$root/usr/share/seabios" -L "$root/usr/share/qemu" -accel tcg,thread=multi -cpu max -nographic -no-reboot \
    -nic none -vga none -smp 4,sockets=2,cores=2 -m 2048 \
    -object memory-backend-ram,id=m0,size=768M -object memory-backend-ram,id=m1,size=768M \
    -object memory-backend-ram,id=m3,size=512M \
    -numa node,nodeid=0,cpus=0-1,memdev=m0 -numa node,nodeid=1,cpus=2,memdev=m1 -numa node,nodeid=2,cpus=3 \
    -numa node,nodeid=3,memdev=m3 \
    -numa dist,src=0,dst=1,val=21 -numa dist,src=0,dst=2,val=31 -numa dist,src=1,dst=2,val=12 \
    -numa dist,src=0,dst=3,val=24 -numa dist,src=1,dst=3,val=24 -numa dist,src=2,dst=3,val=24 \
    -kernel "$kernel" -initrd "$work/initrd" \
    -append "console=ttyS0 quiet no_timer_check panic=-1" </dev/null | tee "$work/log"
grep -q "numa tests: status 0" "$work/log"
