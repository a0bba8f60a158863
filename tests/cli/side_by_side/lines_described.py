"""Images described in full, with ``--image-opts`` or ``json:``, in every command that takes them."""

from __future__ import annotations

from .table import Differs, Line

LINES = [
    Line("check --image-opts driver=qcow2,file.driver=file,file.filename=plain.qcow2"),
    Line(
        "check --image-opts driver=qcow2,file.filename=plain.qcow2,lazy-refcounts=on,l2-cache-size=1M"
    ),
    Line(
        "check --image-opts driver=qcow2,file.filename=plain.qcow2,discard=unmap,overlap-check=all"
    ),
    Line("check --image-opts driver=qcow2,file.filename=plain.qcow2,overlap-check=nope"),
    Line("check --image-opts driver=qcow2,file.filename=plain.qcow2,nonsense=1"),
    Line("check --image-opts driver=qcow2,file.filename=top.qcow2,backing="),
    Line(
        "check --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw"
    ),
    Line("check --image-opts driver=raw,offset=64k,size=64k,file.filename=plain.raw"),
    Line("check --image-opts file.filename=plain.qcow2"),
    Line("check --image-opts -U driver=qcow2,file.filename=plain.qcow2"),
    Line("check --image-opts -r all -U driver=qcow2,file.filename=leaky.qcow2"),
    Line("check --image-opts -r all driver=qcow2,file.filename=leaky.qcow2,read-only=on"),
    Line(
        "check --image-opts -r all driver=qcow2,file.filename=leaky.qcow2,discard=unmap,lazy-refcounts=on"
    ),
    Line("check --image-opts -r all driver=qcow2,file.filename=leaky.qcow2,force-share=on"),
    Line("check --image-opts driver=qcow2,file.filename=plain.qcow2,file.locking=off"),
    Line("check --image-opts driver=qcow2,file.filename=plain.qcow2,cache.direct=on"),
    Line(
        "check --image-opts --output=json driver=qcow2,file.filename=plain.qcow2,lazy-refcounts=on"
    ),
    Line(
        'check \'json:{"driver":"qcow2","lazy-refcounts":true,"file":{"driver":"file","filename":"leaky.qcow2"}}\''
    ),
    Line(
        'check -f qcow2 \'json:{"driver":"qcow2","file":{"driver":"file","filename":"leaky.qcow2"}}\''
    ),
    Line(
        'check -f raw \'json:{"driver":"qcow2","file":{"driver":"file","filename":"leaky.qcow2"}}\''
    ),
    Line('check -f qcow2 \'json:{"file":{"driver":"file","filename":"leaky.qcow2"}}\''),
    Line('check \'json:{"file":{"driver":"file","filename":"leaky.qcow2"}}\''),
    Line('check \'json:{"driver":"file","filename":"leaky.qcow2"}\''),
    Line("check --image-opts driver=file,filename=plain.raw"),
    Line("check --image-opts file=x"),
    Line("check --image-opts ''"),
    Line("check --image-opts driver=qcow2"),
    Line("check --image-opts driver=qcow2,file.filename=missing"),
    Line(
        "check --image-opts driver=qcow2,file.filename=outside.qcow2,data-file.driver=file,data-file.filename=outside.raw"
    ),
    Line(
        "snapshot -l --image-opts driver=qcow2,file.driver=file,file.filename=snaps.qcow2,lazy-refcounts=on"
    ),
    Line("snapshot -l --image-opts driver=qcow2,file.filename=snaps.qcow2,nonsense=1"),
    Line(
        "snapshot -c x --image-opts driver=qcow2,file.filename=plain.qcow2,lazy-refcounts=on,discard=unmap && snapshot -l plain.qcow2"
    ),
    Line("snapshot -c x --image-opts driver=raw,file.filename=plain.raw"),
    Line("snapshot -c x --image-opts driver=raw,offset=64k,file.filename=plain.raw"),
    Line("snapshot -a first --image-opts driver=qcow2,file.filename=snaps.qcow2,discard=unmap"),
    Line("snapshot -d first --image-opts driver=qcow2,file.filename=snaps.qcow2,file.locking=off"),
    Line("snapshot -d first -U --image-opts driver=qcow2,file.filename=snaps.qcow2"),
    Line("snapshot -c x --image-opts driver=qcow2,file.filename=top.qcow2,backing="),
    Line(
        "snapshot -c x --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw"
    ),
    Line(
        'snapshot -c x \'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"},"backing":null}\''
    ),
    Line('snapshot -l \'json:{"file":{"filename":"snaps.qcow2"}}\''),
    Line('snapshot -l \'json:{"file":{"driver":"file","filename":"snaps.qcow2"}}\''),
    Line(
        "amend --image-opts -o lazy_refcounts=on driver=qcow2,file.filename=plain.qcow2,lazy-refcounts=off"
    ),
    Line(
        "amend --image-opts -o compat=0.10 driver=qcow2,file.filename=plain.qcow2,file.locking=off"
    ),
    Line("amend --image-opts -o size=8M driver=qcow2,file.filename=top.qcow2,backing="),
    Line(
        "amend --image-opts -o size=8M driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw"
    ),
    Line("amend --image-opts -o size=8M driver=qcow2,file.filename=plain.qcow2,nonsense=1"),
    Line("amend --image-opts -o size=8M driver=raw,file.filename=plain.raw"),
    Line("amend --image-opts -o size=8M driver=raw,size=64k,file.filename=plain.raw"),
    Line(
        "amend -o help --image-opts driver=qcow2,file.filename=plain.qcow2,lazy-refcounts=on",
        Differs("no-encryption", out="Amend options for 'qcow2':\n  backing_file=..."),
    ),
    Line(
        'amend -o size=8M \'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"},"discard":"unmap"}\''
    ),
    Line(
        "rebase --image-opts -u -b base.raw -F raw driver=qcow2,file.filename=top.qcow2,lazy-refcounts=on && info top.qcow2"
    ),
    Line(
        "rebase --image-opts -b base.raw -F raw driver=qcow2,file.filename=top.qcow2,lazy-refcounts=on"
    ),
    Line(
        "rebase --image-opts -b base.raw -F raw driver=qcow2,file.filename=top.qcow2,discard=unmap"
    ),
    Line(
        "rebase --image-opts -b base.raw -F raw driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw",
        Differs("described-backing", status=0, err="", files=["top.qcow2"]),
    ),
    Line(
        "rebase --image-opts -b base.raw -F raw driver=qcow2,file.filename=top.qcow2,backing=",
        Differs(
            "described-backing",
            status=0,
            err='qemu-img: warning: Use of "backing": "" is deprecated; use "backing": null instead',
            files=["top.qcow2"],
        ),
    ),
    Line(
        "rebase --image-opts -b '' driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw"
    ),
    Line("rebase --image-opts -b base.raw -F raw driver=qcow2,file.filename=top.qcow2,nonsense=1"),
    Line(
        'rebase -b base.raw -F raw \'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"},"lazy-refcounts":true}\''
    ),
    Line("commit --image-opts driver=qcow2,file.filename=top.qcow2,lazy-refcounts=on"),
    Line("commit --image-opts -d driver=qcow2,file.filename=top.qcow2,discard=unmap"),
    Line(
        "commit --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=middle.qcow2"
    ),
    Line(
        "commit --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw"
    ),
    Line(
        "commit --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=middle.qcow2,backing.read-only=on"
    ),
    Line(
        "commit --image-opts -b base.raw driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=middle.qcow2"
    ),
    Line(
        "commit --image-opts -b base.raw driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=middle.qcow2,backing.backing.driver=raw,backing.backing.file.filename=base.raw"
    ),
    Line(
        "commit --image-opts -b none.raw driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=middle.qcow2"
    ),
    Line(
        "commit --image-opts -b middle.qcow2 driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=middle.qcow2"
    ),
    Line(
        "commit --image-opts -b middle.qcow2 driver=qcow2,file.filename=top.qcow2,lazy-refcounts=on"
    ),
    Line("commit --image-opts driver=qcow2,file.filename=top.qcow2,backing="),
    Line("commit --image-opts driver=qcow2,file.filename=top.qcow2,nonsense=1"),
    Line(
        'commit \'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"},"discard":"unmap"}\''
    ),
    Line("bitmap --add --image-opts driver=qcow2,file.filename=plain.qcow2,lazy-refcounts=on b"),
    Line(
        "bitmap --add --image-opts driver=raw,offset=64k,file.filename=plain.raw b",
        Differs(
            "bitmap-nodes",
            err="...: Can't store persistent bitmaps to plain.raw: Operation not supported",
        ),
    ),
    Line("bitmap --add --image-opts driver=qcow2,file.filename=plain.qcow2,nonsense=1 b"),
    Line(
        'bitmap --add \'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"},"lazy-refcounts":true}\' b'
    ),
    Line(
        'bitmap --add --merge b0 -b \'json:{"driver":"qcow2","file":{"driver":"file","filename":"bitmaps.qcow2"}}\' plain.qcow2 b'
    ),
    Line(
        "convert -n --target-image-opts plain.raw driver=qcow2,file.filename=empty.qcow2,lazy-refcounts=on"
    ),
    Line(
        "convert -n --target-image-opts plain.raw driver=qcow2,file.filename=empty.qcow2,discard=unmap,detect-zeroes=unmap"
    ),
    Line(
        "convert -n --target-image-opts plain.raw driver=qcow2,file.filename=empty.qcow2,nonsense=1"
    ),
    Line("convert -n --target-image-opts odd.raw driver=raw,offset=1M,file.filename=zeroes.raw"),
    Line(
        "convert -n --target-image-opts full.raw driver=raw,offset=1M,size=128k,file.filename=zeroes.raw"
    ),
    Line(
        "convert -n --target-image-opts full.raw driver=raw,offset=1M,size=32k,file.filename=zeroes.raw"
    ),
    Line("convert -n --target-image-opts full.raw file.filename=zeroes.raw"),
    Line("convert -n --target-image-opts full.raw driver=file,filename=zeroes.raw"),
    Line("convert -n --target-image-opts full.raw driver=qcow2,file.filename=missing"),
    Line("convert -n --target-image-opts full.raw driver=qcow2,file.filename=top.qcow2,backing="),
    Line(
        "convert -n --target-image-opts full.raw driver=qcow2,file.filename=top.qcow2,backing.driver=raw,backing.file.filename=base.raw"
    ),
    Line(
        "convert -n --target-image-opts full.raw driver=qcow2,file.filename=empty.qcow2,force-share=on"
    ),
    Line(
        "convert -n --target-image-opts full.raw driver=qcow2,file.filename=empty.qcow2,read-only=on"
    ),
    Line(
        'convert -n full.raw \'json:{"driver":"qcow2","file":{"driver":"file","filename":"empty.qcow2"}}\''
    ),
    Line(
        'convert -n -O qcow2 full.raw \'json:{"driver":"qcow2","file":{"driver":"file","filename":"empty.qcow2"}}\''
    ),
    Line(
        'convert -n -O raw full.raw \'json:{"driver":"qcow2","file":{"driver":"file","filename":"empty.qcow2"}}\''
    ),
    Line(
        'convert -n -O qcow2 full.raw \'json:{"file":{"driver":"file","filename":"empty.qcow2"}}\''
    ),
    Line(
        'convert -n -O raw full.raw \'json:{"driver":"file","filename":"zeroes.raw"}\'',
        Differs("storages-hold-raw", status=0, err="", files=["zeroes.raw"]),
    ),
    Line(
        'convert -O qcow2 full.raw \'json:{"driver":"qcow2","file":{"driver":"file","filename":"new"}}\''
    ),
    Line("convert -n --target-image-opts plain.qcow2 driver=qcow2,file.filename=plain.qcow2"),
    Line("resize --image-opts driver=qcow2,file.filename=plain.qcow2,lazy-refcounts=on 8M"),
    Line("resize --image-opts driver=raw,offset=64k,file.filename=plain.raw 8M"),
    Line(
        "resize --image-opts driver=raw,size=64k,file.filename=plain.raw 8M",
        Differs(
            "own-words", err="...This disk is a part of 'plain.raw' (size=…) and cannot be resized"
        ),
    ),
    Line('resize \'json:{"driver":"qcow2","file":{"driver":"file","filename":"plain.qcow2"}}\' 8M'),
    Line(
        'create -f qcow2 \'json:{"driver":"qcow2","file":{"driver":"file","filename":"new"}}\' 1M'
    ),
    Line('create -f raw \'json:{"driver":"raw","file":{"driver":"file","filename":"new"}}\' 1M'),
    Line("create -f raw 'json:x' 1M"),
    Line('dd if=plain.raw \'of=json:{"driver":"raw","file":{"driver":"file","filename":"new"}}\''),
    Line("convert -O raw plain.raw json:new"),
    Line("convert plain.qcow2 --image-opts driver=raw,file.filename=x"),
    Line(
        'create -f qcow2 -b \'json:{"driver":"raw","file":{"driver":"file","filename":"base.raw"}}\' -F raw new',
        Differs(
            "stored-names",
            status=1,
            out="",
            err="...No such file or directory\nCould not open backing image.",
            files=["new"],
        ),
    ),
    Line("check -r all --image-opts driver=qcow2,file.filename=leaky.qcow2,file.read-only=on"),
    Line(
        "check -r all --image-opts driver=qcow2,file.filename=leaky.qcow2,read-only=on,auto-read-only=on"
    ),
    Line("check -r all --image-opts driver=qcow2,file.filename=leaky.qcow2,auto-read-only=on"),
    Line("check -r all --image-opts driver=qcow2,file.filename=leaky.qcow2,file.force-share=on"),
    Line("check --image-opts driver=qcow2,file.filename=leaky.qcow2,read-only=off"),
    Line("bench -w -c 1 --image-opts driver=raw,file.filename=plain.raw,read-only=on"),
    Line("resize --image-opts driver=raw,file.filename=plain.raw,read-only=on 8M"),
    Line("commit --image-opts driver=qcow2,file.filename=top.qcow2,read-only=on"),
    Line("amend -o size=8M --image-opts driver=qcow2,file.filename=plain.qcow2,read-only=on"),
    Line("rebase -u -b '' --image-opts driver=qcow2,file.filename=top.qcow2,read-only=on"),
    Line("bitmap --add --image-opts driver=qcow2,file.filename=plain.qcow2,read-only=on b"),
    Line("snapshot -c x --image-opts driver=qcow2,file.filename=plain.qcow2,read-only=on"),
    Line("snapshot -l --image-opts driver=qcow2,file.filename=snaps.qcow2,read-only=on"),
    Line(
        'check \'json:{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"leaky.qcow2"}}\' -r all'
    ),
    Line("check -r all --image-opts driver=qcow2,file.filename=leaky.qcow2,read-only=maybe"),
    Line("info --image-opts ''"),
]
