"""``--object secret,id=…``: helpers of qemu-img that scripts define. They are checked, and unused.

Nothing here needs a secret yet; a command line that defines one must work all the same, and one
that defines it wrongly fail as it does with qemu-img.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final, cast

from underlay.cli.problems import CommandError

__all__ = ["check_objects"]

#: Objects of QEMU that no command here has a use for, and whose options nobody checks.
_UNUSED: Final = (
    "authz-list",
    "authz-list-file",
    "authz-pam",
    "authz-simple",
    "secret_keyring",
    "throttle-group",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
)
_KNOWN: Final = frozenset({"data", "file", "format", "iv", "keyid"})
_BASE64: Final = re.compile(rb"[A-Za-z0-9+/=\n]*")
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_ID_HINT: Final = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


def check_objects(definitions: Sequence[str]) -> None:
    """See that each definition could be one of qemu-img's.

    Raises:
        CommandError: one is not; in qemu-img's words.
    """
    seen: set[str] = set()
    for text in definitions:
        options = _options(text)
        kind = options.pop("qom-type", None)
        if kind is None:
            raise CommandError("Parameter 'qom-type' is missing")
        if kind != "secret" and kind not in _UNUSED:
            raise CommandError(f"Parameter 'qom-type' does not accept value '{kind}'")
        name = options.pop("id", None)
        if name is None:
            raise CommandError("Parameter 'id' is missing")
        if not _ID.fullmatch(name):
            raise CommandError("Parameter 'id' expects an identifier", hints=(_ID_HINT,))
        if kind == "secret":
            _check_secret(options, seen)
        if name in seen:
            raise CommandError(
                f"attempt to add duplicate property '{name}' to object (type 'container')"
            )
        seen.add(name)


def _options(text: str) -> dict[str, str]:
    """``secret,id=a,data=b``, or the same as JSON."""
    if text.startswith("{"):
        try:
            found: object = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            raise CommandError("JSON parse error, premature EOI") from None
        return {str(name): str(value) for name, value in cast("dict[str, object]", found).items()}
    options: dict[str, str] = {}
    for number, part in enumerate(text.replace(",,", "\0").split(",") if text else ()):
        name, equals, value = part.replace("\0", ",").partition("=")
        if not equals and number:
            raise CommandError(f"Expected '=' after parameter '{name}'")
        options[name if equals else "qom-type"] = value if equals else name
    return options


def _check_secret(options: Mapping[str, str], seen: set[str]) -> None:
    for name in options:
        if name not in _KNOWN:
            raise CommandError(f"Parameter '{name}' is unexpected")
    form = options.get("format", "raw")
    if form not in {"raw", "base64"}:
        raise CommandError(f"Parameter 'format' does not accept value '{form}'")
    if "file" in options and "data" in options:
        raise CommandError("'file' and 'data' are mutually exclusive")
    key = options.get("keyid")
    if key is not None and key not in seen:
        raise CommandError(f"No secret with id '{key}'")
    if "file" in options:
        data = _content(options["file"])
    elif "data" in options:
        data = options["data"].encode(errors="surrogateescape")
    else:
        raise CommandError("Either 'file' or 'data' must be provided")
    if form == "base64":
        _check_base64(data)


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise CommandError(
            f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}"
        ) from error


def _check_base64(data: bytes) -> None:
    if not _BASE64.fullmatch(data.strip()):
        raise CommandError(f"Base64 data '{data.decode(errors='replace')}' is not valid")
