"""Disks as many objects, on a real server: the contract, images, jobs, commands and costs."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import underlay
import underlay.jobs
from underlay.cli import main
from underlay.errors import (
    InvalidImageError,
    OptionError,
    StorageChangedError,
    StorageExistsError,
    StorageNotFoundError,
    UnsupportedOperationError,
)
from underlay.storage import (
    AnyStorage,
    PreallocateMode,
    StorageCreateOptions,
    StorageOpenOptions,
)
from underlay.testing import StorageContract
from underlay_storage.s3.blocks.storage import S3Blocks
from underlay_storage.s3.client import ObjectClient

from .proxy import Proxy
from .servers import BUCKET, Server, make_bucket
from .workloads import until

if TYPE_CHECKING:
    from tests.conftest import Tool

BLOCK = 64 << 10
MIB = 1 << 20
#: Small enough that blocks go to the server while others are written, and are fetched again.
SMALL = {"block_size": BLOCK, "cache": MIB}


def url(prefix: str) -> str:
    return f"s3+blocks://{BUCKET}/{prefix}"


class TestContract(StorageContract):
    @pytest.fixture(autouse=True)
    def _server(self, seaweed: Server, prefix: str) -> None:
        self.options = seaweed.options(**SMALL)
        self.prefix = prefix
        self.made = 0

    def make(self, content: bytes) -> AnyStorage:
        self.made += 1
        storage = S3Blocks.create_open(
            StorageCreateOptions(name=url(f"{self.prefix}/{self.made}"), options=self.options)
        )
        if content:
            storage.writev((content,), 0)
        storage.sync()
        return storage

    def reopen(self, storage: AnyStorage) -> AnyStorage:
        return S3Blocks.open(StorageOpenOptions(name=storage.name(), options=self.options))

    def stored(self, storage: AnyStorage) -> bytes:
        assert isinstance(storage, S3Blocks)
        storage.sync()
        other = S3Blocks.open(StorageOpenOptions(name=storage.name(), options=self.options))
        content = bytearray(other.size())
        if content:
            other.readv((content,), 0)
        other.close()
        return bytes(content)


@pytest.fixture
def options(seaweed: Server) -> dict[str, object]:
    return seaweed.options(**SMALL)


def _create(prefix: str, options: dict[str, object], **more: Any) -> S3Blocks:
    return S3Blocks.create_open(StorageCreateOptions(name=url(prefix), options=options, **more))


def _open(prefix: str, options: dict[str, object], **more: Any) -> S3Blocks:
    return S3Blocks.open(StorageOpenOptions(name=url(prefix), options=options, **more))


def _bytes(storage: S3Blocks, offset: int, length: int) -> bytes:
    content = bytearray(length)
    storage.readv((content,), offset)
    return bytes(content)


# -- coming to be, and going


def test_creating_what_exists_has_to_be_asked_for(prefix: str, options: dict[str, object]) -> None:
    first = _create(prefix, options)
    first.writev((b"old",), 0)
    first.sync()
    first.close()
    with pytest.raises(StorageExistsError, match="exists; overwriting it was not asked for"):
        _create(prefix, options)
    second = _create(prefix, options, size=5, overwrite=True)
    assert _bytes(second, 0, 5) == bytes(5)
    second.close()
    third = _open(prefix, options)
    assert (third.size(), _bytes(third, 0, 5)) == (5, bytes(5))
    third.close()


def test_a_creation_that_is_abandoned_leaves_nothing(
    prefix: str, options: dict[str, object], client: ObjectClient
) -> None:
    storage = _create(prefix, options)
    storage.writev((b"x" * (3 * MIB),), 0)
    storage.abandon()
    storage.close()
    assert list(client.listing(prefix)) == []


def test_an_overwritten_disk_survives_that_the_new_one_is_abandoned(
    prefix: str, options: dict[str, object]
) -> None:
    _create(prefix, options, size=9).close()
    storage = _create(prefix, options, overwrite=True)
    storage.abandon()
    storage.close()
    _open(prefix, options).close()


def test_what_is_not_there_cannot_be_opened(prefix: str, options: dict[str, object]) -> None:
    for writable in (False, True):
        with pytest.raises(StorageNotFoundError):
            _open(prefix, options, writable=writable)


def test_what_is_no_disk_is_refused_and_can_be_overwritten(
    prefix: str, options: dict[str, object], client: ObjectClient
) -> None:
    client.put(f"{prefix}/root", b"something else", write_id="1")
    for writable in (False, True):
        with pytest.raises(InvalidImageError, match="too short to be one of underlay's"):
            _open(prefix, options, writable=writable)
    with pytest.raises(StorageExistsError):
        _create(prefix, options)
    _create(prefix, options, overwrite=True).close()
    _open(prefix, options).close()


def test_unknown_options_and_impossible_sizes_are_refused(
    prefix: str, options: dict[str, object]
) -> None:
    with pytest.raises(OptionError, match="nonsense"):
        _create(prefix, {**options, "nonsense": 1})
    with pytest.raises(OptionError, match="cannot be negative"):
        _create(prefix, options, size=-1)
    with pytest.raises(UnsupportedOperationError, match="larger block_size"):
        _create(prefix, options, size=1 << 60)
    with pytest.raises(UnsupportedOperationError, match="reserves no space"):
        _create(prefix, options, size=1, preallocation=PreallocateMode.FULL)
    storage = _create(prefix, options)
    with pytest.raises(UnsupportedOperationError, match="larger block_size"):
        storage.writev((b"x",), 1 << 60)
    storage.close()


def test_a_reader_sees_the_disk_as_it_was_when_it_was_opened(
    prefix: str, options: dict[str, object]
) -> None:
    writer = _create(prefix, options, size=2 * MIB)
    writer.writev((b"1" * (2 * MIB),), 0)
    writer.sync()
    reader = _open(prefix, options)
    writer.writev((b"2" * (2 * MIB),), 0)
    writer.resize(3 * MIB)
    writer.sync()
    writer.close()
    assert reader.size() == 2 * MIB
    assert _bytes(reader, 0, 2 * MIB) == b"1" * (2 * MIB)
    assert reader.reopening() != _open(prefix, options).reopening()
    # Once the grace period is over, what it reads may be gone: that is said, and nothing mixed.
    underlay.jobs.collect_storage(url(prefix), grace=0, storage_options=options)
    reader.invalidate_cache()
    with pytest.raises(StorageChangedError, match="written by somebody else since it was opened"):
        _bytes(reader, 0, 2 * MIB)
    reader.close()


def test_zeroes_are_no_objects(
    prefix: str, options: dict[str, object], client: ObjectClient
) -> None:
    storage = _create(prefix, options, size=1 << 40)
    storage.writev((bytes(2 * MIB),), 5 * MIB)
    storage.sync()
    assert [entry.key for entry in client.listing(f"{prefix}/objects")] == []
    storage.writev((b"x" * (4 * BLOCK),), 1 << 39)
    storage.writev((b"y",), 0)
    storage.sync()
    assert storage.survey()["blocks"] == 5
    assert storage.survey()["stored-bytes"] == 4 * BLOCK + 1 + 2 * 24 + 5 * 36
    hole = storage.extent_at(BLOCK)
    assert (hole.is_data, hole.length) == (False, (1 << 39) - BLOCK)
    data = storage.extent_at(1 << 39)
    assert (data.is_data, data.length) == (True, 4 * BLOCK)
    storage.write_zeroes(0, 1 << 40)
    storage.sync()
    assert storage.survey()["blocks"] == 0
    storage.close()


def test_many_threads_write_and_read_and_sync(prefix: str, options: dict[str, object]) -> None:
    storage = _create(prefix, options)
    share = 5 * BLOCK + 1000
    models = [bytearray(share) for _ in range(6)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        try:
            for turn in range(40):
                offset = dice.randrange(share - 1)
                data = dice.randbytes(dice.randrange(1, min(share - offset, 2 * BLOCK) + 1))
                storage.writev((data,), number * share + offset)
                models[number][offset : offset + len(data)] = data
                if turn % 9 == 0:
                    storage.sync()
                content = bytearray(share)
                storage.readv((content,), number * share)
                assert content == models[number]
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    storage.sync()
    storage.close()
    reader = _open(prefix, options)
    assert _bytes(reader, 0, 6 * share) == b"".join(models)
    assert not reader.check_objects(read_all=True).damaged
    reader.close()


# -- what it costs


def test_few_requests_are_made(prefix: str, seaweed: Server, proxy: Proxy) -> None:
    through = seaweed.options(endpoint=proxy.endpoint, **SMALL)
    writer = _create(prefix, through, size=1 << 32)
    writer.writev((b"a" * (4 * BLOCK),), 0)
    writer.sync()
    proxy.requests.clear()
    writer.writev((b"b" * 100,), BLOCK)
    writer.sync()
    assert [request.verb for request in proxy.requests] == ["PUT", "PUT", "PUT"]
    proxy.requests.clear()
    writer.sync()
    assert proxy.requests == []
    writer.close()

    proxy.requests.clear()
    reader = _open(prefix, through)
    assert len(proxy.requests) == 1
    assert _bytes(reader, 100, 4096) == b"a" * 4096
    assert len(proxy.requests) == 3
    assert _bytes(reader, 200, 4096) == b"a" * 4096
    assert _bytes(reader, 1 << 30, 4096) == bytes(4096)
    assert len(proxy.requests) == 3
    assert _bytes(reader, 0, 4 * BLOCK)[BLOCK:][:100] == b"b" * 100
    assert len(proxy.requests) == 6
    reader.close()


def test_who_reads_one_block_after_the_other_has_the_next_fetched_ahead(
    prefix: str, seaweed: Server, proxy: Proxy
) -> None:
    options = seaweed.options(endpoint=proxy.endpoint, block_size=BLOCK, cache=16 * MIB)
    writer = _create(prefix, options)
    writer.writev((b"x" * (64 * BLOCK),), 0)
    writer.sync()
    writer.close()
    reader = _open(prefix, options)
    for step in range(12):
        assert _bytes(reader, step * BLOCK // 2, BLOCK // 2) == b"x" * (BLOCK // 2)
    until(lambda: reader.try_readv((bytearray(BLOCK),), 8 * BLOCK) == BLOCK)
    reader.close()
    reader = _open(prefix, options)
    proxy.requests.clear()
    for block in (40, 7, 21, 3, 60):
        _bytes(reader, block * BLOCK, 4096)
    assert len(proxy.requests) == 6
    reader.close()


def test_memory_is_bounded_whatever_is_written(prefix: str, options: dict[str, object]) -> None:
    storage = _create(prefix, options)
    writer = storage._writer
    assert writer is not None
    for number in range(64):
        storage.writev((number.to_bytes(1, "big") * BLOCK,), number * BLOCK)
        assert len(writer.staged()) <= MIB // 2 // BLOCK + 1
    storage.sync()
    assert not writer.staged()
    storage.close()


# -- images


@pytest.fixture
def disk(tmp_path: Path, qemu_img: Tool, qemu_io: Tool) -> Path:
    """A qcow2 image of 20 MiB with data here and there, made by QEMU."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "20M")
    writes = ["write -P 1 0 3M", "write -P 2 7M 100k", "write -P 3 20479k 1k", "write -P 4 9M 64k"]
    qemu_io(*(argument for write in writes for argument in ("-c", write)), path)
    return path


@pytest.mark.parametrize("output_format", ["raw", "qcow2"])
def test_qemu_finds_the_same_bytes_when_they_come_back(
    output_format: str, disk: Path, prefix: str, options: dict[str, object], qemu_img: Tool
) -> None:
    name = url(prefix)
    underlay.jobs.convert(disk, name, output_format=output_format, target_storage_options=options)
    assert underlay.probe(name, storage_options=options).format == output_format
    back = disk.parent / "back.qcow2"
    underlay.jobs.convert(name, back, output_format="qcow2", storage_options=options)
    assert "identical" in qemu_img("compare", disk, back)
    assert underlay.jobs.digest(disk) == underlay.jobs.digest(name, storage_options=options)
    # The very bytes of the image, too.
    storage = _open(prefix, options)
    copy = disk.parent / "copy"
    copy.write_bytes(_bytes(storage, 0, storage.size()))
    storage.close()
    if output_format == "qcow2":
        assert "No errors" in qemu_img("check", copy)
    assert "identical" in qemu_img("compare", "-F", output_format, disk, copy)


def test_an_image_is_written_in_place_and_qemu_agrees(
    prefix: str, options: dict[str, object], tmp_path: Path, qemu_img: Tool
) -> None:
    name = url(prefix)
    model = bytearray(6 * MIB)
    dice = random.Random(6)
    with underlay.create(name, format="qcow2", size="6M", storage_options=options) as image:
        assert image.size == 6 * MIB
    for _ in range(3):
        with underlay.open_any(name, writable=True, storage_options=options) as image:
            for _ in range(15):
                offset = dice.randrange(5 * MIB)
                data = dice.randbytes(dice.randrange(1, 200_000))
                image.write(data, offset)
                model[offset : offset + len(data)] = data
            image.discard_to_zero(MIB, 2 * MIB)
            model[MIB : 3 * MIB] = bytes(2 * MIB)
    with underlay.open_any(name, storage_options=options) as image:
        assert image.read_bytes(0, 6 * MIB) == model
    result = underlay.jobs.check(name, storage_options=options)
    assert not result.corruptions
    (tmp_path / "model").write_bytes(model)
    underlay.jobs.convert(name, tmp_path / "back", output_format="raw", storage_options=options)
    assert "identical" in qemu_img(
        "compare", "-f", "raw", "-F", "raw", tmp_path / "model", tmp_path / "back"
    )


# -- keeping it in order


def test_checking_tells_what_is_missing_or_damaged(
    prefix: str, options: dict[str, object], client: ObjectClient
) -> None:
    storage = _create(prefix, options)
    storage.writev((b"x" * (9 * BLOCK),), 0)
    storage.sync()
    storage.close()
    name = url(prefix)
    sound = underlay.jobs.check_storage(name, read_all=True, storage_options=options)
    assert (sound.objects, sound.damaged, sound.unneeded) == (10, 0, 0)
    blocks = [entry.key for entry in client.listing(f"{prefix}/objects") if entry.size == BLOCK]
    client.delete([blocks[0]])
    client.put(blocks[1], b"short", write_id="1")
    client.put(blocks[2], b"y" * BLOCK, write_id="2")
    client.put(f"{prefix}/objects/{'1' * 32}-{'0' * 16}", b"lost", write_id="3")
    client.put(f"{prefix}/objects/README", b"not of this format", write_id="4")
    quick = underlay.jobs.check_storage(name, storage_options=options)
    assert sorted(damage.what for damage in quick.damages) == [
        "has 5 bytes, and was written with 65536",
        "is missing",
    ]
    assert (quick.unneeded, quick.unneeded_bytes) == (1, 4)
    thorough = underlay.jobs.check_storage(name, read_all=True, storage_options=options)
    assert thorough.damaged >= 3
    assert "has other bytes than were written" in {damage.what for damage in thorough.damages}
    reader = _open(prefix, options)
    with pytest.raises(underlay.StorageError, match=r"is damaged|storage check"):
        _bytes(reader, 0, 9 * BLOCK)
    reader.close()


def test_a_segment_that_is_gone_stops_the_collector(
    prefix: str, options: dict[str, object], client: ObjectClient
) -> None:
    storage = _create(prefix, options)
    storage.writev((b"x" * (2 * BLOCK),), 0)
    storage.sync()
    storage.close()
    entries = list(client.listing(f"{prefix}/objects"))
    client.delete([entry.key for entry in entries if entry.size < BLOCK])
    name = url(prefix)
    assert underlay.jobs.check_storage(name, storage_options=options).damaged == 1
    with pytest.raises(StorageNotFoundError):
        underlay.jobs.collect_storage(name, grace=0, storage_options=options)
    assert len(list(client.listing(f"{prefix}/objects"))) == 2


@pytest.mark.parametrize("job", [underlay.jobs.check_storage, underlay.jobs.collect_storage])
def test_the_example_in_the_docstring_runs(
    job: Callable[..., object], seaweed: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_bucket(seaweed, "bucket")
    for variable, value in seaweed.environment().items():
        monkeypatch.setenv(variable, value)
    S3Blocks.create_open(
        StorageCreateOptions(name="s3+blocks://bucket/disk", overwrite=True)
    ).close()
    example = (inspect.getdoc(job) or "").split("Example::\n")[1].split("\n\nRaises:")[0]
    exec(compile(textwrap.dedent(example), "<example>", "exec"), {"underlay": underlay})  # noqa: S102


# -- the command


@pytest.fixture
def run(
    seaweed: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The command, with where the server is in the environment."""
    for variable, value in seaweed.environment().items():
        monkeypatch.setenv(variable, value)

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ending:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ending.value.code, int)
        return ending.value.code, out, err

    return command


def test_the_command_converts_checks_and_tidies_up(
    disk: Path, prefix: str, run: Callable[..., tuple[int, str, str]], qemu_img: Tool
) -> None:
    name = url(prefix)
    small = "--target-storage-option", "block_size=64k"
    assert run("convert", "-O", "raw", *small, disk, name) == (0, "", "")
    back = disk.parent / "back"
    assert run("convert", "-O", "raw", "--storage-option", "cache=1M", name, back) == (0, "", "")
    assert "identical" in qemu_img("compare", "-F", "raw", disk, back)

    status, out, err = run("storage", "info", name)
    assert (status, err) == (0, "")
    assert f"storage: {name}\nsize: 20 MiB (20971520 bytes)\nlayout version: 1\n" in out
    assert "block size: 64 KiB (65536 bytes)" in out
    status, out, err = run("storage", "info", "--output=json", name)
    facts = json.loads(out)
    assert (facts["version"], facts["size"], facts["facts"]["blocks"]) == (1, 20 * MIB, 52)

    status, out, err = run("storage", "check", "--read-all", "--output=json", name)
    checked = json.loads(out)
    assert (status, checked["objects"], checked["damages"]) == (0, 53, [])
    # A second conversion takes the place of the first, whose objects then wait for the collector.
    assert run("convert", "-O", "qcow2", *small, disk, name)[0] == 0
    status, out, err = run("storage", "gc", "--dry-run", "--grace", "0", name)
    assert (status, err) == (0, "")
    assert "dry run: yes\nremoved objects: " in out
    would = json.loads(run("storage", "gc", "--dry-run", "--grace=0", "--output=json", name)[1])
    done = json.loads(run("storage", "gc", "--grace", "0", "--output=json", name)[1])
    assert done["removed-objects"] == would["removed-objects"] >= 53
    status, out, err = run("storage", "check", name)
    assert (status, err) == (0, "")
    assert "damaged objects: 0\nunneeded objects: 0\n" in out


def test_a_damaged_disk_is_a_status_and_a_line_for_each_object(
    prefix: str,
    options: dict[str, object],
    client: ObjectClient,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    storage = _create(prefix, options)
    storage.writev((b"x" * BLOCK,), 0)
    storage.sync()
    storage.close()
    client.delete(e.key for e in client.listing(f"{prefix}/objects") if e.size == BLOCK)
    status, out, err = run("storage", "check", url(prefix))
    assert (status, err) == (2, "")
    assert "damaged objects: 1\ndamaged: " in out
    assert "is missing\n" in out


def test_wrong_uses_are_one_line(
    tmp_path: Path, prefix: str, run: Callable[..., tuple[int, str, str]]
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")
    assert run("storage", "info", file)[:2] == (
        0,
        f"storage: {file}\nsize: 1 B (1 bytes)\nlocked: no\n",
    )
    for arguments, told in (
        (("check", file), "is one object: there is nothing to check"),
        (("gc", file), "is one object: there is nothing to check"),
        (("info", "--grace", "1", file), "--grace is for gc"),
        (("gc", "--read-all", file), "--read-all is for check"),
        (("gc", "--grace", "soon", file), "--grace: 'soon' is no number of seconds"),
        (("check", url(prefix)), "NoSuchKey"),
        (("check", "--storage-option", "nonsense=1", url(prefix)), "Unknown option 'nonsense'"),
    ):
        status, out, err = run("storage", *arguments)
        assert (status, out) == (1, ""), arguments
        assert told in err
        assert err.count("\n") == 1
    assert "Expecting info, check or gc, and one name" in run("storage", "mend", file)[2]
