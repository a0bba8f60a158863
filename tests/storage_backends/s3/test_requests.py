"""What reading and writing one object costs, in requests."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

import underlay
import underlay.jobs
from underlay.storage import StorageCreateOptions, StorageOpenOptions
from underlay_storage.s3 import S3Object
from underlay_storage.s3.client import ObjectClient

from ...conftest import Tool
from .proxy import Proxy, Request, no_fault
from .servers import BUCKET, Server

MIB = 1 << 20


@pytest.fixture
def url(prefix: str) -> str:
    return f"s3://{BUCKET}/{prefix}/a"


@pytest.fixture
def options(seaweed: Server, proxy: Proxy) -> dict[str, object]:
    """Storage options that lead through the proxy, which counts."""
    return seaweed.options(endpoint=proxy.endpoint)


@pytest.fixture
def image(
    tmp_path: Path, qemu_img: Tool, qemu_io: Tool, client: ObjectClient, prefix: str
) -> bytes:
    """An image of 64 GiB with data here and there, as QEMU makes it; in the bucket."""
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "64G")
    at = [f"write -q -P {1 + gib % 250} {gib}G 256k" for gib in range(0, 64, 4)]
    qemu_io(*[word for command in at for word in ("-c", command)], path)
    content = path.read_bytes()
    client.put(f"{prefix}/a", content, write_id="a test")
    return content


def verbs(requests: list[Request]) -> list[str]:
    return [request.verb for request in requests]


def test_opening_and_probing_costs_two_a_cold_read_two_more_and_a_warm_one_none(
    image: bytes, url: str, options: dict[str, object], proxy: Proxy
) -> None:
    assert len(image) > 2 * MIB
    with proxy.scripted(no_fault) as requests:
        disk = underlay.open_any(url, storage_options=options)
        assert disk.format_name == "qcow2"
        assert verbs(requests) == ["GET", "GET"]
        assert sum(_range(request) for request in requests) <= 640 << 10
        del requests[:]
        assert disk.read_bytes((60 << 30) + 8192, 4096) == bytes([61]) * 4096
        assert 1 <= len(requests) <= 2
        assert sum(_range(request) for request in requests) <= 256 << 10
        del requests[:]
        assert disk.read_bytes((60 << 30) + 8192, 4096) == bytes([61]) * 4096
        assert disk.read_bytes((60 << 30) + 12_288, 1000) == bytes([61]) * 1000
        assert not requests
        disk.close()
        assert not requests


def _range(request: Request) -> int:
    first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
    return int(last) - int(first) + 1


def test_every_request_after_the_first_is_for_the_version_that_was_opened(
    image: bytes, url: str, options: dict[str, object], proxy: Proxy
) -> None:
    with proxy.scripted(no_fault) as requests:
        with underlay.open_any(url, storage_options=options) as disk:
            for gib in range(0, 64, 4):
                disk.read_bytes(gib << 30, 256 << 10)
        etags = [request.headers.get("If-Match") for request in requests]
    assert etags[0] is None
    assert len(set(etags[1:])) == 1
    assert etags[1] is not None


def test_reading_it_all_costs_few_large_requests_side_by_side(
    client: ObjectClient, prefix: str, url: str, options: dict[str, object], proxy: Proxy
) -> None:
    content = os.urandom(24 * MIB)
    client.put(f"{prefix}/a", content, write_id="a test")
    under_way: list[int] = [0, 0]
    lock = threading.Lock()

    def watch(request: Request) -> None:
        with lock:
            under_way[0] = sum(one.status is None for one in proxy.requests)
            under_way[1] = max(under_way)

    with (
        proxy.scripted(watch) as requests,
        underlay.open_any(url, storage_options=options) as disk,
    ):
        got = b"".join(disk.read_bytes(at, 128 << 10) for at in range(0, len(content), 128 << 10))
    assert got == content
    assert len(requests) <= 24
    assert under_way[1] > 1
    assert sum(_range(request) for request in requests) <= len(content) + MIB


def test_reading_here_and_there_costs_one_each(
    client: ObjectClient, prefix: str, url: str, options: dict[str, object], proxy: Proxy
) -> None:
    content = os.urandom(16 * MIB)
    client.put(f"{prefix}/a", content, write_id="a test")
    dice = random.Random(1)
    with (
        underlay.open_any(url, storage_options=options) as disk,
        proxy.scripted(no_fault) as requests,
    ):
        for _ in range(50):
            at = dice.randrange(MIB, 15 * MIB) & -4096
            assert disk.read_bytes(at, 4096) == content[at : at + 4096]
    assert len(requests) <= 50
    assert max(map(_range, requests)) <= 16 << 10


def test_many_who_read_one_thing_cost_one(
    client: ObjectClient, prefix: str, url: str, options: dict[str, object], proxy: Proxy
) -> None:
    client.put(f"{prefix}/a", os.urandom(4 * MIB), write_id="a test")
    with (
        underlay.open_any(url, storage_options=options) as disk,
        proxy.scripted(no_fault) as requests,
    ):
        threads = [
            threading.Thread(target=disk.read_bytes, args=(2 * MIB, 4096)) for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(requests) == 1


@pytest.mark.parametrize(("changes", "expected"), [(0, []), (1, ["PUT"]), (100, ["PUT"])])
def test_a_sync_costs_nothing_where_nothing_has_changed(
    url: str, options: dict[str, object], proxy: Proxy, changes: int, expected: list[str]
) -> None:
    storage = S3Object.create_open(StorageCreateOptions(name=url, size=MIB, options=options))
    storage.sync()
    with proxy.scripted(no_fault) as requests:
        for number in range(changes):
            storage.writev((b"x",), 5000 * number)
            storage.barrier()
        storage.flush()
        storage.sync()
        storage.sync()
        storage.close()
    assert verbs(requests) == expected


def test_an_upload_sends_the_parts_that_changed(
    client: ObjectClient, prefix: str, url: str, options: dict[str, object], proxy: Proxy
) -> None:
    part = 5 * MIB
    client.put(f"{prefix}/a", bytes(6 * part), write_id="a test")
    options = {**options, "part_size": part}
    storage = S3Object.open(StorageOpenOptions(name=url, writable=True, options=options))
    storage.writev((b"x",), part)
    storage.sync()
    with proxy.scripted(no_fault) as requests:
        for number in range(100):
            storage.writev((b"y",), 2 * part + 1000 * number + 1)
        storage.sync()
    storage.close()
    assert sorted(verbs(requests)) == sorted(
        ["CreateUpload", "CopyPart", "GET", "UploadPart", "CopyPart", "CompleteUpload"]
    )
    sent = [request for request in requests if request.verb == "UploadPart"]
    assert sum(len(request.body) for request in sent) == part


def test_an_image_that_is_made_is_published_once(
    url: str, options: dict[str, object], proxy: Proxy, tmp_path: Path
) -> None:
    storage = S3Object.create_open(StorageCreateOptions(name=f"{url}-0", options=options))
    with proxy.scripted(no_fault) as requests:
        underlay.create(url, size=MIB, storage_options=options).close()
    # The client knows already that the server honours conditions.
    assert verbs(requests).count("PUT") == 1
    (tmp_path / "a.raw").write_bytes(os.urandom(3 * MIB))
    with proxy.scripted(no_fault) as requests:
        underlay.jobs.convert(
            str(tmp_path / "a.raw"),
            url,
            output_format="qcow2",
            overwrite=True,
            target_storage_options=options,
        )
    assert verbs(requests).count("PUT") == 1
    storage.close()
