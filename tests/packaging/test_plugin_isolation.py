"""What a plug-in does wrong is its own trouble, and is told to whoever asks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.packaging.conftest import MakeDistribution, RunPython

HEAD = """
import underlay.storage
from underlay.driver import FormatDriverInstance
from underlay.hookspecs import hookimpl
from underlay.probing import Match, NoMatch
"""

WHOLE = """
class Whole(FormatDriverInstance):
    format_name = "{name}"

    @classmethod
    def probe(cls, view):
        {probe}

    @classmethod
    async def open(cls, options):
        return cls()

    def size(self):
        return 0

    def collect_storage_dependencies(self):
        return ()

    async def get_mapping(self, offset, max_length):
        raise AssertionError

@hookimpl
def underlay_format_drivers():
    return (Whole,)
"""

BROKEN = {
    "its import fails": ("raise ImportError('libodd.so is missing')", "libodd.so is missing"),
    "its import exits": ("raise SystemExit('done')", "SystemExit"),
    "it has a syntax error": ("def (", "SyntaxError"),
    "its hook is unknown": (
        HEAD + "@hookimpl\ndef underlay_format_driver():\n    return ()\n",
        "underlay_format_driver",
    ),
    "its hook has a wrong signature": (
        HEAD + "@hookimpl\ndef underlay_format_drivers(config):\n    return ()\n",
        "config",
    ),
    "its hook raises": (
        HEAD + "@hookimpl\ndef underlay_format_drivers():\n    raise KeyError('settings')\n",
        "settings",
    ),
    "it offers no driver": (
        HEAD + "@hookimpl\ndef underlay_format_drivers():\n    return (int,)\n",
        "FormatDriverInstance",
    ),
    "its driver lacks methods": (
        HEAD
        + "class Half(FormatDriverInstance):\n    format_name = 'odd'\n\n"
        + "@hookimpl\ndef underlay_format_drivers():\n    return (Half,)\n",
        "get_mapping",
    ),
    "it was written for another contract": (
        HEAD
        + WHOLE.format(name="odd", probe="return NoMatch()").replace(
            "format_name", "api_version = 99\n    format_name", 1
        ),
        "99",
    ),
    "its storage has no schemes": (
        HEAD
        + "class S(underlay.storage.BlockingStorage):\n"
        + "    def size(self):\n        return 0\n"
        + "    def readv(self, buffers, offset):\n        pass\n\n"
        + "@hookimpl\ndef underlay_storage_backends():\n    return (S,)\n",
        "schemes",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_harms_nobody_and_is_told_of(
    case: str, make_distribution: MakeDistribution, run_python: RunPython, repository: Path
) -> None:
    source, says = BROKEN[case]
    site = make_distribution("odd-format", source, entry="odd")
    out = run_python(
        """
        import json, sys, underlay, underlay.plugins
        with underlay.open_any(sys.argv[1]) as disk:
            opened = disk.format_name
        try:
            underlay.open_image(sys.argv[1], format="odd")
        except underlay.PluginError as error:
            asked = str(error)
        failed = [record.error for record in underlay.plugins.registry().failures()]
        print(json.dumps([opened, asked, failed]))
        """,
        repository / "examples" / "images" / "base.qcow2",
        path=[site],
    )
    opened, asked, failed = json.loads(out)
    assert opened == "qcow2"
    assert "odd-format" in asked
    assert says in asked
    assert len(failed) == 1
    assert says in failed[0]


def test_the_command_shows_what_failed_and_still_works(
    make_distribution: MakeDistribution, run_python: RunPython, repository: Path
) -> None:
    site = make_distribution("odd-format", "raise ImportError('libodd.so is missing')", entry="odd")
    listed = run_python("", "plugins", path=[site], module="underlay")
    assert "odd-format" in listed
    assert "libodd.so is missing" in listed
    image = repository / "examples" / "images" / "base.qcow2"
    assert "qcow2" in run_python("", "info", image, path=[site], module="underlay")


def test_a_probe_that_raises_is_recorded_and_guards_a_guess(
    make_distribution: MakeDistribution,
    run_python: RunPython,
    repository: Path,
    tmp_path: Path,
) -> None:
    site = make_distribution(
        "odd-format",
        HEAD + WHOLE.format(name="odd", probe="raise IndexError('short')"),
        entry="odd",
    )
    (tmp_path / "plain").write_bytes(bytes(1024))
    out = run_python(
        """
        import json, sys, underlay
        known, plain = (underlay.probe(target) for target in sys.argv[1:])
        try:
            underlay.open_any(sys.argv[2], writable=True).close()
        except underlay.UnderlayError as error:
            refused = str(error)
        with underlay.open_any(sys.argv[2]) as disk:
            opened = disk.format_name
        print(json.dumps([
            known.format, plain.format, plain.guessed,
            [failure.format for failure in plain.failures], plain.failures[0].reason,
            opened, refused,
        ]))
        """,
        repository / "examples" / "images" / "base.qcow2",
        tmp_path / "plain",
        path=[site],
    )
    known, plain, guessed, failed, reason, opened, refused = json.loads(out)
    assert (known, plain, guessed, failed, opened) == ("qcow2", "raw", True, ["odd"], "raw")
    assert "short" in reason
    assert "odd" in refused


def test_two_claims_to_one_name_are_an_error_that_names_both(
    make_distribution: MakeDistribution, run_python: RunPython, repository: Path
) -> None:
    source = HEAD + WHOLE.format(name="odd", probe="return NoMatch()")
    first = make_distribution("first-odd", source, entry="odd", version="1.5")
    second = make_distribution("second-odd", source, entry="other", version="2.5")
    out = run_python(
        """
        import json, sys, underlay
        with underlay.open_any(sys.argv[1]) as disk:
            opened = disk.format_name
        try:
            underlay.open_image(sys.argv[1], format="odd")
        except underlay.PluginConflictError as error:
            print(json.dumps([opened, str(error), error.claimants]))
        """,
        repository / "examples" / "images" / "base.qcow2",
        path=[first, second],
    )
    opened, message, claimants = json.loads(out)
    assert opened == "qcow2"
    for claimant in ("first-odd 1.5", "second-odd 2.5"):
        assert claimant in message
        assert any(claimant in claim for claim in claimants)


@pytest.mark.parametrize(
    "call", ["open_image(sys.argv[1], format='qcow2')", "open_any(sys.argv[1])"]
)
def test_nobody_takes_over_a_built_in_format(
    make_distribution: MakeDistribution, run_python: RunPython, repository: Path, call: str
) -> None:
    source = HEAD + WHOLE.format(name="qcow2", probe="return Match('mine')")
    site = make_distribution("better-qcow2", source, entry="a-name-that-sorts-first")
    out = run_python(
        f"""
        import sys, underlay
        try:
            underlay.{call}.close()
        except underlay.PluginConflictError as error:
            print(error)
        """,
        repository / "examples" / "images" / "base.qcow2",
        path=[site],
    )
    assert "better-qcow2 1.0" in out
    assert "underlay_drivers.qcow2" in out


@pytest.mark.parametrize("how", ["module", "code"])
def test_nothing_is_discovered_in_the_current_folder(
    make_distribution: MakeDistribution, run_python: RunPython, tmp_path: Path, how: str
) -> None:
    downloads = tmp_path / "downloads"
    make_distribution(
        "evil",
        "import pathlib; pathlib.Path('was-here').touch(); raise ImportError",
        entry="evil",
        folder=downloads,
    )
    if how == "module":
        listed = run_python("", "plugins", module="underlay", cwd=downloads)
        assert "underlay_drivers.raw" in listed
    else:
        code = "import underlay.plugins; print(underlay.plugins.registry().records)"
        listed = run_python(code, cwd=downloads)
    assert "evil" not in listed
    assert not (downloads / "was-here").exists()


def test_a_folder_put_on_the_path_by_name_is_searched(
    make_distribution: MakeDistribution, run_python: RunPython
) -> None:
    source = HEAD + WHOLE.format(name="odd", probe="return NoMatch()")
    site = make_distribution("first-odd", source, entry="odd")
    code = "import underlay.plugins; print(underlay.plugins.registry().format_names())"
    assert run_python(code, path=[site]).strip() == "['odd', 'qcow2', 'raw']"


@pytest.mark.parametrize(
    ("value", "formats"), [("raw,file", ["raw"]), ("first-odd", ["odd"]), ("", [])]
)
def test_a_variable_restricts_what_is_loaded(
    make_distribution: MakeDistribution, run_python: RunPython, value: str, formats: list[str]
) -> None:
    source = HEAD + WHOLE.format(name="odd", probe="return NoMatch()")
    site = make_distribution("first-odd", source, entry="odd")
    code = "import underlay.plugins; print(underlay.plugins.registry().format_names())"
    out = run_python(code, path=[site], env={"UNDERLAY_PLUGINS": value})
    assert out.strip() == str(formats)
