"""Signals: those that end a command leave nothing behind, and one asks how far it is."""

from __future__ import annotations

import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from underlay.jobs import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Run
    from tests.conftest import Tool

#: Moments within these first seconds, in which Python imports what the command needs.
MOMENTS, EARLY = 30, 0.12
#: Says when our first lines have begun; what was before is Python's own start.
FROM_OUR_FIRST_LINES = """
import sys
from underlay.cli import main

def begun(frame, *_):
    if frame.f_code.co_name == "_status":
        sys.settrace(None)
        sys.stderr.write("main\\n")

sys.settrace(begun)
main(sys.argv[1:])
"""

#: Interrupts come where Python cannot raise them, and where a coroutine has not yet begun.
WHERE_NOTHING_HEARS = """
import signal
from underlay.cli.signals import Ended, signals_heard, told_to_end

class Leaving:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

async def wait():
    pass

with signals_heard():
    Leaving()
    assert told_to_end() is not None
with signals_heard():
    assert told_to_end() is None
    try:
        wait(), signal.raise_signal(signal.SIGINT)
    except Ended:
        pass
"""


def start(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_ctrl_c_is_quiet_from_the_first_lines_on(plain: Path, moment: int) -> None:
    process = start(sys.executable, "-c", FROM_OUR_FIRST_LINES, "info", plain.name)
    assert process.stderr is not None
    assert process.stderr.readline() == b"main\n"
    time.sleep(EARLY * moment / MOMENTS)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode in {128 + signal.SIGINT, 0, -signal.SIGINT}
    assert out.startswith(b"image: ") or process.returncode != 0


def test_an_interrupt_that_python_loses_is_known_and_says_nothing() -> None:
    process = start(sys.executable, "-c", WHERE_NOTHING_HEARS)
    assert (*process.communicate(timeout=60), process.returncode) == (b"", b"", 0)


def test_outside_of_a_command_python_tells_what_it_told_before() -> None:
    lost = WHERE_NOTHING_HEARS + "\nLeaving()\nwait()\n"
    process = start(sys.executable, "-c", lost)
    assert re.search(rb"(?s)ignored.*KeyboardInterrupt.*never awaited", process.communicate()[1])


@pytest.mark.parametrize(
    ("told", "busy"),
    [
        (signal.SIGINT, "-S 0"),
        (signal.SIGINT, "-o preallocation=full"),
        (signal.SIGTERM, "-S 0"),
        (signal.SIGHUP, "-O qcow2 -o preallocation=metadata,cluster_size=512"),
    ],
)
def test_a_copy_that_is_told_to_end_leaves_nothing_behind(
    here: Path, qemu_img: Tool, told: signal.Signals, busy: str
) -> None:
    qemu_img("create", "-q", "-f", "raw", "large.raw", "8G")
    process = start(
        sys.executable,
        "-m",
        "underlay",
        "convert",
        "--progress=json",
        *busy.split(),
        "large.raw",
        "copy.raw",
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith(b'{"done": 0,')
    time.sleep(0.1)
    process.send_signal(told)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + told
    assert all(line.startswith(b'{"done"') for line in err.splitlines())
    assert not Path("copy.raw").exists()


@pytest.mark.parametrize("becomes", ["lost", "another exception"])
def test_ctrl_c_in_the_midst_of_an_import_counts_all_the_same(
    run: Run, plain: Path, monkeypatch: pytest.MonkeyPatch, becomes: str
) -> None:
    def digest(*_: object, progress: Callable[[Progress], None], **__: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if becomes != "lost":
                raise AttributeError("half an import has no attributes") from None
        progress(Progress(0, 1))
        pytest.fail("nobody stopped it")

    monkeypatch.setattr("underlay.cli.digest.digest", digest)
    assert run("digest", plain.name) == (128 + signal.SIGINT, "", "")


def test_what_a_process_does_with_signals_stays_as_it_was(run: Run, plain: Path) -> None:
    heard = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in heard]
    assert run("info", plain.name)[0] == 0
    assert [signal.getsignal(number) for number in heard] == before


LINE = re.compile(rb"^    \(\d+\.\d\d/100%\)\n", re.MULTILINE)
both_tools = pytest.mark.parametrize(
    "tool", ["qemu-img", f"{sys.executable} -m underlay"], ids=["qemu-img", "underlay"]
)


def copying(tool: str, *flags: str) -> subprocess.Popen[bytes]:
    """A copy of 24 MiB that has begun."""
    Path("disk.raw").write_bytes(b"d" * (24 << 20))
    process = start(*tool.split(), "convert", *flags, "disk.raw", "copy.raw")
    while not Path("copy.raw").exists():
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("shown", ["", "-q"])
@both_tools
def test_usr1_asks_for_a_line_where_no_progress_is_shown(
    here: Path, qemu_img: Tool, tool: str, shown: str
) -> None:
    process = copying(tool, *shown.split(), "-r", "4M")
    assert process.stderr is not None
    while not select.select([process.stderr], [], [], 0.02)[0]:
        process.send_signal(signal.SIGUSR1)
    process.kill()
    assert LINE.search(process.communicate()[1])


@pytest.mark.parametrize("shown", ["", "-p", "-q"])
@both_tools
def test_whoever_asks_late_harms_nobody(here: Path, qemu_img: Tool, tool: str, shown: str) -> None:
    process = copying(tool, *shown.split(), "-r", "32M")
    while process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.02)
    _, err = process.communicate()
    assert process.returncode == 0
    assert shown != "-p" or not LINE.search(err)
