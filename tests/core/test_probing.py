"""Finding out a format: by verdicts, never by name or order, and without believing a guess."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import attrs
import pytest

import underlay
from underlay import plugins
from underlay.driver import FormatDriverInstance, FormatOpenOptions
from underlay.errors import UnderlayError
from underlay.handle import StorageHandle
from underlay.mapping import Eof, ShallowMapping
from underlay.probing import VIEW_BYTES, Match, NoMatch, ProbeVerdict, ProbeView
from underlay_storage.memory import MemoryStorage

Verdict = Callable[[ProbeView], object]


class _Empty(FormatDriverInstance):
    """A disk of no bytes."""

    def __init__(self, storage: StorageHandle) -> None:
        self.storage = storage

    @classmethod
    async def open(cls, options: FormatOpenOptions) -> _Empty:
        return cls(options.storage)

    def size(self) -> int:
        return 0

    def collect_storage_dependencies(self) -> Sequence[StorageHandle]:
        return (self.storage,)

    async def get_mapping(self, offset: int, max_length: int) -> ShallowMapping:
        return Eof()


@attrs.define
class Formats:
    """Adds formats to those that are installed, for one test."""

    registry: plugins.Registry

    def add(self, name: str, verdict: Verdict, *, distribution: str = "dist") -> None:
        def probe(cls: type, view: ProbeView) -> ProbeVerdict:
            return verdict(view)  # type: ignore[return-value]

        kind = type(name.title(), (_Empty,), {"format_name": name, "probe": classmethod(probe)})
        record = plugins.PluginRecord(
            name=name, value=f"{distribution}:x", distribution=distribution, version="1"
        )
        self.registry._formats.setdefault(name, []).append(plugins._Claim(kind, record))

    def fail(self, name: str) -> None:
        record = plugins.PluginRecord(
            name=name, value="x", distribution="broken", version="1", error="ImportError: nope"
        )
        self.registry.records = (*self.registry.records, record)


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> Formats:
    real = plugins.registry()
    copy = plugins.Registry(
        records=real.records,
        formats={name: list(claims) for name, claims in real._formats.items()},
        schemes=real._schemes,
    )
    monkeypatch.setattr(plugins, "_registry", copy)
    return Formats(copy)


def _starts(magic: bytes) -> Verdict:
    return lambda view: Match(f"starts with {magic!r}") if view.head[:4] == magic else NoMatch()


def _raise(error: BaseException) -> Verdict:
    def verdict(view: ProbeView) -> object:
        raise error

    return verdict


def _always(verdict: object) -> Verdict:
    def say(view: ProbeView) -> object:
        return verdict

    return say


def test_one_match_is_the_format(formats: Formats) -> None:
    formats.add("aaaa", _starts(b"AAAA"))
    formats.add("bbbb", _starts(b"BBBB"))
    result = underlay.probe(MemoryStorage(b"AAAA" + bytes(100)))
    assert (result.format, result.guessed, result.size) == ("aaaa", False, 104)
    assert result.matches == {"aaaa": "starts with b'AAAA'"}
    assert result.failures == ()
    with underlay.open_any(MemoryStorage(b"BBBB")) as disk:
        assert disk.format_name == "bbbb"


def test_two_matches_are_an_error_that_names_both(formats: Formats) -> None:
    formats.add("zzzz", _starts(b"AAAA"))
    formats.add("aaaa", _starts(b"AAAA"))
    image = MemoryStorage(b"AAAA")
    result = underlay.probe(image)
    assert result.format is None
    assert set(result.matches) == {"aaaa", "zzzz"}
    with pytest.raises(underlay.AmbiguousFormatError, match=r"aaaa.*zzzz") as caught:
        underlay.open_any(image)
    assert caught.value.formats == ("aaaa", "zzzz")
    with underlay.open_image(image, format="zzzz") as disk:
        assert disk.format_name == "zzzz"


def test_a_name_decides_nothing(tmp_path: Path, formats: Formats) -> None:
    formats.add("qcow3", _starts(b"QCW3"))
    for name in ("disk.qcow3", "disk.qcow2", "disk.iso"):
        (tmp_path / name).write_bytes(b"nothing of the kind".ljust(512))
        with underlay.open_any(tmp_path / name) as disk:
            assert disk.format_name == "raw"


def test_a_driver_sees_both_ends_and_no_more(formats: Formats) -> None:
    seen: list[ProbeView] = []

    def verdict(view: ProbeView) -> ProbeVerdict:
        seen.append(view)
        return Match("it ends so") if view.tail.endswith(b"end!") else NoMatch()

    formats.add("tail", verdict)
    content = b"head" + bytes(3 * VIEW_BYTES) + b"end!"
    assert underlay.probe(MemoryStorage(content)).format == "tail"
    assert (len(seen[0].head), len(seen[0].tail)) == (VIEW_BYTES, VIEW_BYTES)
    assert seen[0].head.startswith(b"head")
    assert seen[0].size == len(content)
    for small in (b"", b"x", b"abcend!"):
        underlay.probe(MemoryStorage(small))
        assert (seen[-1].head, seen[-1].tail, seen[-1].size) == (small, small, len(small))


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        (_raise(ValueError("oh no")), "ValueError: oh no"),
        (_raise(underlay.InvalidImageError("x")), "InvalidImageError: x"),
        (_raise(RecursionError()), "RecursionError"),
        (_always(None), "its verdict was None"),
        (_always("yes"), "its verdict was"),
    ],
)
def test_a_failing_probe_leaves_raw_read_only(
    formats: Formats, verdict: Verdict, reason: str
) -> None:
    formats.add("rotten", verdict)
    formats.add("aaaa", _starts(b"AAAA"))
    image = MemoryStorage(b"no format at all".ljust(1024))
    result = underlay.probe(image)
    assert (result.format, result.guessed) == ("raw", True)
    ((failed, why),) = [(failure.format, failure.reason) for failure in result.failures]
    assert failed == "rotten"
    assert reason in why
    with underlay.open_any(image) as disk:
        assert disk.read_bytes(0, 2) == b"no"
    with pytest.raises(underlay.PluginError, match=r"rotten.*format='raw'"):
        underlay.open_any(image, writable=True)
    with underlay.open_image(image, format="raw", writable=True) as disk:
        disk.write(b"so", 0)
    with underlay.open_any(MemoryStorage(b"AAAA"), writable=True) as disk:
        assert disk.format_name == "aaaa", "a verdict is a verdict, whoever else failed"


def test_a_plug_in_that_failed_to_load_leaves_raw_read_only(formats: Formats) -> None:
    formats.fail("vhdx")
    image = MemoryStorage(bytes(1024))
    with underlay.open_any(image) as disk:
        assert disk.format_name == "raw"
    with pytest.raises(underlay.PluginError, match=r"vhdx.*nope"):
        underlay.open_any(image, writable=True)
    with pytest.raises(underlay.PluginError, match=r"vhdx.*broken 1.*nope"):
        underlay.open_image(image, format="vhdx")


def test_a_contested_format_is_an_error_for_its_images_alone(formats: Formats) -> None:
    formats.add("both", _starts(b"BOTH"), distribution="one")
    formats.add("both", _starts(b"BOTH"), distribution="two")
    with pytest.raises(underlay.PluginConflictError, match=r"one 1.*two 1"):
        underlay.open_any(MemoryStorage(b"BOTH"))
    with underlay.open_any(MemoryStorage(bytes(512))) as disk:
        assert disk.format_name == "raw"
    with pytest.raises(underlay.PluginError):
        underlay.open_any(MemoryStorage(bytes(512)), writable=True)


def test_an_unknown_format_lists_those_there_are() -> None:
    for call in (
        partial(underlay.open_image, MemoryStorage(), format="qcow17"),
        partial(underlay.create, MemoryStorage(), format="qcow17", size=1),
    ):
        with pytest.raises(underlay.PluginError, match=r"qcow17.*qcow2.*raw"):
            call()


def test_probing_opens_without_a_lock_and_changes_nothing(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(5000))
    with underlay.open_image(image, format="raw", writable=True):
        assert underlay.probe(image).format == "raw"
        assert asyncio.run(underlay.aio.probe(image)).size == 5000
        with pytest.raises(underlay.ImageInUseError):
            underlay.open_any(image)
    assert image.read_bytes() == bytes(5000)


# -- raw that was only guessed


@pytest.fixture
def guessed(formats: Formats) -> MemoryStorage:
    """Something that no format claims, while one looks at its beginning and another at its end."""
    formats.add("head", _starts(b"HEAD"))
    formats.add("tail", lambda v: Match("") if v.tail.endswith(b"TAIL") else NoMatch())
    return MemoryStorage(bytes(500_000))


def test_a_guessed_raw_disk_is_not_turned_into_another_format(guessed: MemoryStorage) -> None:
    with underlay.open_any(guessed, writable=True) as disk:
        size = disk.size
        changes: list[Callable[[], None]] = [
            lambda: disk.write(b"HEAD", 0),
            lambda: disk.write(b"HEAD" + bytes(100_000), 0),
            lambda: disk.writev([b"HE", b"AD"], 0),
            lambda: disk.write(b"TAIL", size - 4),
            lambda: disk.write(bytes(100_000) + b"TAIL", size - 100_004),
            lambda: disk.slice(0, 100).write(b"HEAD", 0),
            lambda: disk.slice(size - 10, 10).write(b"TAIL", 6),
            lambda: disk.slice(5, size - 5).slice(0, size - 5).write(b"TAIL", size - 9),
        ]
        for change in changes:
            with pytest.raises(underlay.ReadOnlyError, match=r"guessed to be raw.*format='raw'"):
                change()
        disk.write(b"HEA", 0)
        with pytest.raises(underlay.ReadOnlyError):
            disk.write(b"D", 3)
        disk.write(b"TAI", size - 4)
        with pytest.raises(underlay.ReadOnlyError):
            disk.write(b"L", size - 1)
        disk.write(b"HEAD", 1)
        disk.write(b"TAIL" * 1000, 100_000)
        assert disk.read_bytes(0, 5) == b"HHEAD"
    assert underlay.probe(guessed).guessed


def test_nor_by_zeroing_discarding_or_resizing(formats: Formats) -> None:
    formats.add("zero", lambda v: Match("") if v.head[:8] == b"A" + bytes(7) else NoMatch())
    formats.add("tail", lambda v: Match("") if v.tail.endswith(b"TAIL") else NoMatch())
    formats.add("size", lambda v: Match("") if v.size == 777_777 else NoMatch())
    content = bytearray(b"A" * 500_000)
    content[300_000:300_004] = b"TAIL"
    storage = MemoryStorage(bytes(content))
    with underlay.open_any(storage, writable=True) as disk:
        for change in (
            lambda: disk.write_zeroes(1, 7),
            lambda: disk.discard_to_zero(1, 200_000),
            lambda: disk.discard_to_any(1, 499_999),
            lambda: disk.discard_to_backing(1, 7),
            lambda: disk.resize(300_004),
            lambda: disk.resize_shrink(300_004),
            lambda: disk.resize(777_777),
            lambda: disk.resize_grow(777_777),
            lambda: disk.ensure_data_mapping(250_000, 10),
        ):
            with pytest.raises(underlay.ReadOnlyError):
                change()
        assert disk.read_bytes(0, disk.size) == content
        disk.resize(300_005)
        disk.resize(300_003)
        disk.resize(777_776)
        disk.write_zeroes(2, 7)
    assert storage.size() == 777_776


def test_what_was_called_raw_is_not_guarded(guessed: MemoryStorage) -> None:
    with underlay.open_image(guessed, format="raw", writable=True) as disk:
        disk.write(b"HEAD", 0)
        disk.write(b"TAIL", disk.size - 4)
        assert disk.ensure_data_mapping(0, 10).length == 10
    assert set(underlay.probe(guessed).matches) == {"head", "tail"}


def test_a_guessed_part_is_guarded_as_part_of_the_whole(guessed: MemoryStorage) -> None:
    with underlay.open_any(guessed, writable=True, offset=2, size=1000) as disk:
        disk.write(b"HEAD", 0)
        disk.write(bytes(4), 0)
    with underlay.open_any(guessed, writable=True, offset=500_000 - 10) as disk:
        with pytest.raises(underlay.ReadOnlyError):
            disk.write(b"TAIL", 6)
        with pytest.raises(underlay.ReadOnlyError):
            disk.slice(4, 6).write(b"TAIL", 2)


def test_two_harmless_writes_do_not_become_a_harmful_one(guessed: MemoryStorage) -> None:
    async def check() -> None:
        async with await underlay.aio.open_any(guessed, writable=True) as disk:
            for _ in range(20):
                await disk.write(bytes(4), 0)
                done = await asyncio.gather(
                    disk.write(b"HE", 0), disk.write(b"AD", 2), return_exceptions=True
                )
                assert any(isinstance(error, UnderlayError) for error in done)
                assert await disk.read_bytes(0, 4) != b"HEAD"

    asyncio.run(check())


def test_the_real_qcow2_magic_is_refused(tmp_path: Path) -> None:
    """What a guest would do: write a header that names a file of the host."""
    image = tmp_path / "guest.raw"
    image.write_bytes(bytes(1 << 20))
    header = bytearray(512)
    header[:8] = b"QFI\xfb\0\0\0\3"
    with underlay.open_any(image, writable=True) as disk:
        with pytest.raises(underlay.ReadOnlyError, match="qcow2"):
            disk.write(header, 0)
        with disk.as_file() as file, pytest.raises(underlay.ReadOnlyError):
            file.write(header)
    assert image.read_bytes() == bytes(1 << 20)
