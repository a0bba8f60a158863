"""Many conversions, each a task of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, cast

import attrs

from underlay.errors import OptionError, TimeLimitError
from underlay.jobs.convert import Source, convert
from underlay.jobs.copying import Copied
from underlay.jobs.progress import Progress, ProgressCallback
from underlay.jobs.workers import in_parallel, is_elsewhere, worker_count
from underlay.time_limit import TimeLimit, check_time, time_left

if TYPE_CHECKING:
    from collections.abc import Sequence
    from concurrent.futures import Executor

__all__ = ["Conversion", "convert_here", "convert_many"]

#: How many conversions other processes may have at a time: a thread waits for each.
_MOST_ELSEWHERE = 256
_DEFAULT_ELSEWHERE = 64


@attrs.frozen(init=False)
class Conversion:
    """A call of ``convert`` to be made: ``Conversion("a.qcow2", "a.raw", sparse_size=0)``."""

    sources: Source | Sequence[Source]
    target: Source
    #: The further arguments, by their names.
    arguments: Mapping[str, Any]

    def __init__(
        self, sources: Source | Sequence[Source], target: Source, **arguments: Any
    ) -> None:
        """``arguments`` are those of ``convert``, but for ``executor`` and ``progress``.

        Raises:
            TypeError: there is no such argument.
        """
        unknown = arguments.keys() - _ARGUMENTS
        if unknown:
            raise TypeError(f"a Conversion has no argument '{min(unknown)}'")
        cast("Any", self).__attrs_init__(sources, target, arguments)


_ARGUMENTS = (convert.__kwdefaults__ or {}).keys() - {"executor", "progress"}


def convert_many(
    conversions: Iterable[Conversion],
    *,
    stop_at_failure: bool = False,
    parallel: int | None = None,
    executor: Executor | None = None,
    progress: ProgressCallback | None = None,
) -> list[Copied | Exception]:
    """Make many conversions, ``parallel`` of them at a time, each with one thread of its own.

    Returns what each came to, in their order: what ``convert`` returns, or the error that it
    raised. One that fails does not end the others, unless ``stop_at_failure`` says so; then its
    error is raised. ``progress`` counts conversions. A conversion that names ``parallel`` among its
    arguments has so many threads.

    ``executor`` may be one of other processes, on other machines too. Then all that a conversion
    has must pickle, and each worker has to find its images under the names that they have here.
    When a worker dies, or the job ends early, what was new and is not complete is removed. Up to
    256 conversions run at a time then, 64 by default, if there are as many workers.

    Example::

        names = ["disk.qcow2", "a.qcow2"]
        fleet = [underlay.jobs.Conversion(name, f"{name}.raw") for name in names]
        for name, result in zip(names, underlay.jobs.convert_many(fleet)):
            print(name, "failed" if isinstance(result, Exception) else result.size)

    Raises:
        OptionError: ``parallel`` is out of its range.
        WorkerError: the executor does no work.
        Exception: what the first conversion that failed raised, with ``stop_at_failure``.
    """
    listed = list(conversions)
    results: list[Copied | Exception | None] = [None] * len(listed)
    report = progress or _quiet
    if is_elsewhere(executor):
        from underlay.jobs.many_elsewhere import ConvertingElsewhere

        most, elsewhere = _elsewhere_count(parallel), ConvertingElsewhere(executor)
        executor = None
        fleet, stop = _Fleet(elsewhere.convert), elsewhere.stop
    else:
        most, fleet = worker_count(parallel), _Fleet(convert_here)
        stop = fleet.stop
    report(Progress(0, len(listed)))
    ended = in_parallel(fleet.do, enumerate(listed), parallel=most, executor=executor, stop=stop)
    with closing(ended):
        for done, (number, result) in enumerate(ended, 1):
            if isinstance(result, TimeLimitError):
                check_time()
            if stop_at_failure and isinstance(result, Exception):
                raise result
            results[number] = result
            report(Progress(done, len(listed)))
    return cast("list[Copied | Exception]", results)


def _quiet(progress: Progress) -> None:
    """Tell nobody."""


def _elsewhere_count(parallel: int | None) -> int:
    most = _DEFAULT_ELSEWHERE if parallel is None else parallel
    if not 1 <= most <= _MOST_ELSEWHERE:
        raise OptionError(
            f"parallel is {parallel}; with workers in other processes it can be from 1 to "
            f"{_MOST_ELSEWHERE}",
            option="parallel",
        )
    return most


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """Nobody waits for the conversion any more."""


class _Fleet:
    """Makes conversions, in many threads at once."""

    def __init__(
        self, convert: Callable[[Conversion, float | None, ProgressCallback], Copied]
    ) -> None:
        #: Makes one, in so many seconds.
        self._convert = convert
        left = time_left()
        self._end = None if left is None else time.monotonic() + left
        self._stopped = False

    def stop(self) -> None:
        """Let the conversions end."""
        self._stopped = True

    def do(self, task: tuple[int, Conversion]) -> tuple[int, Copied | Exception]:
        """Make one; its number, and what it came to."""
        number, conversion = task
        left = None if self._end is None else max(0.0, self._end - time.monotonic())
        try:
            return number, self._convert(conversion, left, self._look)
        except Exception as error:  # noqa: BLE001 - it is what this conversion came to
            return number, error

    def _look(self, _: Progress) -> None:
        if self._stopped:
            raise _Stopped


def convert_here(
    conversion: Conversion, seconds: float | None, progress: ProgressCallback
) -> Copied:
    """Make a conversion in this thread, within so many seconds; ``progress`` can stop it."""
    arguments: dict[str, Any] = {"parallel": 1, **conversion.arguments}
    with nullcontext() if seconds is None else TimeLimit(seconds):
        return convert(conversion.sources, conversion.target, progress=progress, **arguments)
