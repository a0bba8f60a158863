"""Work done by other processes, on this machine or on others: by an executor that pickles.

A thread of the job waits for each task that is done elsewhere, and goes on with what comes back;
so a job stops, ends and reports as it does with threads alone. What is sent is a value: in place of
an open storage stands how to open the same object again, in place of an image what decodes its
units. All else (mappings, what a gate allowed, locks) was settled here: a worker reads host bytes
of objects that it is told, and changes nothing. So a task may be done twice, or by a worker that
everybody took for dead.
"""

from __future__ import annotations

import io
import pickle
import secrets
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar, cast

import attrs

from underlay.driver import FormatDriverInstance
from underlay.errors import (
    StorageChangedError,
    UnderlayError,
    UnsupportedOperationError,
    WorkerError,
)
from underlay.face import run_blocking
from underlay.handle import StorageHandle
from underlay.storage import Reopening
from underlay.targets import open_storage
from underlay.time_limit import check_time, time_left

__all__ = ["Elsewhere", "shares_memory"]

T = TypeVar("T")
R = TypeVar("R")

_HINT = "use threads for it (parallel=, or an executor of threads)"


class _Token:
    """Something that does not arrive in another process."""

    def __reduce__(self) -> tuple[type[bool], tuple[()]]:
        return bool, ()


def _arrived(token: object) -> bool:
    return isinstance(token, _Token)


def shares_memory(executor: Executor) -> bool:
    """Whether what an executor calls sees this process's objects themselves.

    Raises:
        WorkerError: it calls nothing.
    """
    if isinstance(executor, ThreadPoolExecutor):
        return True
    return bool(_Calls(executor).call(_arrived, _Token(), wait=time_left))


class Elsewhere(Generic[T, R]):
    """Does tasks of a job with an executor of other processes: ``do`` in place of ``work``.

    ``work``, the tasks and the results have to pickle, but for the storages and images in tasks.
    """

    def __init__(self, executor: Executor, work: Callable[[T], R]) -> None:
        self._calls = _Calls(executor)
        self._work = work
        self._reopenings: dict[int, Reopening] = {}

    def do(self, task: T) -> R:
        """Send a task, and wait for its result; called in threads of the job.

        Raises:
            UnsupportedOperationError: something of the task cannot be had in another process.
            WorkerError: the workers failed.
            UnderlayError: what the work raised.
        """
        return cast("R", self._calls.call(_do, self._parcel(task)))

    def stop(self) -> None:
        """Wait no longer for what was sent."""
        self._calls.stop()

    def _parcel(self, task: T) -> _Parcel:
        content = io.BytesIO()
        packer = _Packer(content, self._reopenings)
        try:
            packer.dump((self._work, task))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UnsupportedOperationError(
                f"This work cannot be sent to other processes ({error}); {_HINT}"
            ) from error
        return _Parcel(content.getvalue(), tuple(packer.reopenings))


@attrs.frozen
class _Parcel:
    """A task on its way, and what its worker has to open."""

    content: bytes
    reopenings: tuple[Reopening, ...] = attrs.field(repr=False)


class _Packer(pickle.Pickler):
    """Writes what a storage or an image is elsewhere: the number of a storage, or a decoder."""

    def __init__(self, file: io.BytesIO, known: dict[int, Reopening]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.reopenings: list[Reopening] = []
        self._numbers: dict[int, int] = {}
        #: Of the whole job, by the handle: asked for once.
        self._known = known

    def persistent_id(self, obj: object) -> object:
        kinds = type(obj).__mro__
        if StorageHandle in kinds:
            return self._number(cast("StorageHandle", obj))
        if FormatDriverInstance in kinds:
            driver = cast("FormatDriverInstance", obj)
            decoder = driver.decoder()
            if decoder is None:
                raise UnsupportedOperationError(
                    f"What is encoded in {driver.format_name} images cannot be decoded by other "
                    f"processes; {_HINT}"
                )
            return decoder
        return None

    def _number(self, handle: StorageHandle) -> int:
        key = id(handle)
        number = self._numbers.get(key)
        if number is None:
            reopening = self._known.get(key) or handle.reopening()
            if reopening is None:
                raise UnsupportedOperationError(
                    f"'{handle.name()}' lives in this process alone, and other processes cannot "
                    f"read it; {_HINT}, or copy it to a file first"
                )
            self._known[key] = reopening
            number = self._numbers[key] = len(self.reopenings)
            self.reopenings.append(reopening)
        return number


# -- in a worker


def _call(_name: str, function: Callable[[Any], Any], argument: object) -> object:
    """Call a function.

    An executor may take equal calls for one, so that what is cancelled ends another: each has a
    name of its own.
    """
    return function(argument)


class _Unpacker(pickle.Unpickler):
    def __init__(self, content: bytes, handles: list[StorageHandle]) -> None:
        super().__init__(io.BytesIO(content))
        self._handles = handles

    def persistent_load(self, pid: object) -> object:
        return self._handles[pid] if isinstance(pid, int) else pid


def _do(parcel: _Parcel) -> object:
    """Open what a task is about, and do it."""
    with ExitStack() as opened:
        handles = [opened.enter_context(_opened(each)) for each in parcel.reopenings]
        work, task = _Unpacker(parcel.content, handles).load()
        return work(task)


@contextmanager
def _opened(reopening: Reopening) -> Generator[StorageHandle]:
    """The object that another process has open, with its locks, as the same one."""
    import socket

    where = f"in a process of '{socket.gethostname()}', which has to find it under this name"
    try:
        handle = run_blocking(
            open_storage(reopening.name, lock=False, storage_options=reopening.options)
        )
    except UnderlayError as error:
        error.args = (f"{error} ({where})",)
        raise
    try:
        if handle.reopening() != reopening:
            raise StorageChangedError(
                f"'{reopening.name}' is another object, or has changed since ({where})"
            )
        yield handle
    finally:
        run_blocking(handle.close())


# -- waiting


class _Calls:
    """Calls that an executor makes, each waited for by the thread that asked for it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._waiting: dict[Future[Any], SimpleQueue[Future[Any] | None]] = {}
        self._stopped = False

    def call(
        self,
        function: Callable[[Any], Any],
        argument: object,
        *,
        wait: Callable[[], float | None] = lambda: None,
    ) -> Any:
        """What ``function`` returns elsewhere; it is looked at the time after ``wait()`` seconds.

        Nothing waits in a future: an exception that a signal raises while its lock is being taken
        would leave that locked.
        """
        ended: SimpleQueue[Future[Any] | None] = SimpleQueue()
        try:
            future = self._executor.submit(_call, secrets.token_hex(8), function, argument)
        except UnderlayError:
            raise
        except Exception as error:
            raise _failed(error) from error
        self._waiting[future] = ended
        if self._stopped:
            ended.put(None)
        future.add_done_callback(ended.put)
        try:
            while True:
                check_time()
                try:
                    done = ended.get(timeout=wait())
                except Empty:
                    continue
                return _result(done)
        finally:
            del self._waiting[future]
            future.cancel()

    def stop(self) -> None:
        """Let nobody wait any longer, and nothing begin that has not begun."""
        self._stopped = True
        for ended in list(self._waiting.values()):
            ended.put(None)


def _result(done: Future[Any] | None) -> Any:
    if done is None or done.cancelled():
        raise _failed(CancelledError("it was cancelled"))
    error = done.exception()
    if error is None:
        return done.result()
    if isinstance(error, UnderlayError) or not isinstance(error, Exception):
        raise error
    raise _failed(error) from error


def _failed(error: Exception) -> WorkerError:
    told = str(error) or type(error).__name__
    return WorkerError(
        f"The executor's workers did not do their part: {told}; see to them, and run the job again"
    )
