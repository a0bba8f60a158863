"""QEMU and we write one image in turn: each time nothing leaks, and every byte is right."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,  # pyright: ignore[reportUnknownVariableType]
)

import underlay
from underlay import SyncFormatAccess
from underlay.capabilities import CompressedWriter, Snapshottable

pytestmark = pytest.mark.slow

#: So many are the same ones each time; any other number tries others.
_EXAMPLES = 40


@attrs.frozen(kw_only=True)
class Kind:
    """How an image is made."""

    cluster: int
    options: dict[str, Any]
    data_file: bool
    backing: bool
    #: Whether QEMU creates it, or we do.
    theirs: bool

    @property
    def size(self) -> int:
        """Virtual bytes: over the border of an L2 table where that takes few clusters."""
        return 80 * self.cluster if self.cluster < 4096 else 24 * self.cluster

    @property
    def most(self) -> int:
        """How often a cluster can be counted."""
        bits: int = self.options.get("refcount_bits", 16)
        return (1 << bits) - 1

    @property
    def snapshots(self) -> bool:
        """Whether it can have two internal snapshots; QEMU leaks when it cannot count them."""
        return not self.data_file and self.most > 3

    @property
    def compression(self) -> bool:
        """Whether clusters may share another one, and still be counted in every snapshot."""
        return not self.data_file and self.most != 15


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """The cross of what an image can be made with."""
    extended = draw(st.booleans())
    cluster = draw(st.sampled_from([16 << 10, 64 << 10] if extended else [512, 4096, 64 << 10]))
    options: dict[str, Any] = {}
    data_file = False
    if extended:
        options["extended_l2"] = True
    elif draw(st.integers(0, 3)) == 0:
        options["compat"] = "v2"
    if "compat" not in options:
        options["refcount_bits"] = draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64]))
        options["compression_type"] = draw(st.sampled_from(["zlib", "zstd"]))
        options["lazy_refcounts"] = draw(st.booleans())
        data_file = draw(st.integers(0, 3)) == 0
    if data_file:
        options["data_file_raw"] = draw(st.booleans())
    backing = not data_file and draw(st.booleans())
    if not backing:
        options["preallocation"] = draw(st.sampled_from(["off", "off", "metadata"]))
    return Kind(
        cluster=cluster,
        options=options,
        data_file=data_file,
        backing=backing,
        theirs=draw(st.booleans()),
    )


#: Where to write, and how much: parts of the disk's size.
_place = st.tuples(st.integers(0, 255), st.sampled_from([-1, 0, 0, 0, 7, 512]))
_length = st.sampled_from([1, 100, 512, 1000, 4096, 8192, 65536, 70000])


class BothEnds(RuleBasedStateMachine):
    """One image, two programs, and what it must hold."""

    folder: Path
    tools: Callable[[str], str]

    def __init__(self) -> None:
        super().__init__()
        self.work = Path(tempfile.mkdtemp(dir=self.folder))
        self.disk: SyncFormatAccess | None = None
        self.value = 0
        self.snapshots: dict[str, bytearray] = {}

    @initialize(kind=kinds())
    def make(self, kind: Kind) -> None:
        self.kind = kind
        self.model = bytearray(kind.size)
        self.path = self.work / "disk.qcow2"
        options = dict(kind.options)
        if kind.backing:
            below = bytes(range(1, 252)) * (kind.size // 200)
            (self.work / "base.raw").write_bytes(below)
            self.model[:] = below[: kind.size]
            options |= {"backing_file": "base.raw", "backing_fmt": "raw"}
        if kind.data_file:
            options["data_file"] = "data.raw"
        options["cluster_size"] = kind.cluster
        if kind.theirs:
            told = ",".join(f"{name}={_told(value)}" for name, value in options.items())
            self.qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", told, self.path, kind.size)
        else:
            with contextlib.chdir(self.work):
                gate = underlay.DirectoryGate()
                underlay.create(self.path, size=kind.size, gate=gate, **options).close()

    def qemu(self, program: str, *arguments: object) -> None:
        """Let QEMU do what it must be able to do."""
        said = self.qemu_says(program, *arguments)
        assert not said, f"{program} {arguments}: {said}"

    def qemu_says(self, program: str, *arguments: object) -> str:
        """What QEMU has to say; nothing if all is well."""
        done = subprocess.run(
            [self.tools(program), *map(str, arguments)],
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        said = done.stdout + done.stderr
        return said or (f"exit {done.returncode}" if done.returncode else "")

    # -- turns

    def ours(self) -> SyncFormatAccess:
        """Our turn begins, if it has not."""
        if self.disk is None:
            gate = underlay.DirectoryGate()
            self.disk = underlay.open_image(self.path, format="qcow2", writable=True, gate=gate)
        return self.disk

    def end_our_turn(self) -> None:
        """Our turn ends, if it is ours: QEMU has to agree with all of it."""
        if self.disk is None:
            return
        disk, self.disk = self.disk, None
        disk.close()
        self.qemu("qemu-img", "check", "-q", self.path)
        raw = self.work / "model.raw"
        raw.write_bytes(self.model)
        self.qemu("qemu-img", "compare", "-q", "-F", "raw", "-f", "qcow2", self.path, raw)

        self.see_raw_data()

    def see_raw_data(self) -> None:
        """A raw data file holds what the guest sees, whoever looks into it."""
        if self.kind.options.get("data_file_raw"):
            assert (self.work / "data.raw").read_bytes() == self.model

    def theirs(self, command: str) -> None:
        """QEMU does something; we have to agree with it."""
        self.qemu("qemu-io", "-f", "qcow2", "-d", "unmap", "-c", command, self.path)
        self.agree()

    def agree(self) -> None:
        """We read what the model says."""
        gate = underlay.DirectoryGate()
        with underlay.open_image(self.path, format="qcow2", gate=gate) as disk:
            assert disk.size == len(self.model)
            assert disk.read_bytes(0, disk.size) == self.model

    def range(self, place: tuple[int, int], length: int) -> tuple[int, int]:
        """A range inside the disk."""
        size = len(self.model)
        offset = place[0] * size // 256
        offset = max(offset - offset % self.kind.cluster + place[1], 0)
        offset = min(offset, size - 1)
        return offset, min(length, size - offset)

    def data(self, offset: int, length: int, *, zero: bool = False) -> bytes:
        """What is written next, taken into the model."""
        self.value = self.value % 254 + 1
        data = bytes([0 if zero else self.value]) * length
        self.model[offset : offset + length] = data
        return data

    # -- what each does

    @rule(place=_place, length=_length)
    def we_write(self, place: tuple[int, int], length: int) -> None:
        offset, length = self.range(place, length)
        self.ours().write(self.data(offset, length), offset)

    @rule(place=_place, lengths=st.lists(_length, min_size=2, max_size=5))
    def we_write_pieces(self, place: tuple[int, int], lengths: list[int]) -> None:
        offset, length = self.range(place, sum(lengths))
        data = memoryview(self.data(offset, length))
        borders = [sum(lengths[:number]) for number in range(len(lengths) + 1)]
        pieces = [data[start:end] for start, end in itertools.pairwise(borders)]
        self.ours().writev(pieces, offset)

    @rule(place=_place, length=_length, discard=st.booleans())
    def we_zero(self, place: tuple[int, int], length: int, discard: bool) -> None:
        offset, length = self.range(place, length)
        disk = self.ours()
        (disk.discard_to_zero if discard else disk.write_zeroes)(offset, length)
        self.data(offset, length, zero=True)

    @rule(place=_place)
    def we_compress(self, place: tuple[int, int]) -> None:
        if not self.kind.compression:
            return
        cluster = self.kind.cluster
        offset, _ = self.range((place[0], 0), 1)
        if offset + cluster <= len(self.model):
            data = self.data(offset, cluster)
            writer = self.ours().capability(CompressedWriter)
            writer.write_encoded(offset, writer.encode(memoryview(data)))

    @rule()
    def we_flush(self) -> None:
        disk = self.ours()
        disk.flush()
        disk.sync()

    @rule(name=st.sampled_from("ab"))
    def we_take(self, name: str) -> None:
        if self.kind.snapshots and name not in self.snapshots:
            self.ours().capability(Snapshottable).create_snapshot(name)
            self.snapshots[name] = bytearray(self.model)

    @rule(name=st.sampled_from("ab"))
    def we_apply(self, name: str) -> None:
        if name in self.snapshots:
            self.ours().capability(Snapshottable).apply_snapshot(name)
            self.model[:] = self.snapshots[name]

    @rule(name=st.sampled_from("ab"))
    def we_delete(self, name: str) -> None:
        if name in self.snapshots:
            self.ours().capability(Snapshottable).delete_snapshot(name)
            del self.snapshots[name]

    @rule(change=st.sampled_from([-9, -1, 1, 9, 70]))
    def we_resize(self, change: int) -> None:
        if not self.snapshots:
            size = max(len(self.model) + change * self.kind.cluster // 2 * 2, 1024)
            self.ours().resize(size)
            self.model[:] = self.model[:size].ljust(size, b"\0")

    @rule()
    def we_read(self) -> None:
        assert self.ours().read_bytes(0, len(self.model)) == self.model

    @rule(place=_place, length=_length)
    def they_write(self, place: tuple[int, int], length: int) -> None:
        self.end_our_turn()
        offset, length = self.range(place, length)
        self.data(offset, length)
        self.theirs(f"write -q -P {self.value} {offset} {length}")

    @rule(place=_place, length=_length, unmap=st.sampled_from(["", "-u"]))
    def they_zero(self, place: tuple[int, int], length: int, unmap: str) -> None:
        self.end_our_turn()
        offset, length = self.range(place, length)
        self.data(offset, length, zero=True)
        self.theirs(f"write -q -z {unmap} {offset} {length}")

    @rule(place=_place, clusters=st.integers(1, 20))
    def they_discard(self, place: tuple[int, int], clusters: int) -> None:
        # What it discards of version 2 and of a raw data file may keep its data.
        if "compat" not in self.kind.options and not self.kind.options.get("data_file_raw"):
            self.end_our_turn()
            cluster = self.kind.cluster
            offset, _ = self.range((place[0], 0), 1)
            length = min(clusters * cluster, (len(self.model) - offset) // cluster * cluster)
            if length:
                self.data(offset, length, zero=True)
                self.theirs(f"discard -q {offset} {length}")

    @rule(change=st.sampled_from([-9, -1, 1, 9, 70]))
    def they_resize(self, change: int) -> None:
        # It does not hide what a longer backing image has with version 2.
        if not (self.snapshots or (self.kind.backing and "compat" in self.kind.options)):
            self.end_our_turn()
            size = max(len(self.model) + change * self.kind.cluster // 2 * 2, 1024)
            shrink = ["--shrink"] if size < len(self.model) else []
            self.qemu("qemu-img", "resize", "-q", *shrink, "-f", "qcow2", self.path, size)
            self.model[:] = self.model[:size].ljust(size, b"\0")
            self.agree()

    @rule(place=_place)
    def they_compress(self, place: tuple[int, int]) -> None:
        if not self.kind.compression:
            return
        self.end_our_turn()
        cluster = self.kind.cluster
        offset, _ = self.range((place[0], 0), 1)
        if offset + cluster <= len(self.model):
            before = bytes(self.model)
            self.data(offset, cluster)
            command = f"write -q -c -P {self.value} {offset} {cluster}"
            said = self.qemu_says("qemu-io", "-f", "qcow2", "-c", command, self.path)
            if "Input/output error" in said:
                # It does not compress what is there already.
                self.model[:] = before
            else:
                assert not said
            self.agree()

    @rule(name=st.sampled_from("ab"), how=st.sampled_from(["-c", "-a", "-d"]))
    def they_use_snapshots(self, name: str, how: str) -> None:
        if not self.kind.snapshots or (name in self.snapshots) == (how == "-c"):
            return
        self.end_our_turn()
        self.qemu("qemu-img", "snapshot", "-q", how, name, self.path)
        if how == "-c":
            self.snapshots[name] = bytearray(self.model)
        elif how == "-a":
            self.model[:] = self.snapshots[name]
        else:
            del self.snapshots[name]
        self.agree()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.end_our_turn()
            self.qemu("qemu-img", "check", "-q", self.path)


def _told(value: object) -> str:
    """An option's value as qemu-img takes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return {"v2": "0.10"}.get(str(value), str(value))


def test_qemu_and_we_write_one_image_in_turn(
    qemu: Callable[[str], str], tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    qemu("qemu-img")
    qemu("qemu-io")
    examples = pytestconfig.getoption("--both-ends")
    assert isinstance(examples, int)
    machine = type("Machine", (BothEnds,), {"folder": tmp_path, "tools": staticmethod(qemu)})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            derandomize=examples == _EXAMPLES,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            print_blob=True,
            suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
        ),
    )
