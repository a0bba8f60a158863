"""Names that reach further than they look: links, ``/proc``, devices, pipes, and swapped files."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay.gate import DirectoryGate, ImplicitOpenGate, PermissiveImplicitOpenGate

from .toy_format import pack

pytestmark = pytest.mark.usefixtures("toy")

_SECRET = b"the host's own".ljust(4096, b"!")
_CONTENT = b"what may be read".ljust(4096, b".")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images beside one that is none of theirs."""
    (tmp_path / "host").mkdir()
    (tmp_path / "host" / "secret").write_bytes(_SECRET)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "base").write_bytes(_CONTENT)
    return folder


def _read(folder: Path, name: str, gate: ImplicitOpenGate) -> bytes:
    """What an image in the folder shows that names this as its raw backing file."""
    image = folder / "overlay.toy"
    image.write_bytes(pack(bytes(4096), backing=name, backing_format="raw"))
    with underlay.open_any(image, gate=gate) as disk:
        return disk.read_bytes(0, disk.size)


@contextmanager
def _descriptor(path: Path) -> Generator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# -- what lies elsewhere


@pytest.mark.parametrize(
    "name",
    [
        "../host/secret",
        "./.././images/../host/secret",
        "{tmp}/host/secret",
        "/{tmp}/host/secret",
        "{tmp}/images/../host/secret",
        "link",
        "link-to-link",
        "folder-link/secret",
        "folder-link/../host/secret",
        "deep-link/../secret",
        "/proc/self/root{tmp}/host/secret",
        "/proc/self/fd/{fd}",
        "/proc/thread-self/fd/{fd}",
        "/dev/fd/{fd}",
        "/proc/self/fd/{fd}/../fd/{fd}",
        "/dev/zero",
        "/etc/hostname",
    ],
)
def test_a_folders_gate_sees_where_a_name_really_leads(images: Path, name: str) -> None:
    host = images.parent / "host"
    (host / "deep").mkdir()
    (images / "link").symlink_to("../host/secret")
    (images / "link-to-link").symlink_to("link")
    (images / "folder-link").symlink_to(host)
    (images / "deep-link").symlink_to(host / "deep")
    with _descriptor(host / "secret") as descriptor:
        name = name.format(tmp=images.parent, fd=descriptor)
        with pytest.raises(underlay.ImplicitOpenDeniedError, match="outside"):
            _read(images, name, DirectoryGate())
        if "secret" in name or "link" in name or "/fd/" in name:
            try:
                found = _read(images, name, PermissiveImplicitOpenGate())
            except underlay.StorageError:
                assert "/../fd/" in name
            else:
                assert found == _SECRET, "the name leads nowhere, so nothing was shown"


def test_a_name_by_descriptor_of_a_file_of_the_folder_is_one_of_the_folders(images: Path) -> None:
    with _descriptor(images / "base") as descriptor:
        assert _read(images, f"/proc/self/fd/{descriptor}", DirectoryGate()) == _CONTENT


def test_a_pipe_or_socket_by_descriptor_lies_in_no_folder(images: Path) -> None:
    reading, writing = os.pipe()
    with socket.socket() as connection:
        try:
            for descriptor in (reading, writing, connection.fileno()):
                name = f"/proc/self/fd/{descriptor}"
                for gate in (DirectoryGate(), DirectoryGate("/dev")):
                    with pytest.raises(underlay.ImplicitOpenDeniedError, match="outside"):
                        _read(images, name, gate)
                for anywhere in (DirectoryGate("/proc"), PermissiveImplicitOpenGate()):
                    with pytest.raises(underlay.StorageError, match="only regular files"):
                        _read(images, name, anywhere)
        finally:
            os.close(reading)
            os.close(writing)


def test_a_hard_link_is_the_file_itself(images: Path) -> None:
    """No path can tell it from a file of the folder; docs/security.md says so."""
    os.link(images.parent / "host" / "secret", images / "hard")
    assert _read(images, "hard", DirectoryGate()) == _SECRET


# -- names that are odd, and yet names


@pytest.mark.parametrize(
    "name",
    ["\udcff\udcfe", "a\nb", "\x1b[31m", " ", "-", "~", "$HOME", "a'b\"c", "%00", "nbd:x", "ü"],
)
def test_an_odd_name_is_a_name_and_nothing_else(images: Path, name: str) -> None:
    (images / name).write_bytes(_CONTENT)
    assert _read(images, name, DirectoryGate()) == _CONTENT
    assert _read(images, f"./{name}", DirectoryGate()) == _CONTENT


@pytest.mark.parametrize("name", ["a\0b", "base\0", "\0/etc/passwd", "/\0"])
def test_a_name_with_a_nul_byte_is_none(images: Path, name: str) -> None:
    for gate in (DirectoryGate(), DirectoryGate("/")):
        with pytest.raises(underlay.ImplicitOpenDeniedError):
            _read(images, name, gate)
    with pytest.raises(underlay.UnderlayError):
        _read(images, name, PermissiveImplicitOpenGate())


# -- what is no file


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "device", "dangling", "loop"])
@pytest.mark.parametrize("writable", [False, True])
def test_only_files_and_block_devices_are_opened(images: Path, kind: str, writable: bool) -> None:
    """Named by the caller as well as by an image; nobody waits for a pipe's other end."""
    path = images / kind
    listener = socket.socket(socket.AF_UNIX)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        listener.bind(str(path.relative_to(Path.cwd())) if len(str(path)) > 100 else str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to({"dangling": "nowhere", "loop": "loop"}[kind])
    with listener:
        for call in (
            lambda: underlay.open_any(path, writable=writable),
            lambda: underlay.open_image(path, format="raw", writable=writable),
            lambda: underlay.probe(path),
            lambda: underlay.inspect(path),
            lambda: _read(images, kind, PermissiveImplicitOpenGate()),
        ):
            with pytest.raises(underlay.StorageError):
                call()


# -- between the decision and the opening


def _put_link(path: Path) -> None:
    path.symlink_to("../host/secret")


@pytest.mark.parametrize(
    ("put", "error", "words"),
    [
        (_put_link, underlay.ImplicitOpenDeniedError, "what was opened lies outside"),
        (os.mkfifo, underlay.StorageError, "named pipe"),
        (os.mkdir, underlay.StorageError, "directory"),
    ],
    ids=["link", "fifo", "folder"],
)
def test_a_file_swapped_at_the_last_moment_is_noticed(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    put: Callable[[Path], None],
    error: type[Exception],
    words: str,
) -> None:
    """Between the look at what it is and the system call that opens it."""
    real = os.open

    def swapped(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if path == str(images / "base"):
            (images / "base").unlink()
            put(images / "base")
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(error, match=words):
        _read(images, "base", DirectoryGate())


def test_a_folder_swapped_in_between_is_noticed(images: Path) -> None:
    (images / "folder").mkdir()
    (images / "folder" / "secret").write_bytes(_CONTENT)

    class Raced(DirectoryGate):
        def decide(self, request: Any) -> Any:
            decision = super().decide(request)
            (images / "folder").rename(images / "was")
            (images / "folder").symlink_to("../host")
            return decision

    with pytest.raises(underlay.ImplicitOpenDeniedError, match="what was opened lies outside"):
        _read(images, "folder/secret", Raced())


# -- while it is open


def test_a_file_that_shrinks_or_grows_while_it_is_open_is_read_as_far_as_it_goes(
    images: Path,
) -> None:
    base = images / "base"
    image = images / "overlay.toy"
    image.write_bytes(pack(bytes(4096), backing="base", backing_format="raw"))
    with underlay.open_any(image, gate=DirectoryGate(), lock=False) as disk:
        os.truncate(base, 6)
        assert disk.read_bytes(0, disk.size) == _CONTENT[:6].ljust(4096, b"\0")
        base.write_bytes(_SECRET * 3)
        assert disk.read_bytes(0, disk.size) == _SECRET
    with underlay.open_any(image, gate=DirectoryGate(), lock=False) as disk:
        os.truncate(image, 0)
        assert disk.read_bytes(0, disk.size) == _SECRET, "its table is in memory"
    with underlay.open_image(base, format="raw", writable=True, lock=False) as disk:
        os.truncate(base, 0)
        disk.write(b"on", 100)
        assert disk.read_bytes(0, 102) == bytes(100) + b"on"
