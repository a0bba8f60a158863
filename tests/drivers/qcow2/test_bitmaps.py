"""Dirty bitmaps: the list; and damage to it, which is no damage to the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from underlay.errors import CorruptImageError
from underlay.face import run_blocking
from underlay_drivers.qcow2 import layout

from .conftest import Tool
from .images import Image, open_bytes, read


@pytest.fixture
def bitmapped(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Image:
    path = tmp_path / "bitmaps.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    qemu_img("bitmap", "--add", path, "first")
    qemu_img("bitmap", "--add", "--disable", "-g", "512", path, "second")
    qemu_io("-f", "qcow2", "-c", "write -P 0x11 0 64k", path)
    return Image.load(path)


def directory(image: Image) -> int:
    data = bytes(image.data)
    header, _ = image.header.with_extensions(data)
    assert header.bitmaps is not None
    return header.bitmaps.directory_offset


def test_the_list_is_qemus(bitmapped: Image, qemu_img: Tool, tmp_path: Path) -> None:
    # One that was not saved properly, too.
    bitmapped.put(directory(bitmapped) + 12, "I", layout.BITMAP_IN_USE | layout.BITMAP_AUTO)
    (tmp_path / "image").write_bytes(bitmapped.data)
    told = json.loads(qemu_img("info", "--output=json", tmp_path / "image"))
    with open_bytes(bitmapped.data) as disk:
        found = run_blocking(disk.bitmaps())
        description = run_blocking(disk.describe())
    assert [(one.name, one.granularity, one.in_use, one.auto) for one in found] == [
        ("first", 65536, True, True),
        ("second", 512, False, False),
    ]
    assert description.details == told["format-specific"]["data"]
    assert description.warnings == ()


@pytest.mark.parametrize(
    ("at", "form", "value"),
    [
        (12, "I", 8),
        (16, "B", 0),
        (16, "B", 9),
        (17, "B", 64),
        (17, "B", 8),
        (18, "H", 0),
        (18, "H", 65_535),
        (20, "I", 2**32 - 1),
        (8, "I", 2**32 - 1),
    ],
)
def test_an_entry_that_makes_no_sense_is_a_warning(
    bitmapped: Image, at: int, form: str, value: int
) -> None:
    bitmapped.put(directory(bitmapped) + at, form, value)
    with open_bytes(bitmapped.data) as disk:
        assert read(disk, 0, 1) == b"\x11"
        with pytest.raises(CorruptImageError):
            run_blocking(disk.bitmaps())
        description = run_blocking(disk.describe())
        assert description.bitmaps == ()
        assert len(description.warnings) == 1


def test_two_of_one_name(bitmapped: Image) -> None:
    at = directory(bitmapped) + 32
    bitmapped.put(at + 18, "H", 5)
    bitmapped.data[at + 24 : at + 32] = b"first\0\0\0"
    with open_bytes(bitmapped.data) as disk, pytest.raises(CorruptImageError, match="another one"):
        run_blocking(disk.bitmaps())


def test_bitmaps_that_are_out_of_date_are_not_listed(
    bitmapped: Image, qemu_img: Tool, tmp_path: Path
) -> None:
    bitmapped.put(88, "Q", 0)
    (tmp_path / "image").write_bytes(bitmapped.data)
    told = json.loads(qemu_img("info", "--output=json", tmp_path / "image"))
    with open_bytes(bitmapped.data) as disk:
        assert run_blocking(disk.bitmaps()) == []
        description = run_blocking(disk.describe())
    assert description.details == told["format-specific"]["data"]
    assert "out of date" in description.warnings[0]
