"""Help, for the command itself and for each subcommand."""

from __future__ import annotations

from typing import Any

import click

from underlay.cli.output import echo

__all__ = ["CONTEXT", "help_option"]

#: Settings of every command.
CONTEXT: dict[str, Any] = {"max_content_width": 100}


def _show_help(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        echo(context.get_help())
        context.exit()


#: In place of click's own, which looks for a translation of its text each time a command starts.
help_option = click.Option(
    ["-h", "--help"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_help,
    help="Show this message and exit.",
)
