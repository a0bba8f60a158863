"""Finding an object's format by asking every driver for its verdict."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeAlias

import attrs

from underlay.errors import AmbiguousFormatError, PluginError
from underlay.handle import StorageHandle
from underlay.plugins import registry
from underlay.probing import (
    VIEW_BYTES,
    Match,
    NoMatch,
    ProbeFailure,
    ProbeResult,
    ProbeView,
)
from underlay.signatures import foreign_formats

__all__ = [
    "RAW",
    "Guess",
    "GuessCallback",
    "Recognition",
    "guesses_told",
    "judge_view",
    "matching_formats",
    "read_view",
    "recognise",
    "tell_guess",
]

#: What an object is when no format claims it.
RAW = "raw"


@attrs.frozen
class Recognition:
    """The verdicts of all drivers on one object."""

    result: ProbeResult
    #: Formats that no driver claims, and whose signature the object bears all the same.
    foreign: tuple[str, ...]

    def require_format(self, name: str) -> str:
        """The format to open it as.

        Raises:
            AmbiguousFormatError: more than one matches.
            PluginConflictError: the one that matches is claimed by two distributions.
        """
        formats = sorted(self.result.matches)
        if len(formats) > 1:
            raise AmbiguousFormatError(
                f"'{name}' looks like {' and like '.join(formats)}; say which with format=",
                formats=formats,
            )
        format_name = formats[0] if formats else RAW
        registry().driver(format_name)  # a contested or broken one is an error here
        return format_name

    def refuse_writing(self, name: str) -> None:
        """Refuse to write to a guess that may be an image of some format after all.

        Raises:
            PluginError: a plug-in gave no verdict, or a format that none knows has its signature
                here.
        """
        if self.result.failures:
            failure = self.result.failures[0]
            raise PluginError(
                f"'{name}' matches no format, but '{failure.format}' could not be asked "
                f"({failure.reason}), so it is opened read-only or with format='raw'"
            )
        if self.foreign:
            raise PluginError(
                f"'{name}' bears the signature of {' and of '.join(self.foreign)}, which no "
                "plug-in here knows, so it is opened read-only or with format='raw'"
            )


@attrs.frozen(kw_only=True)
class Guess:
    """An object that is opened as raw since no format claims it."""

    name: str
    writable: bool
    #: Formats that nobody here knows, and whose signature it bears.
    foreign: tuple[str, ...]


GuessCallback: TypeAlias = Callable[[Guess], None]
_listener: ContextVar[GuessCallback | None] = ContextVar("underlay_guesses", default=None)


@contextmanager
def guesses_told(listener: GuessCallback) -> Generator[None]:
    """Hear of each guess in what is opened inside the ``with`` block, by a job too.

    So nobody has to probe an object before that, only to warn of it.
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell_guess(guess: Guess) -> None:
    """Tell whoever listens."""
    listener = _listener.get()
    if listener is not None:
        listener(guess)


async def read_view(storage: StorageHandle) -> ProbeView:
    """The two ends of an object."""
    size = storage.size()
    window = min(size, VIEW_BYTES)
    head = bytes(await storage.read_bytes(0, window))
    if size <= VIEW_BYTES:
        return ProbeView(head, head, size)
    return ProbeView(head, bytes(await storage.read_bytes(size - window, window)), size)


async def recognise(storage: StorageHandle) -> Recognition:
    """Ask every driver about an open object."""
    return judge_view(await read_view(storage))


def matching_formats(view: ProbeView) -> Sequence[str]:
    """The formats that claim a view; else those that would, if somebody knew them."""
    judged = judge_view(view)
    return sorted(judged.result.matches) or judged.foreign


def judge_view(view: ProbeView) -> Recognition:
    """The verdicts of all drivers on a view."""
    plugins = registry()
    matches: dict[str, str] = {}
    failures = [ProbeFailure(record.name, record.error or "") for record in plugins.failures()]
    failures += [
        ProbeFailure(name, f"claimed by {' and by '.join(who)}")
        for name, who in plugins.conflicts().items()
        if not name.endswith(":")
    ]
    for name, driver in plugins.candidates():
        try:
            verdict: object = driver.probe(view)
        except Exception as error:  # noqa: BLE001 - a stranger's probe may do anything
            failures.append(ProbeFailure(name, f"{type(error).__name__}: {error}"))
            continue
        if isinstance(verdict, Match):
            matches.setdefault(name, verdict.reason)
        elif not isinstance(verdict, NoMatch):
            failures.append(ProbeFailure(name, f"its verdict was {verdict!r}"))
    format_name = RAW if not matches else next(iter(matches)) if len(matches) == 1 else None
    return Recognition(
        ProbeResult(
            format=format_name,
            guessed=not matches,
            matches=matches,
            failures=tuple(failures),
            size=view.size,
        ),
        foreign=() if matches else tuple(foreign_formats(view)),
    )
