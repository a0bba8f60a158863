"""What comes before a command."""

from __future__ import annotations

from .table import Differs, Line

LINES = [
    Line(""),
    Line("nonsense"),
    Line("nonsense -f qcow2"),
    Line("--nonsense"),
    Line("-Z"),
    Line("info --nonsense"),
    Line("--version", Differs("help", out="underlay ...")),
    Line("-V", Differs("help", out="underlay ...")),
    Line("--help", Differs("help", out="Usage: underlay ...")),
    Line("-h", Differs("help", out="Usage: underlay ...")),
    Line("info --help", Differs("help", out="Usage: underlay ...")),
    Line("info -h", Differs("help", out="Usage: underlay ...")),
    Line("convert --help nonsense", Differs("help", out="Usage: underlay ...")),
    Line("-- info plain.qcow2"),
    Line("--trace nonsense info plain.qcow2", Differs("no-tracing", err="")),
    Line("-T nonsense info plain.qcow2", Differs("no-tracing", err="")),
    Line("Info plain.qcow2"),
    Line("inf plain.qcow2"),
    Line("info info"),
    Line("'' plain.qcow2"),
]
