"""``az://``, against Microsoft's own stand-in for the service."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay import jobs
from underlay.errors import (
    StorageAccessError,
    StorageChangedError,
    StorageError,
    StorageExistsError,
    StorageNotFoundError,
    UnsupportedOperationError,
)
from underlay.storage import StorageCreateOptions, StorageOpenOptions
from underlay_storage.s3.client import CREATE, Condition
from underlay_storage.s3.conditions import require_conditions
from underlay_storage.s3.object import S3Object

from .azurite import ACCOUNT, CONTAINER, KEY, Azurite
from .workloads import Waits

MIB = 1 << 20


@pytest.fixture
def url(prefix: str) -> str:
    return f"az://{CONTAINER}/{prefix}/disk"


@pytest.fixture
def key(prefix: str) -> str:
    return f"{prefix}/disk"


def content(url: str, server: Azurite) -> bytes:
    with underlay.open_image(url, format="raw", storage_options=server.options()) as disk:
        return disk.read_bytes(0, disk.size)


# -- requests


def test_a_range_comes_with_the_facts_of_the_object(azurite: Azurite, key: str) -> None:
    client = azurite.client()
    etag = client.put(key, bytes(range(100)), write_id="one")
    got = client.get(key, 10, 20, etag=etag)
    assert bytes(got.data) == bytes(range(10, 30))
    assert (got.facts.size, got.facts.etag, got.facts.write_id) == (100, etag, "one")
    assert client.head(key) == got.facts
    assert bytes(client.get(key, 90, 50).data) == bytes(range(90, 100))
    assert len(client.get(key, 100, 50).data) == 0


def test_writes_have_conditions(azurite: Azurite, key: str, waits: Waits) -> None:
    client = azurite.client()
    require_conditions(client, key)
    first = client.put(key, b"first", write_id="one", condition=CREATE)
    with pytest.raises(StorageExistsError):
        client.put(key, b"second", write_id="two", condition=CREATE)
    second = client.put(key, b"second", write_id="two", condition=Condition(first))
    with pytest.raises(StorageChangedError, match="somebody else"):
        client.put(key, b"third", write_id="three", condition=Condition(first))
    with pytest.raises(StorageChangedError, match="open it again"):
        client.get(key, 0, 5, etag=first)
    assert waits.waits == [], "a condition that does not hold is not tried again"
    assert client.head(key).etag == second


def test_a_write_whose_answer_was_lost_is_known_again(azurite: Azurite, key: str) -> None:
    client = azurite.client()
    first = client.put(key, b"first", write_id="one", condition=CREATE)
    assert client.put(key, b"first", write_id="one", condition=CREATE) == first


def test_listing_and_deleting(azurite: Azurite, prefix: str) -> None:
    client = azurite.client()
    for number in range(3):
        client.put(f"{prefix}/{number}", b"123", write_id="one")
    assert [(one.key, one.size) for one in client.listing(prefix)] == [
        (f"{prefix}/{number}", 3) for number in range(3)
    ]
    client.delete([f"{prefix}/0", f"{prefix}/none", f"{prefix}/2"])
    assert [one.key for one in client.listing(prefix)] == [f"{prefix}/1"]


# -- disks


@pytest.mark.parametrize("compress", [False, True])
def test_a_disk_goes_there_and_back(
    azurite: Azurite, url: str, tmp_path: Path, qemu_img: Callable[..., str], compress: bool
) -> None:
    source, there, back = tmp_path / "source.raw", tmp_path / "there.qcow2", tmp_path / "back.raw"
    noise = random.Random(1).randbytes(9 * MIB)
    source.write_bytes(noise + b"text " * MIB + bytes(7 * MIB))
    options = azurite.options(part_size="5M")
    jobs.convert(
        source, url, output_format="qcow2", compress=compress, target_storage_options=options
    )
    there.write_bytes(content(url, azurite))
    qemu_img("check", there)
    qemu_img("compare", "-F", "qcow2", "-f", "raw", source, there)
    jobs.convert(url, back, output_format="raw", storage_options=options)
    qemu_img("compare", "-f", "raw", "-F", "raw", source, back)


def test_an_opened_disk_is_changed_in_place(azurite: Azurite, url: str) -> None:
    options = azurite.options()
    with underlay.create(url, size=MIB, format="qcow2", storage_options=options) as disk:
        disk.write(b"first", 4096)
    with underlay.open_any(url, writable=True, storage_options=options) as disk:
        disk.write(b"second", 8192)
    with underlay.open_any(url, storage_options=options) as disk:
        assert disk.read_bytes(4096, 5) == b"first"
        assert disk.read_bytes(8192, 6) == b"second"


def test_a_backing_file_of_another_scheme_is_not_told_the_options(
    azurite: Azurite, url: str, key: str, tmp_path: Path, qemu_img: Callable[..., str]
) -> None:
    # They are of no use there, and would be refused.
    backing = f"{azurite.endpoint}/{CONTAINER}/base.raw"
    there = tmp_path / "overlay.qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "raw", there, "1M")
    azurite.client().put(key, there.read_bytes(), write_id="one")
    gate = underlay.PermissiveImplicitOpenGate()
    with pytest.raises(StorageError, match=r"base\.raw': the server answered 40[34]"):
        underlay.open_any(url, storage_options=azurite.options(), gate=gate)


def test_the_later_of_two_writers_is_refused(azurite: Azurite, url: str) -> None:
    options = azurite.options()
    for _ in range(2):  # a new object, and one that is there
        fresh = StorageCreateOptions(name=url, options=options)
        opening = StorageOpenOptions(name=url, writable=True, options=options)
        two: list[S3Object] = []
        try:
            for _ in range(2):
                try:
                    two.append(S3Object.create_open(fresh))
                except StorageExistsError:
                    two.append(S3Object.open(opening))
            winner, loser = two
            loser.writev((b"loser",), 0)
            winner.writev((b"winner",), 0)
            winner.sync()
            for _ in range(2):
                with pytest.raises((StorageChangedError, StorageExistsError)):
                    loser.sync()
        finally:
            for one in two:
                one.close()
        assert content(url, azurite)[:6] == b"winner"


def test_a_large_object_needs_memory_or_that_nobody_else_writes(azurite: Azurite, url: str) -> None:
    # obstore has no upload in parts under a condition.
    size = 65 * MIB
    new = StorageCreateOptions(name=url, size=size, options=azurite.options())
    storage = S3Object.create_open(new)
    with pytest.raises(UnsupportedOperationError, match=r"single_writer=on .* or a part_size"):
        storage.sync()
    storage.close()
    whole = azurite.options(part_size="66M")
    storage = S3Object.create_open(StorageCreateOptions(name=url, size=size, options=whole))
    storage.sync()
    late = S3Object.open(StorageOpenOptions(name=url, writable=True, options=whole))
    storage.writev((b"first",), 0)
    storage.sync()
    late.writev((b"late",), 0)
    with pytest.raises(StorageChangedError):
        late.sync()
    for one in (storage, late):
        one.close()
    azurite.client().delete([url.partition(f"{CONTAINER}/")[2]])
    alone = azurite.options(single_writer="on")
    storage = S3Object.create_open(StorageCreateOptions(name=url, size=size, options=alone))
    storage.writev((b"the end",), size - 7)
    storage.sync()
    storage.close()
    client = azurite.client()
    facts = client.head(url.partition(f"{CONTAINER}/")[2])
    assert facts.size == size
    assert facts.write_id


def test_what_is_left_of_uploads_azure_removes_itself(azurite: Azurite, url: str) -> None:
    with pytest.raises(UnsupportedOperationError, match="Azure does so after a week"):
        jobs.collect_storage(url, storage_options=azurite.options())


# -- who asks, and where


def test_the_environment_is_read_at_each_open(
    azurite: Azurite, url: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    azurite.client().put(key, b"1" * 512, write_id="one")
    for variable, value in azurite.environment().items():
        monkeypatch.setenv(variable, value)
    with underlay.open_image(url, format="raw") as disk:
        assert disk.size == 512
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
        with pytest.raises(StorageAccessError):
            underlay.open_image(url, format="raw")
        # And what an option says counts more.
        with underlay.open_image(url, format="raw", storage_options=azurite.options()):
            pass


@pytest.mark.parametrize(
    ("container", "more", "error"),
    [
        (CONTAINER, {}, StorageNotFoundError),
        ("no-such-container", {}, StorageNotFoundError),
        (CONTAINER, {"secret_access_key": "d3Jvbmc="}, StorageAccessError),
        (CONTAINER, {"access_key_id": "nobody"}, StorageAccessError),
        (CONTAINER, {"anonymous": "on"}, StorageAccessError),
    ],
)
def test_what_does_not_work_is_said_at_once(
    azurite: Azurite, container: str, more: dict[str, Any], error: type[StorageError], waits: Waits
) -> None:
    with pytest.raises(error, match=r"the server answered 40[34]") as caught:
        azurite.client(container, **more).get("none", 0, 1)
    text = str(caught.value)
    assert waits.waits == []
    assert "\n" not in text
    assert not any(secret in text for secret in (KEY, "d3Jvbmc=", f"{ACCOUNT}:"))


def test_a_missing_container_is_said_when_writing(azurite: Azurite) -> None:
    with pytest.raises(StorageNotFoundError, match="create the container"):
        azurite.client("no-such-container").put("a", b"", write_id="one")
