"""Uploads in parts, for which obstore knows no conditions: by botocore, AWS's own library.

It brings no types; nobody but this module and ``aws`` imports it.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import datetime as dt
import email.utils
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from underlay_storage.s3.aws import Access
from underlay_storage.s3.location import Location
from underlay_storage.s3.problems import (
    REDIRECTED,
    Kind,
    Problem,
    RequestFailedError,
    problem_of_status,
)
from underlay_storage.s3.settings import Settings

__all__ = ["Begun", "Uploads"]

#: No answer is longer: of 1000 uploads or parts, or of a few words. Bytes.
_ANSWER_MOST: Final = 4 << 20
_PIECE: Final = 16 << 10


@attrs.frozen
class Begun:
    """An upload in parts that has not ended."""

    key: str
    #: Its id.
    upload: str
    #: When it was begun, in seconds since the epoch.
    since: float


class Uploads:
    """The requests of uploads in parts, each made once. Thread-safe.

    Every method raises ``RequestFailedError``.
    """

    def __init__(self, location: Location, settings: Settings, access: Access) -> None:
        import botocore
        import botocore.config
        import botocore.session

        patience = settings.deadline / 4
        addressing = "path" if access.path_style else "virtual"
        session: Any = botocore.session.Session()
        # The same credentials as the other requests have, renewed in the same place.
        session.register_component("credential_provider", _Given(access.source))
        self._bucket = location.bucket
        self._client: Any = session.create_client(
            "s3",
            region_name=access.region,
            endpoint_url=access.endpoint,
            config=botocore.config.Config(
                connect_timeout=patience,
                # Of silence: a body may take as long as it takes.
                read_timeout=patience,
                retries={"total_max_attempts": 1},
                max_pool_connections=settings.parallel,
                s3={"addressing_style": addressing},
                signature_version=botocore.UNSIGNED if access.keys is None else None,
                # Many servers do not know the newer checksums; the signature covers the body.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )

        self._client.meta.events.register("before-send.s3", self._send)
        # After a redirect botocore asks where the bucket is, and after that one's redirect again,
        # until Python's stack ends.
        self._client.meta.events.register("before-call.s3.HeadBucket", _stay)

    def create(self, key: str, metadata: Mapping[str, str]) -> str:
        """Begin an upload; its id."""
        done = self._ask("create_multipart_upload", Key=key, Metadata=dict(metadata))
        return _word(done, "UploadId")

    def send(self, key: str, upload: str, number: int, data: bytes | bytearray) -> str:
        """Upload a part, by its number from 1 on; the part's ETag."""
        done = self._ask("upload_part", Key=key, UploadId=upload, PartNumber=number, Body=data)
        return _word(done, "ETag")

    def copy(
        self, key: str, upload: str, number: int, *, start: int, length: int, etag: str
    ) -> str:
        """Make a part of bytes of the present object, if it has this ETag; the part's ETag."""
        done = self._ask(
            "upload_part_copy",
            Key=key,
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": self._bucket, "Key": key},
            CopySourceRange=f"bytes={start}-{start + length - 1}",
            CopySourceIfMatch=etag,
        )
        return _word(done.get("CopyPartResult", {}), "ETag")

    def complete(
        self, key: str, upload: str, etags: Sequence[str], conditions: Mapping[str, str]
    ) -> str | None:
        """Make the object of its parts, in order; its ETag.

        ``conditions``: ``IfMatch`` or ``IfNoneMatch``.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        done = self._ask(
            "complete_multipart_upload",
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
            **conditions,
        )
        etag: str | None = done.get("ETag")
        return etag

    def abort(self, key: str, upload: str) -> None:
        """Give up an upload, and have its parts deleted."""
        self._ask("abort_multipart_upload", Key=key, UploadId=upload)

    def begun(self, prefix: str) -> tuple[float, list[Begun]]:
        """The uploads that have not ended, of keys that begin with ``prefix``; and what time it is.

        A request for each thousand. Times are the server's, in seconds since the epoch.
        """
        found: list[Begun] = []
        now: float | None = None
        after: dict[str, str] = {}
        while True:
            page = self._ask("list_multipart_uploads", Prefix=prefix, **after)
            if now is None:
                now = _date_of(page)
            for one in page.get("Uploads", ()):
                since = _seconds(one.get("Initiated"), otherwise=now)
                found.append(Begun(_word(one, "Key"), _word(one, "UploadId"), since))
            if not page.get("IsTruncated"):
                return now, found
            after = {
                "KeyMarker": _word(page, "NextKeyMarker"),
                "UploadIdMarker": _word(page, "NextUploadIdMarker"),
            }

    def parts(self, key: str, upload: str) -> list[tuple[int, float]]:
        """The bytes of each part that an upload has, and when it came, as in ``begun``."""
        found: list[tuple[int, float]] = []
        after: dict[str, int] = {}
        while True:
            page = self._ask("list_parts", Key=key, UploadId=upload, **after)
            now = _date_of(page)
            found += (
                (one.get("Size", 0), _seconds(one.get("LastModified"), otherwise=now))
                for one in page.get("Parts", ())
            )
            if not page.get("IsTruncated"):
                return found
            after = {"PartNumberMarker": int(page.get("NextPartNumberMarker", 0))}

    def _ask(self, method: str, **request: Any) -> dict[str, Any]:
        from botocore import exceptions

        try:
            answer: dict[str, Any] = getattr(self._client, method)(Bucket=self._bucket, **request)
        except RequestFailedError:
            raise
        except exceptions.ClientError as error:
            response: Any = error.response
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            code = str(response.get("Error", {}).get("Code", ""))
            known = code if code.isalnum() and not code.isdecimal() else None
            raise RequestFailedError(problem_of_status(status, known)) from None
        except exceptions.SSLError:
            raise _failed(Kind.OTHER, "the server's TLS certificate is not trusted") from None
        except (exceptions.EndpointConnectionError, exceptions.ConnectTimeoutError):
            raise _failed(Kind.UNREACHED, "no connection to the server") from None
        except (exceptions.NoCredentialsError, exceptions.CredentialRetrievalError):
            raise _failed(Kind.DENIED, "the credentials could not be renewed") from None
        except (exceptions.ParamValidationError, exceptions.ValidationError):
            raise _failed(Kind.OTHER, "the answer was not understood") from None
        except Exception:  # noqa: BLE001 - of botocore, of urllib3, of its XML parser
            raise _failed(Kind.TRANSIENT, "the connection broke off") from None
        return answer

    def _send(self, request: Any, **_event: object) -> Any:
        """Send it as botocore does, which would read an answer whole however long it is."""
        request.stream_output = True
        answer: Any = self._client._endpoint.http_session.send(request)  # noqa: SLF001
        answer.raw = _Short(answer.raw)
        return answer


class _Short:
    """The body of an answer that is not endless."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def stream(self) -> Iterator[bytes]:
        """The body, piece by piece."""
        length = 0
        for piece in self._raw.stream(_PIECE):
            length += len(piece)
            if length > _ANSWER_MOST:
                self._raw.close()
                raise _failed(Kind.TRANSIENT, "the answer did not end")
            yield piece


class _Given:
    """A provider of botocore's, of credentials that were found before."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def load_credentials(self) -> Any:
        return self._source


def _stay(**_event: object) -> None:
    raise _failed(Kind.OTHER, REDIRECTED)


def _failed(kind: Kind, reason: str) -> RequestFailedError:
    return RequestFailedError(Problem(kind, reason))


def _word(answer: Mapping[str, Any], name: str) -> str:
    """What an answer has to have; a server that leaves it out cannot do what was asked."""
    value = answer.get(name)
    if not isinstance(value, str) or not value:
        raise _failed(Kind.UNSUPPORTED, f"the server's answer has no {name}")
    return value


def _date_of(answer: Mapping[str, Any]) -> float:
    """When the server answered, by its own clock where it tells."""
    said = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    try:
        return email.utils.parsedate_to_datetime(said).timestamp()
    except (TypeError, ValueError):
        return time.time()


def _seconds(moment: Any, *, otherwise: float) -> float:
    return moment.timestamp() if isinstance(moment, dt.datetime) else otherwise
