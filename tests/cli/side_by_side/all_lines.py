"""The whole table: a module a command."""

from __future__ import annotations

from . import (
    lines_amend,
    lines_bench,
    lines_bitmap,
    lines_check,
    lines_commit,
    lines_compare,
    lines_convert,
    lines_create,
    lines_dd,
    lines_described,
    lines_general,
    lines_info,
    lines_map,
    lines_measure,
    lines_rebase,
    lines_resize,
    lines_snapshot,
)
from .table import Line

__all__ = ["TABLE"]

TABLE: list[Line] = [
    *lines_amend.LINES,
    *lines_bench.LINES,
    *lines_bitmap.LINES,
    *lines_check.LINES,
    *lines_commit.LINES,
    *lines_compare.LINES,
    *lines_convert.LINES,
    *lines_create.LINES,
    *lines_dd.LINES,
    *lines_described.LINES,
    *lines_general.LINES,
    *lines_info.LINES,
    *lines_map.LINES,
    *lines_measure.LINES,
    *lines_rebase.LINES,
    *lines_resize.LINES,
    *lines_snapshot.LINES,
]
