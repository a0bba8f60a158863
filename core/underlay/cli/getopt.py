"""Subcommands that read their command lines as qemu-img's getopt does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial

import click

from underlay.cli.help import CONTEXT, help_option
from underlay.cli.images import IMAGE_OPTIONS, as_typed, warn_of_guess
from underlay.cli.problems import CommandError
from underlay.errors import OptionError, UnderlayError
from underlay.interrupts import undisturbed
from underlay.plugins import registry
from underlay.recognition import guesses_told
from underlay.time_limit import TimeLimit

__all__ = ["Command", "command"]

#: Options that qemu-img does not have. They cannot be shortened: a new one breaks no script.
_OURS = frozenset(
    {
        "--compress-level",
        "--dirty",
        "--dry-run",
        "--findings",
        "--gate",
        "--grace",
        "--limit",
        "--list",
        "--picture",
        "--progress",
        "--read-all",
        "--storage-option",
        "--take-over",
        "--target-storage-option",
        "--time-limit",
    }
)


class Command(click.Command):
    """A subcommand that reads its command line as getopt does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._in_full(args))

    def invoke(self, ctx: click.Context) -> object:
        if ctx.meta.get(IMAGE_OPTIONS) and ctx.params.get("format_name") is not None:
            raise CommandError("--image-opts and --format are mutually exclusive")
        with undisturbed():
            registry()  # imports the plug-ins
        try:
            with (
                ctx.params.pop("time_limit") or nullcontext(),
                guesses_told(partial(warn_of_guess, ctx)),
            ):
                return super().invoke(ctx)
        except UnderlayError as error:
            as_typed(ctx, error)
            raise

    def _in_full(self, args: Sequence[str]) -> list[str]:
        """The arguments with long options that were shortened written out."""
        takes_value = {
            spelling: not option.is_flag
            for option in self.params
            if isinstance(option, click.Option)
            for spelling in option.opts
        }
        found: list[str] = []
        words = iter(args)
        for word in words:
            if word == "--":
                return [*found, word, *words]
            if word.startswith("--"):
                name, equals, value = word.partition("=")
                name = _spelled_out(name, takes_value)
                found.append(name + equals + value)
                if equals or not takes_value.get(name):
                    continue
            else:
                found.append(word)
                if not word.startswith("-") or not _needs_more(word, takes_value):
                    continue
            found.extend(value for value in (next(words, None),) if value is not None)
        return found


def _read_time_limit(_context: object, _parameter: object, value: str | None) -> TimeLimit | None:
    try:
        return None if value is None else TimeLimit(float(value))
    except (ValueError, OptionError):
        raise CommandError(f"--time-limit: '{value}' is no number of seconds") from None


_time_limit = click.Option(
    ["--time-limit"],
    metavar="SECONDS",
    callback=_read_time_limit,
    help="Fail when this much time is over, and clean up as after Ctrl-C.",
)


def _spelled_out(name: str, known: Collection[str]) -> str:
    if name in known:
        return name
    meant = [
        other
        for other in known
        if other.startswith(name) and len(name) > len("--") and other not in _OURS
    ]
    return meant[0] if len(meant) == 1 else name


def _needs_more(word: str, takes_value: Mapping[str, bool]) -> bool:
    """Whether the last of the letters behind a dash takes the next word as its value."""
    for at, letter in enumerate(word[1:], 2):
        if takes_value.get(f"-{letter}", False):
            return at == len(word)
    return False


def command(
    name: str, cls: type[Command] = Command
) -> Callable[[Callable[..., int]], click.Command]:
    """A subcommand of this name."""

    def decorate(function: Callable[..., int]) -> click.Command:
        made = click.command(name, cls, add_help_option=False, context_settings=CONTEXT)(function)
        made.params += [_time_limit, help_option]
        return made

    return decorate
