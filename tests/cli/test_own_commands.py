"""probe, inspect and plugins; help, version and progress."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import pytest

from underlay import plugins
from underlay.probing import Match, ProbeVerdict, ProbeView
from underlay_drivers.raw import Raw

if TYPE_CHECKING:
    from tests.cli.conftest import Run
    from tests.conftest import Tool

COMMANDS = ("compare", "convert", "dd", "info", "inspect", "map", "plugins", "probe")


class Imitation(Raw):
    """A format that claims qcow2's images too."""

    format_name = "imitation"

    @classmethod
    def probe(cls, view: ProbeView) -> ProbeVerdict:
        return Match("starts with QFI") if view.head.startswith(b"QFI") else super().probe(view)


@pytest.fixture
def imitation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two formats match a qcow2 image."""
    real = plugins.registry()
    record = plugins.PluginRecord(
        name="imitation", value="imitation", distribution="imitations", version="0"
    )
    claim = plugins._Claim(Imitation, record)
    with_it = attrs.evolve(real, formats={**real._formats, "imitation": [claim]})
    monkeypatch.setattr(plugins, "_registry", with_it)


# -- probe


def test_probe_says_what_and_why(plain: Path, run: Run) -> None:
    done = run("probe", plain.name)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("plain.qcow2: qcow2\n")
    assert "version 3" in done.out
    told = json.loads(run("probe", "--output=json", plain.name).out)
    assert told == {
        "version": 1,
        "filename": "plain.qcow2",
        "format": "qcow2",
        "guessed": False,
        "matches": [{"format": "qcow2", "reason": told["matches"][0]["reason"]}],
        "failures": [],
        "file-size": plain.stat().st_size,
    }


def test_probe_says_when_it_guesses(here: Path, run: Run) -> None:
    Path("disk.raw").write_bytes(bytes(1024))
    done = run("probe", "disk.raw")
    assert done.status == 0
    assert "guess" in done.out
    told = json.loads(run("probe", "--output=json", "disk.raw").out)
    assert (told["format"], told["guessed"], told["matches"]) == ("raw", True, [])


@pytest.mark.usefixtures("imitation")
def test_two_formats_that_match_are_told_apart_by_the_user(plain: Path, run: Run) -> None:
    done = run("probe", plain.name)
    assert done.status == 1
    assert done.out.startswith("plain.qcow2: imitation or qcow2\n")
    assert json.loads(run("probe", "--output=json", plain.name).out)["format"] is None
    refused = run("info", plain.name)
    assert refused.status == 1
    assert "say which with -f" in refused.err
    assert run("info", "-f", "qcow2", plain.name).status == 0
    assert run("inspect", plain.name).status == 2


# -- inspect


def test_inspect_calls_a_whole_image_safe(plain: Path, run: Run) -> None:
    done = run("inspect", plain.name)
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith("SAFE: plain.qcow2: ")
    assert "\nvirtual size: 4 MiB (4194304 bytes)\n" in done.out
    told = json.loads(run("inspect", "--output=json", plain.name).out)
    assert (told["version"], told["verdict"], told["reasons"]) == (1, "safe", [])
    assert (told["format"], told["virtual-size"]) == ("qcow2", 4 << 20)


def test_inspect_calls_what_names_others_unsafe_and_says_what(
    names_backing: Callable[[str], Path], run: Run
) -> None:
    path = names_backing("/etc/passwd")
    done = run("inspect", path.name)
    assert done.status == 2
    assert done.out.startswith("UNSAFE: names.qcow2: ")
    assert "names: backing file '/etc/passwd', as raw; not opened\n" in done.out
    told = json.loads(run("inspect", "--output=json", path.name).out)
    assert told["verdict"] == "unsafe"
    assert told["references"] == [{"kind": "backing file", "name": "/etc/passwd", "format": "raw"}]
    assert "'/etc/passwd'" in told["reasons"][0]


@pytest.mark.parametrize(
    ("change", "says"),
    [((72, 0x40), "feature"), ((79, 0x02), "corrupt"), ((20, 0xFF), "cluster")],
)
def test_inspect_calls_damage_and_unknown_features_unsafe(
    plain: Path, run: Run, change: tuple[int, int], says: str
) -> None:
    data = bytearray(plain.read_bytes())
    data[change[0]] |= change[1]
    plain.write_bytes(data)
    done = run("inspect", plain.name)
    assert done.status == 2
    assert re.search(rf"^  - .*{says}", done.out, re.MULTILINE), done.out


@pytest.mark.parametrize(
    "content", [b"", b"# Disk DescriptorFile\nversion=1\n", b"KDMV" + bytes(508)]
)
def test_inspect_says_when_it_cannot_tell(here: Path, run: Run, content: bytes) -> None:
    Path("odd").write_bytes(content)
    done = run("inspect", "odd")
    assert done.status == 1
    assert done.out.startswith("UNKNOWN: odd: ")
    assert json.loads(run("inspect", "--output=json", "odd").out)["verdict"] == "unknown"


# -- plugins


def test_plugins_lists_what_is_installed(run: Run) -> None:
    done = run("plugins")
    assert (done.status, done.err) == (0, "")
    assert re.search(
        r"^qcow2 +underlay \S+ +underlay_drivers\.qcow2 +format qcow2$", done.out, re.MULTILINE
    )
    told = json.loads(run("plugins", "--output=json").out)
    assert (told["version"], told["conflicts"]) == (1, [])
    by_name = {plugin["name"]: plugin for plugin in told["plugins"]}
    assert by_name["raw"]["formats"] == ["raw"]
    assert by_name["file"]["schemes"] == ["file"]
    assert {plugin["distribution"] for plugin in told["plugins"]} == {"underlay"}
    assert not any(plugin["error"] for plugin in told["plugins"])


def test_plugins_tells_of_failures_and_conflicts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = plugins.registry()
    broken = plugins.PluginRecord(
        name="odd", value="odd_module", distribution="odd", version="1", error="ImportError: no\x1b"
    )
    rival = plugins.PluginRecord(
        name="rival", value="rival", distribution="rival", version="2", formats=("raw",)
    )
    formats = {**real._formats, "raw": [*real._formats["raw"], plugins._Claim(Raw, rival)]}
    records = (*real.records, broken, rival)
    registry = attrs.evolve(real, records=records, formats=formats)
    monkeypatch.setattr(plugins, "_registry", registry)
    done = run("plugins")
    assert done.status == 0
    assert re.search(
        r"^odd +odd 1 +odd_module +not loaded: ImportError: no\\x1b$", done.out, re.MULTILINE
    )
    assert re.search(
        r"^Conflict: raw is claimed by underlay .* and by rival 2", done.out, re.MULTILINE
    )
    told = json.loads(run("plugins", "--output=json").out)
    (conflict,) = told["conflicts"]
    assert (conflict["kind"], conflict["name"], len(conflict["claimants"])) == ("format", "raw", 2)


# -- help, version


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(run: Run, flag: str) -> None:
    done = run(flag)
    assert (done.status, done.err) == (0, "")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z].*\.$", done.out, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(run: Run, command: str) -> None:
    done = run(command, "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"Usage: underlay {command} ")
    assert done.out == run(command, "-h").out
    if command != "plugins":
        assert "--gate" in done.out


def test_version(run: Run) -> None:
    assert re.fullmatch(r"underlay \d+\.\d+\S*\n", run("--version").out)
    assert run("-V") == run("--version")


def test_the_command_may_be_given_as_an_argument_and_run_again(
    plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from underlay.cli import main

    told: list[str] = []
    for _ in range(3):
        with pytest.raises(SystemExit) as ending:
            main(["info", "plain.qcow2"])
        assert ending.value.code == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] == told[2] != ""


# -- progress


def test_progress_in_json_goes_to_stderr(plain: Path, run: Run) -> None:
    for words in (("convert", "plain.qcow2", "out.raw"), ("compare", "plain.qcow2", "plain.qcow2")):
        done = run(words[0], "--progress=json", *words[1:])
        assert done.status == 0
        lines = [json.loads(line) for line in done.err.splitlines()]
        assert all(set(line) == {"done", "total"} for line in lines)
        assert lines[-1]["done"] == lines[-1]["total"]
    assert run("convert", "--progress=xml", "plain.qcow2", "out.raw").status == 1


def test_progress_without_a_terminal_is_qemu_imgs_but_on_stderr(plain: Path, run: Run) -> None:
    done = run("compare", "-p", "plain.qcow2", "plain.qcow2")
    assert done.out == "Images are identical.\n"
    assert re.fullmatch(r"(    \(\d+\.\d\d/100%\)\r)+\n", done.err)
    assert done.err.endswith("    (100.00/100%)\r\n")
    assert run("compare", "-p", "-q", "plain.qcow2", "plain.qcow2") == (0, "", "")


def test_progress_on_a_terminal_is_a_bar(plain: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "underlay", "convert", "-p", "plain.qcow2", "out.raw"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=False,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert (done.returncode, done.stdout) == (0, b"")
    assert "100%" in shown
    assert "\u2501" in shown
    assert Path("out.raw").stat().st_size == 4 << 20


# -- options that are handed on


def test_storage_options_reach_the_storage(plain: Path, qemu_img: Tool, run: Run) -> None:
    assert run("info", "--storage-option", "direct=off", plain.name).status == 0
    for words in (
        ("info", "--storage-option", "nonsense=1", "plain.qcow2"),
        ("info", "--storage-option", "direct", "plain.qcow2"),
        ("convert", "--target-storage-option", "nonsense=1", "plain.qcow2", "out.raw"),
        ("probe", "--storage-option", "nonsense=1", "plain.qcow2"),
    ):
        done = run(*words)
        assert done.status == 1
        assert done.err.count("\n") == 1
    assert not Path("out.raw").exists()


def test_creation_options_reach_the_driver(plain: Path, run: Run) -> None:
    assert run("convert", "-o", "preallocation=full", "plain.qcow2", "out.raw") == (0, "", "")
    assert Path("out.raw").stat().st_blocks * 512 >= 4 << 20
    done = run("convert", "-o", "nonsense=1", "plain.qcow2", "none.raw")
    assert done.status == 1
    assert done.err == "underlay: Invalid parameter 'nonsense'\n"
    assert not Path("none.raw").exists()
    helped = run("convert", "-O", "raw", "-o", "help")
    assert (helped.status, helped.err) == (0, "")
    assert re.search(r"^  preallocation=<str> +- ", helped.out, re.MULTILINE)
