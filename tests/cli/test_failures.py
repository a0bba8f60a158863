"""A command that fails says why in one line, and leaves with a status of its own."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import underlay.cli.info

if TYPE_CHECKING:
    from tests.cli.conftest import Done, Run
    from tests.conftest import Tool

READERS = {
    "info": ("info",),
    "map": ("map",),
    "compare": ("compare", "plain.qcow2"),
    "convert": ("convert", "-O", "raw"),
    "dd": ("dd", "of=out.raw"),
    "probe": ("probe",),
    "inspect": ("inspect",),
}
#: Those that take the image's lock.
LOCKERS = [name for name in READERS if name not in {"probe", "inspect"}]


def read(run: Run, command: str, name: str, *flags: str) -> Done:
    words = [*READERS[command], *flags]
    words.append(f"if={name}" if command == "dd" else name)
    return run(*words, *(["out.raw"] if command == "convert" else []))


def assert_one_line(done: Done, command: str) -> None:
    assert done.status == (2 if command == "compare" else 1)
    assert done.out == ""
    assert done.err.startswith("underlay: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert not Path("out.raw").exists()


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(
    "name",
    ["missing", "folder", "fifo", "", "nbd://localhost:1/x", 'json:{"driver":"raw"}', "a\nb"],
)
def test_what_cannot_be_opened_is_told_in_one_line(
    plain: Path, run: Run, command: str, name: str
) -> None:
    Path("folder").mkdir()
    os.mkfifo("fifo")
    assert_one_line(read(run, command, name), command)


@pytest.mark.parametrize("command", [name for name in READERS if name not in {"probe", "inspect"}])
def test_damage_is_told_in_one_line(plain: Path, run: Run, command: str) -> None:
    data = bytearray(plain.read_bytes())
    data[20:24] = (63).to_bytes(4, "big")
    Path("damaged.qcow2").write_bytes(data)
    assert_one_line(read(run, command, "damaged.qcow2", "-f", "qcow2"), command)
    Path("garbage").write_bytes(b"QFI\xfb" + bytes(range(256)) * 4)
    assert_one_line(read(run, command, "garbage", "-f", "qcow2"), command)
    Path("short").write_bytes(data[:40])
    assert_one_line(read(run, command, "short", "-f", "qcow2"), command)


@pytest.mark.parametrize("command", LOCKERS)
def test_an_image_in_use_is_refused_unless_that_is_wanted(
    plain: Path, qemu_img: Tool, qemu_io: Tool, run: Run, command: str
) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "busy.qcow2", "1M")
    user = subprocess.Popen(
        ["qemu-io", "busy.qcow2"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        assert b"1 MiB" in user.stdout.readline()
        done = read(run, command, "busy.qcow2")
        assert done.status == (2 if command == "compare" else 1)
        assert done.out == ""
        # qemu-img's words, since scripts look for them.
        assert done.err == (
            "underlay: Could not open 'busy.qcow2': Failed to get shared \"write\" lock\n"
            "Is another process using the image [busy.qcow2]?\n"
        )
        allowed = read(run, command, "busy.qcow2", "-U")
        assert allowed.err == ""
        assert allowed.status == (1 if command == "compare" else 0)
        # Judging takes no lock.
        for judge in ("probe", "inspect"):
            assert read(run, judge, "busy.qcow2").status == 0
    finally:
        user.communicate()


def test_control_characters_in_a_name_reach_no_terminal(
    names_backing: Callable[[str], Path], run: Run
) -> None:
    path = names_backing("evil\x1b[2J\nunderlay: all is well\u202e\x85.raw")
    for words in (
        ("info", path.name),
        ("map", path.name),
        ("map", "--gate", "directory", path.name),
        ("inspect", path.name),
        ("inspect", "--output=json", path.name),
        ("info", "--output=json", path.name),
    ):
        done = run(*words)
        text = done.out + done.err
        assert "evil" in text
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "\nunderlay: all is well" not in text


def test_bytes_in_a_name_that_are_no_text_are_shown_escaped(
    names_backing: Callable[[str], Path], run: Run
) -> None:
    path = names_backing(os.fsdecode(b"caf\xe9.raw"))
    assert "backing file: caf\\xe9.raw\n" in run("info", path.name).out
    assert r'"backing-filename": "caf\uFFFD.raw"' in run("info", "--output=json", path.name).out


def test_a_name_on_the_command_line_need_be_no_text(plain: Path, run: Run) -> None:
    odd = os.fsdecode(b"caf\xe9.qcow2")
    plain.rename(odd)
    assert "image: caf\\xe9.qcow2\n" in run("info", odd).out
    assert run("map", odd).status == 0


def test_a_mistake_of_ours_is_told_without_a_traceback(
    plain: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(underlay.cli.info, "info", broken)
    done = run("info", plain.name)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("underlay: internal error: ZeroDivisionError: oh\\nno")
    assert done.err.count("\n") == 1
    monkeypatch.setenv("UNDERLAY_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        underlay.cli.main(["info", plain.name])


def test_an_interrupt_is_quiet(plain: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(underlay.cli.info, "info", interrupted)
    assert run("info", plain.name) == (130, "", "")


def start(*words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "underlay", *words],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def test_a_reader_that_goes_away_is_no_failure_worth_a_word(here: Path, qemu_img: Tool) -> None:
    # Many runs of one cluster: more text than a pipe holds.
    data = b"".join(b"%4096d" % n if n % 2 else bytes(4096) for n in range(4000))
    Path("disk.raw").write_bytes(data)
    qemu_img("convert", "-O", "qcow2", "-o", "cluster_size=4k", "disk.raw", "disk.qcow2")
    process = start("map", "--output=json", "disk.qcow2")
    assert process.stdout is not None
    assert process.stdout.read(1) == b"["
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("info plain.qcow2", 1),
        ("--version", 1),
        ("plugins", 1),
        ("compare plain.qcow2 plain.qcow2", 2),
    ],
)
def test_output_that_cannot_be_written_is_a_failure(plain: Path, line: str, status: int) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    process = start(*line.split(), stdout=full)
    os.close(full)
    _, err = process.communicate()
    assert process.returncode == status  # of compare, 1 would say that they differ
    assert err.decode() == (
        f"underlay: Could not write to 'standard output': {os.strerror(errno.ENOSPC)}\n"
    )


def redirected(how: str, line: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a shell does."""
    command = [sys.executable, "-m", "underlay", *line.split()]
    return subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {how}', "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("line", ["map --picture=- plain.qcow2", "info plain.qcow2"])
def test_a_closed_stdout_is_a_failure(plain: Path, line: str) -> None:
    done = redirected(">&-", line)
    assert (done.returncode, done.stderr) == (
        1,
        "underlay: Could not write the output: standard output is closed\n",
    )


@pytest.mark.parametrize("how", ["2>&-", "2>/dev/full"])
def test_a_job_goes_on_where_nobody_can_be_told_how_far_it_is(plain: Path, how: str) -> None:
    for style in ("-p", "--progress=json"):
        assert redirected(how, f"convert {style} plain.qcow2 out.raw").returncode == 0
        os.unlink("out.raw")
    # And what keeps it from going on shows in its status, if nowhere else.
    assert redirected(how, "compare none.qcow2 plain.qcow2").returncode == 2
    assert redirected(how, "info --no-such-option plain.qcow2").returncode == 1


def test_a_target_that_cannot_be_overwritten_could_not_be_created(
    plain: Path, run: Run, oracle: Run
) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, "busy")
    with subprocess.Popen(["./busy", "60"]) as busy:  # not even root can write to it
        for line in ("create busy 1M", "convert plain.qcow2 busy", "dd if=plain.qcow2 of=busy"):
            theirs, ours = oracle(*line.split()), run(*line.split())
            assert "Could not create 'busy': Text file busy" in theirs.err
            assert ours == theirs._replace(err=theirs.err.replace("qemu-img:", "underlay:"))
        busy.kill()


def test_a_folder_as_backing_file_is_not_taken_for_the_new_image(
    here: Path, run: Run, oracle: Run
) -> None:
    line = ("create", "-f", "qcow2", "-F", "qcow2", "-b", ".", "new.qcow2", "1M")
    theirs = oracle(*line)
    assert "'.' to be a regular file" in theirs.err
    assert run(*line) == theirs._replace(err=theirs.err.replace("qemu-img:", "underlay:"))


@pytest.mark.parametrize("url", ["s3:x", "s3://", "s3://bucket", "s3://bucket/"])
def test_an_address_without_an_object_is_told_what_it_should_be(
    here: Path, run: Run, url: str
) -> None:
    assert run("info", url) == (
        1,
        "",
        f"underlay: Could not open '{url}': '{url}' names no object; write s3://bucket/name\n",
    )
