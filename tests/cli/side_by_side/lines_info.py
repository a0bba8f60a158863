"""``info``."""

from __future__ import annotations

from .table import Line

LINES = [
    Line("info plain.qcow2"),
    Line("info -f qcow2 plain.qcow2"),
    Line("info --format qcow2 --output=json plain.qcow2"),
    Line("info --output=nonsense plain.raw"),
    Line("info --backing-chain --output=json top.qcow2"),
    Line("info"),
]
