"""Which object a URL names. Pure."""

from __future__ import annotations

import posixpath
import re
from typing import Final
from urllib.parse import quote, unquote

import attrs

from underlay.errors import OptionError

__all__ = ["BLOCKS", "WEB", "Location", "locate"]

#: The layout of many objects under one prefix.
BLOCKS: Final = "s3+blocks"
#: Read-only, and without buckets.
WEB: Final = frozenset({"http", "https"})
#: Buckets, containers, and hosts with their ports.
_BUCKET: Final = re.compile(r"[A-Za-z0-9$_.-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?")


@attrs.frozen(kw_only=True)
class Location:
    """An object, or a prefix of many, in a bucket."""

    scheme: str
    #: The bucket (Azure: the container; on the web: the host, and the port if there is one).
    bucket: str
    #: The object's key, without a slash in front.
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{quote(self.key) if self.is_web else self.key}"

    @property
    def is_web(self) -> bool:
        """Whether it is a page of the web and no object in a bucket."""
        return self.scheme in WEB

    @property
    def speaks_s3(self) -> bool:
        """Whether the server is asked in the words of S3."""
        return self.scheme in {"s3", BLOCKS}

    def at(self, key: str) -> Location:
        """Another object of the same bucket."""
        return Location(scheme=self.scheme, bucket=self.bucket, key=key)

    def beside(self, name: str) -> str:
        """The URL of ``name``, seen from this object's folder; a full URL stays itself."""
        if "://" in name:
            return name
        folder = posixpath.dirname(self.key)
        return str(self.at(posixpath.normpath(posixpath.join("/", folder, name)).lstrip("/")))


def locate(url: str) -> Location:
    """Read a URL.

    Nothing that follows a question mark or stands before an ``@`` is in the message of an error:
    that is where passwords and signatures are.

    Raises:
        OptionError: it names no object, or carries what has no place in it.
    """
    scheme, rest = url.partition(":")[0], url.partition("://")[2]
    bucket, _, key = rest.partition("/")
    if "@" in bucket:
        raise OptionError(
            f"'{scheme}://…@{bucket.rpartition('@')[2]}/…': a password has no place in an address; "
            "give it as a storage option"
        )
    if scheme in WEB:
        if "?" in rest or "#" in rest:
            raise OptionError(
                f"'{scheme}://{rest.partition('?')[0].partition('#')[0]}?…': an address with a "
                "query cannot be read in parts; name the object in its bucket instead"
            )
        key = unquote(key)
    key = key.strip("/")
    if not bucket or not key:
        raise OptionError(f"'{url}' names no object; write {scheme}://bucket/name")
    if not _BUCKET.fullmatch(bucket):
        raise OptionError(f"'{url}': there can be no bucket or host of the name '{bucket}'")
    if not key.isprintable() or not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise OptionError(
            f"'{url}': a key with empty parts, dots as parts or control characters cannot be used"
        )
    return Location(scheme=scheme, bucket=bucket, key=key)
