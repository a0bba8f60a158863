"""Jobs whose work is done by other processes: what comes of it is what comes of threads."""

from __future__ import annotations

import importlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import underlay
from underlay import errors, jobs
from underlay.jobs import many_elsewhere
from underlay.jobs.many import convert_here
from underlay.jobs.workers import is_elsewhere
from underlay_storage.memory import MemoryStorage

from .conftest import Make
from .executors import Posting
from .files import goes, same, write_mixed

Tool = Callable[..., str]

#: Most of it has no types.
distributed: Any = importlib.import_module("distributed")


class StoppedError(Exception):
    """The caller has seen enough."""


def process_pool(workers: int = 2) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with process_pool() as executor:
        yield executor


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with distributed.LocalCluster(
        host="127.0.0.1",
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address="127.0.0.1:0",
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def dask(cluster: Any) -> Iterator[Executor]:
    with distributed.Client(cluster) as client:
        yield client.get_executor()


@pytest.fixture(params=["posting", "processes", "dask"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "posting":
        return Posting(times=2)
    found: Executor = request.getfixturevalue(request.param)
    return found


def fill(path: Path, tmp_path: Path, qemu_img: Tool, *options: str) -> Path:
    """A qcow2 image of the bytes of a raw one."""
    image = tmp_path / f"{path.stem}.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, path, image)
    return image


# -- where work is done


class _Inline(Executor):
    """An executor of somebody's own, which works in the calling thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_an_executor_is_known_by_what_it_does(executor: Executor, mixed: Path) -> None:
    assert is_elsewhere(executor)
    assert not is_elsewhere(None)
    assert not is_elsewhere(_Inline())
    with ThreadPoolExecutor(1) as threads:
        assert not is_elsewhere(threads)


def test_what_is_stopped_stops_nothing_that_comes_after_it(executor: Executor) -> None:
    """An executor may cancel late, and take equal calls for one."""
    for _ in range(20):
        with suppress(errors.TimeLimitError), underlay.TimeLimit(0):
            is_elsewhere(executor)
        assert is_elsewhere(executor)


def test_one_that_does_nothing_any_more_is_an_error(tmp_path: Path, mixed: Path) -> None:
    pool = process_pool(1)
    pool.shutdown()
    with pytest.raises(errors.WorkerError, match="shutdown"):
        jobs.convert(mixed, tmp_path / "out.raw", executor=pool)
    assert not (tmp_path / "out.raw").exists()


# -- copies


@pytest.mark.parametrize(
    "given",
    [
        {"output_format": "raw"},
        {"output_format": "raw", "sparse_size": 0},
        {"output_format": "qcow2"},
        {"output_format": "qcow2", "compress": True},
        {"output_format": "qcow2", "compress": True, "level": 9},
        {"output_format": "qcow2", "compress": True, "options": {"compression_type": "zstd"}},
        {"output_format": "qcow2", "options": {"cluster_size": 4096, "extended_l2": False}},
    ],
    ids=str,
)
def test_a_raw_disk_arrives_whole(
    given: dict[str, Any], executor: Executor, mixed: Path, tmp_path: Path, qemu_img: Tool
) -> None:
    by_threads, out = tmp_path / "threads", tmp_path / "out"
    expected = jobs.convert(mixed, by_threads, parallel=1, **given)
    assert jobs.convert(mixed, out, executor=executor, **given) == expected
    qemu_img("compare", "-f", "raw", "-F", given["output_format"], mixed, out)
    if given["output_format"] == "qcow2":
        assert "No errors were found" in qemu_img("check", out)
    assert jobs.digest(out, executor=executor) == jobs.digest(mixed)
    allocated = out.stat().st_blocks * 512, by_threads.stat().st_blocks * 512
    assert abs(allocated[0] - allocated[1]) <= 256 << 10


@pytest.mark.parametrize("options", [(), ("-c",), ("-c", "-o", "compression_type=zstd")], ids=str)
def test_a_qcow2_image_arrives_whole(
    options: tuple[str, ...],
    executor: Executor,
    mixed: Path,
    tmp_path: Path,
    qemu_img: Tool,
) -> None:
    image = fill(mixed, tmp_path, qemu_img, *options)
    jobs.convert(image, tmp_path / "out.raw", executor=executor)
    assert same(mixed, tmp_path / "out.raw")


def test_a_chain_arrives_whole_and_what_its_gate_refuses_does_not(
    executor: Executor, make: Make, tmp_path: Path, qemu_img: Tool
) -> None:
    base = make("base.qcow2", "qcow2", "6M", "write -P 1 0 3M", "write -P 2 5M 64k")
    middle = make("middle.qcow2", "qcow2", "7M", "write -P 3 1M 1M", backing=base)
    top = make("top.qcow2", "qcow2", "8M", "write -z 2M 512k", "write -P 4 7M 1M", backing=middle)
    out = tmp_path / "out.qcow2"
    with pytest.raises(errors.ImplicitOpenDeniedError):
        jobs.convert(top, out, output_format="qcow2", executor=executor)
    gate = underlay.DirectoryGate()
    jobs.convert(top, out, output_format="qcow2", compress=True, gate=gate, executor=executor)
    qemu_img("compare", top, out)
    assert jobs.compare(top, out, gate=gate, executor=executor).identical

    over = tmp_path / "over.qcow2"
    jobs.convert(
        top,
        over,
        output_format="qcow2",
        options={"backing_file": "middle.qcow2", "backing_fmt": "qcow2"},
        compress=True,
        gate=gate,
        executor=executor,
    )
    qemu_img("compare", top, over)
    assert over.stat().st_size < out.stat().st_size


def test_a_snapshot_and_a_slice_of_it_arrive(
    executor: Executor, make: Make, tmp_path: Path, qemu_img: Tool, qemu_io: Tool
) -> None:
    image = make("a.qcow2", "qcow2", "4M", "write -P 1 0 2M")
    qemu_img("snapshot", "-c", "then", image)
    qemu_io("-c", "write -P 9 1M 3M", image)
    with underlay.open_image(image, format="qcow2", snapshot="then") as disk:
        jobs.convert(disk, tmp_path / "out.raw", executor=executor)
        with disk.slice(1 << 20, 2 << 20) as part:
            jobs.convert(part, tmp_path / "part.raw", executor=executor)
    content = b"\1" * (2 << 20) + bytes(2 << 20)
    assert (tmp_path / "out.raw").read_bytes() == content
    assert (tmp_path / "part.raw").read_bytes() == content[1 << 20 : 3 << 20]


def test_bitmaps_come_along(
    dask: Executor, make: Make, tmp_path: Path, qemu_img: Tool, qemu_io: Tool
) -> None:
    image = make("a.qcow2", "qcow2", "4M")
    qemu_img("bitmap", "--add", image, "b")
    qemu_io("-c", "write -P 5 1M 128k", image)
    out = tmp_path / "out.qcow2"
    jobs.convert(image, out, output_format="qcow2", bitmaps=True, executor=dask)
    assert list(jobs.dirty_ranges(out, "b")) == list(jobs.dirty_ranges(image, "b"))
    qemu_img("compare", image, out)


def test_several_sources_are_put_over_what_an_image_held(
    executor: Executor, make: Make, tmp_path: Path
) -> None:
    first = write_mixed(tmp_path / "first.raw", size=(5 << 20) + 512, seed=2)
    second = write_mixed(tmp_path / "second.raw", size=(3 << 20) + 100, seed=3)
    out = make("out.qcow2", "qcow2", "9M", "write -P 7 0 9M")
    jobs.convert(
        [first, second],
        out,
        output_format="qcow2",
        compress=True,
        target_exists=True,
        executor=executor,
    )
    expected = first.read_bytes() + second.read_bytes() + bytes(-100 % 512)
    with underlay.open_image(out, format="qcow2") as disk:
        found = disk.read_bytes(0, disk.size)
    assert found == expected + b"\7" * (len(found) - len(expected))


def test_commit_and_dd_copy_with_it_too(executor: Executor, make: Make, tmp_path: Path) -> None:
    base = make("base.raw", "raw", "4M")
    overlay = make("top.qcow2", "qcow2", "4M", "write -P 1 1M 1M", backing=base)
    gate = underlay.DirectoryGate()
    jobs.dd(overlay, tmp_path / "out.raw", gate=gate, executor=executor)
    jobs.commit(overlay, gate=gate, executor=executor)
    assert base.read_bytes() == bytes(1 << 20) + b"\1" * (1 << 20) + bytes(2 << 20)
    assert same(base, tmp_path / "out.raw")


def test_a_job_that_needs_threads_says_so(processes: Executor, make: Make) -> None:
    base = make("base.raw", "raw", "1M", "write -P 1 0 64k")
    overlay = make("top.qcow2", "qcow2", "1M", backing=base)
    with pytest.raises(errors.UnsupportedOperationError, match="give one of threads"):
        jobs.rebase(overlay, None, gate=underlay.DirectoryGate(), executor=processes)


def test_no_more_is_on_its_way_than_was_asked_for(mixed: Path, tmp_path: Path) -> None:
    executor = Posting(times=1)
    jobs.convert(mixed, tmp_path / "out.raw", parallel=1, executor=executor)
    assert executor.calls > 2
    assert executor.most_at_once <= 2


def test_zeroes_are_not_sent_for(tmp_path: Path) -> None:
    executor, empty = Posting(times=1), tmp_path / "empty.raw"
    with empty.open("wb") as file:
        file.truncate(1 << 30)
    jobs.convert(empty, tmp_path / "out.raw", executor=executor)
    assert executor.calls == 1  # whether it is one of other processes


# -- what goes wrong


def damaged(tmp_path: Path, qemu_img: Tool) -> Path:
    """A compressed image, the middle of whose data is no stream any more."""
    text, image = tmp_path / "text.raw", tmp_path / "damaged.qcow2"
    text.write_bytes(b"".join(b"line %d\n" % number for number in range(500_000)))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", text, image)
    with image.open("r+b") as file:
        file.seek(image.stat().st_size // 2)
        file.write(b"\xff" * 70_000)
    return image


def test_damage_is_the_same_error(executor: Executor, tmp_path: Path, qemu_img: Tool) -> None:
    image = damaged(tmp_path, qemu_img)
    with pytest.raises(errors.CorruptImageError) as here:
        jobs.convert(image, tmp_path / "here.raw", parallel=1)
    assert not (tmp_path / "here.raw").exists()
    with pytest.raises(errors.CorruptImageError) as there:
        jobs.convert(image, tmp_path / "there.raw", parallel=1, executor=executor)
    assert "guest offset" in str(there.value)
    assert there.value.field == here.value.field
    assert not (tmp_path / "there.raw").exists()


def test_what_can_be_is_salvaged(executor: Executor, tmp_path: Path, qemu_img: Tool) -> None:
    image = damaged(tmp_path, qemu_img)
    lost: dict[str, list[tuple[int, int]]] = {"here": [], "there": []}
    for name, given in (("here", None), ("there", executor)):

        def note(what: jobs.Unreadable, name: str = name) -> None:
            lost[name].append((what.start, what.length))

        jobs.convert(image, tmp_path / name, salvage=note, executor=given)
    assert lost["here"]
    assert sorted(lost["here"]) == sorted(lost["there"])
    assert same(tmp_path / "here", tmp_path / "there")


def test_what_lives_in_this_process_is_refused(executor: Executor, tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedOperationError, match="lives in this process alone"):
        jobs.convert(MemoryStorage(b"x" * 4096), tmp_path / "out.raw", executor=executor)
    assert not (tmp_path / "out.raw").exists()


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("change", "error"),
    [(touch, errors.StorageChangedError), (remove, errors.StorageNotFoundError)],
)
def test_what_is_not_the_same_source_any_more_is_not_read(
    change: Callable[[Path], None],
    error: type[Exception],
    executor: Executor,
    mixed: Path,
    tmp_path: Path,
) -> None:
    def act(progress: jobs.Progress) -> None:
        if progress.done:
            change(mixed)

    mixed.write_bytes(mixed.read_bytes() * 3)
    with pytest.raises(error, match="has to find it under this name"):
        jobs.convert(mixed, tmp_path / "out.raw", parallel=1, executor=executor, progress=act)
    assert not (tmp_path / "out.raw").exists()


def test_a_callback_or_the_time_limit_stops_it_and_nothing_stays(
    executor: Executor, mixed: Path, tmp_path: Path
) -> None:
    def stop(progress: jobs.Progress) -> None:
        if progress.done:
            raise StoppedError

    out = tmp_path / "out.raw"
    with pytest.raises(StoppedError):
        jobs.convert(mixed, out, executor=executor, progress=stop)
    assert not out.exists()
    begun = time.monotonic()
    with pytest.raises(errors.TimeLimitError), underlay.TimeLimit(0.3):
        jobs.convert(mixed, out, executor=executor, rate=32 << 10)
    assert time.monotonic() - begun < 60  # to the end it would take minutes
    assert not out.exists()
    # It is as good as before.
    jobs.convert(mixed, out, executor=executor)
    assert same(mixed, out)


def test_workers_of_a_pool_that_die_are_an_error(mixed: Path, tmp_path: Path) -> None:
    with process_pool() as pool:
        pool.submit(os.getpid).result()

        # Not while one sends a result: there Python's pool waits for the rest of it without end.
        def kill(progress: jobs.Progress) -> None:
            if not progress.done:
                for pid in pool._processes:
                    os.kill(pid, signal.SIGKILL)

        with pytest.raises(errors.WorkerError, match="did not do their part"):
            jobs.convert(mixed, tmp_path / "out.raw", executor=pool, progress=kill)
    assert not (tmp_path / "out.raw").exists()


def test_a_worker_of_a_cluster_that_dies_is_made_up_for(
    cluster: Any, dask: Executor, mixed: Path, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill(progress: jobs.Progress) -> None:
        if progress.done and not killed:
            killed.extend(kill_workers(cluster, 1))

    out = tmp_path / "out.qcow2"
    jobs.convert(
        mixed,
        out,
        output_format="qcow2",
        compress=True,
        executor=dask,
        parallel=1,
        rate=8 << 20,
        progress=kill,
    )
    assert killed
    assert jobs.compare(mixed, out).identical


def kill_workers(cluster: Any, most: int) -> list[int]:
    """Kill workers of a cluster, which then starts others; which they were."""
    killed: list[int] = []
    for nanny in list(cluster.workers.values()):
        pid = nanny.pid
        if pid is not None and len(killed) < most:
            with suppress(ProcessLookupError):  # one that was killed before, and is not back yet
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    assert killed, "there is no worker"
    return killed


# -- fleets


@pytest.fixture(params=[None, "threads", "posting", "processes", "dask"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[Executor | None]:
    """Whatever ``convert_many`` may be given."""
    if request.param is None:
        yield None
    elif request.param == "posting":
        yield Posting(times=1)
    elif request.param == "threads":
        with ThreadPoolExecutor(2) as executor:
            yield executor
    else:
        yield request.getfixturevalue(request.param)


def test_a_fleet_comes_to_what_each_comes_to(
    anywhere: Executor | None,
    make: Make,
    tmp_path: Path,
    qemu_img: Tool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make("base.raw", "raw", "2M", "write -P 1 0 1M")
    make("top.qcow2", "qcow2", "2M", "write -P 2 1M 64k", backing=base)
    (tmp_path / "there").write_bytes(b"somebody's")
    (tmp_path / "old").write_bytes(b"old")
    monkeypatch.chdir(tmp_path)
    fleet = [
        jobs.Conversion("base.raw", "a.qcow2", output_format="qcow2", compress=True),
        jobs.Conversion("none.raw", "b.raw"),
        jobs.Conversion("top.qcow2", "c.raw"),
        jobs.Conversion("top.qcow2", "d.raw", gate=underlay.DirectoryGate()),
        jobs.Conversion(base, "there"),
        jobs.Conversion(base, "old", overwrite=True),
        jobs.Conversion(base, "e.raw", options={"nonsense": 1}),
        jobs.Conversion(base, "f.qcow2", output_format="qcow2", options={"data_file": "f.data"}),
    ]
    seen: list[jobs.Progress] = []
    results = jobs.convert_many(fleet, executor=anywhere, progress=seen.append)
    assert [type(result) for result in results] == [
        jobs.Copied,
        errors.StorageNotFoundError,
        errors.ImplicitOpenDeniedError,
        jobs.Copied,
        errors.StorageExistsError,
        jobs.Copied,
        errors.OptionError,
        jobs.Copied,
    ]
    assert seen == [jobs.Progress(done, len(fleet)) for done in range(len(fleet) + 1)]
    assert sorted(os.listdir()) == sorted(
        ["base.raw", "top.qcow2", "there", "old", "a.qcow2", "d.raw", "f.qcow2", "f.data"]
    )
    assert (tmp_path / "there").read_bytes() == b"somebody's"
    assert same(base, tmp_path / "old")
    for one, other in (("base.raw", "a.qcow2"), ("top.qcow2", "d.raw"), ("base.raw", "f.qcow2")):
        qemu_img("compare", one, other)


def test_a_fleet_can_end_with_its_first_failure(anywhere: Executor | None, tmp_path: Path) -> None:
    # To its end it takes a quarter of a minute, but where nobody can stop it.
    (tmp_path / "large.raw").write_bytes(
        b"1" * (8 << 20 if isinstance(anywhere, Posting) else 64 << 20)
    )
    fleet = [
        jobs.Conversion(tmp_path / "large.raw", tmp_path / "slow.raw", rate=4 << 20),
        jobs.Conversion(tmp_path / "none.raw", tmp_path / "b.raw"),
    ]
    with pytest.raises(errors.StorageNotFoundError):
        jobs.convert_many(fleet, executor=anywhere, stop_at_failure=True, parallel=2)
    # Had it been waited for, it would be there to stay.
    slow = tmp_path / "slow.raw"
    assert goes(slow) if is_elsewhere(anywhere) else not slow.exists()


def test_a_worker_leaves_no_other_object_under_the_name_of_one_that_is_gone(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look and its writing; the new file may well get the number of the old one."""
    target = tmp_path / "out.raw"
    target.touch()

    def late(conversion: jobs.Conversion, seconds: float | None, look: Any) -> Any:
        target.unlink()
        calls = itertools.count()

        def look_late(progress: jobs.Progress) -> None:
            if next(calls):  # the first time it is not made yet
                look(progress)

        return convert_here(conversion, seconds, look_late)

    monkeypatch.setattr(many_elsewhere, "convert_here", late)
    with many_elsewhere._seen(target, None) as (seen, _):
        conversion = jobs.Conversion(mixed, target, overwrite=True)
    order = many_elsewhere._Order(conversion=conversion, seconds=None, target=seen)
    assert isinstance(many_elsewhere._convert(order), errors.WorkerError)
    assert not target.exists()


def test_a_fleet_keeps_to_the_time_limit(
    anywhere: Executor | None, mixed: Path, tmp_path: Path
) -> None:
    with pytest.raises(errors.TimeLimitError), underlay.TimeLimit(0.3):
        jobs.convert_many(
            [jobs.Conversion(mixed, tmp_path / "slow.raw", rate=1 << 20)], executor=anywhere
        )
    slow = tmp_path / "slow.raw"
    assert goes(slow) if is_elsewhere(anywhere) else not slow.exists()


def kill_when_written(path: Path, kill: Callable[[], object]) -> threading.Thread:
    """Kill a worker when it has begun to write."""

    def wait() -> None:
        end = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size) and time.monotonic() < end:
            time.sleep(0.01)
        kill()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_worker_of_a_pool_that_dies_leaves_nothing_half(mixed: Path, tmp_path: Path) -> None:
    with process_pool(1) as pool:

        def kill() -> None:
            for pid in list(pool._processes):
                os.kill(pid, signal.SIGKILL)

        thread = kill_when_written(tmp_path / "a.raw", kill)
        results = jobs.convert_many(
            [jobs.Conversion(mixed, tmp_path / name, rate=16 << 10) for name in ("a.raw", "b.raw")],
            executor=pool,
            parallel=1,
        )
        thread.join()
    assert [type(result) for result in results] == [errors.WorkerError, errors.WorkerError]
    assert os.listdir(tmp_path) == [mixed.name]


def test_a_worker_of_a_cluster_that_dies_in_a_fleet_is_made_up_for(
    cluster: Any, dask: Executor, mixed: Path, tmp_path: Path
) -> None:
    small = write_mixed(tmp_path / "small.raw", size=2 << 20)
    out = tmp_path / "out.raw"
    # Either may be at it.
    thread = kill_when_written(out, lambda: kill_workers(cluster, 2))
    results = jobs.convert_many([jobs.Conversion(small, out, rate=2 << 20)], executor=dask)
    thread.join()
    assert [type(result) for result in results] == [jobs.Copied]
    assert same(small, out)


def test_what_cannot_travel_is_refused_and_says_what_to_do(
    processes: Executor, make: Make, tmp_path: Path
) -> None:
    class Own(underlay.DirectoryGate):
        """Nobody else can import it."""

    image = make("a.qcow2", "qcow2", "1M")
    with underlay.open_image(image, format="qcow2") as disk:
        results = jobs.convert_many(
            [
                jobs.Conversion(disk, tmp_path / "a.raw"),
                jobs.Conversion(MemoryStorage(b"x" * 512), tmp_path / "b.raw"),
                jobs.Conversion(image, "memory:nowhere-else"),
                jobs.Conversion(image, tmp_path / "c.raw", gate=Own()),
            ],
            executor=processes,
        )
    hints = ["its name", "its name", "another target", "threads"]
    for result, hint in zip(results, hints, strict=True):
        assert isinstance(result, errors.UnsupportedOperationError)
        assert hint in str(result)
    assert os.listdir(tmp_path) == [image.name]
    with pytest.raises(errors.StorageNotFoundError):
        underlay.open_any("memory:nowhere-else")


def test_a_conversion_is_a_value_with_arguments_of_convert() -> None:
    first = jobs.Conversion("a", "b", compress=True)
    assert first == jobs.Conversion("a", "b", compress=True)
    assert first != jobs.Conversion("a", "b")
    for name in ("executor", "progress", "compres"):
        with pytest.raises(TypeError, match=name):
            jobs.Conversion("a", "b", **{name: None})


def test_parallel_has_its_range(processes: Executor) -> None:
    with pytest.raises(errors.OptionError, match="256"):
        jobs.convert_many([], parallel=257, executor=processes)
    assert jobs.convert_many([], executor=processes) == []
