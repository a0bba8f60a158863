"""Locks on image files: ours are honoured by the real QEMU, and QEMU's by us."""

from __future__ import annotations

import errno
import fcntl
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from underlay.errors import ImageInUseError
from underlay.storage import StorageCreateOptions, StorageOpenOptions
from underlay_storage.file import FileStorage

Paths = Callable[[str], str]
Holder = Callable[..., AbstractContextManager[None]]
SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path, qemu_img: Callable[..., str]) -> Path:
    # Not raw: of a raw image qemu-io, with no guest to protect, lets anybody write what it reads.
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    return path


@contextmanager
def opened(path: Path, *, writable: bool, lock: bool = True) -> Generator[FileStorage]:
    storage = FileStorage.open(StorageOpenOptions(name=str(path), writable=writable, lock=lock))
    try:
        yield storage
    finally:
        storage.close()


def qemu_io_can(qemu: Paths, path: Path, *options: str, do: str) -> bool:
    command = [qemu("qemu-io"), "-f", "qcow2", *options, "-c", do, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        assert "lock" in done.stderr, done.stderr
    return done.returncode == 0


@contextmanager
def held_by_qemu_io(qemu: Paths, path: Path, *options: str) -> Generator[None]:
    command = [qemu("qemu-io"), "-f", "qcow2", *options, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"length\n")
        process.stdin.flush()
        said = b""
        while b"MiB" not in said:  # it has answered, so it has opened the image
            byte = process.stdout.read(1)
            assert byte, "qemu-io ended"
            said += byte
        yield
        process.communicate(b"quit\n")


@contextmanager
def held_by_qemu_nbd(qemu: Paths, path: Path, *options: str) -> Generator[None]:
    listen = ("-t", "-k", str(path.with_suffix(".sock")))
    command = [qemu("qemu-nbd"), "-f", "qcow2", *listen, *options, str(path)]
    with subprocess.Popen(command) as process:
        try:
            while not greets(path.with_suffix(".sock")):
                assert process.poll() is None, "qemu-nbd ended"
                time.sleep(0.01)
            yield
        finally:
            process.kill()


def greets(address: Path) -> bool:
    """Whether a server is up, which by then has opened its image."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(address))
        except OSError:
            return False
        return client.recv(8) == b"NBDMAGIC"


def test_while_we_write_qemu_neither_writes_nor_reads(qemu: Paths, image: Path) -> None:
    with opened(image, writable=True) as storage:
        assert storage.describe() == {"locked": True}
        assert not qemu_io_can(qemu, image, do="write 0 4k")
        assert not qemu_io_can(qemu, image, "-r", do="read 0 4k")
        assert qemu_io_can(qemu, image, "-r", "-U", do="read 0 4k")
    assert qemu_io_can(qemu, image, do="write 0 4k")


def test_while_we_read_qemu_reads_and_does_not_write(qemu: Paths, image: Path) -> None:
    with opened(image, writable=False), opened(image, writable=False):
        assert not qemu_io_can(qemu, image, do="write 0 4k")
        assert qemu_io_can(qemu, image, "-r", do="read 0 4k")


def test_what_is_opened_without_locks_keeps_nobody_away(qemu: Paths, image: Path) -> None:
    with opened(image, writable=True, lock=False) as storage:
        assert storage.describe() == {"locked": False}
        assert qemu_io_can(qemu, image, do="write 0 4k")


@pytest.mark.parametrize("holder", [held_by_qemu_io, held_by_qemu_nbd])
def test_while_qemu_writes_we_neither_read_nor_write(
    qemu: Paths, image: Path, holder: Holder
) -> None:
    before = image.read_bytes()
    with holder(qemu, image):
        for writable in (False, True):
            with pytest.raises(ImageInUseError, match="lock=False") as caught:
                FileStorage.open(StorageOpenOptions(name=str(image), writable=writable))
            assert caught.value.filename == str(image)
            again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
            assert (str(again), again.filename) == (str(caught.value), str(image))
            with opened(image, writable=writable, lock=False):
                pass
        with pytest.raises(ImageInUseError):
            FileStorage.create_open(StorageCreateOptions(name=str(image), overwrite=True))
    assert image.read_bytes() == before
    with opened(image, writable=True):
        pass


@pytest.mark.parametrize("holder", [held_by_qemu_io, held_by_qemu_nbd])
def test_while_qemu_reads_we_read_and_do_not_write(
    qemu: Paths, image: Path, holder: Holder
) -> None:
    with holder(qemu, image, "-r"):
        with opened(image, writable=False):
            pass
        with pytest.raises(ImageInUseError):
            FileStorage.open(StorageOpenOptions(name=str(image), writable=True))


def test_a_refused_open_leaves_no_lock_behind(qemu: Paths, image: Path) -> None:
    with opened(image, writable=False):
        with pytest.raises(ImageInUseError):
            FileStorage.open(StorageOpenOptions(name=str(image), writable=True))
        assert qemu_io_can(qemu, image, "-r", do="read 0 4k")


def test_two_handles_of_one_program_exclude_each_other_too(image: Path) -> None:
    with opened(image, writable=True):
        for writable in (False, True):
            with pytest.raises(ImageInUseError):
                FileStorage.open(StorageOpenOptions(name=str(image), writable=writable))
    with opened(image, writable=True):
        pass


def test_a_new_file_is_locked_from_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "new"
    storage = FileStorage.create_open(StorageCreateOptions(name=str(path), size=SIZE))
    with pytest.raises(ImageInUseError):
        FileStorage.open(StorageOpenOptions(name=str(path)))
    storage.close()


def test_a_file_that_is_locked_whole_is_in_use(image: Path) -> None:
    # A lock of the old kind, as a backup program may take it.
    code = (
        "import fcntl, sys; f = open(sys.argv[1], 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX);"
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ImageInUseError):
            FileStorage.open(StorageOpenOptions(name=str(image)))
        process.communicate(b"\n")


def test_a_filesystem_without_locks_goes_on_and_says_so(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stands in for a network filesystem without a lock server.
    def refuse(*_: object) -> bytes:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with opened(image, writable=True) as storage:
        assert storage.describe() == {"locked": False}
