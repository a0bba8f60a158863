"""How to reach a server, and how much memory and time to spend: the storage options, checked.

What no option says comes from the usual environment and files, which are read at each open.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from typing import Any, Final

import attrs

from underlay.driver import OptionSpec
from underlay.errors import OptionError
from underlay.option_values import checked_options
from underlay_storage.s3.location import BLOCKS

__all__ = ["ENDPOINT", "OPTIONS", "Settings", "has_option"]

_MIB: Final = 1 << 20
#: S3: no part but the last may be smaller.
_PART_LEAST: Final = 5 * _MIB
_BLOCK_LEAST: Final = 4096

OPTIONS: Final[Mapping[str, OptionSpec]] = {
    "endpoint": OptionSpec(
        "address of the server",
        default="AWS_ENDPOINT_URL (Azure: AZURE_STORAGE_ENDPOINT), else AWS",
    ),
    "region": OptionSpec("region of the bucket", default="AWS_REGION, else us-east-1"),
    "access_key_id": OptionSpec(
        "who asks (Azure: the account)",
        default="AWS_ACCESS_KEY_ID (Azure: AZURE_STORAGE_ACCOUNT_NAME)",
    ),
    "secret_access_key": OptionSpec(
        "the password to it (Azure: the account's key)",
        default="AWS_SECRET_ACCESS_KEY (Azure: AZURE_STORAGE_ACCOUNT_KEY)",
    ),
    "session_token": OptionSpec("of credentials that expire", default="AWS_SESSION_TOKEN"),
    "anonymous": OptionSpec("send no credentials", "bool", "off"),
    "path_style": OptionSpec(
        "name the bucket in the path, not in the host", "bool", "on where there is an endpoint"
    ),
    "deadline": OptionSpec("seconds for a request with all its retries", "int", "30"),
    "cache": OptionSpec("memory for what was read", "size", "64M"),
    "parallel": OptionSpec("requests at a time", "int", "8"),
    "part_size": OptionSpec("above it, an upload is made in parts of it", "size", "16M"),
    "staging": OptionSpec("folder for what is not uploaded yet", default="the temporary folder"),
    "single_writer": OptionSpec(
        "nobody else writes: the server need not be able to prevent it", "bool", "off"
    ),
    "block_size": OptionSpec("of a new s3+blocks image", "size", "1M"),
    "grace": OptionSpec(
        "seconds for which what an s3+blocks image had is kept for its readers", "int", "3600"
    ),
}

#: The least and the most of each number.
_BOUNDS: Final = {
    "deadline": (1, 3600),
    "cache": (_MIB, 1 << 40),
    "parallel": (1, 64),
    "part_size": (_PART_LEAST, 1 << 30),
    "block_size": (_BLOCK_LEAST, 64 * _MIB),
    "grace": (0, 1 << 31),
}


_S3: Final = frozenset({"s3", BLOCKS})
_CLOUDS: Final = _S3 | {"gs", "az"}
#: What not every scheme has a use for.
_ONLY_FOR: Final[Mapping[str, frozenset[str]]] = {
    "endpoint": _CLOUDS,
    "region": _S3,
    "access_key_id": _S3 | {"az"},
    "secret_access_key": _S3 | {"az"},
    "session_token": _S3,
    "anonymous": _CLOUDS,
    "path_style": _S3,
    "part_size": _CLOUDS,
    "staging": _CLOUDS,
    "single_writer": _CLOUDS,
    "block_size": frozenset({BLOCKS}),
    "grace": frozenset({BLOCKS}),
}

#: No password, no query: neither is sent, and both would be shown.
ENDPOINT: Final = re.compile(r"https?://[A-Za-z0-9_.:\[\]-]+(/[A-Za-z0-9_.~/%-]*)?")


@attrs.frozen(kw_only=True)
class Settings:
    """The storage options of one open, checked. Secrets do not show in its ``repr``."""

    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = attrs.field(default=None, repr=False)
    secret_access_key: str | None = attrs.field(default=None, repr=False)
    session_token: str | None = attrs.field(default=None, repr=False)
    anonymous: bool = False
    #: None: where there is an endpoint.
    path_style: bool | None = None
    #: Seconds.
    deadline: int = 30
    #: Bytes.
    cache: int = 64 * _MIB
    parallel: int = 8
    #: Bytes.
    part_size: int = 16 * _MIB
    staging: str = attrs.field(factory=tempfile.gettempdir)
    single_writer: bool = False
    #: Bytes, a power of two.
    block_size: int = _MIB
    #: Seconds.
    grace: int = 3600

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> Settings:
        """Check options, each a Python value or the text of a command line.

        Raises:
            OptionError: one is unknown, or has a value that it cannot have.
        """
        given: dict[str, Any] = checked_options(options, OPTIONS, what="object storage")
        for name, value in given.items():
            if OPTIONS[name].type == "str" and not _is_text(value):
                # Not the value: it may be a secret.
                raise OptionError(
                    f"{name} has to be text, neither empty nor with control characters", option=name
                )
        settings = cls(**given)
        for name, (least, most) in _BOUNDS.items():
            number: int = getattr(settings, name)
            if not least <= number <= most:
                raise OptionError(
                    f"{name} is {number}; it can be from {least} to {most}", option=name
                )
        if settings.block_size & settings.block_size - 1:
            raise OptionError(
                f"block_size is {settings.block_size}; it has to be a power of two",
                option="block_size",
            )
        if settings.endpoint and not ENDPOINT.fullmatch(settings.endpoint):
            raise OptionError(
                "endpoint has to be http://host or https://host, maybe with a port and a path",
                option="endpoint",
            )
        if (settings.access_key_id is None) != (settings.secret_access_key is None):
            raise OptionError(
                "access_key_id and secret_access_key belong together", option="access_key_id"
            )
        return settings

    def require_used(self, scheme: str) -> None:
        """Refuse what would have no effect: whoever said it relies on it.

        Raises:
            OptionError: an option was given that this scheme has no use for.
        """
        for name in OPTIONS:
            said = getattr(self, name) != getattr(_NOTHING_SAID, name)
            if said and not has_option(scheme, name):
                schemes = ", ".join(f"{one}://" for one in sorted(_ONLY_FOR[name]))
                raise OptionError(
                    f"{scheme}:// has no use for {name}; it is for {schemes}", option=name
                )


_NOTHING_SAID: Final = Settings()


def has_option(scheme: str, name: str) -> bool:
    """Whether there is such an option, and this scheme has a use for it."""
    return name in OPTIONS and scheme in _ONLY_FOR.get(name, {scheme})


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()
