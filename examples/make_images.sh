#!/usr/bin/env bash
# How examples/images was made, with QEMU's own tools (qemu-img 7.2): a base image with compressed and
# plain clusters, and an overlay on it with data and zeroes of its own.
set -euo pipefail
cd "$(dirname "$0")"
mkdir -p images && cd images
rm -f base.qcow2 overlay.qcow2
text=$(mktemp)
trap 'rm -f "$text"' EXIT

lay() { qemu-io -f qcow2 -c "$2" "$1" >/dev/null; }

qemu-img create -q -f qcow2 -o cluster_size=16k base.qcow2 64M
printf 'This is the base image: what shows through where the overlay has nothing.\n' >"$text"
lay base.qcow2 "write -s $text 0 16k"
# A magazine of compressed clusters, each filled with one letter.
for letter in A B C D E F G H; do
    printf -v byte '0x%x' "'$letter"
    at=$(( ($(printf '%d' "'$letter") - 65) * 16 ))
    lay base.qcow2 "write -c -P $byte $((1024 + at))k 16k"
done
lay base.qcow2 "write -P 0x62 40M 48k"

# The name is relative and the format is recorded: the image says how its backing image is to be read.
qemu-img create -q -f qcow2 -o cluster_size=16k -b base.qcow2 -F qcow2 overlay.qcow2
printf 'This is the overlay: it was written later, and lies above the base image.\n' >"$text"
lay overlay.qcow2 "write -s $text 16k 16k"
lay overlay.qcow2 "write -z 1072k 32k"
lay overlay.qcow2 "write -P 0x6f 48M 64k"

qemu-img check -q base.qcow2
qemu-img check -q overlay.qcow2
du -ch --apparent-size ./*.qcow2
