"""What only files do."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import resource
import socket
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from underlay.buffers import aligned_buffer
from underlay.errors import (
    ClosedError,
    ImageInUseError,
    OptionError,
    ReadOnlyError,
    StorageAccessError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
    UnderlayError,
    UnsupportedOperationError,
)
from underlay.storage import PreallocateMode, StorageCreateOptions, StorageOpenOptions
from underlay_storage.file import FileStorage

OpenFile = Callable[..., FileStorage]

MIB = 1 << 20


def create(path: Path | str, **options: object) -> FileStorage:
    chosen = {"lock": False, **options}
    return FileStorage.create_open(StorageCreateOptions(name=str(path), **chosen))  # type: ignore[arg-type]


def read(storage: FileStorage, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    storage.readv((buffer,), offset)
    return bytes(buffer)


# -- names


def test_a_url_names_the_same_file_as_its_path(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a disk%.raw"
    path.write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    wanted = open_file(path).identity()
    for name in (f"file:{path}", path.as_uri(), "file:a disk%.raw", f"file://localhost{path}"):
        assert open_file(name).identity() == wanted, name


def test_a_file_called_like_a_url_keeps_its_name(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file:x").write_bytes(b"odd")
    first = open_file("file:file:x")
    assert open_file(first.name()).identity() == first.identity()


def test_a_file_of_another_machine_is_refused() -> None:
    with pytest.raises(StorageError, match="another machine"):
        FileStorage.open(StorageOpenOptions(name="file://server/share/disk.raw"))


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "", "x" * 5000])
def test_a_name_that_can_be_none_is_a_typed_error(name: str) -> None:
    with pytest.raises(StorageError):
        FileStorage.open(StorageOpenOptions(name=name))
    with pytest.raises(StorageError):
        create(name)


def test_relative_names_start_at_the_folder_of_the_path_that_was_opened(
    tmp_path: Path, open_file: OpenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "disk").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "disk")
    monkeypatch.chdir(tmp_path)
    storage = open_file("link")
    monkeypatch.chdir("/")
    assert storage.resolve_relative("base.raw") == str(tmp_path / "base.raw")
    assert storage.resolve_relative("../base.raw") == f"{tmp_path}/../base.raw"
    assert storage.resolve_relative("/base.raw") == "/base.raw"
    assert storage.resolve_relative("file:/base.raw") == str(tmp_path / "file:/base.raw")
    with pytest.raises(UnsupportedOperationError):
        storage.resolve_relative("a\0b")
    assert open_file(tmp_path / "real" / "disk").resolve_relative("b") == f"{tmp_path}/real/b"


# -- opening


def test_opening_and_reading_change_no_byte_and_no_time(
    tmp_path: Path, open_file: OpenFile
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(10_001))
    os.utime(path, ns=(10**18, 10**18))
    before, content = path.stat(), path.read_bytes()
    for options in ({}, {"lock": True}, {"options": {"direct": True}}):
        for writable in (False, True):
            storage = open_file(path, writable=writable, **options)
            read(storage, 0, 8192) if storage.req_align() == 1 else None
            storage.extent_at(0)
            storage.sync()
            storage.close()
    after = path.stat()
    assert path.read_bytes() == content
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    with listener:
        for name, kind in (
            (fifo, "named pipe"),
            (tmp_path, "directory"),
            (tmp_path / "socket", "socket"),
            ("/dev/null", "character device"),
            ("/dev/tty", "character device"),
        ):
            for writable in (False, True):
                with pytest.raises(StorageError, match=kind):
                    FileStorage.open(StorageOpenOptions(name=str(name), writable=writable))
            with pytest.raises(StorageError, match=f"{kind}|exists"):
                create(name, overwrite=True)


def test_opening_a_fifo_does_not_let_its_writer_go(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    released = threading.Event()

    def write() -> None:
        os.close(os.open(fifo, os.O_WRONLY))
        released.set()

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(StorageError):
        FileStorage.open(StorageOpenOptions(name=str(fifo)))
    assert not released.wait(0.1)
    os.close(os.open(fifo, os.O_RDONLY))
    writer.join()


def test_missing_and_forbidden_files_have_errors_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(StorageNotFoundError, match="none"):
        FileStorage.open(StorageOpenOptions(name=str(tmp_path / "none")))
    with pytest.raises(StorageNotFoundError):
        create(tmp_path / "none" / "disk")
    if os.geteuid() != 0:
        path = tmp_path / "secret"
        path.write_bytes(b"")
        path.chmod(0)
        with pytest.raises(StorageAccessError):
            FileStorage.open(StorageOpenOptions(name=str(path)))


def test_no_descriptor_is_lost_when_opening_fails(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"x")
    holder = FileStorage.open(StorageOpenOptions(name=str(tmp_path / "disk"), writable=True))
    before = os.listdir("/proc/self/fd")
    for name in ("disk", "none/disk", "."):
        for direct in (False, True):
            options: dict[str, object] = {"direct": direct}
            with pytest.raises(UnderlayError):
                FileStorage.open(StorageOpenOptions(name=str(tmp_path / name), options=options))
            with pytest.raises(UnderlayError):
                create(tmp_path / name, overwrite=True, lock=True, options=options)
    assert os.listdir("/proc/self/fd") == before
    holder.close()


def test_descriptors_are_not_inherited(tmp_path: Path, open_file: OpenFile) -> None:
    (tmp_path / "disk").write_bytes(b"x")
    descriptor = open_file(tmp_path / "disk").descriptor()
    assert descriptor is not None
    assert not os.get_inheritable(descriptor)


def test_options_are_checked(tmp_path: Path, open_file: OpenFile) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"x")
    for options in ({"cache": "none"}, {"direct": "maybe"}, {"direct": 1}):
        with pytest.raises(OptionError, match="direct"):
            open_file(path, options=options)
        with pytest.raises(OptionError, match="direct"):
            create(tmp_path / "new", options=options)
    assert not (tmp_path / "new").exists()
    assert open_file(path, options={"direct": "off"}).req_align() == 1
    assert open_file(path, options={"direct": "on"}).descriptor() is None


# -- reading and writing


def test_the_size_is_the_one_of_now(tmp_path: Path, open_file: OpenFile) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"12345")
    storage = open_file(path)
    with path.open("ab") as other:
        other.write(b"678")
    assert storage.size() == 8
    assert read(storage, 4, 6) == b"5678\0\0"


@pytest.mark.parametrize("direct", [False, True])
def test_a_short_read_or_write_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, direct: bool
) -> None:
    # The system moves 2 GiB at most in one call, and may be interrupted; here it is 9,000 bytes.
    from underlay_storage.file import storage as module

    def shortened(call: Callable[..., int]) -> Callable[..., int]:
        def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
            left = 9000 // granularity * granularity
            some: list[memoryview] = []
            for buffer in buffers:
                if left:
                    some.append(memoryview(buffer)[:left])
                    left -= len(some[-1])
            return call(descriptor, some, offset)

        return short

    def short_anywhere(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return min(os.preadv(descriptor, buffers, offset), 9000)

    storage = create(tmp_path / "disk", options={"direct": direct})
    granularity = storage.req_align()
    monkeypatch.setattr(module, "_pwritev", shortened(os.pwritev))
    content = aligned_buffer(64 << 10)
    content[:] = os.urandom(64 << 10)
    storage.writev((content[:4096], content[4096:]), 0)
    assert (tmp_path / "disk").read_bytes() == content
    for read_short in (shortened(os.preadv), short_anywhere):
        monkeypatch.setattr(module, "_preadv", read_short)
        got = aligned_buffer(96 << 10)
        got[:] = b"?" * (96 << 10)
        storage.readv((got[:4096], got[4096:]), 0)
        assert got[: 64 << 10] == content
        assert not any(got[64 << 10 :])
    storage.close()


@contextmanager
def files_limited_to(size: int) -> Generator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_typed_error_and_not_a_short_write(tmp_path: Path) -> None:
    storage = create(tmp_path / "disk")
    with files_limited_to(MIB):
        with pytest.raises(StorageError) as caught:
            storage.writev((bytes(600_000), bytes(600_000)), 0)
        assert caught.value.errno == errno.EFBIG
        storage.resize(100)
        for mode in PreallocateMode:
            with pytest.raises(StorageError):
                storage.resize(2 * MIB, mode)
            assert storage.size() == 100
    storage.close()


def test_zeroing_and_discarding_give_space_back(tmp_path: Path) -> None:
    storage = create(tmp_path / "disk")
    storage.writev((os.urandom(4 * MIB),), 0)
    storage.sync()
    blocks = (tmp_path / "disk").stat().st_blocks
    storage.write_zeroes(MIB, MIB)
    storage.discard(2 * MIB, 64 * MIB)
    assert (tmp_path / "disk").stat().st_blocks <= blocks // 3
    assert storage.size() == 4 * MIB
    assert storage.extent_at(0).is_data
    assert storage.extent_at(0).length == MIB
    assert not storage.extent_at(MIB).is_data
    assert storage.extent_at(MIB).length == 3 * MIB
    storage.write_zeroes(MIB, MIB, allocate=True)
    assert (tmp_path / "disk").stat().st_blocks >= blocks // 3
    assert not any(read(storage, MIB, MIB))
    storage.close()


def test_without_fallocate_zeroes_are_written_and_nothing_is_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from underlay import space

    calls: list[tuple[int, ...]] = []

    def refuse(*arguments: int) -> int:
        calls.append(arguments)
        return errno.EOPNOTSUPP

    monkeypatch.setattr(space, "_libc_fallocate", lambda: refuse)
    content = os.urandom(3 * MIB)
    storage = create(tmp_path / "disk")
    storage.writev((content,), 0)
    for _ in range(3):
        storage.discard(0, MIB)
        assert read(storage, 0, MIB) == content[:MIB]
        storage.write_zeroes(5, 2 * MIB)
        assert read(storage, 0, 3 * MIB) == content[:5] + bytes(2 * MIB) + content[5 + 2 * MIB :]
        storage.writev((content,), 0)
        storage.write_zeroes(5, 2 * MIB, allocate=True)
        storage.writev((content,), 0)
    storage.write_zeroes(3 * MIB - 5, MIB)
    assert storage.size() == 3 * MIB
    assert len(calls) == 2, "it asks each way once, and remembers"
    storage.close()


def test_preallocation_reserves_what_it_says(tmp_path: Path) -> None:
    for mode, reserved in (
        (PreallocateMode.OFF, 0),
        (PreallocateMode.METADATA, 0),
        (PreallocateMode.FALLOC, 4 * MIB),
        (PreallocateMode.FULL, 4 * MIB),
    ):
        storage = create(tmp_path / mode.value, size=4 * MIB, preallocation=mode)
        storage.sync()
        assert storage.size() == 4 * MIB
        assert (tmp_path / mode.value).stat().st_blocks * 512 >= reserved
        assert not any(read(storage, 0, 4 * MIB))
        storage.close()
    assert (tmp_path / "off").stat().st_blocks == 0


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    storage = create(tmp_path / "disk")
    storage.close()
    storage.close()
    assert storage.descriptor() is None
    calls: tuple[Callable[[], object], ...] = (
        lambda: storage.readv((bytearray(1),), 0),
        lambda: storage.try_readv((bytearray(1),), 0),
        lambda: storage.writev((b"x",), 0),
        storage.size,
        storage.sync,
        lambda: storage.extent_at(0),
        lambda: storage.resize(5),
        lambda: storage.write_zeroes(0, 1),
    )
    for call in calls:
        with pytest.raises(ClosedError):
            call()


def test_a_file_left_open_is_a_warning(tmp_path: Path) -> None:
    storage = create(tmp_path / "disk")
    with pytest.warns(ResourceWarning, match="disk"):
        del storage


def test_an_open_file_cannot_be_copied_or_pickled(tmp_path: Path, open_file: OpenFile) -> None:
    (tmp_path / "disk").write_bytes(b"x")
    storage = open_file(tmp_path / "disk")
    with pytest.raises(TypeError):
        pickle.dumps(storage)
    with pytest.raises(TypeError):
        copy.copy(storage)


def test_what_is_not_cached_is_not_waited_for(tmp_path: Path, open_file: OpenFile) -> None:
    path = tmp_path / "disk"
    content = os.urandom(256 << 10)
    path.write_bytes(content)
    storage = open_file(path)
    storage.sync()
    descriptor = storage.descriptor()
    assert descriptor is not None
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    buffer = bytearray(4096)
    count = storage.try_readv((buffer,), 128 << 10)
    if count is None:
        pytest.skip("this filesystem does not know RWF_NOWAIT")
    assert buffer[:count] == content[128 << 10 : (128 << 10) + count]
    read(storage, 0, 256 << 10)
    assert storage.try_readv((buffer,), 1000) == 4096
    assert buffer == content[1000:5096]
    # Half of it: what is not there is not claimed.
    os.posix_fadvise(descriptor, 128 << 10, 0, os.POSIX_FADV_DONTNEED)
    large = bytearray(256 << 10)
    count = storage.try_readv((large[:7], large), 0)
    assert count is not None
    assert large[: count - 7] == content[7:count]
    read(storage, 0, 256 << 10)
    # Past the end nothing is waited for: that is zeroes, now.
    assert storage.try_readv((buffer,), (256 << 10) - 96) == 4096
    assert buffer == content[-96:] + bytes(4000)
    assert storage.try_readv((buffer,), 1 << 40) == 4096
    assert not any(buffer)


# -- creating


def test_creating_takes_nobodys_place_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"precious")
    with pytest.raises(StorageExistsError, match="disk"):
        create(path, size=10)
    assert path.read_bytes() == b"precious"
    inode = path.stat().st_ino
    create(path, size=10, overwrite=True).close()
    assert path.read_bytes() == bytes(10)
    assert path.stat().st_ino == inode
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StorageExistsError):
        create(tmp_path / "dangling")


def test_a_create_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "old"
    path.write_bytes(b"precious")
    for name in ("new", "old"):
        with files_limited_to(MIB), pytest.raises(StorageError):
            create(tmp_path / name, size=2 * MIB, overwrite=True)
        with pytest.raises(OptionError):
            create(tmp_path / name, size=-1, overwrite=True)
    holder = FileStorage.open(StorageOpenOptions(name=str(path)))
    with pytest.raises(ImageInUseError):
        create(path, size=5, overwrite=True, lock=True)
    holder.close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert path.read_bytes() == b"precious"


def test_abandoning_removes_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"precious")
    for name, stays in (("new", False), ("old", True)):
        storage = create(tmp_path / name, overwrite=True)
        storage.abandon()
        storage.close()
        assert (tmp_path / name).exists() == stays
    storage = create(tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / "elsewhere")
    (tmp_path / "new").write_bytes(b"somebody else's")
    storage.abandon()
    storage.close()
    assert (tmp_path / "new").exists()


def test_the_mode_of_a_new_file_is_the_users_choice(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        create(tmp_path / "disk").close()
    finally:
        os.umask(before)
    assert (tmp_path / "disk").stat().st_mode & 0o777 == 0o640


def test_read_only_files_refuse_every_change(tmp_path: Path, open_file: OpenFile) -> None:
    (tmp_path / "disk").write_bytes(b"content")
    storage = open_file(tmp_path / "disk")
    calls: tuple[Callable[[], object], ...] = (
        lambda: storage.writev((b"x",), 0),
        lambda: storage.write_zeroes(0, 1),
        lambda: storage.discard(0, 1),
        lambda: storage.resize(1),
    )
    for call in calls:
        with pytest.raises(ReadOnlyError):
            call()
    storage.sync()
    assert (tmp_path / "disk").read_bytes() == b"content"


# -- block devices


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[str]:
    """A real one of 8 MiB, where this user and machine can have one."""
    import shutil
    import subprocess

    losetup = shutil.which("losetup")
    if os.geteuid() != 0 or losetup is None:
        pytest.skip("block devices need root and losetup")
    backing = tmp_path / "device.img"
    backing.write_bytes(b"\xaa" * (8 * MIB))
    made = subprocess.run(
        [losetup, "--find", "--show", str(backing)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device to be had here: {made.stderr.strip()}")
    device = made.stdout.strip()
    yield device
    subprocess.run([losetup, "--detach", device], check=True)


@pytest.mark.parametrize("direct", [False, True])
def test_a_block_device_is_a_disk_of_fixed_length(
    block_device: str, open_file: OpenFile, *, direct: bool
) -> None:
    storage = open_file(block_device, writable=True, options={"direct": direct})
    assert storage.size() == 8 * MIB
    assert storage.extent_at(MIB).length == 7 * MIB
    assert storage.identity() == open_file(block_device).identity()
    storage.write_zeroes(MIB, MIB)
    storage.write_zeroes(2 * MIB, MIB, allocate=True)
    storage.discard(4 * MIB, MIB)
    plain = open_file(block_device)
    storage.sync()
    assert read(plain, MIB - 1, 2 * MIB + 2) == b"\xaa" + bytes(2 * MIB) + b"\xaa"
    assert storage.size() == 8 * MIB
    storage.resize(8 * MIB)
    for size in (MIB, 9 * MIB):
        with pytest.raises(UnsupportedOperationError):
            storage.resize(size)
    if not direct:
        storage.write_zeroes(100, 50)
        assert read(storage, 99, 52) == b"\xaa" + bytes(50) + b"\xaa"
        with pytest.raises(StorageError):
            storage.writev((b"too far",), 8 * MIB)


def test_creating_on_a_block_device_wipes_it(block_device: str) -> None:
    with pytest.raises(StorageExistsError):
        create(block_device)
    with pytest.raises(UnsupportedOperationError):
        create(block_device, size=9 * MIB, overwrite=True)
    storage = create(block_device, size=MIB, overwrite=True)
    assert storage.size() == 8 * MIB
    assert not any(read(storage, 0, 8 * MIB))
    storage.abandon()
    storage.close()
    assert os.path.exists(block_device)


def test_reading_without_waiting_is_possible_where_files_are_memory() -> None:
    memory = "/dev/shm"  # noqa: S108 - a real tmpfs is what is tested
    if not os.path.isdir(memory):
        pytest.skip("no filesystem in memory here")
    with tempfile.NamedTemporaryFile(dir=memory) as file:
        file.write(b"x" * 8192)
        file.flush()
        storage = FileStorage.open(StorageOpenOptions(name=file.name))
        try:
            buffer = bytearray(4096)
            storage.try_readv((buffer,), 0)  # finds out what the filesystem can
            assert storage.try_readv((buffer,), 4096) == 4096
            assert buffer == b"x" * 4096
        finally:
            storage.close()
