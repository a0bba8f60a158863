"""Whoever writes at the same time, to one cluster even: nothing is lost, and nothing is broken."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay.capabilities import CompressedWriter

from .judging import chance_of
from .structure import Verdict, look_at

_CLUSTER = 64 << 10
_PIECE = 512


@pytest.fixture(params=["plain", "subclusters", "backing", "compressed"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, bytes]]:
    """An image of four clusters, and what it holds."""
    size = 4 * _CLUSTER
    path = tmp_path / "disk.qcow2"
    content = bytes(size)
    options: dict[str, Any] = {}
    if request.param == "subclusters":
        options["extended_l2"] = True
    if request.param == "backing":
        content = bytes(range(256)) * (size // 256)
        (tmp_path / "base.raw").write_bytes(content)
        options |= {"backing_file": "base.raw", "backing_fmt": "raw"}
    gate = underlay.DirectoryGate()
    with underlay.create(path, size=size, gate=gate, **options) as disk:
        if request.param == "compressed":
            content = b"compressed cluster" * (size // 18 + 1)
            content = content[:size]
            writer = disk.capability(CompressedWriter)
            for offset in range(0, size, _CLUSTER):
                encoded = writer.encode(memoryview(content)[offset : offset + _CLUSTER])
                writer.write_encoded(offset, encoded)
    yield path, content
    assert look_at(path.read_bytes()) == Verdict()


def _pieces(size: int) -> list[int]:
    """Where to write, in an order in which neighbours come far from each other."""
    places = list(range(0, size, 2 * _PIECE))
    chance_of("pieces").shuffle(places)
    return places


def _with_pieces(content: bytes) -> bytes:
    after = bytearray(content)
    for place in _pieces(len(content)):
        after[place : place + _PIECE] = _data(place)
    return bytes(after)


def _data(place: int) -> bytes:
    return (place // _PIECE + 1).to_bytes(4, "big") * (_PIECE // 4)


def test_tasks_write_to_one_cluster_at_once(image: tuple[Path, bytes]) -> None:
    path, content = image

    async def write() -> None:
        gate = underlay.DirectoryGate()
        async with await underlay.aio.open_any(path, writable=True, gate=gate) as disk:
            work = [disk.write(_data(place), place) for place in _pieces(len(content))]
            work.insert(len(work) // 2, disk.flush())
            work.insert(len(work) // 4, disk.sync())
            await asyncio.gather(*work)
            assert await disk.read_bytes(0, disk.size) == _with_pieces(content)

    asyncio.run(write())

    with underlay.open_any(path, gate=underlay.DirectoryGate()) as disk:
        assert disk.read_bytes(0, disk.size) == _with_pieces(content)


def test_threads_write_to_one_cluster_at_once(image: tuple[Path, bytes]) -> None:
    path, content = image
    errors: list[BaseException] = []
    gate = underlay.DirectoryGate()
    with underlay.open_any(path, writable=True, gate=gate) as disk:

        def write(places: list[int]) -> None:
            try:
                for number, place in enumerate(places):
                    disk.write(_data(place), place)
                    if number % 50 == 49:
                        disk.flush()
                        disk.sync()
            except BaseException as error:  # noqa: BLE001 - shown below
                errors.append(error)

        places = _pieces(len(content))
        threads = [threading.Thread(target=write, args=(places[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert disk.read_bytes(0, disk.size) == _with_pieces(content)

    with underlay.open_any(path, gate=underlay.DirectoryGate()) as disk:
        assert disk.read_bytes(0, disk.size) == _with_pieces(content)


def test_threads_may_write_discard_and_read_at_once(tmp_path: Path) -> None:
    """Each thread has clusters of its own, interleaved with the others' in all tables."""
    path = tmp_path / "disk.qcow2"
    cluster, count = 4096, 64
    errors: list[BaseException] = []
    with underlay.create(path, size=cluster * count, cluster_size=cluster) as disk:

        def work(mine: int) -> None:
            try:
                chance = chance_of("threads", mine)
                held = dict.fromkeys(range(mine, count, 4), bytes(cluster))
                for _ in range(150):
                    number = chance.choice(list(held))
                    data = bytes([chance.randrange(256)]) * cluster
                    if chance.random() < 0.3:
                        data = bytes(cluster)
                        disk.discard_to_zero(number * cluster, cluster)
                    else:
                        disk.write(data, number * cluster)
                    held[number] = data
                    if chance.random() < 0.1:
                        disk.flush()
                        disk.sync()
                    other = chance.choice(list(held))
                    assert disk.read_bytes(other * cluster, cluster) == held[other]
            except BaseException as error:  # noqa: BLE001 - shown below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(mine,)) for mine in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
    assert look_at(path.read_bytes()) == Verdict()
