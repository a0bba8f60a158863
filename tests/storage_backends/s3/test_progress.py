"""How far a job is that makes an object: sending it takes as long as all else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from underlay import jobs
from underlay.jobs import Progress
from underlay_storage.s3.client import ObjectClient

from .servers import BUCKET, Server
from .workloads import pending

_SIZE = 22 << 20


@pytest.fixture
def here(tmp_path: Path) -> Path:
    path = tmp_path / "here.raw"
    path.write_bytes(os.urandom(_SIZE))
    return path


@pytest.fixture
def options(seaweed: Server) -> dict[str, object]:
    return {**seaweed.options(), "part_size": "5M", "parallel": 1}


def test_the_bar_moves_while_the_object_is_sent(
    here: Path, options: dict[str, object], prefix: str
) -> None:
    told: list[Progress] = []
    there = f"s3://{BUCKET}/{prefix}/there"
    jobs.convert(here, there, target_storage_options=options, progress=told.append)
    done = [now.done for now in told]
    assert {now.total for now in told if now.done} == {2 * _SIZE}
    assert done == sorted(done)
    assert [at for at in done if _SIZE < at < 2 * _SIZE] == [
        _SIZE + part * (5 << 20) for part in (1, 2, 3, 4)
    ]
    assert done.index(2 * _SIZE) == len(done) - 1


def test_what_is_stopped_while_it_is_sent_leaves_nothing(
    here: Path, options: dict[str, object], prefix: str, client: ObjectClient
) -> None:
    def stop(now: Progress) -> None:
        if now.done > _SIZE:
            raise KeyboardInterrupt

    there = f"s3://{BUCKET}/{prefix}/there"
    with pytest.raises(KeyboardInterrupt):
        jobs.convert(here, there, target_storage_options=options, progress=stop)
    assert list(client.listing(prefix)) == []
    assert pending(client, prefix) == []
