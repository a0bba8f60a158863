"""How fast a disk answers: many requests of one size, some of them at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Final

import attrs

from underlay.errors import OptionError, OutOfRangeError
from underlay.gate import ImplicitOpenGate
from underlay.jobs.opened import Source, opened
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.workers import Running
from underlay.limits import Limits
from underlay.sync import SyncFormatAccess
from underlay.time_limit import check_time

__all__ = ["BenchResult", "bench"]

#: More threads than this would only wait for the interpreter.
_MOST_THREADS: Final = 16
#: Requests between two words of progress.
_STEP: Final = 256


@attrs.frozen(kw_only=True)
class BenchResult:
    """What was done, and how long it took."""

    requests: int
    #: Bytes of each.
    buffer_size: int
    flushes: int
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        """The rate, or 0 where it took no time."""
        return self.requests * self.buffer_size / self.seconds if self.seconds else 0.0


def bench(
    source: Source,
    *,
    count: int = 75_000,
    depth: int = 64,
    buffer_size: int = 4096,
    offset: int = 0,
    step: int | None = None,
    write: bool = False,
    pattern: int = 0,
    flush_interval: int | None = None,
    drain: bool = True,
    format: str | None = None,
    gate: ImplicitOpenGate | None = None,
    limits: Limits | None = None,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    progress: ProgressCallback | None = None,
) -> BenchResult:
    """Send ``count`` requests of ``buffer_size`` bytes, each ``step`` bytes after the one before.

    They begin at guest offset ``offset`` and go round at the end of the disk. At most ``depth`` of
    them are under way at once, each in a thread of its own as far as that helps. With ``write``
    bytes of the value ``pattern`` are written over what is there, and flushed after each
    ``flush_interval`` requests; with ``drain`` all that are under way are waited for first.

    Example::

        result = underlay.jobs.bench("disk.qcow2", count=1000, depth=1)
        print(f"{result.seconds / result.requests * 1e6:.1f} µs a request")

    Raises:
        OptionError: an argument makes no sense.
        OutOfRangeError: a request reaches past the end of the disk.
    """
    _check("count", count, 0)
    _check("depth", depth, 1)
    _check("buffer_size", buffer_size, 0)
    _check("offset", offset, 0)
    if flush_interval is not None:
        _check("flush_interval", flush_interval, 1)
    with opened(
        source,
        format=format,
        writable=write,
        gate=gate,
        limits=limits,
        lock=lock,
        storage_options=storage_options,
    ) as disk:
        offsets = _offsets(disk.size, count, buffer_size, offset, step or buffer_size)
        requests = _Requests(disk, offsets, write=bytes([pattern]) * buffer_size if write else None)
        requests.size, requests.total, requests.progress = buffer_size, count, progress
        started = time.perf_counter()
        if depth == 1:
            flushes = requests.one_by_one(flush_interval)
        else:
            flushes = requests.at_once(depth, flush_interval, drain=drain)
        seconds = time.perf_counter() - started
    return BenchResult(requests=count, buffer_size=buffer_size, flushes=flushes, seconds=seconds)


def _check(name: str, value: int, least: int) -> None:
    if value < least:
        raise OptionError(f"{name} is {value}, and cannot be less than {least}", option=name)


def _offsets(size: int, count: int, length: int, offset: int, step: int) -> Iterator[int]:
    for _ in range(count):
        if offset + length > size:
            raise OutOfRangeError(
                f"A request of {length} bytes at {offset} reaches past the disk's {size} bytes"
            )
        yield offset
        offset = (offset + step) % size if size else 0


@attrs.define
class _Requests:
    disk: SyncFormatAccess
    offsets: Iterator[int]
    #: What to write, or None to read.
    write: bytes | None = attrs.field(kw_only=True)
    size: int = 0
    total: int = 0
    progress: ProgressCallback | None = None

    def one_by_one(self, flush_interval: int | None) -> int:
        """In this thread; returns how many flushes there were."""
        send, flushes = self._sender(), 0
        for number, offset in enumerate(self.offsets, 1):
            send(offset)
            if flush_interval is not None and number % flush_interval == 0:
                self._flush()
                flushes += 1
            if number % _STEP == 0:
                self._tell(number)
        self._tell(self.total)
        return flushes

    def at_once(self, depth: int, flush_interval: int | None, *, drain: bool) -> int:
        """At most ``depth`` of them; returns how many flushes there were."""
        from concurrent.futures import ThreadPoolExecutor

        flushes = 0
        threads = min(depth, _MOST_THREADS)
        with ThreadPoolExecutor(threads) as executor:
            senders: list[Callable[[int], None]] = []

            def send(offset: int) -> None:
                # A thread that takes a buffer puts it back: there are as many as threads.
                sender = senders.pop() if senders else self._sender()
                try:
                    sender(offset)
                finally:
                    senders.append(sender)

            flying = Running(_do, executor, threads=threads)
            try:
                for number, offset in enumerate(self.offsets, 1):
                    _land(flying, depth - 1)
                    flying.begin(partial(send, offset))
                    if flush_interval is not None and number % flush_interval == 0:
                        if drain:
                            _land(flying, 0)
                        flying.begin(self._flush)
                        flushes += 1
                        if drain:
                            _land(flying, 0)
                    if number % _STEP == 0:
                        self._tell(number)
                _land(flying, 0)
            except BaseException:
                executor.shutdown(wait=True, cancel_futures=True)
                raise
        self._tell(self.total)
        return flushes

    def _sender(self) -> Callable[[int], None]:
        disk, data = self.disk, self.write
        if data is None:
            buffer = bytearray(self.size)
            return lambda offset: disk.read(buffer, offset)
        written = data
        return lambda offset: disk.write(written, offset)

    def _flush(self) -> None:
        self.disk.flush()
        self.disk.sync()

    def _tell(self, done: int) -> None:
        check_time()
        if self.progress is not None:
            self.progress(Progress(done * self.size, self.total * self.size))


def _do(request: Callable[[], None]) -> None:
    request()


def _land(flying: Running[Callable[[], None], None], most: int) -> None:
    """Wait until no more than ``most`` are under way."""
    while flying.count > most:
        flying.result()
