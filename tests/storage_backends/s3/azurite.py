"""Azurite, Microsoft's own stand-in for Azure's object storage, on loopback."""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import hmac
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from http import HTTPStatus

import attrs

from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.location import locate
from underlay_storage.s3.settings import Settings

from . import servers

__all__ = ["ACCOUNT", "CONTAINER", "KEY", "Azurite", "azurite"]

ACCOUNT = "tests"
CONTAINER = "underlay-tests"
KEY = base64.b64encode(b"nobody-may-see-this").decode()
#: Of Azure's protocol; any that knows conditions.
_VERSION = "2021-08-06"
#: Seconds.
_START = 180


@attrs.frozen
class Azurite:
    """Where it is, and who may use it."""

    endpoint: str

    def options(self, **more: object) -> dict[str, object]:
        """Storage options that reach it."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": ACCOUNT,
            "secret_access_key": KEY,
            **more,
        }

    def environment(self) -> dict[str, str]:
        """Variables that reach it."""
        return {
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
        }

    def client(self, container: str = CONTAINER, /, **more: object) -> ObjectClient:
        """A client of its own."""
        return ObjectClient.connect(
            locate(f"az://{container}/any"), Settings.read(self.options(**more))
        )


@contextlib.contextmanager
def azurite(program: str) -> Generator[Azurite]:
    """Azurite, which keeps everything in memory, with one container."""
    with servers.temporary_folder() as folder:
        [port] = servers.free_ports(1)
        command = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port)]
        command += ["--inMemoryPersistence", "--disableTelemetry", "--silent"]
        # obstore may speak a version of the protocol that is newer than this program.
        command += ["--skipApiVersionCheck"]
        with servers.running(command, folder, AZURITE_ACCOUNTS=f"{ACCOUNT}:{KEY}"):
            server = Azurite(f"http://127.0.0.1:{port}/{ACCOUNT}")
            end = time.monotonic() + _START
            while True:
                try:
                    _make_container(server)
                except urllib.error.HTTPError as error:
                    if error.code != HTTPStatus.CONFLICT:
                        raise
                    break  # it was made, and the answer came too late
                except OSError:  # nobody listens yet
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.1)
                else:
                    break
            yield server


def _make_container(server: Azurite) -> None:
    """Create the container, which obstore cannot."""
    now = dt.datetime.now(dt.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    signed = (
        f"PUT{12 * chr(10)}x-ms-date:{now}\nx-ms-version:{_VERSION}\n"
        # The account is in the path too, as it is not in the host.
        f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}\nrestype:container"
    )
    digest = hmac.digest(base64.b64decode(KEY), signed.encode(), hashlib.sha256)
    request = urllib.request.Request(  # noqa: S310 - http:// on loopback
        f"{server.endpoint}/{CONTAINER}?restype=container",
        method="PUT",
        headers={
            "x-ms-date": now,
            "x-ms-version": _VERSION,
            "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        },
    )
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30).close()
