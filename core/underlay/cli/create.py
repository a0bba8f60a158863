"""``underlay create``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Unpack, cast

import attrs
import click

from underlay.cli import options
from underlay.cli.format_options import NOT_OURS, FormatOptions, show_creation_options
from underlay.cli.output import echo, echo_json, printable
from underlay.cli.problems import CommandError, hints_of, said_of_new
from underlay.cli.progress import progress_options, reporting
from underlay.creating import create_image
from underlay.driver import OptionSpec
from underlay.errors import ImplicitOpenDeniedError, UnderlayError
from underlay.face import run_blocking
from underlay.jobs.progress import counting
from underlay.plugins import registry
from underlay.storage import PreallocateMode
from underlay.sync import SyncFormatAccess

__all__ = ["command"]

#: Every format has it.
_SIZE: Final[Mapping[str, OptionSpec]] = {"size": OptionSpec("Virtual disk size", type="size")}
#: Of the layout of the JSON.
_VERSION: Final = 1
_NO_BACKING: Final = ("Could not open backing image.",)


@options.command("create")
@options.format_option("-f", "format_name", what="The format of the new image (default raw).")
@click.option("-b", "backing", metavar="FILENAME", help="The image that it lies upon.")
@options.format_option("-F", "backing_format", what="The format of that image.")
@click.option("-u", "unchecked", is_flag=True, help="Do not look at the backing image.")
@click.option("-o", "creation", metavar="OPTIONS", multiple=True, help="How to create it; or help.")
@options.output_option
@progress_options
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@options.object_option
@options.own_access_options
@options.target_storage_option
@options.names("FILENAME [SIZE]")
def command(
    names: tuple[str, ...],
    *,
    format_name: str | None,
    backing: str | None,
    backing_format: str | None,
    unchecked: bool,
    creation: tuple[str, ...],
    output: str,
    bar: bool,
    progress: str | None,
    quiet: bool,
    target_storage_options: dict[str, object],
    **access: Unpack[options.Access],
) -> int:
    """Make a new image of SIZE bytes (suffixes k, M, G, T, P and E), or as large as the one below.

    What lies under that name is replaced.
    """
    format_name = format_name or "raw"
    settings = FormatOptions.read(creation)
    if settings.help_wanted:
        options.known_format(format_name, "Unknown file format")
        return show_creation_options(format_name, for_file=bool(names))
    if not names:
        raise click.UsageError("Expecting image file name")
    name, *sizes = names
    if len(sizes) > 1:
        raise click.UsageError(f"Unexpected argument: {sizes[1]}")
    size = options.given_size(sizes[0], what="image size") if sizes else None
    options.known_format(format_name, f"{name}: Unknown file format")
    try:
        upon = {"backing_file": backing, "backing_fmt": backing_format}
        options.refuse_description(name)
        image = _NewImage.read(name, format_name, settings, size=size, upon=upon)
        if unchecked or "backing_file" not in image.options:
            _refuse_for_nothing(access["storage_options"])
        with reporting(bar=bar, progress=progress, quiet=quiet) as report:
            disk = run_blocking(
                create_image(
                    name,
                    format=format_name,
                    size=image.size,
                    overwrite=True,
                    gate=access["gate"],
                    limits=access["limits"],
                    lock=True,
                    storage_options=target_storage_options,
                    options=image.options,
                    open_backing=not unchecked,
                    backing_storage_options=access["storage_options"],
                    announce=image.announce if output == "human" and not quiet else None,
                    progress=counting(report),
                )
            )
    except ImplicitOpenDeniedError:
        raise
    except CommandError as failure:
        raise CommandError(f"{name}: {failure}", hints=failure.hints) from failure
    except UnderlayError as error:
        raise CommandError(f"{name}: {said_of_new(error)}", hints=hints_of(error)) from error
    with SyncFormatAccess(disk) as made:
        fields: dict[str, object] = {"version": _VERSION, "filename": name}
        fields |= {"format": made.format_name, "virtual-size": made.size}
    if output == "json":
        echo_json(fields)
    return 0


def _refuse_for_nothing(storage_options: Mapping[str, object]) -> None:
    if storage_options:
        raise CommandError(
            "--storage-option is for the backing image, and none is opened; for the new one say "
            "--target-storage-option"
        )


@attrs.frozen(kw_only=True)
class _NewImage:
    """What the command line says of the new image."""

    name: str
    format_name: str
    size: int | None
    options: dict[str, object]
    #: Options whose values are words, as they were written.
    words: dict[str, str]

    @classmethod
    def read(
        cls,
        name: str,
        format_name: str,
        settings: FormatOptions,
        *,
        size: int | None,
        upon: Mapping[str, str | None],
    ) -> _NewImage:
        """Raises CommandError for what makes no sense, without the image's name before it."""
        known = _known(format_name)
        values = settings.values({**known, **_SIZE}, refused=NOT_OURS)
        if "size" in values:
            if size is not None:
                raise CommandError("The image size must be specified only once")
            size = cast("int", values.pop("size"))
        words = {
            option: text
            for option, text in settings.given.items()
            if option in known and known[option].type in {"str", "bool"}
        }
        for option, text in upon.items():
            if text is None:
                continue
            if option not in known:
                what = "file" if option == "backing_file" else "file format"
                raise CommandError(f"Backing {what} not supported for file format '{format_name}'")
            values[option] = words[option] = text
        options.known_format(words.get("backing_fmt"), "Unknown driver", hints=_NO_BACKING)
        below = values.get("backing_file")
        if below == "":
            raise CommandError("Expected backing file name, got empty string")
        if below == name:
            raise CommandError(
                "Error: Trying to create an image with the same filename as the backing file"
            )
        return cls(
            name=name,
            format_name=format_name,
            size=size,
            options=values,
            words=words,
        )

    def announce(self, facts: Mapping[str, object]) -> None:
        """Say what is being made."""
        told = {option: self.words.get(option, value) for option, value in facts.items()}
        line = " ".join(f"{o}={_shown(value)}" for o, value in told.items() if value is not None)
        echo(f"Formatting '{printable(self.name)}', fmt={self.format_name} {line}")
        mode = self.words.get("preallocation", PreallocateMode.OFF.value)
        if mode not in {known.value for known in PreallocateMode}:
            raise CommandError(f"Parameter 'preallocation' does not accept value '{mode}'")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return printable(str(value).replace(",", ",,"))


def _known(format_name: str) -> Mapping[str, OptionSpec]:
    return registry().driver(format_name).create_options
