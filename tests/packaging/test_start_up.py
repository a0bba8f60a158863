"""Starting is cheap: what a command does not need, it does not import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.packaging.conftest import RunPython

HEAVY = ("asyncio", "botocore", "ctypes", "isal", "numpy", "obstore", "rich", "zstandard")

USES = {
    "import underlay": "import underlay",
    "open and read a plain disk": """
import underlay
with underlay.open_any(sys.argv[2]) as disk:
    disk.read_bytes(40 << 20, 4096)
""",
    "underlay info": """
import contextlib, io
import underlay.cli
sys.argv = ["underlay", "info", sys.argv[2]]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    underlay.cli.main()
assert "qcow2" in out.getvalue()
""",
    "underlay probe": """
import contextlib, io
import underlay.cli
sys.argv = ["underlay", "probe", sys.argv[2]]
with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
    underlay.cli.main()
assert "qcow2" in out.getvalue()
""",
}


@pytest.mark.parametrize("use", USES)
def test_heavy_modules_are_imported_only_where_they_are_used(
    use: str, run_python: RunPython, repository: Path
) -> None:
    code = (
        f"import sys\nheavy = set(sys.argv.pop(1).split(','))\nsys.argv.insert(1, '')\n{USES[use]}"
    )
    code += "\nprint(sorted(heavy & set(sys.modules)))"
    image = repository / "examples" / "images" / "base.qcow2"
    assert run_python(code, ",".join(HEAVY), image).strip() == "[]"


def test_a_command_imports_its_own_job_and_no_other(run_python: RunPython) -> None:
    code = """
import sys
import underlay.cli.convert
print({"underlay.public", "underlay.jobs.public", "underlay.jobs.picture"} & set(sys.modules))
"""
    assert run_python(code).strip() == "set()"


def test_a_job_is_the_function_whatever_was_imported_before(run_python: RunPython) -> None:
    code = """
import underlay.jobs.convert
from underlay.jobs import compare, copying, workers
import underlay
import underlay.jobs.check as check
print(*(type(one).__name__ for one in (
    underlay.jobs.convert, compare, check, underlay.open_any, copying, workers
    )))
print(*(hasattr(package, "nothing") for package in (underlay, underlay.jobs)))
from underlay import *
from underlay.jobs import *
print(open_any is underlay.open_any, convert is underlay.jobs.convert)
"""
    kinds = ["function"] * 4 + ["module"] * 2
    assert run_python(code).split() == [*kinds, "False", "False", "True", "True"]
