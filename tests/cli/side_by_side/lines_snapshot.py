"""``snapshot``."""

from __future__ import annotations

from .table import Differs, Line

LINES = [
    Line("snapshot -l snaps.qcow2"),
    Line("snapshot snaps.qcow2"),
    Line("snapshot -q -l snaps.qcow2"),
    Line("snapshot -U -l snaps.qcow2"),
    Line("snapshot -l plain.qcow2"),
    Line("snapshot -l plain.raw"),
    Line("snapshot snaps.qcow2 -l"),
    Line("snapshot -c new plain.qcow2 && snapshot -l plain.qcow2"),
    Line("snapshot -c new snaps.qcow2 && snapshot -l snaps.qcow2"),
    Line("snapshot -cnew plain.qcow2 && snapshot -l plain.qcow2"),
    Line("snapshot -c 'two words' plain.qcow2 && info plain.qcow2"),
    Line("snapshot -c first snaps.qcow2 && snapshot -l snaps.qcow2"),
    Line("snapshot -c second -q plain.qcow2"),
    Line("snapshot -c new old.qcow2 && info old.qcow2"),
    Line("snapshot -c new extended.qcow2"),
    Line(
        "snapshot -c new small.qcow2",
        Differs(
            "own-words",
            err="qemu-img: Could not create snapshot 'new': ... a cluster cannot be referenced 2 times with refcount_bits=1; amend the image to a wider one",
            files=["small.qcow2"],
        ),
    ),
    Line("snapshot -c new compressed.qcow2"),
    Line("snapshot -c new lazy.qcow2"),
    Line("snapshot -c new nothing.qcow2"),
    Line("snapshot -c new full.qcow2"),
    Line("snapshot -c new top.qcow2"),
    Line("snapshot -c new bitmaps.qcow2"),
    Line("snapshot -c new outside.qcow2"),
    Line(
        "snapshot -c '' plain.qcow2",
        Differs(
            "nameless-snapshots",
            status=1,
            err="qemu-img: Could not create snapshot '': A snapshot's name has 1 to 65535 bytes",
            files=["plain.qcow2"],
        ),
    ),
    Line("snapshot -c -x plain.qcow2 && snapshot -l plain.qcow2"),
    Line("snapshot -a first snaps.qcow2"),
    Line("snapshot -a 2 snaps.qcow2"),
    Line("snapshot -a 1 snaps.qcow2"),
    Line("snapshot -a 'a name' snaps.qcow2"),
    Line("snapshot -a nope snaps.qcow2"),
    Line("snapshot -a first plain.qcow2"),
    Line("snapshot -a first snaps.qcow2 && snapshot -a second snaps.qcow2"),
    Line("snapshot -d first snaps.qcow2 && snapshot -l snaps.qcow2"),
    Line("snapshot -d 2 snaps.qcow2 && snapshot -l snaps.qcow2"),
    Line("snapshot -d 1 snaps.qcow2 && snapshot -l snaps.qcow2"),
    Line("snapshot -d 1 snaps.qcow2 && snapshot -d 1 snaps.qcow2 && snapshot -l snaps.qcow2"),
    Line("snapshot -d nope snaps.qcow2"),
    Line("snapshot -d first plain.qcow2"),
    Line(
        "snapshot -d first snaps.qcow2 && snapshot -c again snaps.qcow2 && snapshot -l snaps.qcow2"
    ),
    Line(
        "snapshot -c a plain.qcow2 && snapshot -c b plain.qcow2 && snapshot -a a plain.qcow2 && snapshot -d a plain.qcow2 && snapshot -l plain.qcow2"
    ),
    Line("snapshot -c x plain.raw"),
    Line(
        "snapshot -a x plain.raw",
        Differs(
            "said-once",
            err="WARNING: Image format was not specified for 'plain.raw' ...restrictions.\nqemu-img: Could not apply snapshot 'x': Block driver does not support snapshots",
        ),
    ),
    Line("snapshot -d x plain.raw"),
    Line("snapshot -c new missing"),
    Line("snapshot -l missing"),
    Line("snapshot -l orphan.qcow2", Differs("backing-not-needed", status=0, err="")),
    Line(
        "snapshot -c new orphan.qcow2",
        Differs("backing-not-needed", status=0, err="", files=["orphan.qcow2"]),
    ),
    Line("snapshot -U -c new plain.qcow2"),
    Line("snapshot"),
    Line("snapshot -l"),
    Line("snapshot -c"),
    Line("snapshot -c a"),
    Line("snapshot -l plain.qcow2 plain.raw"),
    Line("snapshot -l -l plain.qcow2"),
    Line("snapshot -c a -c b plain.qcow2"),
    Line("snapshot -c a -d b plain.qcow2"),
    Line("snapshot -l -a b plain.qcow2"),
    Line("snapshot -f qcow2 -l plain.qcow2"),
    Line("snapshot --quiet -l plain.qcow2"),
    Line("snapshot -p -l plain.qcow2", Differs("more-flags", status=0, err="")),
    Line(
        "snapshot -p -c new plain.qcow2",
        Differs("more-flags", status=0, err="...(100.00/100%)...", files=["plain.qcow2"]),
    ),
    Line(
        "snapshot -l --output=json snaps.qcow2",
        Differs(
            "more-flags",
            status=0,
            out='{\n    "version": 1,\n    "filename": "snaps.qcow2",\n    "snapshots": [\n...]\n}',
            err="",
        ),
    ),
    Line("snapshot --image-opts -l driver=qcow2,file.filename=snaps.qcow2"),
    Line("snapshot --image-opts -c new driver=raw,file.filename=plain.raw"),
    Line("snapshot --object secret,id=a,data=x -l snaps.qcow2"),
    Line("snapshot -l -- snaps.qcow2"),
    Line("snapshot -c x top.qcow2"),
]
