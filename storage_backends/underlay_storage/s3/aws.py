"""What AWS's own library, botocore, knows: credentials, regions, endpoints.

It brings no types; nobody but this module and ``uploads`` imports it.
"""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import attrs

from underlay.errors import OptionError, PluginError, StorageAccessError
from underlay_storage.s3.location import Location
from underlay_storage.s3.settings import ENDPOINT, Settings

if TYPE_CHECKING:
    from obstore.store import S3Credential

__all__ = ["Access", "access"]

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
