"""The table of subcommands, each imported when it is used."""

from __future__ import annotations

import importlib
from typing import Any, cast

import click

from underlay.cli.help import CONTEXT, help_option
from underlay.cli.output import echo
from underlay.interrupts import undisturbed

__all__ = ["COMMANDS", "underlay"]

#: Every subcommand with what it does; each is ``command`` in the module of its name.
COMMANDS = {
    "amend": "Change options of an image that were chosen when it was created.",
    "bench": "Measure how fast a disk answers.",
    "bitmap": "Change a dirty bitmap of an image, or look at it.",
    "check": "Say whether an image's metadata are sound, and mend them.",
    "commit": "Write what an overlay has into an image below it.",
    "compare": "Say whether two disks hold the same bytes.",
    "convert": "Copy a disk into a new image.",
    "create": "Make a new image.",
    "dd": "Copy a part of a disk, with dd's operands.",
    "digest": "Hash the bytes of a disk, however they are stored.",
    "info": "Tell what an image says of itself.",
    "inspect": "Judge an image from a stranger, opening nothing else.",
    "map": "List where the bytes of a disk are.",
    "measure": "Tell how many bytes a new image will need.",
    "plugins": "List the formats and storages that are installed.",
    "probe": "Say what format an object has.",
    "rebase": "Let an image lie upon another backing image.",
    "resize": "Change the size of a disk.",
    "snapshot": "List, take, apply or delete internal snapshots.",
    "storage": "Tell of, check or tidy up the objects that a disk is kept as.",
}


class _Commands(click.Group):
    """A group whose help needs none of its commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        with undisturbed():
            module: Any = importlib.import_module(f"underlay.cli.{cmd_name}")
        return cast("click.Command", module.command)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"Command not found: {args[0]}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _show_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        import importlib.metadata

        echo(f"underlay {importlib.metadata.version('underlay')}")
        context.exit()


@click.group(
    cls=_Commands,
    add_help_option=False,
    context_settings=CONTEXT,
    invoke_without_command=True,
    no_args_is_help=False,
    epilog="""\b
    `underlay COMMAND --help` tells more. Flags, output and exit codes are those of
    qemu-img. What an image may open besides itself is decided by --gate.
    """,
)
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option(
    "-T",
    "--trace",
    metavar="PATTERN",
    multiple=True,
    expose_value=False,
    help="Accepted as qemu-img does; has no effect.",
)
@click.pass_context
def underlay(context: click.Context) -> None:
    """Virtual-disk images: create, convert, check, mend, compare and look at them."""
    if context.invoked_subcommand is None:
        raise click.UsageError("Not enough arguments")


underlay.params.append(help_option)
