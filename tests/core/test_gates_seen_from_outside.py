"""What a process opens, as Python's audit hooks tell it: the image, and what its gate allows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .toy_format import pack

_CONTENT = b"what the backing image holds".ljust(4096, b".")


def _overlay(folder: Path, backing: str, backing_format: str) -> Path:
    """An image with nothing of its own that names ``backing``."""
    image = folder / "overlay.toy"
    image.write_bytes(pack(bytes(len(_CONTENT)), backing=backing, backing_format=backing_format))
    return image


_SPY = """
    import json, os, sys
    opened = []
    watching = False
    def hook(event, arguments):
        if watching and event in {"open", "os.listdir", "os.scandir", "socket.connect",
                                  "subprocess.Popen", "os.exec", "os.system"}:
            opened.append([event, str(arguments[0])])
    sys.addaudithook(hook)
    sys.path.insert(0, sys.argv[1])
    import underlay, toy_format
    from underlay import plugins
    import underlay_storage.file, underlay_storage.memory
    plugins._registry = toy_format.register()
    underlay.inspect(sys.argv[2])  # whatever is imported late is, now
    gate = eval("underlay." + sys.argv[3])
    watching = True
    try:
        underlay.open_any(sys.argv[2], gate=gate).close()
        outcome = "opened"
    except underlay.UnderlayError as error:
        outcome = type(error).__name__
    underlay.probe(sys.argv[2])
    underlay.inspect(sys.argv[2])
    watching = False
    print(json.dumps([outcome, opened]))
"""


def _spied(image: Path, gate: str) -> tuple[str, set[str]]:
    """What happened, and the names that were opened meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_SPY), os.path.dirname(__file__), image, gate],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    outcome, opened = json.loads(done.stdout)
    assert {event for event, _ in opened} <= {"open"}
    return outcome, {name for _, name in opened}


@pytest.mark.parametrize(
    "name",
    [
        "base.toy",
        "/etc/passwd",
        "../../../../../../../../etc/passwd",
        "file:///etc/passwd",
        'json:{"driver":"file","filename":"/etc/passwd"}',
        "nbd://127.0.0.1:10809/x",
        "/dev/zero",
        "link",
    ],
)
def test_an_audit_hook_sees_the_image_opened_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / "base.toy").write_bytes(pack(_CONTENT))
    (tmp_path / "link").symlink_to("/etc/passwd")
    image = _overlay(tmp_path, name, "raw")
    outcome, opened = _spied(image, "DenyImplicitOpenGate()")
    assert outcome == "ImplicitOpenDeniedError"
    assert opened == {str(image)}


def test_an_audit_hook_sees_what_a_gate_allowed_and_nothing_else(tmp_path: Path) -> None:
    base = tmp_path / "base.toy"
    base.write_bytes(pack(_CONTENT))
    image = _overlay(tmp_path, "base.toy", "toy")
    assert _spied(image, "DirectoryGate()") == ("opened", {str(image), str(base)})
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("/etc/passwd", "link"):
        image = _overlay(tmp_path, name, "raw")
        assert _spied(image, "DirectoryGate()") == ("ImplicitOpenDeniedError", {str(image)})
