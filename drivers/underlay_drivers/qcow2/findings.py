"""What a check finds: each kind with qemu-img's line for it and a sentence of our own. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import attrs

from underlay.capabilities import CheckResult, Finding, Repair

__all__ = ["KEPT", "TOLD", "Report", "Verb"]

#: How many findings, and how many repairs, a result holds; the rest is counted and reported.
KEPT: Final = 1000
#: How many are reported; the rest is only counted. A few KiB on disk can hold millions.
TOLD: Final = 100_000


class Verb:
    """How a line begins."""

    ERROR: Final = "ERROR"
    REPAIRING: Final = "Repairing"
    LEAKED: Final = "Leaked"


@attrs.define
class Report:
    """Counts findings, passes the first of them on, and keeps fewer."""

    sink: Callable[[Finding], None] | None = None
    repair_sink: Callable[[Repair], None] | None = None
    corruptions: int = 0
    leaks: int = 0
    check_errors: int = 0
    findings: list[Finding] = attrs.field(factory=list[Finding])
    omitted: int = 0
    repairs: list[Repair] = attrs.field(factory=list[Repair])
    repairs_omitted: int = 0
    #: How often what was told already may still be told again.
    _repeats: int = attrs.field(default=KEPT, init=False)
    _told: int = attrs.field(default=0, init=False)

    def corruption(
        self,
        line: str,
        what: str,
        *,
        offset: int | None = None,
        found: int | None = None,
        expected: int | None = None,
        times: int = 1,
    ) -> None:
        """Something is wrong, in so many places that lead to it."""
        self.corruptions += times
        self._add("corruption", line, what, offset, found=found, expected=expected)
        # QEMU says it each time. Small files can have us say it for hours.
        told = min(times - 1, self._repeats)
        self._repeats -= told
        self.omitted += times - 1 - told
        for _ in range(told):
            self._add("corruption", line, what, offset, found=found, expected=expected)

    @property
    def room(self) -> int:
        """How many more findings anybody hears of; whoever has more of a kind only counts them."""
        return (KEPT if self.sink is None else TOLD) - self._told

    def omit(
        self, *, corruptions: int = 0, leaks: int = 0, check_errors: int = 0, notes: int = 0
    ) -> None:
        """So much more is wrong, for which there is no ``room``."""
        self.corruptions += corruptions
        self.leaks += leaks
        self.check_errors += check_errors
        self.omitted += corruptions + leaks + check_errors + notes

    def leak(self, line: str, what: str, *, offset: int, found: int, expected: int) -> None:
        """A cluster is lost."""
        self.leaks += 1
        self._add("leak", line, what, offset, found=found, expected=expected)

    def error(self, line: str, what: str, *, offset: int | None = None) -> None:
        """Something cannot be checked."""
        self.check_errors += 1
        self._add("error", line, what, offset)

    def note(self, line: str, what: str, *, offset: int | None = None) -> None:
        """Something that is no finding, and worth knowing."""
        self._add("note", line, what, offset)

    def repair(
        self, what: str, *, offset: int, before: int | None = None, after: int | None = None
    ) -> None:
        """Something is, or would be, changed."""
        if not self.repair_room:
            self.omit_repairs(1)
            return
        repair = Repair(what=what, offset=offset, before=before, after=after)
        if len(self.repairs) < KEPT:
            self.repairs.append(repair)
        else:
            self.repairs_omitted += 1
        if self.repair_sink is not None:
            self.repair_sink(repair)

    @property
    def repair_room(self) -> int:
        """How many more repairs anybody hears of."""
        told = len(self.repairs) + self.repairs_omitted
        return max((KEPT if self.repair_sink is None else TOLD) - told, 0)

    def omit_repairs(self, count: int) -> None:
        """So many more changes, for which there is no ``repair_room``."""
        self.repairs_omitted += count

    def _add(
        self,
        kind: str,
        line: str,
        what: str,
        offset: int | None = None,
        *,
        found: int | None = None,
        expected: int | None = None,
    ) -> None:
        if not self.room:
            self.omitted += 1
            return
        self._told += 1
        finding = Finding(
            kind=kind, what=what, offset=offset, found=found, expected=expected, line=line
        )
        if len(self.findings) < KEPT:
            self.findings.append(finding)
        else:
            self.omitted += 1
        if self.sink is not None:
            self.sink(finding)

    def result(self) -> CheckResult:
        """What there is so far, without the counts of clusters."""
        return CheckResult(
            corruptions=self.corruptions,
            leaks=self.leaks,
            check_errors=self.check_errors,
            findings=tuple(self.findings),
            findings_omitted=self.omitted,
            repairs=tuple(self.repairs),
            repairs_omitted=self.repairs_omitted,
        )
