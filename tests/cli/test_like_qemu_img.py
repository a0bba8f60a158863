"""What the commands print is what qemu-img prints, character for character."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool

PERMISSIVE = ("--gate", "permissive")


@pytest.mark.parametrize(
    "name", ["top.qcow2", "./top.qcow2", "low/../top.qcow2", "{here}/top.qcow2"]
)
@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize("command", [("info",), ("info", "--backing-chain"), ("map",)])
def test_names_are_those_that_lead_there_from_the_name_given(
    chain: Path, run: Run, oracle: Run, *, command: tuple[str, ...], output: str, name: str
) -> None:
    arguments = (*command, f"--output={output}", name.format(here=chain))
    ours = run(*arguments, *PERMISSIVE)
    assert ours == oracle(*arguments)
    assert ours.status == 0


@pytest.mark.parametrize(
    "part",
    [
        ("-s", "1M"),
        ("--start-offset=0x180000", "--max-length", "1.5M"),
        ("-s", "1000", "-l", "1000"),
        ("-s", "5000k"),
        ("-l", "0"),
        ("-s", "100G"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("output", ["human", "json"])
def test_map_shows_a_part_of_a_disk(
    chain: Path, run: Run, oracle: Run, part: tuple[str, ...], output: str
) -> None:
    arguments = ("map", *part, f"--output={output}", "top.qcow2")
    assert run(*arguments, *PERMISSIVE) == oracle(*arguments)


def test_map_for_people_stops_where_bytes_are_compressed(
    plain: Path, qemu_img: Tool, run: Run, oracle: Run
) -> None:
    qemu_img("convert", "-c", "-O", "qcow2", plain, "compressed.qcow2")
    theirs = oracle("map", "compressed.qcow2")
    assert theirs.status == 1
    ours = run("map", "compressed.qcow2")
    assert ours._replace(err=ours.err.replace("underlay", "qemu-img")) == theirs
    assert run("map", "--output=json", "compressed.qcow2") == oracle(
        "map", "--output=json", "compressed.qcow2"
    )


def test_map_of_nothing_is_one_empty_run(here: Path, run: Run, oracle: Run) -> None:
    Path("empty").touch()
    for output in ("human", "json"):
        arguments = ("map", "-f", "raw", f"--output={output}", "empty")
        assert run(*arguments) == oracle(*arguments)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("compare plain.qcow2 plain.qcow2", 0),
        ("compare -s plain.qcow2 plain.qcow2", 0),
        ("compare plain.qcow2 same.raw", 0),
        ("compare -s plain.qcow2 same.raw", 1),
        ("compare plain.qcow2 other.raw", 1),
        ("compare -q plain.qcow2 other.raw", 1),
        ("compare plain.qcow2 longer.raw", 0),
        ("compare -s plain.qcow2 longer.raw", 1),
        ("compare plain.qcow2 longer-with-data.raw", 1),
        ("compare -f raw -F raw plain.qcow2 same.raw", 1),
        ("compare plain.qcow2 missing", 2),
        ("compare -f nonsense plain.qcow2 plain.qcow2", 2),
        ("compare -T nonsense plain.qcow2 plain.qcow2", 2),
        ("compare plain.qcow2", 1),
        ("compare --nonsense", 1),
    ],
)
def test_compare_has_qemu_imgs_words_and_exit_codes(
    plain: Path, qemu_img: Tool, qemu_io: Tool, run: Run, oracle: Run, *, command: str, status: int
) -> None:
    qemu_img("convert", "-O", "raw", "plain.qcow2", "same.raw")
    qemu_img("convert", "-O", "raw", "plain.qcow2", "other.raw")
    qemu_io("-f", "raw", "-c", "write -P 9 2100k 1k", "other.raw")
    for name in ("longer", "longer-with-data"):
        qemu_img("convert", "-O", "raw", "plain.qcow2", f"{name}.raw")
        qemu_img("resize", "-q", "-f", "raw", f"{name}.raw", "5M")
    qemu_io("-f", "raw", "-c", "write -P 9 4500k 1k", "longer-with-data.raw")
    theirs, ours = oracle(*command.split()), run(*command.split())
    assert (ours.status, ours.out) == (theirs.status, theirs.out)
    assert ours.status == status
    assert bool(ours.err) == bool(theirs.err)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "nonsense",
        "--nonsense",
        "info",
        "info a b",
        "info --nonsense a",
        "info -Z a",
        "info -f",
        "info --output",
        "info --output=xml a",
        "info --backing-chain=yes a",
        "map",
        "map -s x a",
        "map -s 9999999T a",
        "map --max-length=-1 a",
        "compare a b c",
        "compare -T nonsense a b",
        "convert",
        "convert plain.qcow2",
        "convert -S x plain.qcow2 out",
        "convert -S 1 plain.qcow2 out",
        "convert -S 32M plain.qcow2 out",
        "convert -m 0 plain.qcow2 out",
        "convert -m 17 plain.qcow2 out",
        "convert -m x plain.qcow2 out",
        "convert -t nonsense plain.qcow2 out",
        "convert -T nonsense plain.qcow2 out",
        "convert --target-is-zero plain.qcow2 out",
        "dd",
        "dd if=plain.qcow2",
        "dd if=plain.qcow2 of=out bs=x",
        "dd if=plain.qcow2 of=out bs=0",
        "dd if=plain.qcow2 of=out bs=3G",
        "dd if=plain.qcow2 of=out count=x",
        "dd if=plain.qcow2 of=out nonsense=1",
        "dd if=plain.qcow2 of=out nonsense",
    ],
)
def test_a_wrong_command_line_is_told_in_qemu_imgs_words(
    plain: Path, run: Run, oracle: Run, command: str
) -> None:
    ours = run(*command.split())
    assert not Path("out").exists()
    theirs = oracle(*command.split())
    assert ours.err == theirs.err.replace("qemu-img", "underlay")
    assert ours[:2] == theirs[:2]


@pytest.mark.parametrize(
    "flags",
    ["", "-S 0", "-S 64k", "-m 3 -W", "-q -U", "-C -t none -T writeback", "-f qcow2 -O raw", "-p"],
)
def test_convert_writes_what_qemu_img_writes(
    chain: Path, run: Run, oracle: Run, flags: str
) -> None:
    oracle("convert", *flags.split(), "top.qcow2", "theirs.raw")
    assert run("convert", *flags.split(), *PERMISSIVE, "top.qcow2", "ours.raw").status == 0
    ours, theirs = Path("ours.raw"), Path("theirs.raw")
    assert ours.read_bytes() == theirs.read_bytes()
    assert abs(ours.stat().st_blocks - theirs.stat().st_blocks) <= 8


def test_convert_joins_disks_and_reads_snapshots(
    plain: Path, qemu_img: Tool, qemu_io: Tool, run: Run, oracle: Run
) -> None:
    qemu_img("snapshot", "-c", "before, all", plain)
    qemu_io("-c", "write -P 9 0 1M", plain)
    for arguments in (
        ("plain.qcow2", "plain.qcow2"),
        ("-l", "before, all", "plain.qcow2"),
        ("-l", "snapshot.id=1", "plain.qcow2"),
    ):
        oracle("convert", *arguments, "theirs.raw")
        assert run("convert", *arguments, "ours.raw") == (0, "", "")
        assert Path("ours.raw").read_bytes() == Path("theirs.raw").read_bytes()
    missing = run("convert", "-l", "after", "plain.qcow2", "none.raw")
    assert missing == (1, "", "underlay: Failed to load snapshot: Can't find snapshot\n")
    assert not Path("none.raw").exists()


def test_convert_into_an_image_that_exists_leaves_what_lies_behind(
    plain: Path, run: Run, oracle: Run
) -> None:
    for name in ("ours.raw", "theirs.raw"):
        Path(name).write_bytes(b"\xff" * (5 << 20))
    arguments = ("convert", "-n", "-O", "raw", "plain.qcow2")
    assert oracle(*arguments, "theirs.raw").status == 0
    assert run(*arguments, "ours.raw") == (0, "", "")
    assert Path("ours.raw").read_bytes() == Path("theirs.raw").read_bytes()
    Path("small.raw").write_bytes(bytes(512))
    assert oracle(*arguments, "small.raw").status == 1
    failed = run(*arguments, "small.raw")
    assert failed.status == 1
    assert failed.err.count("\n") == 1
    assert Path("small.raw").read_bytes() == bytes(512)


@pytest.mark.parametrize(
    "operands",
    [
        "",
        "bs=1M count=2",
        "bs=1M count=3 skip=2",
        "bs=700 count=100",
        "skip=100G",
        "bs=64k skip=99",
    ],
)
def test_dd_copies_the_blocks_that_qemu_img_copies(
    plain: Path, run: Run, oracle: Run, operands: str
) -> None:
    theirs = oracle("dd", *operands.split(), "if=plain.qcow2", "of=theirs.raw")
    ours = run("dd", *operands.split(), "if=plain.qcow2", "of=ours.raw")
    assert (ours.status, ours.out) == (theirs.status, theirs.out)
    assert ours.err == theirs.err.replace("qemu-img", "underlay")
    assert Path("ours.raw").read_bytes() == Path("theirs.raw").read_bytes()


@pytest.mark.parametrize(
    "size",
    [
        0,
        512,
        1024,
        1536,
        10 << 10,
        999 << 10,
        1000 << 10,
        1023 << 10,
        1 << 20,
        12345 << 20,
        3 << 40,
    ],
)
def test_sizes_are_rounded_alike(here: Path, run: Run, oracle: Run, size: int) -> None:
    with Path("disk.raw").open("wb") as file:
        file.truncate(size)
    assert run("info", "-f", "raw", "disk.raw") == oracle("info", "-f", "raw", "disk.raw")


def test_times_and_counters_of_snapshots_are_shown_alike(
    plain: Path, qemu_img: Tool, run: Run, oracle: Run
) -> None:
    for name in ("one", "a name that is longer than its column", "three"):
        qemu_img("snapshot", "-c", name, plain)
    data = bytearray(plain.read_bytes())
    (table,) = struct.unpack_from(">Q", data, 64)
    struct.pack_into(">Q", data, table + 24, 123_456_789_012_345_678)  # the guest's clock
    struct.pack_into(">Q", data, table + 40, 10 << 30)  # the size of the machine's state
    struct.pack_into(">Q", data, table + 56, (1 << 64) - 1)  # no count of instructions
    plain.write_bytes(data)
    for output in ("human", "json"):
        arguments = ("info", f"--output={output}", "plain.qcow2")
        assert run(*arguments) == oracle(*arguments)


def test_strings_in_json_are_escaped_alike(
    names_backing: Callable[[str], Path], run: Run, oracle: Run
) -> None:
    for name in (
        "tab\tand\x7f",
        'quote"back\\slash',
        "h\u00e9\u00e9\u20ac \U0001f600",
        "a\x1b[31mred",
    ):
        path = names_backing(name)
        arguments = ("info", "--output=json", path.name)
        assert run(*arguments) == oracle(*arguments)
        assert json.loads(run(*arguments).out)["backing-filename"] == name
