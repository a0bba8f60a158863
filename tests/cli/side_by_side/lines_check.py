"""``check``."""

from __future__ import annotations

from .table import Line

LINES: list[Line] = []
