"""What AWS's own library knows: credentials, regions, endpoints. The only place that imports it.

botocore brings no types: here is what becomes of it.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import attrs

from underlay.errors import OptionError, PluginError, StorageAccessError
from underlay_storage.s3.location import Location
from underlay_storage.s3.problems import (
    REDIRECTED,
    Kind,
    Problem,
    RequestFailedError,
    problem_of_status,
)
from underlay_storage.s3.settings import ENDPOINT, Settings

if TYPE_CHECKING:
    from obstore.store import S3Credential

__all__ = ["Access", "Uploads", "access"]

#: How long obstore uses credentials before it asks for them again; botocore knows when they expire.
_ASK_AGAIN: Final = dt.timedelta(minutes=1)


@attrs.frozen(kw_only=True)
class Access:
    """Where S3 is and who asks, found for one open. Two that are equal can share connections."""

    #: None: AWS itself.
    endpoint: str | None
    #: Whether the bucket is named in the path, not in the host.
    path_style: bool
    region: str
    #: Access key, secret key and token at the open; None where none are sent.
    keys: tuple[str, str, str | None] | None = attrs.field(repr=False)
    #: botocore's credentials, which are renewed when they expire.
    source: Any = attrs.field(repr=False, eq=False)

    def provider(self) -> Callable[[], S3Credential]:
        """Credentials for obstore, whenever it asks for them."""
        source = self.source
        assert source is not None

        def provide() -> S3Credential:
            now = source.get_frozen_credentials()
            return {
                "access_key_id": now.access_key,
                "secret_access_key": now.secret_key,
                "token": now.token,
                "expires_at": dt.datetime.now(dt.UTC) + _ASK_AGAIN,
            }

        return provide


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
        except (exceptions.NoCredentialsError, exceptions.CredentialRetrievalError):
            raise _failed(Kind.DENIED, "the credentials could not be renewed") from None
        except (exceptions.ParamValidationError, exceptions.ValidationError):
            raise _failed(Kind.OTHER, "the answer was not understood") from None
        except Exception:  # noqa: BLE001 - of botocore, of urllib3, of its XML parser
            raise _failed(Kind.TRANSIENT, "the connection broke off") from None
        return answer


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


def access(location: Location, settings: Settings) -> Access:
    """Read options, environment and files.

    Raises:
        PluginError: botocore is not installed.
        StorageAccessError: there are no credentials, or they cannot be read.
    """
    try:
        import botocore.credentials
        import botocore.exceptions
        import botocore.session
    except ImportError as error:
        raise PluginError(f"'{location}' needs botocore: pip install 'underlay[s3]'") from error
    session: Any = botocore.session.Session()
    try:
        region = (
            settings.region
            or os.environ.get("AWS_REGION")
            or session.get_config_variable("region")
            or "us-east-1"
        )
        endpoint = settings.endpoint or _configured_endpoint(session)
        source: Any = None
        if settings.access_key_id is not None:
            source = botocore.credentials.Credentials(
                settings.access_key_id, settings.secret_access_key, settings.session_token
            )
        elif not settings.anonymous:
            source = session.get_credentials()
        keys = None if source is None else tuple(source.get_frozen_credentials())[:3]
    except botocore.exceptions.BotoCoreError as error:
        # Its messages name profiles and files, and no secret.
        raise StorageAccessError(
            f"Could not find credentials for '{location}': {error}", filename=str(location)
        ) from None
    if keys is None and not settings.anonymous:
        raise StorageAccessError(
            f"There are no credentials for '{location}': set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or the storage option anonymous=on for a public bucket",
            filename=str(location),
        )
    if not all((word or "").isascii() and (word or "").isprintable() for word in keys or ()):
        raise StorageAccessError(
            f"The credentials for '{location}' have characters that no credentials have, such as "
            "the end of a line",
            filename=str(location),
        )
    if endpoint is not None and not ENDPOINT.fullmatch(endpoint):
        raise OptionError("AWS_ENDPOINT_URL has to be http://host or https://host")
    path_style = settings.path_style
    if path_style is None:
        # A bucket's name with a dot has no certificate of its own.
        path_style = endpoint is not None or "." in location.bucket
    return Access(endpoint=endpoint, path_style=path_style, region=region, keys=keys, source=source)


def _configured_endpoint(session: Any) -> str | None:
    """Of the environment or the profile, in AWS's order."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    profile = session.get_scoped_config()
    services = session.full_config.get("services", {}).get(profile.get("services"), {})
    found: str | None = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or services.get("s3", {}).get("endpoint_url")
        or profile.get("endpoint_url")
    )
    return found
