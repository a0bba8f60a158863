"""``create``: nothing old survives, nothing half-made stays, and nothing is touched unasked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import underlay
from underlay.storage import PreallocateMode
from underlay_storage.memory import MemoryStorage

from .toy_format import pack

pytestmark = pytest.mark.usefixtures("toy")


def test_a_new_disk_is_open_writable_and_zero(tmp_path: Path) -> None:
    with underlay.create(tmp_path / "disk", format="raw", size="1M") as disk:
        assert (disk.size, disk.writable, disk.format_name) == (1 << 20, True, "raw")
        assert disk.read_bytes(0, disk.size) == bytes(1 << 20)
        disk.write(b"QFI\xfb\0\0\0\3", 0)  # the caller said raw: it is not guarded
    assert (tmp_path / "disk").stat().st_size == 1 << 20


def test_a_size_is_kept_exactly() -> None:
    for size in (0, 1, 511, 513, 1_000_003):
        storage = MemoryStorage()
        with underlay.create(storage, format="raw", size=size) as disk:
            assert disk.size == storage.size() == size


@pytest.mark.parametrize("mode", ["off", "falloc", "full", PreallocateMode.FULL])
def test_space_can_be_reserved(tmp_path: Path, mode: str | PreallocateMode) -> None:
    path = tmp_path / "disk"
    with underlay.create(path, format="raw", size=1 << 20, preallocation=mode) as disk:
        assert disk.read_bytes(0, disk.size) == bytes(1 << 20)
    assert (path.stat().st_blocks * 512 >= 1 << 20) == (mode != "off")


def test_what_exists_is_left_alone_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old" * 10_000)
    for target in (path, MemoryStorage(b"old" * 10_000)):
        with pytest.raises(underlay.StorageExistsError, match="overwrit"):
            underlay.create(target, format="raw", size=512)
    assert path.read_bytes() == b"old" * 10_000
    assert isinstance(_caught(path), FileExistsError)
    storage = MemoryStorage(b"old" * 10_000)
    for target in (path, storage):
        with underlay.create(target, format="raw", size=30_000, overwrite=True) as disk:
            assert disk.read_bytes(0, 30_000) == bytes(30_000)
    assert path.read_bytes() == bytes(30_000)
    with underlay.create(storage, format="toy", size=5000, overwrite=True) as disk:
        assert disk.read_bytes(0, 5000) == bytes(5000)


def _caught(path: Path) -> BaseException:
    try:
        underlay.create(path, format="raw", size=512)
    except underlay.UnderlayError as error:
        return error
    raise AssertionError


def test_an_empty_storage_needs_no_permission() -> None:
    with underlay.create(MemoryStorage(), format="toy", size=5000) as disk:
        disk.write(b"x", 4999)


def test_a_name_among_the_options_is_the_callers_word(tmp_path: Path) -> None:
    """What the image so named names in turn is not."""
    (tmp_path / "base").write_bytes(pack(b"base" * 1000))
    (tmp_path / "middle").write_bytes(pack(b"", size=4000, backing="base"))
    with underlay.create(tmp_path / "one", format="toy", size=4000, backing_file="base") as disk:
        assert disk.read_bytes(0, 4) == b"base"
    with pytest.raises(underlay.ImplicitOpenDeniedError) as caught:
        underlay.create(tmp_path / "two", format="toy", size=4000, backing_file="middle")
    assert caught.value.request.image == str(tmp_path / "middle")
    assert not (tmp_path / "two").exists()
    # The same name in another image is that image's, not the caller's.
    (tmp_path / "below" / "below").mkdir(parents=True)
    (tmp_path / "below" / "base").write_bytes(pack(b"x" * 4000, backing="below/base"))
    (tmp_path / "below" / "below" / "base").write_bytes(pack(b"y"))
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        underlay.create(tmp_path / "two", format="toy", size=4000, backing_file="below/base")
    gate = underlay.DirectoryGate()
    options = {"format": "toy", "size": 4000, "gate": gate, "backing_file": "middle"}
    with underlay.create(tmp_path / "two", **options) as disk:  # type: ignore[arg-type]
        assert disk.read_bytes(0, 4) == b"base"
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        underlay.open_any(tmp_path / "one")


def test_a_given_storage_must_be_writable() -> None:
    with pytest.raises(underlay.ReadOnlyError):
        underlay.create(MemoryStorage(writable=False), format="raw", size=512)


@pytest.mark.parametrize("face", ["blocking", "async"])
def test_a_create_that_fails_leaves_no_new_file(tmp_path: Path, face: str) -> None:
    path = tmp_path / "disk"

    def create(**options: object) -> object:
        if face == "blocking":
            return underlay.create(path, format="toy", size=5000, **options)  # type: ignore[arg-type]
        return asyncio.run(
            underlay.aio.create(path, format="toy", size=5000, **options)  # type: ignore[arg-type]
        )

    with pytest.raises(underlay.InvalidImageError, match="sour"):
        create(flavour="sour")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(underlay.StorageNotFoundError):
        create(backing_file="nowhere")
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"old")
    with pytest.raises(underlay.InvalidImageError, match="sour"):
        create(flavour="sour", overwrite=True)
    assert path.exists(), "it was there before"


@pytest.mark.parametrize(
    "wrong",
    [
        {"flavour": "bitter"},
        {"size": -1},
        {"size": None},
        {"size": "1x"},
        {"size": 1 << 62},
        {"nonsense": 1},
        {"format": "nonesuch"},
        {"format": "raw", "preallocation": "metadata"},
        {"format": "raw", "preallocation": "some"},
        {"format": "raw", "flavour": "sweet"},
    ],
    ids=str,
)
def test_impossible_options_are_refused_before_anything_is_touched(
    tmp_path: Path, wrong: dict[str, object]
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    options = {"format": "toy", "size": 512, "overwrite": True} | wrong
    for target in (path, tmp_path / "new"):
        with pytest.raises(underlay.UnderlayError):
            underlay.create(target, **options)  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(underlay.OptionError, match="known: backing_file, flavour"):
        underlay.create(MemoryStorage(), format="toy", size=1, tint="red")


def test_a_file_in_use_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"old")
    with (
        underlay.open_image(path, format="raw"),
        pytest.raises(underlay.ImageInUseError),
    ):
        underlay.create(path, format="raw", size=512, overwrite=True)
    assert path.read_bytes() == b"old"


def test_a_cancelled_create_leaves_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        for turns in range(25):
            path = tmp_path / str(turns)
            task = asyncio.ensure_future(underlay.aio.create(path, format="toy", size=5000))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if task.cancelled():
                assert not path.exists()
            else:
                await task.result().close()

    asyncio.run(check())
