"""What an image may make the program open: only what the gate says, however the name is written."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest

import underlay
from underlay.gate import (
    Allow,
    Deny,
    DirectoryGate,
    GateDecision,
    ImplicitOpenGate,
    ImplicitOpenRequest,
    OpenedObject,
    PermissiveImplicitOpenGate,
    Reference,
    ReferenceKind,
    Substitute,
)
from underlay_storage.memory import MemoryStorage

from .toy_format import pack

pytestmark = pytest.mark.usefixtures("toy")

_CONTENT = b"what the backing image holds".ljust(4096, b".") * 3


@attrs.define
class RecordingGate(ImplicitOpenGate):
    """Answers what it was told to, and remembers what it was asked."""

    answer: GateDecision = attrs.field(factory=Allow)
    verdict: Allow | Deny = attrs.field(factory=Allow)
    asked: list[ImplicitOpenRequest] = attrs.field(factory=list[ImplicitOpenRequest])
    opened: list[OpenedObject] = attrs.field(factory=list[OpenedObject])

    def decide(self, request: ImplicitOpenRequest) -> GateDecision:
        self.asked.append(request)
        return self.answer

    def confirm(self, request: ImplicitOpenRequest, opened: OpenedObject) -> Allow | Deny:
        self.opened.append(opened)
        return self.verdict


def _overlay(folder: Path, backing: str, *, backing_format: str | None = "toy") -> Path:
    """An image with nothing of its own that names ``backing``."""
    image = folder / "overlay.toy"
    image.write_bytes(pack(bytes(len(_CONTENT)), backing=backing, backing_format=backing_format))
    return image


def _base(folder: Path, name: str = "base.toy") -> Path:
    folder.mkdir(exist_ok=True)
    base = folder / name
    base.write_bytes(pack(_CONTENT))
    return base


def _read(image: Path, gate: ImplicitOpenGate) -> bytes:
    with underlay.open_any(image, gate=gate) as disk:
        return disk.read_bytes(0, disk.size)


# -- the default


@pytest.mark.parametrize("gate", [None, underlay.DenyImplicitOpenGate()])
def test_nothing_is_opened_unless_a_gate_allows_it(
    tmp_path: Path, gate: ImplicitOpenGate | None
) -> None:
    _base(tmp_path)
    image = _overlay(tmp_path, "base.toy")
    with pytest.raises(underlay.ImplicitOpenDeniedError) as caught:
        underlay.open_any(image, gate=gate)
    message = str(caught.value)
    for part in ("base.toy", str(image), "backing file", "DirectoryGate()"):
        assert part in message
    assert caught.value.request.reference.name == "base.toy"
    assert caught.value.reason


def test_a_data_file_is_asked_for_like_a_backing_file(tmp_path: Path) -> None:
    image = tmp_path / "image.toy"
    image.write_bytes(pack(_CONTENT, data_file="/etc/passwd"))
    with pytest.raises(underlay.ImplicitOpenDeniedError, match="data file '/etc/passwd'"):
        underlay.open_any(image)
    with pytest.raises(underlay.ImplicitOpenDeniedError, match="outside"):
        underlay.open_any(image, gate=DirectoryGate())


def test_a_denied_name_cannot_write_on_the_terminal(tmp_path: Path) -> None:
    image = _overlay(tmp_path, "x'\n\x1b[31m\udcff")
    with pytest.raises(underlay.ImplicitOpenDeniedError) as caught:
        underlay.open_any(image)
    assert str(caught.value).isprintable()
    assert r"x\'\n\x1b[31m" in str(caught.value)


# -- what a gate is asked


def test_a_gate_is_told_all_about_the_name(tmp_path: Path) -> None:
    base = _base(tmp_path)
    middle = tmp_path / "middle.toy"
    middle.write_bytes(pack(b"", size=len(_CONTENT), backing="base.toy"))
    image = _overlay(tmp_path, "./middle.toy")
    gate = RecordingGate()
    assert _read(image, gate) == _CONTENT
    first, second = gate.asked
    assert first == ImplicitOpenRequest(
        reference=Reference(kind=ReferenceKind.BACKING, name="./middle.toy", format="toy"),
        resolved=first.resolved,
        scheme=None,
        image=str(image),
        image_folder=os.path.realpath(tmp_path),
        depth=1,
    )
    assert os.path.normpath(first.resolved or "") == str(middle)
    assert (second.depth, second.image) == (2, first.resolved)
    assert os.path.normpath(second.resolved or "") == str(base)
    assert [opened.real_path for opened in gate.opened] == [
        os.path.realpath(middle),
        os.path.realpath(base),
    ]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("memory:x", "memory"),
        ("file:///etc/passwd", "file"),
        ("nbd://host/x", None),
        ('json:{"driver": "file"}', None),
        ("C:\\disk", None),
        ("plain", None),
    ],
)
def test_a_gate_is_told_of_a_registered_scheme(
    tmp_path: Path, name: str, scheme: str | None
) -> None:
    gate = RecordingGate(Deny("for the test"))
    with pytest.raises(underlay.ImplicitOpenDeniedError, match="for the test"):
        underlay.open_any(_overlay(tmp_path, name), gate=gate)
    (request,) = gate.asked
    assert request.scheme == scheme
    assert request.reference.name == name
    assert request.resolved is not None
    assert os.path.isabs(request.resolved)


def test_a_gate_is_not_asked_for_what_the_caller_gave_or_suppressed(tmp_path: Path) -> None:
    image = _overlay(tmp_path, "/nowhere")
    gate = RecordingGate(Deny("never"))
    with underlay.open_image(image, format="toy", backing=None, gate=gate) as disk:
        assert disk.read_bytes(0, disk.size) == bytes(len(_CONTENT))
    with (
        underlay.open_any(_base(tmp_path)) as base,
        underlay.open_image(image, format="toy", backing=base, gate=gate) as disk,
    ):
        assert disk.read_bytes(0, disk.size) == _CONTENT
    assert gate.asked == []


# -- what a gate answers


def test_a_gate_may_give_a_disk_or_a_storage_instead(tmp_path: Path) -> None:
    image = _overlay(tmp_path, "/nowhere")
    storage = MemoryStorage(pack(_CONTENT))
    with underlay.open_image(storage, format="toy") as disk:
        assert _read(image, RecordingGate(Substitute(disk))) == _CONTENT
        assert disk.read_bytes(0, 4) == _CONTENT[:4], "it stays the caller's"
    assert _read(image, RecordingGate(Substitute(storage))) == _CONTENT
    assert storage.size(), "it stays the caller's"
    assert _read(image, RecordingGate(Substitute(None))) == bytes(len(_CONTENT))


def test_a_storage_given_instead_is_not_probed(tmp_path: Path) -> None:
    image = _overlay(tmp_path, "x", backing_format=None)
    with pytest.raises(underlay.InvalidImageError, match="records no format"):
        underlay.open_any(image, gate=RecordingGate(Substitute(MemoryStorage(pack(_CONTENT)))))


@pytest.mark.parametrize("answer", [None, True, "allow", Allow])
def test_whatever_is_no_answer_is_no_permission(tmp_path: Path, answer: object) -> None:
    _base(tmp_path)
    image = _overlay(tmp_path, "base.toy")
    with pytest.raises(TypeError, match="gate"):
        underlay.open_any(image, gate=RecordingGate(answer))  # type: ignore[arg-type]
    gate = RecordingGate(verdict=answer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gate"):
        underlay.open_any(image, gate=gate)


def test_a_gate_may_refuse_what_was_really_opened(tmp_path: Path) -> None:
    _base(tmp_path)
    gate = RecordingGate(verdict=Deny("not that one"))
    with pytest.raises(underlay.ImplicitOpenDeniedError, match="not that one"):
        underlay.open_any(_overlay(tmp_path, "base.toy"), gate=gate)


def test_a_gate_that_raises_stops_the_open(tmp_path: Path) -> None:
    class Broken(ImplicitOpenGate):
        def decide(self, request: ImplicitOpenRequest) -> GateDecision:
            raise KeyError(request.reference.name)

    _base(tmp_path)
    with pytest.raises(KeyError):
        underlay.open_any(_overlay(tmp_path, "base.toy"), gate=Broken())


# -- folders


def test_the_images_own_folder_and_below(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside, inside / "below"):
        _base(folder)
    for name in ("base.toy", "below/base.toy", str(inside / "base.toy"), "below/../base.toy"):
        assert _read(_overlay(inside, name), DirectoryGate()) == _CONTENT
    for name in ("../outside/base.toy", str(outside / "base.toy"), "below/../../outside/base.toy"):
        with pytest.raises(underlay.ImplicitOpenDeniedError, match="outside"):
            _read(_overlay(inside, name), DirectoryGate())


def test_given_folders_and_no_others(tmp_path: Path) -> None:
    home, shared = tmp_path / "home", tmp_path / "shared"
    home.mkdir()
    _base(shared)
    image = _overlay(home, str(shared / "base.toy"))
    assert _read(image, DirectoryGate(shared)) == _CONTENT
    assert _read(image, DirectoryGate(home, shared)) == _CONTENT
    _base(home)
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        _read(_overlay(home, "base.toy"), DirectoryGate(shared))
    neighbour = tmp_path / "shared-not"
    _base(neighbour)
    with pytest.raises(underlay.ImplicitOpenDeniedError):
        _read(_overlay(home, str(neighbour / "base.toy")), DirectoryGate(shared))


def test_a_symbolic_link_counts_as_what_it_leads_to(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    _base(inside)
    _base(outside)
    (inside / "out").symlink_to(outside / "base.toy")
    (inside / "folder").symlink_to(outside)
    (inside / "in").symlink_to("base.toy")
    (inside / "loop").symlink_to("loop")
    assert _read(_overlay(inside, "in"), DirectoryGate()) == _CONTENT
    for name in ("out", "folder/base.toy"):
        with pytest.raises(underlay.ImplicitOpenDeniedError):
            _read(_overlay(inside, name), DirectoryGate())
    with pytest.raises(underlay.UnderlayError):
        _read(_overlay(inside, "loop"), DirectoryGate())
    root_is_a_link = tmp_path / "link"
    root_is_a_link.symlink_to(outside)
    image = _overlay(inside, str(outside / "base.toy"))
    assert _read(image, DirectoryGate(root_is_a_link)) == _CONTENT


def test_a_link_swapped_in_between_changes_nothing(tmp_path: Path) -> None:
    """After the decision and before the open somebody puts a link in the file's place."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    _base(inside)
    _base(outside)
    image = _overlay(inside, "base.toy")

    class Raced(DirectoryGate):
        def decide(self, request: ImplicitOpenRequest) -> GateDecision:
            decision = super().decide(request)
            assert isinstance(decision, Allow)
            (inside / "base.toy").unlink()
            (inside / "base.toy").symlink_to(outside / "base.toy")
            return decision

    with pytest.raises(underlay.ImplicitOpenDeniedError, match="what was opened lies outside"):
        _read(image, Raced())


def test_direct_io_changes_nothing_for_a_gate(tmp_path: Path) -> None:
    _base(tmp_path)
    image = _overlay(tmp_path, "base.toy")
    try:
        disk = underlay.open_any(image, gate=DirectoryGate(), storage_options={"direct": True})
    except underlay.UnsupportedOperationError:
        pytest.skip("no direct I/O on this filesystem")
    with disk:
        assert disk.read_bytes(0, disk.size) == _CONTENT


def test_a_fifo_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for gate in (DirectoryGate(), PermissiveImplicitOpenGate()):
        with pytest.raises(underlay.StorageError, match="pipe"):
            _read(_overlay(tmp_path, "fifo", backing_format="raw"), gate)
    (tmp_path / "folder").mkdir()
    with pytest.raises(underlay.StorageError, match="directory"):
        _read(_overlay(tmp_path, "folder", backing_format="raw"), DirectoryGate())


@pytest.mark.parametrize(
    "name", ["", "\0", "a\0b", "x" * 5000, "..", "/", "\udcff", "~root", "$HOME"]
)
def test_a_name_that_is_no_name_is_an_error_of_underlays(tmp_path: Path, name: str) -> None:
    image = tmp_path / "image.toy"
    for gate in (DirectoryGate(), DirectoryGate("/"), PermissiveImplicitOpenGate()):
        image.write_bytes(pack(b"x" * 4096, data_file=name[:4000] or "."))
        with pytest.raises(underlay.UnderlayError):
            underlay.open_any(image, gate=gate)


@pytest.mark.parametrize(
    "name", ["file:base.toy", "memory:base.toy", "json:base.toy", "nbd://base.toy"]
)
def test_a_name_in_an_image_is_a_plain_name(tmp_path: Path, name: str) -> None:
    """Not a URL: the file that is really called so is what it means."""
    (tmp_path / "nbd:").mkdir()
    (tmp_path / name).write_bytes(pack(_CONTENT))
    assert _read(_overlay(tmp_path, name), DirectoryGate()) == _CONTENT


def test_only_a_gate_makes_a_name_a_url(tmp_path: Path) -> None:
    image = _overlay(tmp_path, "memory:gates-url")
    with underlay.create("memory:gates-url", format="raw", size=len(_CONTENT)) as disk:
        disk.resize(len(pack(_CONTENT)))
        disk.write(pack(_CONTENT), 0)
    try:
        assert _read(image, PermissiveImplicitOpenGate()) == _CONTENT
        with pytest.raises(underlay.StorageNotFoundError):
            _read(image, DirectoryGate())
        with pytest.raises(underlay.StorageNotFoundError):
            _read(image, DirectoryGate("/"))
    finally:
        MemoryStorage.remove("gates-url")


def test_names_on_a_storage_without_paths_lie_in_no_folder() -> None:
    with underlay.create("memory:dir/base", format="raw", size=4096):
        pass
    with underlay.create("memory:dir/top", format="raw", size=1 << 20) as disk:
        disk.write(pack(b"", size=4096, backing="base", backing_format="raw"), 0)
    try:
        for gate in (DirectoryGate(), DirectoryGate(os.getcwd()), DirectoryGate("/")):
            with pytest.raises(underlay.ImplicitOpenDeniedError, match="leads to no file"):
                underlay.open_image("memory:dir/top", format="toy", gate=gate)
        recording = RecordingGate()
        with underlay.open_image("memory:dir/top", format="toy", gate=recording) as disk:
            assert disk.read_bytes(0, 4096) == bytes(4096)
        assert recording.asked[0].resolved == "memory:dir/base"
        assert recording.asked[0].image_folder is None
        assert recording.opened[0].real_path is None
    finally:
        MemoryStorage.remove("dir/base")
        MemoryStorage.remove("dir/top")


# -- formats of backing files


def test_a_backing_file_without_a_format_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    image = _overlay(tmp_path, "base.toy", backing_format=None)
    with pytest.raises(underlay.InvalidImageError, match=r"records no format.*probe=True"):
        _read(image, DirectoryGate())
    _base(tmp_path)
    with pytest.raises(underlay.InvalidImageError, match="records no format"):
        _read(image, PermissiveImplicitOpenGate())
    assert _read(image, DirectoryGate(probe=True)) == _CONTENT
    assert _read(image, PermissiveImplicitOpenGate(probe=True)) == _CONTENT


def test_a_recorded_format_is_believed_and_not_probed(tmp_path: Path) -> None:
    base = _base(tmp_path)
    image = _overlay(tmp_path, "base.toy", backing_format="raw")
    assert _read(image, DirectoryGate()) == base.read_bytes()[: len(_CONTENT)]
    base.write_bytes(b"not a toy")
    with pytest.raises(underlay.InvalidImageError):
        _read(_overlay(tmp_path, "base.toy"), DirectoryGate())


def test_an_unknown_recorded_format_is_an_error_before_anything_is_opened(tmp_path: Path) -> None:
    image = _overlay(tmp_path, "base.toy", backing_format="nonesuch")
    gate = RecordingGate()
    with pytest.raises(underlay.PluginError, match="nonesuch"):
        _read(image, gate)
    assert gate.opened == []
