"""What an image may ask for: each limit at it and one past it, and where limits can be given."""

from __future__ import annotations

import inspect
from pathlib import Path

import attrs
import pytest

import underlay
from underlay import jobs
from underlay_storage.memory import MemoryStorage

NAMES = [field.name for field in attrs.fields(underlay.Limits)]
#: Jobs that open no image, or only what each of their conversions says, with its own limits.
_OPEN_NOTHING = {
    "amend_options",
    "check_storage",
    "collect_storage",
    "convert_many",
    "image_info_json",
    "storage_info",
}
JOBS = [
    name
    for name in jobs.__all__
    if inspect.isroutine(getattr(jobs, name)) and name not in _OPEN_NOTHING
]


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_itself_is_allowed_and_one_more_is_not(name: str) -> None:
    limits = underlay.Limits(**{name: 77})
    limits.check(name, 77, what="It")
    with pytest.raises(underlay.LimitExceededError, match=rf"It is 78.*Limits\({name}=") as found:
        limits.check(name, 78, what="It")
    assert (found.value.limit, found.value.value, found.value.allowed) == (name, 78, 77)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_that_opens_an_image_takes_limits(name: str) -> None:
    parameters = inspect.signature(getattr(jobs, name)).parameters
    spread = [one for one in parameters.values() if one.kind is one.VAR_KEYWORD]
    assert "limits" in parameters or any("OpeningAlone" in str(one.annotation) for one in spread)


@pytest.mark.parametrize("face", [underlay, underlay.aio])
@pytest.mark.parametrize("name", ["open_any", "open_image", "create", "inspect"])
def test_everything_that_opens_an_image_takes_limits(face: object, name: str) -> None:
    assert "limits" in inspect.signature(getattr(face, name)).parameters


@pytest.mark.parametrize("job", ["convert", "dd"])
@pytest.mark.parametrize("more", [0, 1])
def test_a_copy_can_be_no_larger_than_the_limit(job: str, more: int, tmp_path: Path) -> None:
    """A few bytes can stand for a disk of any size: nothing is made of one that is too large."""
    source, target = MemoryStorage((1 << 20) + more), tmp_path / "copy.raw"
    limits = underlay.Limits(virtual_size=1 << 20)
    if not more:
        getattr(jobs, job)(source, target, limits=limits)
        assert target.stat().st_size == 1 << 20
        return
    with pytest.raises(underlay.LimitExceededError, match="virtual_size"):
        getattr(jobs, job)(source, target, limits=limits)
    assert not target.exists()


def test_what_several_sources_make_together_is_limited_too(tmp_path: Path) -> None:
    sources, target = [MemoryStorage(1 << 20), MemoryStorage(512)], tmp_path / "copy.raw"
    with pytest.raises(underlay.LimitExceededError, match="virtual_size"):
        jobs.convert(sources, target, limits=underlay.Limits(virtual_size=1 << 20))
    assert not target.exists()


def test_a_sparse_file_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    image = tmp_path / "huge.raw"
    with image.open("wb") as file:
        file.truncate(8 << 40)
    with pytest.raises(underlay.LimitExceededError, match="virtual_size"):
        underlay.open_any(image, limits=underlay.Limits(virtual_size=(8 << 40) - 1))
    assert underlay.probe(image).guessed
    assert jobs.digest(image).size == 8 << 40
    assert [run.length for run in jobs.map_image(image)] == [8 << 40]
    assert jobs.measure(image).required == 8 << 40
    assert jobs.picture(image).virtual_size == 8 << 40
    assert jobs.compare(image, image).identical
    assert jobs.convert(image, tmp_path / "copy.raw").data == 0
