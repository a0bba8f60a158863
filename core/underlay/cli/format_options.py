"""``-o a=1,b=2``: options of a format, read and refused in qemu-img's words."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import attrs

from underlay.cli.output import echo
from underlay.cli.problems import CommandError
from underlay.driver import OptionSpec
from underlay.errors import OptionError
from underlay.plugins import registry
from underlay.units import parse_size

__all__ = ["NOT_OURS", "FormatOptions", "show_creation_options", "show_options"]

_SIZE: Final = OptionSpec("Virtual disk size", type="size")
#: What stands below the list where no file name says what further options there are.
_MORE: Final = (
    "",
    "The protocol level may support further options.",
    "Specify the target filename to include those options.",
)

_TYPES = {"bool": "bool (on/off)", "int": "num"}
_COLUMN = 22
_ON, _OFF = ("on", "yes", "true", "y"), ("off", "no", "false", "n")
_INT_MAX = (1 << 64) - 1
_TOO_LATE = "This option is only supported for image creation"
_SIZE_HINT = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
    "and exabytes, respectively.",
)
_UNENCRYPTED: Final = "images cannot be encrypted yet"
_FOLDERS: Final = "set it for the folder, and new files in it have it"
#: What qemu-img has and we have not, and why.
NOT_OURS: Final = {
    "encrypt.": _UNENCRYPTED,
    "encryption": _UNENCRYPTED,
    "extent_size_hint": _FOLDERS,
    "nocow": _FOLDERS,
}


@attrs.frozen
class FormatOptions:
    """The options of one command line, in their order, as they were written."""

    given: Mapping[str, str]
    help_wanted: bool = False

    @classmethod
    def read(cls, lists: Sequence[str]) -> FormatOptions:
        """Take each ``-o`` apart: a comma in a value is doubled, and a bare name means "on".

        Raises:
            CommandError: a list is none.
        """
        given: dict[str, str] = {}
        for text in lists:
            if not text or text.startswith(",") or (text.endswith(",") and not _doubled_end(text)):
                raise CommandError(f"Invalid option list: {text}")
        for part in ",".join(lists).replace(",,", "\0").split(",") if lists else ():
            name, equals, value = part.replace("\0", ",").partition("=")
            if not equals:
                if name in {"help", "?"}:
                    return cls({}, help_wanted=True)
                if name.startswith("no"):
                    name, value = name.removeprefix("no"), "off"
                else:
                    value = "on"
            given.pop(name, None)
            given[name] = value
        return cls(given)

    def values(
        self,
        known: Mapping[str, OptionSpec],
        *,
        refused: Mapping[str, str] = MappingProxyType({}),
        at_creation: Collection[str] = (),
    ) -> dict[str, object]:
        """Their values, each of the type that its ``OptionSpec`` says.

        ``refused`` says why of options that qemu-img has and we have not; a name that ends in a
        period stands for all that begin with it. ``at_creation`` are options that come too late.

        Raises:
            CommandError: one is unknown, or its value of another type.
        """
        values: dict[str, object] = {}
        for name, text in self.given.items():
            spec = known.get(name)
            if spec is not None:
                values[name] = _value(name, text, spec)
                continue
            for other, why in refused.items():
                if name == other or (other.endswith(".") and name.startswith(other)):
                    raise CommandError(f"Parameter '{name}' is not supported: {why}")
            hints = (_TOO_LATE,) if name in at_creation else ()
            raise CommandError(f"Invalid parameter '{name}'", hints=hints)
        return values


def _doubled_end(text: str) -> bool:
    return (len(text) - len(text.rstrip(","))) % 2 == 0


def _value(name: str, text: str, spec: OptionSpec) -> object:
    if spec.type == "bool":
        if text in _ON or text in _OFF:
            return text in _ON
        raise CommandError(f"Parameter '{name}' expects 'on' or 'off'")
    if spec.type == "int":
        number = _number(text)
        if number is None:
            raise CommandError(f"Parameter '{name}' expects a number")
        return number
    if spec.type == "size":
        try:
            return parse_size(text, option=name)
        except OptionError:
            raise CommandError(
                f"Parameter '{name}' expects a non-negative number below 2^64",
                hints=_SIZE_HINT,
            ) from None
    return text


def _number(text: str) -> int | None:
    try:
        number = int(text.lstrip(), 0 if text.lstrip().lower().startswith("0x") else 10)
    except ValueError:
        return None
    return number if abs(number) <= _INT_MAX and "_" not in text else None


def show_options(title: str, known: Mapping[str, OptionSpec]) -> int:
    """Say what ``-o`` takes."""
    echo(title)
    for name, option in sorted(known.items()):
        kind = _TYPES.get(option.type, option.type)
        echo(f"  {f'{name}=<{kind}>':<{_COLUMN}} - {option.help}")
    return 0


def show_creation_options(format_name: str, *, for_file: bool) -> int:
    """Say what ``-o`` takes for a new image; ``for_file`` when the file that it is in is known."""
    known = {**registry().driver(format_name).create_options, "size": _SIZE}
    if for_file:
        return show_options("Supported options:", known)
    show_options(f"Supported {format_name} options:", known)
    for line in _MORE:
        echo(line)
    return 0
