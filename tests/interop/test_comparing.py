"""``convert`` and ``compare``: the files and the words are qemu-img's."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from .building import BuiltImage, Done
from .matrix import over

Both = Callable[..., tuple[Done, Done]]
Command = Callable[..., Done]


def _data(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, end) of what is no hole."""
    with path.open("rb") as file:
        end = 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # no more data
                return
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            yield start, end


def assert_same(ours: Path, theirs: Path) -> None:
    """Two files hold the same bytes; holes, which may be terabytes, are not read."""
    assert ours.stat().st_size == theirs.stat().st_size
    with ours.open("rb") as one, theirs.open("rb") as other:
        for path in (ours, theirs):
            for start, end in _data(path):
                for offset in range(start, end, 1 << 20):
                    length = min(1 << 20, end - offset)
                    one.seek(offset)
                    other.seek(offset)
                    assert one.read(length) == other.read(length), f"in the MiB at {offset:#x}"


def test_convert_writes_the_file_that_qemu_img_writes(
    image: BuiltImage, underlay_command: Command, tmp_path: Path
) -> None:
    target = tmp_path / "ours.raw"
    arguments = ("--gate", "directory", "-f", "qcow2", "-O", "raw", image.path.name, target)
    done = underlay_command("convert", *arguments)
    assert (done.status, done.stdout, done.stderr) == (0, "", "")
    assert_same(target, image.raw())
    # Nothing is written out that could be a hole; extents may be a little larger.
    assert target.stat().st_blocks <= image.raw().stat().st_blocks + 2048
    target.unlink()


@contextmanager
def flipped(path: Path, offset: int) -> Generator[None]:
    """One bit of a file is another one for a while."""
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)
        file.seek(offset)
        file.write(bytes((before[0] ^ 0x10,)))
        file.flush()
        yield
        file.seek(offset)
        file.write(before)


def test_compare_says_what_qemu_img_says(
    image: BuiltImage, both: Both, underlay_command: Command
) -> None:
    twin = image.raw()
    files = ("-f", "qcow2", "-F", "raw", image.path.name, twin.name)
    if image.recipe.has_odd_size:
        done = underlay_command("compare", "--gate", "directory", *files)
        assert (done.status, done.stdout) == (0, "Images are identical.\n")
        return
    theirs, ours = both("compare", *files)
    assert theirs.status == 0
    assert ours == theirs
    size = image.exact_size
    if not size:
        return
    chance = random.Random(image.recipe.name)
    with flipped(twin, chance.choice((0, size - 1, chance.randrange(size)))):
        theirs, ours = both("compare", *files)
        assert theirs.status == 1
        assert ours == theirs


# What follows the end of one of them has little to do with the image: a sample is enough.
@over(lambda recipe: not recipe.has_odd_size and sum(recipe.name.encode()) % 5 == 0)
def test_compare_of_other_lengths_says_what_qemu_img_says(image: BuiltImage, both: Both) -> None:
    twin, size = image.raw(), image.exact_size
    files = ("-f", "qcow2", "-F", "raw", image.path.name, twin.name)
    try:
        os.truncate(twin, size + 5120)
        for arguments in (files, ("-s", *files)):
            theirs, ours = both("compare", *arguments)
            assert ours == theirs
        with flipped(twin, size + 4100):
            theirs, ours = both("compare", *files)
            assert theirs.status == 1
            assert ours == theirs
    finally:
        os.truncate(twin, size)
