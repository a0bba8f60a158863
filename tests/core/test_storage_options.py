"""Storage options that are given once for several names: each goes where a storage has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import underlay
from underlay import jobs
from underlay.errors import OptionError
from underlay.storage import StorageOpenOptions
from underlay.targets import options_for
from underlay_storage.file import FileStorage
from underlay_storage.memory import MemoryStorage

SIZE = 1 << 20
OPTIONS = {"direct": "off"}
#: What each name was opened with, as often as that was said anything.
Told = dict[str, set[str]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Of files: memory has no options, and refuses them all."""
    seen: Told = {}
    for method in ("open", "create_open"):
        real = getattr(FileStorage, method)

        def spy(options: StorageOpenOptions, real: object = real) -> FileStorage:
            seen.setdefault(options.name.rpartition("/")[2], set()).update(options.options)
            assert callable(real)
            opened = real(options)
            assert isinstance(opened, FileStorage)
            return opened

        monkeypatch.setattr(FileStorage, method, spy)
    return seen


@pytest.fixture
def memory() -> Iterator[str]:
    underlay.create("memory:told", format="raw", size=SIZE).close()
    yield "memory:told"
    MemoryStorage.remove("told")


def test_each_gets_what_its_storage_has() -> None:
    assert options_for(("a", "memory:b", MemoryStorage()), OPTIONS) == [OPTIONS, {}, {}]
    assert options_for(("a", None), {"other": 1}) == [{"other": 1}, {}]
    assert options_for(("a", "memory:b"), None) == [{}, {}]


def test_one_that_none_has_is_refused() -> None:
    with pytest.raises(
        OptionError, match="None of 'a', 'memory:b' has a storage option 'sideways'"
    ):
        options_for(("a", "memory:b"), {"sideways": 1, **OPTIONS})


def test_in_a_comparison(tmp_path: Path, told: Told, memory: str) -> None:
    (tmp_path / "zeroes").write_bytes(bytes(SIZE))
    for two in ((tmp_path / "zeroes", memory), (memory, tmp_path / "zeroes")):
        assert jobs.compare(*two, storage_options=OPTIONS).identical
    assert told == {"zeroes": {"direct"}}


def test_of_a_new_image_and_what_it_is_made_upon(tmp_path: Path, told: Told, memory: str) -> None:
    new = tmp_path / "new.qcow2"
    underlay.create(
        new,
        backing_file=memory,
        backing_fmt="raw",
        data_file="new.data",
        storage_options=OPTIONS,
    ).close()
    assert told == {"new.qcow2": {"direct"}, "new.data": {"direct"}}


def test_of_sources_and_of_targets(tmp_path: Path, told: Told, memory: str) -> None:
    (tmp_path / "base").write_bytes(bytes(SIZE))
    upon = {"backing_file": "base", "backing_fmt": "raw"}
    jobs.convert(
        memory, tmp_path / "new", output_format="qcow2", options=upon, storage_options=OPTIONS
    )
    assert told == {"base": {"direct"}, "new": set()}
    told.clear()
    jobs.convert(
        tmp_path / "base",
        memory,
        overwrite=True,
        output_format="qcow2",
        options={"data_file": str(tmp_path / "data")},
        target_storage_options=OPTIONS,
    )
    assert told == {"base": set(), "data": {"direct"}}


def test_of_an_image_and_its_next_backing_image(tmp_path: Path, told: Told, memory: str) -> None:
    overlay = tmp_path / "overlay"
    underlay.create(overlay, size=SIZE).close()
    told.clear()
    jobs.rebase(overlay, memory, backing_format="raw", storage_options=OPTIONS)
    assert told == {"overlay": {"direct"}}
    gate = underlay.PermissiveImplicitOpenGate()
    with underlay.open_any(overlay, gate=gate) as disk:
        assert disk.backing is not None


def test_of_an_image_and_a_data_file_that_the_caller_names(
    tmp_path: Path, told: Told, memory: str
) -> None:
    image = tmp_path / "image"
    underlay.create(image, size=SIZE, data_file="data").close()
    told.clear()
    with underlay.open_any(image, data_file=memory, storage_options=OPTIONS):
        assert told == {"image": {"direct"}}
