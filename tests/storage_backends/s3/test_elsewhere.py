"""Workers in other processes find the same objects of a bucket."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest

import underlay
from underlay import errors, jobs

from .servers import BUCKET, Server
from .workloads import until

_SIZE = 6 << 20


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        yield executor


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    data = random.Random(1).randbytes(_SIZE // 4)
    path.write_bytes(data + b"text " * (_SIZE // 20) + bytes(_SIZE // 2))
    return path


@pytest.mark.parametrize("scheme", ["s3", "s3+blocks"])
def test_they_convert_from_and_to_it(
    scheme: str, seaweed: Server, prefix: str, source: Path, processes: Executor
) -> None:
    folder = source.parent
    options = seaweed.options()
    there = f"{scheme}://{BUCKET}/{prefix}/disk"
    jobs.convert(
        source,
        there,
        output_format="qcow2",
        compress=True,
        executor=processes,
        target_storage_options=options,
    )
    jobs.convert(there, folder / "back.raw", executor=processes, storage_options=options)
    assert jobs.compare(source, folder / "back.raw").identical

    fleet = [
        jobs.Conversion(source, f"{there}-{number}", target_storage_options=options)
        for number in range(2)
    ]
    fleet.append(jobs.Conversion(source, there, target_storage_options=options))
    fleet.append(jobs.Conversion(folder / "none", f"{there}-3", target_storage_options=options))
    results = jobs.convert_many(fleet, executor=processes)
    assert [type(result) for result in results] == [
        jobs.Copied,
        jobs.Copied,
        errors.StorageExistsError,
        errors.StorageNotFoundError,
    ]
    for number in range(2):
        with underlay.open_image(
            f"{there}-{number}", format="raw", storage_options=options
        ) as disk:
            assert jobs.compare(disk, source).identical
    with pytest.raises(errors.StorageNotFoundError):
        underlay.open_any(f"{there}-3", storage_options=options)


@pytest.mark.parametrize("scheme", ["s3", "s3+blocks"])
def test_a_fleet_that_is_stopped_shows_nothing_of_what_it_began(
    scheme: str, seaweed: Server, prefix: str, source: Path, processes: Executor
) -> None:
    options = seaweed.options()
    there = f"{scheme}://{BUCKET}/{prefix}/disk"
    with pytest.raises(errors.TimeLimitError), underlay.TimeLimit(1):
        jobs.convert_many(
            [
                jobs.Conversion(
                    source,
                    there,
                    output_format="qcow2",
                    rate=1 << 20,
                    target_storage_options=options,
                )
            ],
            executor=processes,
        )

    def is_empty() -> bool:
        try:
            with underlay.open_image(there, format="raw", storage_options=options) as disk:
                return disk.size == 0
        except errors.StorageNotFoundError:
            return True

    time.sleep(1)  # for what a worker still does
    until(is_empty)
