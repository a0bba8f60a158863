"""A hash of a disk's bytes, the same however they are stored.

Version 1, with *H* a hash function: the disk, filled up with zeroes to whole blocks of 64 KiB, is a
list of blocks; 1,024 blocks (or what is left at the end) are a group. The hash of a group is *H* of
the *H* of its blocks, one after the other; that of the disk is *H* of ``underlay-digest-1``, a zero
byte, the disk's size in bytes (64 bits, big-endian), and the hashes of its groups. So zeroes cost
nothing, wherever they are, and blocks can be hashed in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import attrs

from underlay.errors import OptionError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.loading import Buffers, load
from underlay.jobs.opened import Source, in_use, opened
from underlay.jobs.pieces import in_whole_units
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.runs import Run, runs
from underlay.jobs.workers import in_parallel, sent, worker_count
from underlay.limits import Limits
from underlay.sync import SyncFormatAccess
from underlay.time_limit import check_time

if TYPE_CHECKING:
    import hashlib
    from concurrent.futures import Executor

__all__ = ["DIGEST_VERSION", "Digest", "digest"]

DIGEST_VERSION: Final = 1

_BLOCK: Final = 64 << 10
_GROUP: Final = 1024
_LABEL: Final = b"underlay-digest-1\0"
_ZEROES: Final = bytes(_BLOCK)
#: Data of one task, and how many pieces it may have.
_TASK: Final = 4 << 20
_TASK_PIECES: Final = 256
#: Groups of zeroes whose hashes are written at once.
_AT_ONCE: Final = 4096


@attrs.frozen(kw_only=True)
class Digest:
    """The hash of a disk. Equal ones mean equal sizes and equal bytes."""

    algorithm: str
    #: In hexadecimal digits.
    hex: str
    #: Guest bytes.
    size: int
    version: int = DIGEST_VERSION

    def __str__(self) -> str:
        return f"underlay{self.version}-{self.algorithm}:{self.hex}"


def digest(
    disk: Source,
    *,
    algorithm: str = "sha256",
    parallel: int | None = None,
    executor: Executor | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> Digest:
    """Hash the guest's bytes of ``disk``; what is known to be zeroes is not read.

    ``algorithm`` is one of ``hashlib``'s. The work is done by ``parallel`` threads (1 to 16), or by
    those of ``executor``. ``gate``, ``limits`` and ``storage_options`` are for a disk that is given
    by its name.

    Example::

        print(underlay.jobs.digest("disk.qcow2"))
        with underlay.open_any("disk.qcow2") as disk:
            print(underlay.jobs.digest(disk, algorithm="sha1"))

    Raises:
        OptionError: there is no such algorithm, or ``parallel`` is out of its range.
        CorruptImageError, StorageError: the disk cannot be read; says at which guest offset.
    """
    function = _function(algorithm)
    workers = worker_count(parallel)
    with opened(disk, gate=gate, limits=limits, storage_options=storage_options) as image:
        tree = _Tree(algorithm, function, image.size)
        _fill(tree, image, workers, executor, progress or _quiet)
        return Digest(algorithm=algorithm, hex=tree.root(), size=image.size)


def _fill(
    tree: _Tree,
    disk: SyncFormatAccess,
    workers: int,
    executor: Executor | None,
    report: ProgressCallback,
) -> None:
    hasher = _Hasher(disk, tree.leaf)
    waiting: dict[int, bytes | int] = {}
    done = begun = 0
    with ExitStack() as holds:
        holds.enter_context(disk.lease())
        report(Progress(0, disk.size))
        results = holds.enter_context(
            closing(
                in_parallel(
                    hasher.hash,
                    _tasks(disk),
                    parallel=workers,
                    executor=executor,
                    stop=hasher.stop,
                    elsewhere=sent(partial(_hash, tree.algorithm)),
                )
            )
        )
        for start, length, found in results:
            waiting[start] = found
            while begun in waiting:
                begun += tree.add(waiting.pop(begun))
            done += length
            report(Progress(done, disk.size))


def _hash(algorithm: str, task: _Task) -> tuple[int, int, bytes | int]:
    """Do one task, in another process."""
    function = _function(algorithm)
    return _Hasher(None, lambda data: function(data).digest()).hash(task)


def _quiet(progress: Progress) -> None:
    """Tell nobody."""


def _function(algorithm: str) -> Callable[..., hashlib._Hash]:
    import hashlib

    try:
        made = hashlib.new(algorithm)
        made.digest()
    except (ValueError, TypeError):  # unknown, or of no fixed length
        known = ", ".join(sorted(hashlib.algorithms_guaranteed))
        raise OptionError(
            f"'{algorithm}' is no hash function of a fixed length; known: {known}",
            option="algorithm",
        ) from None

    def hashed(data: bytes | memoryview = b"") -> hashlib._Hash:
        return hashlib.new(algorithm, data)

    return hashed


class _Tree:
    """Puts the hashes of blocks together."""

    def __init__(self, algorithm: str, function: Callable[..., hashlib._Hash], size: int) -> None:
        self.algorithm = algorithm
        self._function = function
        self._zero_block = self.leaf(memoryview(_ZEROES))
        self._width = len(self._zero_block)
        self._zero_group = self.leaf(self._zero_block * _GROUP)
        self._root = function(_LABEL + size.to_bytes(8, "big"))
        #: The hashes of the group's blocks so far.
        self._group = bytearray()

    def leaf(self, data: bytes | memoryview) -> bytes:
        """The hash of one block, or group."""
        return self._function(data).digest()

    def add(self, found: bytes | int) -> int:
        """Add the hashes of blocks, or so many blocks of zeroes; how many blocks that were."""
        if isinstance(found, bytes):
            self._add(found)
            return len(found) // self._width
        first = min(found, -(len(self._group) // self._width) % _GROUP)
        self._add(self._zero_block * first)
        groups, rest = divmod(found - first, _GROUP)
        for at in range(0, groups, _AT_ONCE):
            check_time()
            self._root.update(self._zero_group * min(_AT_ONCE, groups - at))
        self._add(self._zero_block * rest)
        return found

    def _add(self, leaves: bytes) -> None:
        self._group += leaves
        full = self._width * _GROUP
        while len(self._group) >= full:
            self._root.update(self.leaf(bytes(self._group[:full])))
            del self._group[:full]

    def root(self) -> str:
        """The hash of all."""
        if self._group:
            self._root.update(self.leaf(bytes(self._group)))
            self._group.clear()
        return self._root.hexdigest()


class _Task(NamedTuple):
    #: Runs that follow each other, each list read at once; zeroes are a task of their own.
    pieces: list[list[Run]]
    #: Guest bytes.
    start: int
    length: int


def _tasks(disk: SyncFormatAccess) -> Iterator[_Task]:
    pieces: list[list[Run]] = []
    start = at = 0
    with closing(runs(disk, 0, disk.size)) as found:
        for piece in in_whole_units(found, _BLOCK):
            end = piece[-1].end
            if len(piece) == 1 and piece[0].storage is None:
                if pieces:
                    yield _Task(pieces, start, at - start)
                yield _Task([], at, end - at)
                pieces, start = [], end
            else:
                pieces.append(piece)
                if end - start >= _TASK or len(pieces) >= _TASK_PIECES:
                    yield _Task(pieces, start, end - start)
                    pieces, start = [], end
            at = end
    if pieces:
        yield _Task(pieces, start, at - start)


class _Hasher:
    """Does the tasks, in many threads at once."""

    def __init__(self, disk: SyncFormatAccess | None, leaf: Callable[[memoryview], bytes]) -> None:
        #: None in another process.
        self._disk = disk
        self._leaf = leaf
        self._zero = leaf(memoryview(_ZEROES))
        self._buffers = Buffers()
        self._stopped = False

    def stop(self) -> None:
        """Let the tasks end before their next piece."""
        self._stopped = True

    def hash(self, task: _Task) -> tuple[int, int, bytes | int]:
        """Do a task: its first block, its bytes, and the blocks' hashes or how many are zeroes."""
        first = task.start // _BLOCK
        if not task.pieces:
            return first, task.length, -(-task.length // _BLOCK)
        leaves: list[bytes] = []
        with in_use(self._disk), self._buffers.lend() as scratch:
            for piece in task.pieces:
                if self._stopped:
                    break
                length = piece[-1].end - piece[0].start
                scratch.make_room(length + _BLOCK)
                view = memoryview(scratch.first)
                load(piece, view[:length], scratch)
                view[length : length + _BLOCK] = _ZEROES  # the disk's last block may be shorter
                for at in range(0, length, _BLOCK):
                    if scratch.first.startswith(_ZEROES, at):
                        leaves.append(self._zero)
                    else:
                        leaves.append(self._leaf(view[at : at + _BLOCK]))
        return first, task.length, b"".join(leaves)
