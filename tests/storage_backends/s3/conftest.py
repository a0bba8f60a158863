"""A real server for the whole run, a scripted proxy before it, and names of one's own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Generator, Iterator

import pytest

from underlay_storage.s3 import requesting
from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.conditions import UPLOADS
from underlay_storage.s3.location import locate
from underlay_storage.s3.settings import Settings

from . import azurite as azure
from . import servers
from .azurite import Azurite
from .proxy import Proxy
from .servers import BUCKET, Server
from .workloads import Waits

#: A client through the proxy, with these storage options.
MakeClient = Callable[..., ObjectClient]


@pytest.fixture(autouse=True, scope="session")
def no_credentials_of_this_machine(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[pytest.MonkeyPatch]:
    """No variable, file or service of this machine says who asks, or where."""
    nothing = str(tmp_path_factory.mktemp("aws") / "nothing")
    with pytest.MonkeyPatch.context() as patch:
        for variable in (
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "AWS_PROFILE",
            "AWS_REGION",
            "AWS_DEFAULT_REGION",
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
            *(name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_"))),
        ):
            patch.delenv(variable, raising=False)
        patch.setenv("AWS_CONFIG_FILE", nothing)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", nothing)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield patch


@pytest.fixture(scope="session")
def seaweed(program: Callable[[str], str]) -> Generator[Server]:
    """SeaweedFS, which does what S3 does."""
    with servers.seaweed(program("weed")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone(program: Callable[[str], str]) -> Generator[Server]:
    """Rclone, which ignores conditions."""
    with servers.rclone(program("rclone")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(program: Callable[[str], str]) -> Generator[Azurite]:
    """Azurite, which does what Azure does."""
    with azure.azurite(program("azurite-blob")) as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A folder of the bucket that no other test has."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def proxy(seaweed: Server) -> Generator[Proxy]:
    """The scripted proxy, before SeaweedFS."""
    proxy = Proxy(seaweed.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def through(seaweed: Server, proxy: Proxy) -> MakeClient:
    """Makes clients that go through the proxy."""

    def make(**more: object) -> ObjectClient:
        options = seaweed.options(endpoint=proxy.endpoint, **more)
        return ObjectClient.connect(locate(f"s3://{BUCKET}/any"), Settings.read(options))

    return make


@pytest.fixture
def client(seaweed: Server) -> ObjectClient:
    """A client that nothing disturbs."""
    return seaweed.client()


@pytest.fixture
def uploader(through: MakeClient, prefix: str) -> ObjectClient:
    """A client for ``upload_requests``, which has asked for conditions already."""
    client = through(part_size="5M", parallel=2)
    client.honoured[UPLOADS] = True
    return client


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """For clients that are made from now on it is no real time in which they try again."""
    waits = Waits()
    monkeypatch.setattr(requesting, "Retrying", waits.retrying)
    return waits
