"""``bitmap``."""

from __future__ import annotations

from .table import Differs, Line

#: Names a node of QEMU's block graph where we name the file.
_FAILED = "Operation {} on bitmap {} failed: "

#: Nothing is to be changed, and they store all bitmaps anew.
_SAME = Differs("bitmap-rewrite", files=("bitmaps.qcow2",))
_SAME_UNSAVED = Differs("bitmap-rewrite", files=("unsaved.qcow2",))

LINES: list[Line] = [
    # What is wrong with the line itself.
    Line("bitmap"),
    Line("bitmap plain.qcow2"),
    Line("bitmap plain.qcow2 b0"),
    Line("bitmap -F raw"),
    Line("bitmap --add plain.qcow2"),
    Line("bitmap --add plain.qcow2 b0 more"),
    Line("bitmap --foo plain.qcow2 b0"),
    Line("bitmap --add -q plain.qcow2 b0"),
    Line("bitmap --add=x plain.qcow2 b0"),
    Line("bitmap --clear -f"),
    Line("bitmap --clear --merge"),
    Line("bitmap --clear -g 64k plain.qcow2 b0"),
    Line("bitmap --clear -g 64k -F x plain.qcow2 b0"),
    Line("bitmap --clear -b other.qcow2 plain.qcow2 b0"),
    Line("bitmap --clear -b other.qcow2 -F qcow2 plain.qcow2 b0"),
    Line("bitmap --merge b1 -F qcow2 plain.qcow2 b0"),
    Line("bitmap --add -g x plain.qcow2 b0"),
    Line("bitmap --add -g -1 plain.qcow2 b0"),
    Line("bitmap --add -f nope plain.qcow2 b0"),
    Line("bitmap --merge b0 -b other.qcow2 -F nope bitmaps.qcow2 b0", _SAME),
    Line("bitmap --add --image-opts -f qcow2 driver=qcow2,file.filename=plain.qcow2 b0"),
    # Adding.
    Line("bitmap --add plain.qcow2 b0"),
    Line("bitmap --add plain.qcow2 b0 && info plain.qcow2"),
    Line("bitmap --add plain.qcow2 b0 && info --output=json plain.qcow2 && check -q plain.qcow2"),
    Line("bitmap --add --image-opts driver=qcow2,file.filename=plain.qcow2 b0"),
    Line("bitmap --add -f qcow2 -g 512 plain.qcow2 'a name'"),
    Line("bitmap --add -g 2G plain.qcow2 b0"),
    Line("bitmap --add -g 0 plain.qcow2 b0"),
    Line("bitmap --add -g 3 plain.qcow2 b0"),
    Line("bitmap --add -g 256 plain.qcow2 b0"),
    Line("bitmap --add -g 4G plain.qcow2 b0"),
    Line("bitmap --add --disable plain.qcow2 b0"),
    Line("bitmap --add --enable plain.qcow2 b0"),
    Line("bitmap --add small.qcow2 b0"),
    Line("bitmap --add extended.qcow2 b0"),
    Line("bitmap --add snaps.qcow2 b0 && check -q snaps.qcow2"),
    Line("bitmap --add compressed.qcow2 b0 && check -q compressed.qcow2"),
    Line("bitmap --add bitmaps.qcow2 b0", _SAME),
    Line("bitmap --add bitmaps.qcow2 b2 && check -q bitmaps.qcow2"),
    Line("bitmap --add plain.qcow2 ''"),
    Line("bitmap --add missing.qcow2 b0"),
    Line(
        "bitmap --add old.qcow2 b0",
        Differs(
            "bitmap-nodes",
            err="qemu-img: " + _FAILED.format("add", "b0") + "Can't make bitmap 'b0' persistent in "
            "'old.qcow2': Cannot store dirty bitmaps in qcow2 v2 files",
        ),
    ),
    Line(
        "bitmap --add -f raw plain.raw b0",
        Differs(
            "bitmap-nodes",
            err="qemu-img: " + _FAILED.format("add", "b0") + "Can't store persistent bitmaps to "
            "plain.raw: Operation not supported",
        ),
    ),
    # Changing.
    Line("bitmap --remove bitmaps.qcow2 b0 && check -q bitmaps.qcow2"),
    Line("bitmap --remove bitmaps.qcow2 b0 && bitmap --remove bitmaps.qcow2 b1"),
    Line("bitmap --remove --add bitmaps.qcow2 b0"),
    Line("bitmap --remove --remove bitmaps.qcow2 b0"),
    Line("bitmap --clear bitmaps.qcow2 b0 && check -q bitmaps.qcow2"),
    Line("bitmap --enable bitmaps.qcow2 b1"),
    Line("bitmap --disable bitmaps.qcow2 b0"),
    Line("bitmap --enable --disable --enable bitmaps.qcow2 b0", _SAME),
    Line("bitmap --merge b0 bitmaps.qcow2 b1 && check -q bitmaps.qcow2"),
    Line("bitmap --merge b0 bitmaps.qcow2 b0", _SAME),
    Line("bitmap --add --disable --merge b0 --merge b1 -g 4k bitmaps.qcow2 b2"),
    Line("bitmap --rem bitmaps.qcow2 b0"),
    Line("bitmap --mer b0 bitmaps.qcow2 b1"),
    Line(
        "bitmap --add plain.qcow2 b9 && bitmap --merge b1 -b bitmaps.qcow2 -F qcow2 plain.qcow2 b9"
    ),
    Line("bitmap --add longer.qcow2 b9 && bitmap --merge b0 -b bitmaps.qcow2 longer.qcow2 b9"),
    Line("bitmap --merge b0 -b plain.raw -F raw bitmaps.qcow2 b0", _SAME),
    Line("bitmap --merge b0 -b missing bitmaps.qcow2 b0", _SAME),
    # Those that are not there.
    Line("bitmap --remove bitmaps.qcow2 no", _SAME),
    Line("bitmap --clear bitmaps.qcow2 no", _SAME),
    Line("bitmap --enable bitmaps.qcow2 no", _SAME),
    Line("bitmap --disable bitmaps.qcow2 no", _SAME),
    Line("bitmap --merge no bitmaps.qcow2 b0", _SAME),
    Line("bitmap --merge b0 bitmaps.qcow2 no", _SAME),
    Line("bitmap --clear -f raw plain.raw no"),
    # One that was not saved properly.
    Line("bitmap --clear unsaved.qcow2 b0", _SAME_UNSAVED),
    Line("bitmap --enable unsaved.qcow2 b0", _SAME_UNSAVED),
    Line("bitmap --disable unsaved.qcow2 b0", _SAME_UNSAVED),
    Line("bitmap --add unsaved.qcow2 b0", _SAME_UNSAVED),
    Line("bitmap --merge b1 unsaved.qcow2 b0", _SAME_UNSAVED),
    Line("bitmap --merge b0 unsaved.qcow2 b1", _SAME_UNSAVED),
    Line("bitmap --remove unsaved.qcow2 b0 && check -q unsaved.qcow2"),
    Line("bitmap --add unsaved.qcow2 b2 && info unsaved.qcow2"),
    Line("bitmap --remove plain.raw b"),
    Line(
        "bitmap --add -f raw plain.raw b",
        Differs(
            "bitmap-nodes",
            err="...: Can't store persistent bitmaps to plain.raw: Operation not supported",
        ),
    ),
    Line(
        "bitmap --add plain.raw b",
        Differs(
            "bitmap-nodes",
            err="WARNING: ...: Can't store persistent bitmaps to plain.raw: Operation not supported",
        ),
    ),
    Line("bitmap --add --merge b0 -b bitmaps.qcow2 -F raw plain.qcow2 c"),
    Line("bitmap --add --merge b0 -b plain.raw plain.qcow2 b"),
    Line("bitmap --add -U plain.qcow2 b"),
]
