"""What went wrong with a request, told from what obstore or botocore raised.

obstore puts the server's status and its error code into its message only, so they are looked for
there. The message itself is never shown: it quotes addresses, the whole answer, and tracebacks.
"""

from __future__ import annotations

import enum
import re
from typing import Final

import attrs

__all__ = [
    "NO_RANGES",
    "REDIRECTED",
    "Kind",
    "Problem",
    "RequestFailedError",
    "problem_of",
    "problem_of_status",
]

#: Of a request, and in obstore's words for a part of a bulk request; there Azure has no more.
_STATUS: Final = re.compile(r"non-2xx status code: (\d{3})|\(code: (\d{3})\)")
#: In the same places.
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>|\(code: ([A-Za-z][A-Za-z0-9]{0,63})\)")
#: Of a longer message no more is looked at.
_MOST: Final = 16 << 10


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
    #: The server does not know the upload in parts (any more).
    LOST = enum.auto()
    #: The same request may work the next time.
    TRANSIENT = enum.auto()
    #: No connection came about: nobody listens, or the name leads nowhere.
    UNREACHED = enum.auto()
    #: The server does not have what was asked for (conditions, copies).
    UNSUPPORTED = enum.auto()
    #: A write was done, and the answer does not say all about it.
    DONE = enum.auto()
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


class RequestFailedError(Exception):
    """A request of botocore's failed."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


_STATUSES: Final = {
    401: Kind.DENIED,
    403: Kind.DENIED,
    404: Kind.MISSING,
    405: Kind.UNSUPPORTED,
    # Request timeout, too early, too many requests; what gateways and servers say of themselves.
    408: Kind.TRANSIENT,
    409: Kind.RACE,
    412: Kind.CONDITION,
    416: Kind.RANGE,
    425: Kind.TRANSIENT,
    429: Kind.TRANSIENT,
    500: Kind.TRANSIENT,
    501: Kind.UNSUPPORTED,
    502: Kind.TRANSIENT,
    503: Kind.TRANSIENT,
    504: Kind.TRANSIENT,
}

#: Codes that say more than the status that they come with.
_CODES: Final = {
    "AccessDenied": Kind.DENIED,
    "ExpiredToken": Kind.DENIED,
    "InvalidAccessKeyId": Kind.DENIED,
    "InvalidToken": Kind.DENIED,
    "TokenRefreshRequired": Kind.DENIED,
    "InternalError": Kind.TRANSIENT,
    "RequestTimeout": Kind.TRANSIENT,
    "SlowDown": Kind.TRANSIENT,
    "NoSuchUpload": Kind.LOST,
    "NotImplemented": Kind.UNSUPPORTED,
    # Azure's: the first comes with 409, which elsewhere is a race, the second with 412.
    "BlobAlreadyExists": Kind.CONDITION,
    "LeaseIdMissing": Kind.DENIED,
}

#: What the user can do.
_ADVICE: Final = {
    "ContainerNotFound": "create the container first",
    "ExpiredToken": "get new credentials",
    "LeaseIdMissing": "somebody has a lease on it",
    "NoSuchBucket": "create the bucket first",
    "RequestTimeTooSkewed": "set this machine's clock",
}
REDIRECTED: Final = (
    "the server sent us away: the bucket is in another region, or at another endpoint"
)

#: Why an object cannot be read in parts.
NO_RANGES: Final = "the server sends the whole object where a range of it is asked for"

#: Pieces of obstore's messages where there is no status. What is not among them may be better the
#: next time: a connection that broke off, an answer that was mangled on its way.
_TEXTS: Final = (
    ("Error performing token request", Kind.DENIED, "there are no credentials"),
    ("Received non-partial response", Kind.WHOLE, NO_RANGES),
    ("Range request not supported", Kind.WHOLE, NO_RANGES),
    ("InvalidRangeRequest", Kind.RANGE, "the object ends before the range"),
    ("Received redirect", Kind.OTHER, REDIRECTED),
    ("error following redirect", Kind.OTHER, REDIRECTED),
    ("InvalidCertificate", Kind.OTHER, "the server's TLS certificate is not trusted"),
    ("ETag Header missing", Kind.DONE, "the server gives objects no ETag"),
    ("HTTP error: builder error", Kind.OTHER, "the endpoint is no address of a server"),
    ("Could not parse path", Kind.OTHER, "object storage knows no such name"),
    ("dns error", Kind.UNREACHED, "the server's name was not found"),
    ("ConnectError", Kind.UNREACHED, "no connection to the server"),
    ("TimedOut", Kind.TRANSIENT, "the server took too long"),
    ("HTTP error", Kind.TRANSIENT, "the connection broke off"),
)


def problem_of_status(status: int | None, code: str | None = None) -> Problem:
    """What a status, and the code in its answer, stand for."""
    if status in {301, 302, 307, 308}:
        return Problem(Kind.OTHER, REDIRECTED, code)
    said = "the server answered"
    if status is not None:
        said += f" {status}"
    if code is not None:
        said += f" ({code})" if status else f" {code}"
    if code in _ADVICE:
        said += f": {_ADVICE[code]}"
    return Problem(_CODES.get(code or "") or _STATUSES.get(status or 0, Kind.OTHER), said, code)


def problem_of(error: BaseException) -> Problem:
    """What an exception stands for."""
    if isinstance(error, RequestFailedError):
        return error.problem
    from obstore import exceptions

    text = str(error)[:_MOST]
    status = _STATUS.search(text)
    found = _CODE.search(text)
    code = found.group(found.lastindex or 0) if found else None
    if status is not None or code is not None:
        number = int(status.group(status.lastindex or 0)) if status else None
        return problem_of_status(number, code)
    if isinstance(error, FileNotFoundError):
        return Problem(Kind.MISSING, "there is no such object")
    if isinstance(error, exceptions.UnauthenticatedError):
        return Problem(Kind.DENIED, "the credentials could not be renewed")
    if isinstance(error, exceptions.PermissionDeniedError):
        return Problem(Kind.DENIED, "the server does not allow it")
    if isinstance(error, exceptions.AlreadyExistsError | exceptions.PreconditionError):
        return Problem(Kind.CONDITION, "the object is another one")
    for piece, kind, reason in _TEXTS:
        if piece in text:
            return Problem(kind, reason)
    if isinstance(error, exceptions.NotSupportedError | NotImplementedError):
        return Problem(Kind.UNSUPPORTED, "the server cannot do that")
    return Problem(Kind.TRANSIENT, "the answer was not understood")
