"""``compare``."""

from __future__ import annotations

from .table import Differs, Line

LINES = [
    Line("compare plain.qcow2 plain.qcow2"),
    Line("compare plain.qcow2 plain.raw"),
    Line("compare plain.raw plain.qcow2"),
    Line("compare -s plain.qcow2 plain.qcow2"),
    Line("compare -s plain.qcow2 plain.raw"),
    Line("compare -s plain.qcow2 old.qcow2"),
    Line("compare plain.qcow2 other.qcow2"),
    Line("compare -s plain.qcow2 other.qcow2"),
    Line("compare -q plain.qcow2 other.qcow2"),
    Line("compare -q plain.qcow2 plain.raw"),
    Line("compare plain.qcow2 longer.qcow2"),
    Line("compare longer.qcow2 plain.qcow2"),
    Line("compare -s plain.qcow2 longer.qcow2"),
    Line("compare -q plain.qcow2 longer.qcow2"),
    Line("compare plain.qcow2 compressed.qcow2"),
    Line("compare compressed.qcow2 zstd.qcow2"),
    Line("compare -s plain.qcow2 compressed.qcow2"),
    Line("compare top.qcow2 middle.qcow2"),
    Line("compare middle.qcow2 base.raw"),
    Line("compare -s top.qcow2 top.qcow2"),
    Line("compare empty.qcow2 zeroes.raw"),
    Line("compare -s empty.qcow2 zeroes.raw"),
    Line("compare empty.qcow2 full.qcow2"),
    Line("compare -s empty.qcow2 full.qcow2"),
    Line("compare nothing.raw nothing.qcow2"),
    Line("compare nothing.raw zeroes.raw"),
    Line("compare nothing.raw plain.raw"),
    Line("compare odd.raw odd.raw"),
    Line("compare odd.raw plain.raw"),
    Line("compare extended.qcow2 plain.qcow2"),
    Line("compare outside.qcow2 outside.raw"),
    Line("compare snaps.qcow2 plain.qcow2"),
    Line("compare lazy.qcow2 old.qcow2"),
    Line("compare -f qcow2 -F raw plain.qcow2 plain.raw"),
    Line("compare -f raw -F raw plain.qcow2 plain.raw"),
    Line("compare -f raw plain.raw plain.qcow2"),
    Line("compare -F raw plain.qcow2 plain.raw"),
    Line("compare -fqcow2 -Fraw plain.qcow2 plain.raw"),
    Line("compare -f nonsense plain.qcow2 plain.raw"),
    Line("compare -F nonsense plain.qcow2 plain.raw"),
    Line("compare -f qcow2 plain.raw plain.qcow2"),
    Line("compare plain.qcow2 missing"),
    Line("compare missing plain.qcow2"),
    Line("compare missing gone"),
    Line("compare plain.qcow2 orphan.qcow2"),
    Line("compare orphan.qcow2 plain.qcow2"),
    Line("compare"),
    Line("compare plain.qcow2"),
    Line("compare plain.qcow2 plain.raw other.qcow2"),
    Line("compare --nonsense a b"),
    Line("compare -T none plain.qcow2 plain.raw"),
    Line("compare -T nonsense plain.qcow2 plain.raw"),
    Line("compare -T"),
    Line("compare -U plain.qcow2 plain.raw"),
    Line("compare --force-share plain.qcow2 plain.raw"),
    Line(
        "compare --output=json plain.qcow2 plain.raw",
        Differs(
            "more-flags",
            status=0,
            err="",
            out='{\n    "version": 1,\n    "filenames": [\n        "plain.qcow2",\n        "plain.raw"\n    ],\n    "strict": false,\n    "identical": true,\n    "size-differs": false\n}',
        ),
    ),
    Line(
        "compare -p plain.qcow2 plain.raw",
        Differs("progress-on-stderr", out="Images are identical.", err="...(100.00/100%)..."),
    ),
    Line("compare -p -q plain.qcow2 plain.raw"),
    Line("compare -- plain.qcow2 -dash.raw"),
    Line("compare -s -- -dash.raw -dash.raw"),
    Line(
        "compare --image-opts driver=qcow2,file.filename=plain.qcow2 driver=raw,file.filename=plain.raw"
    ),
    Line("compare --image-opts driver=qcow2,file.filename=plain.qcow2 plain.raw"),
    Line(
        "compare --image-opts -f qcow2 driver=qcow2,file.filename=plain.qcow2 driver=raw,file.filename=plain.raw"
    ),
    Line(
        "compare --image-opts -F qcow2 driver=qcow2,file.filename=plain.qcow2 driver=qcow2,file.filename=plain.qcow2"
    ),
    Line(
        'compare \'json:{"driver": "qcow2", "file": {"driver": "file", "filename": "plain.qcow2"}}\' plain.raw'
    ),
    Line("compare --object secret,id=a,data=x plain.qcow2 plain.raw"),
    Line("compare --object nonsense plain.qcow2 plain.raw"),
    Line(
        "compare --image-opts driver=raw,offset=1M,size=1M,file.filename=plain.raw driver=raw,offset=1M,size=1M,file.filename=plain.raw"
    ),
]
