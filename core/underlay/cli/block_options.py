"""``driver=…,file.filename=…`` and ``json:{…}``: an image described in full on the command line.

Only what a user types is read so. A name that an image stores is a name and nothing more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypedDict, cast

import attrs

from underlay.chain import FROM_IMAGE, FromImage
from underlay.cli.output import warn
from underlay.driver import OptionSpec
from underlay.errors import OptionError
from underlay.plugins import registry
from underlay.units import parse_size

__all__ = ["BlockNode", "BlockOptionError", "from_json", "from_options", "option_pairs"]

JSON: Final = "json:"
_FILE: Final = "file"
#: What QEMU calls a device of the host; to us it is a file.
_SAME_AS_FILE: Final = {"host_device": _FILE, "host_cdrom": _FILE}
_ON, _OFF = ("on", "yes", "true", "y", True), ("off", "no", "false", "n", False)

#: Options of QEMU that change nothing here, and those among them that are on or off.
_SWITCHES: Final = (
    "auto-read-only",
    "cache.no-flush",
    "cache.writeback",
    "drop-cache",
    "lazy-refcounts",
    "overlap-check.active-l1",
    "overlap-check.active-l2",
    "overlap-check.bitmap-directory",
    "overlap-check.inactive-l1",
    "overlap-check.inactive-l2",
    "overlap-check.main-header",
    "overlap-check.refcount-block",
    "overlap-check.refcount-table",
    "overlap-check.snapshot-table",
    "pass-discard-other",
    "pass-discard-request",
    "pass-discard-snapshot",
    "x-check-cache-dropped",
)
_WITHOUT_EFFECT: Final = (
    *_SWITCHES,
    "aio",
    "aio-max-batch",
    "cache-clean-interval",
    "cache-size",
    "l2-cache-entry-size",
    "l2-cache-size",
    "node-name",
    "overlap-check",
    "overlap-check.template",
    "pr-manager",
)
_ALLOWED: Final = "Allowed are any of the following: none, constant, cached, all"
#: Options whose values are words: what each means here, and what is said of others.
_CHOICES: Final[Mapping[str, tuple[Mapping[str, str], str]]] = {
    "discard": (
        {"unmap": "unmap", "on": "unmap", "ignore": "ignore", "off": "ignore"},
        "Invalid discard option",
    ),
    "detect-zeroes": (
        {"off": "off", "on": "on", "unmap": "unmap"},
        "invalid parameter value: {}",
    ),
    "aio": (
        {"threads": "threads", "native": "native", "io_uring": "io_uring"},
        "invalid parameter value: {}",
    ),
    "overlap-check": (
        {"none": "none", "constant": "constant", "cached": "cached", "all": "all"},
        f"Unsupported value '{{}}' for qcow2 option 'overlap-check'. {_ALLOWED}",
    ),
}
#: Options that say which part of a file the image is.
_PART: Final = ("offset", "size")
_SIZE_HINT: Final = (
    "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
    "and exabytes, respectively.",
)


class BlockOptionError(Exception):
    """What is wrong with a description, in QEMU's words; ``hints`` are further lines."""

    def __init__(self, text: str, *, hints: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.hints = hints


@attrs.frozen(kw_only=True)
class BlockNode:
    """An image: where it is, and how to open it."""

    #: A path, or a URL.
    target: str
    #: None: to be found out.
    format: str | None = None
    format_options: Mapping[str, object] = attrs.field(factory=dict[str, object])
    storage_options: Mapping[str, object] = attrs.field(factory=dict[str, object])
    lock: bool = True
    #: Whether the user says that it is not to be written.
    read_only: bool = False
    #: Whether it is open elsewhere, and may be, so that it must not be written here.
    shared: bool = False
    #: What to lay below it, in place of what it names.
    backing: BlockNode | FromImage | None = FROM_IMAGE
    data_file: str | FromImage = FROM_IMAGE
    #: What it is called where its file's name would not say all.
    name: str | None = None


def option_pairs(text: str, *, implied: str | None = None) -> dict[str, str]:
    """``a=b,c=d`` as a mapping: a comma in a value is doubled; a bare name is on, or "no…" off."""
    found: dict[str, str] = {}
    for number, part in enumerate(text.replace(",,", "\0").split(",")):
        name, equals, value = part.replace("\0", ",").partition("=")
        if equals:
            found[name] = value
        elif number == 0 and implied is not None:
            found[implied] = name
        elif name.startswith("no"):
            found[name.removeprefix("no")] = "off"
        else:
            found[name] = "on"
    return found


def from_options(text: str) -> BlockNode:
    """The image that ``--image-opts`` describes.

    Raises:
        BlockOptionError: it describes none.
    """
    return _node(dict(option_pairs(text, implied=_FILE)) if text else {})


def from_json(text: str) -> BlockNode:
    """The image that ``json:{…}`` describes; raises as ``from_options`` does."""
    return _node(_flat(_parsed(text.removeprefix(JSON))))


def _parsed(text: str) -> dict[str, object]:
    import json

    try:
        found: object = json.loads(_QUOTED.sub(_with_double_quotes, text))
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        what = "premature EOI"
        if rest:
            word = re.match(r"[a-z]+", rest)
            what = "invalid keyword '" + word[0] + "'" if word else "expecting value"
        raise BlockOptionError(
            f"Could not parse the JSON options: JSON parse error, {what}"
        ) from None
    except RecursionError:
        raise BlockOptionError("Could not parse the JSON options: it nests too deep") from None
    if not isinstance(found, dict):
        raise BlockOptionError("Invalid JSON object given")
    return cast("dict[str, object]", found)


#: A string between quotes of either kind: QEMU's JSON knows both.
_QUOTED: Final = re.compile(r'"(?:\\.|[^"\\])*"|\'((?:\\.|[^\'\\])*)\'')


def _with_double_quotes(match: re.Match[str]) -> str:
    if match[1] is None:
        return match[0]
    return '"' + match[1].replace("\\'", "'").replace('"', '\\"') + '"'


def _flat(nested: Mapping[str, object]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            inner = _flat(cast("dict[str, object]", value))
            found |= {f"{name}.{key}": item for key, item in inner.items()}
        else:
            found[name] = value
    return found


def _below(options: dict[str, object], name: str) -> dict[str, object]:
    """Take out what is said of one child."""
    start = f"{name}."
    return {
        key.removeprefix(start): options.pop(key) for key in [*options] if key.startswith(start)
    }


def _node(options: dict[str, object]) -> BlockNode:
    driver = options.pop("driver", None)
    file = _below(options, _FILE)
    by_name = options.pop(_FILE, None)
    if by_name is not None:
        raise BlockOptionError(f"Cannot find device='{by_name}' nor node-name='{by_name}'")
    if driver is None and not file:
        raise BlockOptionError("Must specify either driver or file")
    if driver is not None and (not isinstance(driver, str) or not _is_known(driver)):
        raise BlockOptionError(f"Unknown driver '{driver}'")
    if driver is not None and driver not in registry().format_names():
        return attrs.evolve(_storage(driver, options), format="raw")
    if not file:
        raise BlockOptionError('A block device must be specified for "file"')
    kind = file.pop("driver", _FILE)
    if not isinstance(kind, str) or not _is_known(kind):
        raise BlockOptionError(f"Unknown driver '{kind}'")
    if kind in registry().format_names():
        raise BlockOptionError(f"'{kind}' is a format: only a storage can lie below another format")
    storage = _storage(kind, file)
    changes: dict[str, Any] = {"format": driver, "storage_options": dict(storage.storage_options)}
    changes["backing"], changes["data_file"] = _chain(options)
    changes |= _rights(options, changes["storage_options"], storage)
    part: dict[str, object] = {key: options[key] for key in _PART if key in options}
    if part:
        changes["name"] = _json_name(driver, part, kind, storage.target)
    changes["format_options"] = _format_options(driver, options)
    return attrs.evolve(storage, **changes)


def _json_name(driver: str | None, part: dict[str, object], kind: str, target: str) -> str:
    """What QEMU calls a part of a file."""
    import json

    described: dict[str, object] = {"offset": part.get("offset"), "driver": driver}
    described |= {"size": part.get("size"), "file": {"driver": kind, "filename": target}}
    given = {key: value for key, value in described.items() if value is not None}
    return JSON + json.dumps(given)


def _is_known(driver: str) -> bool:
    return (
        driver in registry().format_names()
        or driver in _SAME_AS_FILE
        or registry().has_scheme(driver)
    )


def _chain(options: dict[str, object]) -> tuple[BlockNode | FromImage | None, str | FromImage]:
    backing: BlockNode | FromImage | None = FROM_IMAGE
    if below := _below(options, "backing"):
        backing = _node(below)
    elif "backing" in options:
        name = options.pop("backing")
        if name not in (None, ""):
            raise BlockOptionError(f"Cannot find device='{name}' nor node-name='{name}'")
        if name is not None:
            warn('Use of "backing": "" is deprecated; use "backing": null instead')
        backing = None
    data_file: str | FromImage = FROM_IMAGE
    if beside := _below(options, "data-file"):
        kind = beside.pop("driver", _FILE)
        data_file = _storage(str(kind), beside).target
    return backing, data_file


def _storage(kind: str, options: dict[str, object]) -> BlockNode:
    kind = _SAME_AS_FILE.get(kind, kind)
    name = options.pop("filename", options.pop("url", None))
    if not isinstance(name, str) or (kind == _FILE and not name):
        raise BlockOptionError(f"The '{kind}' block driver requires a file name")
    storage_options: dict[str, object] = {}
    rights = _rights(options, storage_options)
    locking = options.pop("locking", "auto")
    if locking not in (*_ON, *_OFF, "auto"):
        raise BlockOptionError(f"invalid parameter value: {locking}")
    _drop(options)
    for option, value in options.items():
        if kind == _FILE:
            raise BlockOptionError(f"Block protocol 'file' doesn't support the option '{option}'")
        storage_options[option] = value
    return BlockNode(
        target=name, storage_options=storage_options, lock=locking not in _OFF, **rights
    )


class _Rights(TypedDict):
    read_only: bool
    shared: bool


def _rights(
    options: dict[str, object],
    storage_options: dict[str, object],
    below: BlockNode | None = None,
) -> _Rights:
    """Take out what may be said of either layer, and means something here."""
    if _is_on(options, "cache.direct"):
        storage_options["direct"] = "on"
    return {
        "read_only": _is_on(options, "read-only") or (below is not None and below.read_only),
        "shared": _is_on(options, "force-share") or (below is not None and below.shared),
    }


def _is_on(options: dict[str, object], name: str) -> bool:
    """Take out a switch."""
    return name in options and _switch(name, options.pop(name))


def _format_options(driver: str | None, options: dict[str, object]) -> dict[str, object]:
    known: Mapping[str, OptionSpec] = {}
    if driver is not None:
        known = registry().driver(driver).open_options
    given: dict[str, object] = {}
    _choose(options)
    for option in [*options]:
        name = option.replace("-", "_")
        if name not in known:
            continue
        given[name] = value = options.pop(option)
        if known[name].type == "size" and isinstance(value, str | int):
            try:
                given[name] = parse_size(value)
            except OptionError:
                raise BlockOptionError(
                    f"Parameter '{option}' expects a non-negative number below 2^64",
                    hints=_SIZE_HINT,
                ) from None
    _drop(options)
    for option in options:
        raise BlockOptionError(f"Block format '{driver}' does not support the option '{option}'")
    return given


def _drop(options: dict[str, object]) -> None:
    """Take out what has no effect, and see that it makes sense."""
    _choose(options)
    for option in [*options]:
        if option in _WITHOUT_EFFECT:
            value = options.pop(option)
            if option in _SWITCHES:
                _switch(option, value)
    options.pop("discard", None)
    options.pop("detect-zeroes", None)


def _choose(options: dict[str, object]) -> None:
    """See that what is one of several words is one, and say it in ours."""
    for option, (words, complaint) in _CHOICES.items():
        value = options.get(option)
        if value is None:
            continue
        if not isinstance(value, str) or value not in words:
            raise BlockOptionError(complaint.format(value))
        options[option] = words[value]


def _switch(name: str, value: object) -> bool:
    if value in _ON or value in _OFF:
        return value in _ON
    raise BlockOptionError(f"Parameter '{name}' expects 'on' or 'off'")
