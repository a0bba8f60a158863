"""obstore's stores for one bucket, each with the patience that its requests need."""

from __future__ import annotations

import datetime as dt
import os
import threading
from typing import TYPE_CHECKING, Any, Final

from underlay.errors import ClosedError, OptionError, PluginError
from underlay_storage.s3.aws import Access
from underlay_storage.s3.location import Location
from underlay_storage.s3.settings import Settings

if TYPE_CHECKING:
    from obstore.store import ObjectStore

__all__ = ["Stores", "surroundings"]

#: The process in which obstore's threads run; they do not survive in a forked child.
_home: Final[list[int]] = []

#: A request that carries no more than this is a small one.
_SMALL: Final = 1 << 20
#: The slowest network that a request is not given up on: bytes a second, of each request.
_SLOWEST: Final = 256 << 10
_CONNECT: Final = 5


class Stores:
    """The stores of one bucket. obstore sets timeouts for a store, not for a request.

    No store tries a request again: whether that is right is decided above it.
    """

    def __init__(self, location: Location, settings: Settings, access: Access | None) -> None:
        """``access`` is for those that speak S3.

        Raises:
            PluginError: obstore is not installed.
        """
        self._location = location
        self._settings = settings
        self._access = access
        #: Seconds: so that one attempt that hangs leaves time for others.
        self._patience = settings.deadline / 4
        self._lock = threading.Lock()
        self._made: dict[str, ObjectStore] = {}
        self.small()

    def small(self) -> ObjectStore:
        """For requests that carry little: nothing of them may take long."""
        return self._store("small", whole=self._patience, silence=self._patience)

    def reading(self, length: int) -> ObjectStore:
        """For an answer of ``length`` bytes: the first may not take long."""
        if length <= _SMALL:
            return self.small()
        return self._store("reading", whole=self._bulk, silence=self._patience)

    def writing(self, length: int) -> ObjectStore:
        """For a body of ``length`` bytes: nothing is heard until all of it is there."""
        if length <= _SMALL:
            return self.small()
        return self._store("writing", whole=self._bulk, silence=self._bulk)

    @property
    def _bulk(self) -> float:
        largest = max(self._settings.part_size, self._settings.block_size)
        return self._patience + largest / _SLOWEST

    def _store(self, use: str, *, whole: float, silence: float) -> ObjectStore:
        with self._lock:
            if not _home:
                _home.append(os.getpid())
            elif _home[0] != os.getpid():
                raise ClosedError(
                    f"'{self._location}' was asked for in a forked child, where object storage "
                    "cannot be used: start processes by 'spawn' or 'forkserver'"
                )
            store = self._made.get(use)
            if store is None:
                store = self._made[use] = _make(
                    self._location,
                    self._settings,
                    self._access,
                    client_options={
                        # Only an endpoint that says so is reached without TLS.
                        "allow_http": True,
                        "connect_timeout": _seconds(min(self._patience, _CONNECT)),
                        "read_timeout": _seconds(silence),
                        "timeout": _seconds(whole),
                    },
                    retry_config={"max_retries": 0, "retry_timeout": _seconds(whole)},
                )
            return store


def surroundings() -> tuple[tuple[str, str], ...]:
    """The variables in which obstore finds what no option says, as it makes a store."""
    return tuple(
        sorted(
            (name, value)
            for name, value in os.environ.items()
            if name.startswith(("AZURE_", "GOOGLE_"))
        )
    )


def _seconds(number: float) -> dt.timedelta:
    return dt.timedelta(seconds=number)


def _make(
    location: Location, settings: Settings, access: Access | None, **common: Any
) -> ObjectStore:
    try:
        from obstore import exceptions, store
    except ImportError as error:
        raise PluginError(f"'{location}' needs obstore: pip install 'underlay[s3]'") from error
    options: dict[str, Any] = {"skip_signature": settings.anonymous}
    try:
        if location.is_web:
            return store.HTTPStore(f"{location.scheme}://{location.bucket}", **common)
        if access is not None:
            return _s3(location, access, **common)
        if location.scheme == "gs":
            if settings.endpoint is not None:
                options["base_url"] = settings.endpoint
            return store.GCSStore(location.bucket, **options, **common)
        if settings.endpoint is not None:
            options["endpoint"] = settings.endpoint
        if settings.access_key_id is not None:
            options["account_name"] = settings.access_key_id
            options["account_key"] = settings.secret_access_key
        return store.AzureStore(location.bucket, **options, **common)
    except (exceptions.BaseError, ValueError) as error:
        # The first line says what is missing in options or environment; the rest is of obstore.
        reason = str(error).partition("\n")[0]
        raise OptionError(f"'{location}' cannot be asked for: {reason}") from None


def _s3(location: Location, access: Access, **common: Any) -> ObjectStore:
    from obstore import store

    options: dict[str, Any] = {"region": access.region, "skip_signature": access.keys is None}
    endpoint = access.endpoint
    if endpoint is not None:
        if not access.path_style:
            scheme, _, host = endpoint.partition("://")
            endpoint = f"{scheme}://{location.bucket}.{host}"
        # By this name it counts more than what obstore itself finds in the environment.
        options["aws_endpoint_url_s3"] = endpoint.rstrip("/")
    if access.keys is not None:
        options["credential_provider"] = access.provider()
    return store.S3Store(
        location.bucket,
        virtual_hosted_style_request=not access.path_style,
        **options,
        **common,
    )
