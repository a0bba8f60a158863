"""``underlay check`` says what ``qemu-img check`` says, and exits as it does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import underlay
from underlay import jobs

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool

#: Where the images have their first refcount block, with refcounts of two bytes.
BLOCK = 0x20000


def damage(path: Path, *refcounts: tuple[int, int]) -> None:
    data = bytearray(path.read_bytes())
    for cluster, count in refcounts:
        data.extend(bytes(max(0, (cluster + 1 << 16) - len(data))))
        data[BLOCK + 2 * cluster : BLOCK + 2 * cluster + 2] = count.to_bytes(2, "big")
    path.write_bytes(data)


DAMAGE: dict[str, tuple[tuple[int, int], ...]] = {
    "sound": (),
    "leaks": ((9, 3),),
    "corrupt": ((9, 3), (7, 0)),
}
STATUS = {"sound": 0, "leaks": 3, "corrupt": 2}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("more", [(), ("-q",), ("-U",), ("-f", "qcow2"), ("--output=json",)])
def test_like_qemu_img(
    run: Run, oracle: Run, plain: Path, kind: str, more: tuple[str, ...]
) -> None:
    damage(plain, *DAMAGE[kind])
    theirs = oracle("check", *more, plain.name)
    ours = run("check", *more, plain.name)
    assert theirs.status == STATUS[kind]
    assert ours == theirs


def test_like_qemu_img_without_data(run: Run, oracle: Run, here: Path, qemu_img: Tool) -> None:
    for size in ("0", "1M"):
        qemu_img("create", "-q", "-f", "qcow2", here / "empty.qcow2", size)
        for output in ("human", "json"):
            arguments = ("check", f"--output={output}", "empty.qcow2")
            assert run(*arguments) == oracle(*arguments)


@pytest.mark.parametrize("output", ["human", "json"])
@pytest.mark.parametrize(("kind", "what"), [("leaks", "leaks"), ("leaks", "all"), ("sound", "all")])
def test_repairs_like_qemu_img(  # noqa: PLR0917
    run: Run, oracle: Run, plain: Path, kind: str, what: str, output: str
) -> None:
    damage(plain, *DAMAGE[kind])
    kept = plain.read_bytes()
    theirs = oracle("check", "-r", what, f"--output={output}", plain.name)
    plain.write_bytes(kept)
    ours = run("check", "-r", what, f"--output={output}", plain.name)
    assert (ours.status, ours.out) == (theirs.status, theirs.out) == (0, theirs.out)
    assert oracle("check", plain.name).status == 0


def test_new_refcounts_where_they_are_needed(run: Run, oracle: Run, plain: Path) -> None:
    damage(plain, *DAMAGE["corrupt"])
    done = run("check", "-r", "all", plain.name)
    assert done.status == 0
    assert "Rebuilding refcount structure\n" in done.err
    assert "    1 leaked clusters\n    1 corruptions\n" in done.out
    assert oracle("check", plain.name).status == 0


def test_leaks_that_cannot_be_told_from_data(run: Run, oracle: Run, plain: Path) -> None:
    damage(plain, *DAMAGE["corrupt"])
    kept = plain.read_bytes()
    assert oracle("check", "-r", "leaks", plain.name).status == 1
    plain.write_bytes(kept)
    done = run("check", "-r", "leaks", plain.name)
    assert done.status == 1
    assert done.err.splitlines()[-1].startswith("underlay: ")
    assert plain.read_bytes() == kept


def test_a_dry_run_prints_the_plan_and_changes_nothing(run: Run, plain: Path) -> None:
    damage(plain, *DAMAGE["leaks"])
    kept = plain.read_bytes()
    done = run("check", "-r", "all", "--dry-run", plain.name)
    assert done.status == 3
    assert "1. at 0x90000: lower the refcount, from 0x3 to 0x0\n" in done.out
    shown = json.loads(run("check", "-r", "all", "--dry-run", "--output=json", plain.name).out)
    assert shown["repairs"] == [
        {"what": "lower the refcount", "offset": 0x90000, "before": 3, "after": 0}
    ]
    assert plain.read_bytes() == kept


def test_findings_are_named_one_by_one(run: Run, plain: Path) -> None:
    damage(plain, *DAMAGE["leaks"])
    assert "leak: the cluster at 0x90000 has a refcount of 3, and 0 references" in (
        run("check", "--findings", plain.name).out
    )
    shown = json.loads(run("check", "--findings", "--output=json", plain.name).out)
    first = shown["findings"][0]
    assert (first["kind"], first["offset"], first["found"], first["expected"]) == (
        "leak",
        0x90000,
        3,
        0,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "plain.raw"),
        ("check", "-f", "raw", "plain.qcow2"),
        ("check", "-r", "some", "plain.qcow2"),
        ("check", "-U", "-r", "all", "plain.qcow2"),
        ("check", "-T", "never", "plain.qcow2"),
        ("check", "--output=xml", "plain.qcow2"),
        ("check",),
        ("check", "a", "b"),
    ],
)
def test_refuses_as_qemu_img_does(
    run: Run, oracle: Run, plain: Path, arguments: tuple[str, ...]
) -> None:
    shutil.copy(plain, plain.with_suffix(".raw"))
    plain.with_suffix(".raw").write_bytes(bytes(1 << 20))
    theirs = oracle(*arguments)
    ours = run(*arguments)
    assert ours.status == theirs.status
    assert ours.err.splitlines()[0].removeprefix("underlay: ") == (
        theirs.err.splitlines()[0].removeprefix("qemu-img: ")
    )


def test_nothing_that_the_image_names_is_opened(
    run: Run, names_backing: Callable[[str], Path]
) -> None:
    assert run("check", names_backing("nbd://nowhere").name).status == 0


def test_an_image_marked_corrupt_is_repaired(run: Run, plain: Path) -> None:
    data = bytearray(plain.read_bytes())
    data[79] |= 2
    plain.write_bytes(data)
    with pytest.raises(underlay.CorruptImageError):
        underlay.open_any(plain, writable=True)
    assert run("check", "-r", "all", plain.name).status == 0
    assert not plain.read_bytes()[79] & 2


def test_the_jobs_say_the_same(plain: Path) -> None:
    damage(plain, *DAMAGE["leaks"])
    result = jobs.check(plain)
    assert (result.format, result.leaks, len(result.findings)) == ("qcow2", 1, 1)
    planned = jobs.repair(plain, dry_run=True)
    done = jobs.repair(plain, leaks_only=True)
    assert planned.repairs == done.repairs
    assert jobs.check(plain).leaks == 0


def test_progress_is_told_by_tables(here: Path, qemu_img: Tool) -> None:
    options = ("-o", "preallocation=metadata,cluster_size=4k")
    qemu_img("create", "-q", "-f", "qcow2", *options, here / "tables.qcow2", "512M")
    told: list[jobs.Progress] = []
    jobs.check(here / "tables.qcow2", progress=told.append)
    # 256 L2 tables, and the refcount blocks of 131,200 clusters.
    assert [progress.done for progress in told] == list(range(len(told)))
    assert {progress.total for progress in told} == {256 + 65}
    assert told[-1].done == 256 + 65


def test_an_image_in_use_is_not_repaired(plain: Path) -> None:
    with underlay.open_any(plain), pytest.raises(underlay.ImageInUseError):
        jobs.repair(plain)
