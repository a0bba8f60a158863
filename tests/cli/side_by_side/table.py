"""One line of the table: a command line that both tools get, and what may differ."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import attrs

__all__ = ["Differs", "Line"]


@attrs.frozen
class Differs:
    """How our answer differs from qemu-img's, and under which name the documents argue it.

    What is given is what we answer, exactly; three periods stand for any text. What is not given
    must be the same. A difference that is none any more fails, so that the table stays true.
    """

    #: The name of a row in docs/qemu-img.md.
    why: str
    status: int | None = attrs.field(default=None, kw_only=True)
    out: str | None = attrs.field(default=None, kw_only=True)
    err: str | None = attrs.field(default=None, kw_only=True)
    #: Names of files that are left and differ: in bytes, in what qemu-img says, or in being there.
    files: Sequence[str] = attrs.field(default=(), kw_only=True)


@attrs.frozen
class Line:
    """Arguments of both tools, as one types them in a shell.

    Images of the pool (pool.py) whose names occur in it lie in the current folder, with what they
    lie upon. Several commands follow each other behind ``&&``: what all of them print is compared,
    and the status of the last. ``{here}`` is the folder.
    """

    text: str
    differs: Differs | None = None
    #: Further images of the pool that must be there.
    images: str = attrs.field(default="", kw_only=True)

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command."""
        return [shlex.split(command) for command in self.text.split(" && ")]
