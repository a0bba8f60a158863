"""Whole conversions by workers in other processes, none of which leaves half an image behind.

This process makes each new target, empty, and the worker writes it. As long as the conversion
lasts, whoever dies in it, the object is this process's to remove. A worker writes only what is as
it was seen here, and stops when it is gone: so one that was taken for dead harms nobody, one that
comes after a dead one does not take what that left for somebody's image, and one on a machine that
has another object under that name leaves it alone.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Hashable, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import attrs

from underlay.errors import (
    StorageChangedError,
    StorageExistsError,
    StorageNotFoundError,
    UnderlayError,
    UnsupportedOperationError,
    WorkerError,
)
from underlay.face import run_blocking
from underlay.jobs.copying import Copied
from underlay.jobs.elsewhere import Elsewhere
from underlay.jobs.many import Conversion, convert_here
from underlay.storage import Reopening, is_storage
from underlay.sync import SyncFormatAccess
from underlay.targets import (
    Target,
    absolute,
    create_storage,
    named_in,
    open_storage,
    options_for,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from underlay.handle import StorageHandle
    from underlay.jobs.progress import Progress, ProgressCallback

__all__ = ["ConvertingElsewhere"]

#: Workers that may die with one conversion.
_TRIES = 4
#: Seconds after which a worker looks again whether its target is still there.
_LOOK = 1.0


class ConvertingElsewhere:
    """Lets an executor of other processes make conversions."""

    def __init__(self, executor: Executor) -> None:
        self._elsewhere = Elsewhere(executor, _convert)
        self.stop = self._elsewhere.stop

    def convert(
        self, conversion: Conversion, seconds: float | None, progress: ProgressCallback
    ) -> Copied:
        """Have a conversion made, and wait for it.

        Raises:
            UnsupportedOperationError: something of it cannot be had in another process.
            WorkerError: its workers died, or have other objects under its names.
            Exception: what ``convert`` raised.
        """
        conversion = _known_everywhere(conversion)
        for _ in range(_TRIES):
            with _held(conversion) as held:
                if held.made:  # what a dead worker leaves of it is in nobody's way
                    conversion = _overwriting(conversion)
                result = self._elsewhere.do(
                    _Order(conversion=conversion, seconds=seconds, target=held.seen)
                )
                if isinstance(result, Exception):
                    raise result
                if result is not None:
                    held.keep()
                    return result
        raise WorkerError(
            f"No worker made '{conversion.target}': they died, or find something else under that "
            "name than this process does"
        )


@attrs.frozen(kw_only=True)
class _Order:
    """What a worker is told."""

    conversion: Conversion
    seconds: float | None
    #: What the target has to be; None where there is none yet.
    target: Reopening | None


def _known_everywhere(conversion: Conversion) -> Conversion:
    """The same conversion with full names.

    Raises:
        UnsupportedOperationError: it has no names, but objects that are open.
    """
    given = conversion.sources
    several = given if isinstance(given, list | tuple) else (given,)
    named: list[Target] = []
    for each in (*several, conversion.target):
        if isinstance(each, SyncFormatAccess) or is_storage(each):
            raise UnsupportedOperationError(
                "An open disk or storage cannot be sent to other processes; give its name, or use "
                "threads"
            )
        named.append(absolute(cast("Target", each)))
    return Conversion(tuple(named[:-1]), named[-1], **conversion.arguments)


@attrs.define
class _Held:
    """The objects that a conversion writes."""

    #: Those that were made for it.
    made: list[StorageHandle] = attrs.field(factory=list["StorageHandle"])
    #: What the target is now; None where there is none.
    seen: Reopening | None = None

    def keep(self) -> None:
        """They are complete."""
        while self.made:
            handle = self.made.pop()
            run_blocking(handle.sync())  # its name
            run_blocking(handle.close())

    def drop(self, target: Target, options: Mapping[str, object] | None) -> None:
        """Remove what was made, if it was not kept."""
        for handle in self.made:
            try:
                run_blocking(handle.abandon())
            except StorageChangedError:
                # Where one writer shuts out another, the worker did so: shut it out, and leave
                # nothing in what it made.
                run_blocking(handle.close())
                emptied = create_storage(
                    target, overwrite=True, lock=False, storage_options=options
                )
                with suppress(UnderlayError):
                    run_blocking(run_blocking(emptied).close())


def _overwriting(conversion: Conversion) -> Conversion:
    arguments = {**conversion.arguments, "overwrite": True}
    return Conversion(conversion.sources, conversion.target, **arguments)


@contextmanager
def _held(conversion: Conversion) -> Generator[_Held]:
    """See to the target. What is made here goes again, unless it is kept."""
    arguments = conversion.arguments
    target = cast("Target", conversion.target)
    data_file = _data_file(conversion)
    options, of_data_file = _told(conversion)
    held = _Held()
    try:
        if not arguments.get("target_exists"):
            _make(target, options, held.made, overwrite=bool(arguments.get("overwrite")))
            if held.made and data_file is not None:
                _make(data_file, of_data_file, held.made, overwrite=False)
        with _seen(target, options) as (found, _):
            held.seen = found
        yield held
    finally:
        held.drop(target, options)


def _data_file(conversion: Conversion) -> Target | None:
    """The data file that is made with the target, if there is to be one."""
    creating: Mapping[str, object] = conversion.arguments.get("options") or {}
    return named_in(creating, "data_file", cast("Target", conversion.target))


def _told(conversion: Conversion) -> list[dict[str, object]]:
    """The storage options of the target, and those of its data file."""
    return options_for(
        (conversion.target, _data_file(conversion)),
        conversion.arguments.get("target_storage_options"),
    )


def _make(
    target: Target,
    options: Mapping[str, object] | None,
    made: list[StorageHandle],
    *,
    overwrite: bool,
) -> None:
    """Make an empty object, where that is seen at once.

    Where objects appear only when they are complete, a worker that dies leaves nothing.
    """
    try:
        handle = run_blocking(create_storage(target, lock=False, storage_options=options))
    except StorageExistsError:
        if not overwrite:
            raise
        return
    try:
        run_blocking(
            run_blocking(open_storage(target, lock=False, storage_options=options)).close()
        )
    except StorageNotFoundError:
        run_blocking(handle.abandon())
    except BaseException:
        run_blocking(handle.abandon())
        raise
    else:
        made.append(handle)


@contextmanager
def _seen(
    target: Target, options: Mapping[str, object] | None
) -> Generator[tuple[Reopening | None, Hashable]]:
    """What is there: as every process sees it, and as this one does. None: nothing.

    While the block lasts nothing else can be taken for it: a file that is gone leaves its number to
    the next one, but not as long as somebody has it open.
    """
    try:
        handle = run_blocking(open_storage(target, lock=False, storage_options=options))
    except StorageNotFoundError:
        yield None, None
        return
    try:
        found = handle.reopening()
        if found is None:
            raise UnsupportedOperationError(
                f"'{handle.name()}' lives in this process alone, and other processes cannot write "
                "it; use threads, or another target"
            )
        yield found, handle.identity()
    finally:
        run_blocking(handle.close())


# -- in a worker


def _convert(order: _Order) -> Copied | Exception | None:
    """Make a conversion; None if its target is not what it has to be."""
    conversion = order.conversion
    target = cast("Target", conversion.target)
    options, _ = _told(conversion)
    try:
        with _seen(target, options) as (seen, identity):
            if seen != order.target:
                return None
            return convert_here(conversion, order.seconds, _Watch(target, options, identity))
    except Exception as error:  # noqa: BLE001 - it is what the conversion came to
        return error


class _Watch:
    """Stops a conversion whose target was taken away: nobody waits for it any more."""

    def __init__(
        self, target: Target, options: Mapping[str, object] | None, identity: Hashable
    ) -> None:
        self._target = target
        self._options = options
        #: None where an object appears only when it is complete: there is nothing to look for.
        self._identity = identity
        self._next = 0.0

    def __call__(self, _progress: Progress) -> None:
        now = time.monotonic()
        if self._identity is None or now < self._next:
            return
        self._next = now + _LOOK
        with _seen(self._target, self._options) as (_, identity):
            if identity != self._identity:
                raise WorkerError(f"'{self._target}' was taken away while it was written")
