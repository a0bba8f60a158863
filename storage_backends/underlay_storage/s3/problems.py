"""What went wrong with a request, told from the client library's exception.

obstore puts the server's status and its error code into its message only, so they are looked for
there. The message itself is never shown: it quotes headers, addresses and the whole answer.
"""

from __future__ import annotations

import enum
import re
from typing import Final

import attrs

__all__ = ["Kind", "Problem", "problem_of", "problem_of_status"]

_STATUS: Final = re.compile(r"non-2xx status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
#: Of a longer answer no more is looked at.
_ANSWER_MOST: Final = 8192

#: Request timeout, too many requests, and what a server or a gateway says of itself.
_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Codes that come with a status that says something else.
_TRANSIENT_CODES: Final = frozenset({"RequestTimeout", "SlowDown", "InternalError"})


class Kind(enum.Enum):
    """What one can do about it."""

    #: No such object, or no such bucket.
    MISSING = enum.auto()
    #: The credentials are wrong, have expired, or do not allow it.
    DENIED = enum.auto()
    #: The object is not the one that the request was conditional on.
    CONDITION = enum.auto()
    #: Somebody else writes the same object at this very moment.
    RACE = enum.auto()
    #: The range lies behind the object's end.
    RANGE = enum.auto()
    #: The whole object was sent where a range of it was asked for.
    WHOLE = enum.auto()
    #: The same request may work the next time.
    TRANSIENT = enum.auto()
    #: The server does not have what was asked for (conditions, copies).
    UNSUPPORTED = enum.auto()
    OTHER = enum.auto()


@attrs.frozen
class Problem:
    """Why a request failed; ``str()`` is short and quotes nothing secret."""

    kind: Kind
    reason: str
    #: The server's own word, such as ``NoSuchBucket``.
    code: str | None = None

    def __str__(self) -> str:
        return self.reason

    @property
    def no_bucket(self) -> bool:
        """Whether it is the bucket that is missing."""
        return self.code in {"NoSuchBucket", "ContainerNotFound"}


def problem_of_status(status: int, code: str | None = None) -> Problem:
    """What a status, and the code in its answer, stand for."""
    said = f"the server answered {status}" + (f" ({code})" if code else "")
    if status in _TRANSIENT or code in _TRANSIENT_CODES:
        return Problem(Kind.TRANSIENT, said, code)
    kinds = {
        301: Kind.OTHER,
        401: Kind.DENIED,
        403: Kind.DENIED,
        404: Kind.MISSING,
        409: Kind.RACE,
        412: Kind.CONDITION,
        416: Kind.RANGE,
        501: Kind.UNSUPPORTED,
    }
    if status in {301, 302, 307, 308}:
        return Problem(Kind.OTHER, f"{said}: the bucket is at another endpoint or region", code)
    return Problem(kinds.get(status, Kind.OTHER), said, code)


def problem_of(error: BaseException) -> Problem:
    """What an exception of obstore's stands for."""
    from obstore import exceptions

    text = str(error)[:_ANSWER_MOST]
    status, code = _STATUS.search(text), _CODE.search(text)
    said = code.group(1) if code else None
    if status is not None:
        return problem_of_status(int(status.group(1)), said)
    if isinstance(error, FileNotFoundError):
        return Problem(Kind.MISSING, "there is no such object", said)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        return Problem(Kind.DENIED, "the server does not allow it", said)
    if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
        return Problem(Kind.CONDITION, "the object is another one", said)
    if isinstance(error, exceptions.NotSupportedError | NotImplementedError):
        return Problem(Kind.UNSUPPORTED, "the server cannot do that", said)
    if "tls" in text.lower() or "certificate" in text.lower():
        return Problem(Kind.OTHER, "the server's TLS certificate is not trusted", said)
    if "HTTP error" in text or "error sending request" in text or "timed out" in text:
        return Problem(Kind.TRANSIENT, "no connection, or it broke off", said)
    return Problem(Kind.OTHER, "the answer was not understood", said)
