"""Finding and loading plug-ins so that none of them can harm another.

pluggy makes the calls; the loading is ours, because one plug-in that fails to import must not take
every format with it, and a second distribution must not take over a name without a word. Each entry
point is loaded, registered and asked on its own, in sorted order; what fails is recorded and shown
to whoever asks for that format.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import attrs
import pluggy

import underlay.hookspecs
from underlay.driver import FormatDriverInstance
from underlay.errors import PluginConflictError, PluginError
from underlay.installed import InstalledEntry, installed_entries
from underlay.storage import BlockingStorage, Storage

__all__ = ["PluginRecord", "Registry", "registry", "reset"]

GROUP = "underlay"
API_VERSION = 1


@attrs.frozen(kw_only=True)
class PluginRecord:
    """One entry point: where it comes from, what it offers, and what went wrong."""

    #: The entry point's name.
    name: str
    #: ``module`` or ``module:attribute``.
    value: str
    distribution: str
    version: str
    formats: tuple[str, ...] = ()
    schemes: tuple[str, ...] = ()
    #: Why it is not loaded, in one line; None where it is.
    error: str | None = None

    @property
    def origin(self) -> str:
        """Who offers it: ``"underlay 0.1.0"``."""
        return f"{self.distribution} {self.version}".strip()


@attrs.frozen
class _Claim:
    """A class, and the plug-in that offers it."""

    offered: type[Any]
    record: PluginRecord


@attrs.define
class Registry:
    """The formats and storages that are installed."""

    records: tuple[PluginRecord, ...] = ()
    _formats: dict[str, list[_Claim]] = attrs.field(
        factory=dict[str, list[_Claim]], alias="formats"
    )
    _schemes: dict[str, list[_Claim]] = attrs.field(
        factory=dict[str, list[_Claim]], alias="schemes"
    )

    def driver(self, format_name: str) -> type[FormatDriverInstance]:
        """The driver class of a format.

        Raises:
            PluginError: there is none, or the plug-in of this name failed to load.
            PluginConflictError: two distributions offer it.
        """
        return cast(
            "type[FormatDriverInstance]", self._one(self._formats, format_name, what="format")
        )

    def backend(self, scheme: str) -> type[BlockingStorage] | type[Storage]:
        """The storage class of a URL scheme; raises as ``driver`` does."""
        return cast(
            "type[BlockingStorage] | type[Storage]",
            self._one(self._schemes, scheme, what="storage scheme"),
        )

    def has_scheme(self, scheme: str) -> bool:
        """Whether any plug-in claims this URL scheme, or failed to load under its name."""
        return scheme in self._schemes or any(rec.name == scheme for rec in self.failures())

    def format_names(self) -> list[str]:
        """The names of all formats, sorted."""
        return sorted(self._formats)

    def candidates(self) -> Iterator[tuple[str, type[FormatDriverInstance]]]:
        """Every driver class with its format's name; of a contested name, each claimant's."""
        for name in sorted(self._formats):
            for claim in self._formats[name]:
                yield name, claim.offered

    def failures(self) -> list[PluginRecord]:
        """The plug-ins that are not loaded."""
        return [record for record in self.records if record.error is not None]

    def conflicts(self) -> dict[str, tuple[str, ...]]:
        """Contested formats and schemes (``scheme:``), with who claims them."""
        found: dict[str, tuple[str, ...]] = {}
        for suffix, table in (("", self._formats), (":", self._schemes)):
            for name, claims in table.items():
                if len(claims) > 1:
                    found[name + suffix] = _claimants(claims)
        return found

    def _one(self, table: dict[str, list[_Claim]], name: str, *, what: str) -> type[Any]:
        claims = table.get(name, [])
        broken = [
            record for record in self.failures() if record.name == name or name in record.formats
        ]
        if len(claims) == 1 and not broken:
            return claims[0].offered
        if len(claims) > 1:
            who = _claimants(claims)
            raise PluginConflictError(
                f"The {what} '{name}' is claimed by {' and by '.join(who)}; uninstall one of them, "
                f"or name the plug-ins to load in UNDERLAY_PLUGINS",
                claimants=who,
            )
        if claims:
            who = (*_claimants(claims), *(record.origin for record in broken))
            if len(set(who)) > 1:
                raise PluginConflictError(
                    f"The {what} '{name}' is claimed by {' and by '.join(who)} (which failed to "
                    f"load: {broken[0].error}); uninstall one of them",
                    claimants=who,
                )
            return claims[0].offered
        if broken:
            raise PluginError(
                f"The plug-in for the {what} '{name}' ({broken[0].origin}, {broken[0].value}) "
                f"failed to load: {broken[0].error}"
            )
        known = ", ".join(sorted(table)) or "none"
        raise PluginError(f"Unknown {what} '{name}'; installed: {known}")


_lock = threading.RLock()
_registry: Registry | None = None


def registry() -> Registry:
    """The plug-ins installed here, loaded at the first call."""
    global _registry
    if _registry is None:
        with _lock:
            if _registry is None:
                _registry = load(entry_points())
    return _registry


def reset() -> None:
    """Forget what is loaded, so that the next use looks again (after an installation, in tests)."""
    global _registry
    with _lock:
        _registry = None


def entry_points() -> list[InstalledEntry]:
    """Every entry point of the group, sorted.

    The current folder is not searched: ``python -m`` puts it on the path, and a folder of downloads
    may hold anything. ``UNDERLAY_PLUGINS`` (names of entry points or distributions, separated by
    commas) restricts what is loaded.
    """
    found = installed_entries(GROUP, _search_path())
    wanted = os.environ.get("UNDERLAY_PLUGINS")
    if wanted is not None:
        chosen = {name.strip() for name in wanted.split(",")}
        found = [entry for entry in found if {entry.name, entry.distribution} & chosen]
    return sorted(found, key=lambda entry: (entry.name, entry.distribution))


def _search_path() -> list[str]:
    """``sys.path`` without the current folder, unless underlay itself is installed there."""
    home = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # the current folder was removed
        here = ""
    if here == home:
        return list(sys.path)
    return [entry for entry in sys.path if entry and os.path.realpath(entry) != here]


def load(entries: Iterable[InstalledEntry]) -> Registry:
    """Load each entry on its own, and gather what all of them offer."""
    records: list[PluginRecord] = []
    formats: dict[str, list[_Claim]] = {}
    schemes: dict[str, list[_Claim]] = {}
    for entry in entries:
        record = PluginRecord(**entry._asdict())
        try:
            drivers, backends = _ask(entry)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it may do anything
            reason = " ".join(str(error).split()) or "no reason given"
            records.append(attrs.evolve(record, error=f"{type(error).__name__}: {reason}"))
            continue
        record = attrs.evolve(
            record,
            formats=tuple(driver.format_name for driver in drivers),
            schemes=tuple(scheme for backend in backends for scheme in backend.schemes),
        )
        records.append(record)
        for driver in drivers:
            formats.setdefault(driver.format_name, []).append(_Claim(driver, record))
        for backend in backends:
            for scheme in backend.schemes:
                schemes.setdefault(scheme, []).append(_Claim(backend, record))
    return Registry(records=tuple(records), formats=formats, schemes=schemes)


def _ask(entry: InstalledEntry) -> tuple[list[type[Any]], list[type[Any]]]:
    """Import one plug-in, and call its hooks in a plug-in manager of its own."""
    manager = pluggy.PluginManager(underlay.hookspecs.PROJECT_NAME)
    manager.add_hookspecs(underlay.hookspecs)
    manager.register(entry.load(), name=entry.name)
    manager.check_pending()
    drivers = [cls for offer in manager.hook.underlay_format_drivers() for cls in offer]
    backends = [cls for offer in manager.hook.underlay_storage_backends() for cls in offer]
    for driver in drivers:
        _check_class(driver, (FormatDriverInstance,))
        if not driver.format_name or not isinstance(driver.format_name, str):
            raise TypeError(f"{driver.__name__} has no format_name")
    for backend in backends:
        _check_class(backend, (BlockingStorage, Storage))
        if not backend.schemes or isinstance(backend.schemes, str):
            raise TypeError(f"{backend.__name__}.schemes must be a tuple of URL schemes")
    return drivers, backends


def _check_class(offered: object, contracts: Sequence[type[Any]]) -> None:
    names = " or ".join(contract.__name__ for contract in contracts)
    if not isinstance(offered, type) or not any(base in offered.__mro__ for base in contracts):
        raise TypeError(f"{offered!r} is no subclass of underlay.{names}")
    missing = sorted(getattr(offered, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{offered.__name__} does not implement {', '.join(missing)}")
    version = getattr(offered, "api_version", None)
    if version != API_VERSION:
        raise TypeError(
            f"{offered.__name__} was written for contract version {version}, this is {API_VERSION}"
        )


def _claimants(claims: Sequence[_Claim]) -> tuple[str, ...]:
    return tuple(f"{claim.record.origin} ({claim.record.value})" for claim in claims)
