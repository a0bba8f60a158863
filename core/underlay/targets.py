"""What a caller may name: a path, a URL, or an open storage."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeAlias, cast

from underlay.errors import OptionError, ReadOnlyError, StorageExistsError
from underlay.face import home_loop, in_loop, in_worker, is_blocking
from underlay.handle import StorageHandle
from underlay.interrupts import undisturbed
from underlay.plugins import registry
from underlay.storage import (
    AnyStorage,
    BlockingStorage,
    Storage,
    StorageCreateOptions,
    StorageOpenOptions,
    is_storage,
)

__all__ = [
    "Target",
    "absolute",
    "backend_of",
    "beside",
    "create_storage",
    "named_for",
    "named_in",
    "open_storage",
    "open_with",
    "options_for",
    "scheme_of",
]

#: A path, a URL whose scheme a back end registered, or an open storage, which stays the caller's.
Target: TypeAlias = "str | os.PathLike[str] | BlockingStorage | Storage"

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):")


def scheme_of(name: str) -> str | None:
    """The registered URL scheme that a name starts with, or None."""
    match = _SCHEME.match(name)
    return match[1] if match is not None and registry().has_scheme(match[1]) else None


def beside(target: Target, name: str) -> Target:
    """What ``name`` means in an image at ``target``: it is seen from that image's own folder."""
    if is_storage(target):
        return cast("AnyStorage", target).resolve_relative(name)
    if isinstance(target, str) and scheme_of(target) is not None and not os.path.lexists(target):
        if scheme_of(name) is not None or name.startswith("/"):
            return name
        return target[: max(target.rfind("/"), target.find(":")) + 1] + name
    path = os.fsdecode(os.fspath(cast("str | os.PathLike[str]", target)))
    beside = os.path.join(os.path.dirname(path), name)
    # What looks like a URL is none here.
    return beside if scheme_of(beside) is None else os.path.join(os.curdir, beside)


def named_for(target: Target, name: str) -> Target:
    """What a caller means by ``name`` for an image at ``target``: a URL, or a name beside it."""
    return name if scheme_of(name) is not None else beside(target, name)


def named_in(options: Mapping[str, object], option: str, target: Target) -> Target | None:
    """What such an option of creating an image at ``target`` names, if it is given."""
    name = options.get(option)
    return named_for(target, name) if isinstance(name, str) else None


def absolute(target: Target) -> Target:
    """The same target for a process with another current folder."""
    if is_storage(target):
        return target
    if isinstance(target, str) and scheme_of(target) is not None and not os.path.lexists(target):
        return target
    return os.path.abspath(os.fsdecode(os.fspath(cast("str | os.PathLike[str]", target))))


async def open_storage(
    target: Target,
    *,
    writable: bool = False,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
) -> StorageHandle:
    """Open what a caller named.

    Raises:
        TypeError: the target is none of the three.
        ReadOnlyError: a given storage is read-only, and ``writable`` was asked for.
    """
    if is_storage(target):
        storage = cast("AnyStorage", target)
        if storage_options:
            raise OptionError("storage_options are for names; this target is open already")
        if writable and not storage.writable():
            raise ReadOnlyError(f"{storage.name()}: the given storage is read-only")
        return StorageHandle(storage, owned=False)
    name, backend = backend_of(target)
    options = StorageOpenOptions(
        name=name, writable=writable, lock=lock, options=dict(storage_options or {})
    )
    return await open_with(backend, options)


async def create_storage(
    target: Target,
    *,
    size: int = 0,
    overwrite: bool = False,
    lock: bool = True,
    storage_options: Mapping[str, object] | None = None,
    made: list[StorageHandle] | None = None,
) -> StorageHandle:
    """Create what a caller named, empty or of ``size`` zero bytes, open for writing.

    A given storage is emptied if ``overwrite`` is set or it is empty already. What is created
    stands in ``made``, to be abandoned there, before an interrupt can come.

    Raises:
        StorageExistsError: it is there already, and ``overwrite`` is not set.
    """
    if is_storage(target):
        handle = await open_storage(target, writable=True, storage_options=storage_options)
        if handle.size() and not overwrite:
            raise StorageExistsError(
                f"{handle.name()}: the given storage is not empty; say overwrite=True to empty it",
                filename=handle.name(),
            )
        if handle.size():
            await handle.resize(0)
        if size:
            await handle.resize(size)
        if made is not None:
            made.append(handle)
        return handle
    name, backend = backend_of(target)
    options = StorageCreateOptions(
        name=name,
        size=size,
        overwrite=overwrite,
        lock=lock,
        options=dict(storage_options or {}),
    )
    return await _call(backend, "create_open", options, [] if made is None else made)


async def open_with(
    backend: type[BlockingStorage] | type[Storage], options: StorageOpenOptions
) -> StorageHandle:
    """Open a storage of a known class."""
    return await _call(backend, "open", options, [])


async def _call(
    backend: type[BlockingStorage] | type[Storage],
    method: str,
    options: object,
    handles: list[StorageHandle],
) -> StorageHandle:
    function: Any = getattr(backend, method)
    if BlockingStorage not in backend.__mro__:
        handle = StorageHandle(await in_loop(home_loop(), function, options), owned=True)
        handles.append(handle)
        return handle
    opened: list[BlockingStorage] = []
    try:
        with undisturbed() if is_blocking() else nullcontext():
            await in_worker(lambda: opened.append(function(options)))
            handle = StorageHandle(opened[0], owned=True)
            handles.append(handle)
    except BaseException:
        for storage in opened:  # the task was cancelled while it was being opened
            if method == "create_open":
                storage.abandon()
            storage.close()
        raise
    return handle


def options_for(
    targets: Sequence[object], options: Mapping[str, object] | None
) -> list[dict[str, object]]:
    """For each of several targets those options, given once for all, that its storage has.

    What says where a server is says nothing to a file beside it. What is open already gets none.

    Raises:
        OptionError: not one of the names has a storage with such an option.
    """
    if not options:
        return [{} for _ in targets]
    found = [backend_of(target) if _is_name(target) else None for target in targets]
    names = [named for named in found if named is not None]
    if len(names) < 2:  # noqa: PLR2004 - what one storage has, it says best itself
        return [dict(options) if named is not None or not names else {} for named in found]
    for option in options:
        if not any(backend.has_option(name, option) for name, backend in names):
            told = ", ".join(f"'{name}'" for name, _ in names)
            raise OptionError(f"None of {told} has a storage option '{option}'", option=option)
    return [
        {
            option: value
            for option, value in options.items()
            if named is not None and named[1].has_option(named[0], option)
        }
        for named in found
    ]


def _is_name(target: object) -> bool:
    return isinstance(target, str | os.PathLike)


def backend_of(target: object) -> tuple[str, type[BlockingStorage] | type[Storage]]:
    """The name to open, and the back end for it. A path that exists wins over a URL.

    Raises:
        TypeError: it is neither a path nor a URL.
    """
    if isinstance(target, str):
        scheme = None if os.path.lexists(target) else scheme_of(target)
        if scheme is not None:
            return target, registry().backend(scheme)
        return os.path.abspath(target) if scheme_of(target) else target, registry().backend("file")
    if isinstance(target, os.PathLike):
        path = os.fsdecode(os.fspath(cast("os.PathLike[str]", target)))
        return os.path.abspath(path) if scheme_of(path) else path, registry().backend("file")
    raise TypeError(
        f"a path, a URL or an open storage was expected, not {type(target).__name__} {target!r}"
    )
