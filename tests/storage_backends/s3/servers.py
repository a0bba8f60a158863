"""Real servers of object storage, on loopback, for as long as a test run."""

# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from typing import Any

import attrs

from underlay_storage.s3.client import ObjectClient
from underlay_storage.s3.location import locate
from underlay_storage.s3.settings import Settings

__all__ = ["BUCKET", "Server", "free_ports", "rclone", "running", "seaweed", "temporary_folder"]

BUCKET = "underlay-tests"
_KEY = "tests"
_SECRET = "nobody-may-see-this"  # noqa: S105 - of a server that nobody else reaches
#: No test is to choose the same ports as the one beside it.
_dice = random.SystemRandom()
#: Seconds.
_START = 180


@attrs.frozen
class Server:
    """Where a server is, and who may use it."""

    endpoint: str

    def options(self, **more: object) -> dict[str, object]:
        """Storage options that reach it."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": _KEY,
            "secret_access_key": _SECRET,
            **more,
        }

    def environment(self) -> dict[str, str]:
        """Variables that reach it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
        }

    def client(self, bucket: str = BUCKET, /, **more: object) -> ObjectClient:
        """A client of its own; one for disks of many objects where an option is for them."""
        scheme = "s3" if more.keys().isdisjoint(("block_size", "grace")) else "s3+blocks"
        return ObjectClient.connect(
            locate(f"{scheme}://{bucket}/any"), Settings.read(self.options(**more))
        )


@contextlib.contextmanager
def seaweed(program: str) -> Generator[Server]:
    """SeaweedFS: conditions, uploads in parts and copies as S3 has them."""
    with temporary_folder() as folder:
        config = os.path.join(folder, "s3.json")
        who = {
            "name": "tests",
            "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        with open(config, "w", encoding="ascii") as file:
            json.dump({"identities": [who]}, file)
        names = ("master", "volume", "filer", "s3")
        ports = free_ports(2 * len(names))
        arguments = [f"-{name}.port={ports.pop()}" for name in names]
        port = arguments[-1].partition("=")[2]
        arguments += [f"-{name}.port.grpc={ports.pop()}" for name in names]
        arguments += [f"-{name}.localSocket={folder}/{name}.sock" for name in ("filer", "s3")]
        arguments += [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={folder}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=80",
            "-s3",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        with running([program, "server", *arguments], folder):
            server = Server(f"http://127.0.0.1:{port}")
            _await(server)
            yield server


@contextlib.contextmanager
def rclone(program: str) -> Generator[Server]:
    """Rclone, which ignores conditions, and has its own idea of ranges."""
    with temporary_folder() as folder:
        [port] = free_ports(1)
        arguments = [f"--addr=127.0.0.1:{port}", f"--auth-key={_KEY},{_SECRET}"]
        with running([program, "serve", "s3", *arguments, folder], folder):
            server = Server(f"http://127.0.0.1:{port}")
            _await(server)
            yield server


@contextlib.contextmanager
def temporary_folder() -> Generator[str]:
    """A name short enough for sockets, which pytest's are not."""
    folder = tempfile.mkdtemp(prefix="underlay-")
    try:
        yield folder
    finally:
        # What the server was just writing may come as this goes.
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running(command: Sequence[str], folder: str, **environment: str) -> Generator[None]:
    """A server, until the end of the block; what it says is in the folder's ``log``."""
    with (
        open(os.path.join(folder, "log"), "wb") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": folder, **environment},
            start_new_session=True,
        ) as process,
    ):
        try:
            yield
        finally:
            # It would take 20 s to end by itself.
            os.killpg(process.pid, signal.SIGKILL)


def _await(server: Server) -> None:
    """Wait until the bucket is there and takes objects."""
    end = time.monotonic() + _START
    while True:
        try:
            make_bucket(server, BUCKET)
            client = server.client(deadline=2)
            client.put("started", b"1", write_id="start")
            client.delete(["started"])
        except Exception:  # whatever it says while it starts
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return


def make_bucket(server: Server, bucket: str) -> None:
    """Create a bucket; underlay itself never does."""
    import botocore.config
    import botocore.session

    session: Any = botocore.session.Session()
    client: Any = session.create_client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=_KEY,
        aws_secret_access_key=_SECRET,
        config=botocore.config.Config(
            retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
        ),
    )
    try:
        client.create_bucket(Bucket=bucket)
    except (client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou):
        pass
    finally:
        client.close()


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on.

    They are none of those that the system itself hands out, which others may get until they are
    used.
    """
    found: list[int] = []
    while len(found) < count:
        port = _dice.randrange(10_000, 32_000)
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found += {port}.difference(found)
    return found
