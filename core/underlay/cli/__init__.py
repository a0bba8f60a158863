"""The command ``underlay``, with qemu-img's flags, text, JSON and exit codes.

One module a subcommand, imported when it is used. They are thin: parse, call a job, print.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, by default that of this process, and exit with its status.

    Nothing outlives the call: it may be made again in the same process.
    """
    from underlay.cli.problems import exit_status

    sys.exit(exit_status(sys.argv[1:] if argv is None else argv))
