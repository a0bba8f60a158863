"""A stranger's format and a stranger's storage, installed by pip, work like our own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.packaging.conftest import RunPython

CONTENT = b"first tile".ljust(4096, b".") + bytes(8192) + b"the end"
PACK = """
    import sys, pathlib, zipfile
    import underlay_tiles
    content = b"first tile".ljust(4096, b".") + bytes(8192) + b"the end"
    packed = underlay_tiles.pack(content)
    pathlib.Path(sys.argv[1]).write_bytes(packed)
    with zipfile.ZipFile(sys.argv[1] + ".zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("disks/a.img", packed)
"""


@pytest.fixture
def tiles_image(example_plugins: Path, tmp_path: Path, run_python: RunPython) -> Path:
    # Of no telling suffix, and its size is no multiple of anything.
    image = tmp_path / "disk.img"
    run_python(PACK, image, path=[example_plugins])
    return image


def test_open_any_finds_an_installed_format(
    example_plugins: Path, tiles_image: Path, run_python: RunPython
) -> None:
    out = run_python(
        """
        import json, sys, underlay
        with underlay.open_any(sys.argv[1]) as disk:
            content = disk.read_bytes(0, disk.size)
            runs = [(e.start, e.length) for e in disk.extents()]
            print(json.dumps([disk.format_name, disk.size, bytes(content).hex(), runs]))
        """,
        tiles_image,
        path=[example_plugins],
    )
    name, size, content, runs = json.loads(out)
    assert (name, size) == ("tiles", len(CONTENT))
    assert bytes.fromhex(content) == CONTENT
    assert runs == [[0, 4096], [4096, 8192], [12288, 7]]


def test_without_the_plugin_the_same_image_is_raw(tiles_image: Path, run_python: RunPython) -> None:
    out = run_python("import sys, underlay; print(underlay.probe(sys.argv[1]).format)", tiles_image)
    assert out.strip() == "raw"


def test_a_format_inside_a_storage_both_of_strangers(
    example_plugins: Path, tiles_image: Path, run_python: RunPython
) -> None:
    out = run_python(
        """
        import sys, underlay
        with underlay.open_any(f"zip:{sys.argv[1]}.zip!disks/a.img") as disk:
            print(disk.format_name, bytes(disk.read_bytes(12288, 7)).decode(), disk.writable)
        """,
        tiles_image,
        path=[example_plugins],
    )
    assert out.strip() == "tiles the end False"


def test_the_async_face_opens_them_too(
    example_plugins: Path, tiles_image: Path, run_python: RunPython
) -> None:
    out = run_python(
        """
        import asyncio, sys, underlay, underlay.aio
        async def main():
            target = f"zip:{sys.argv[1]}.zip!disks/a.img"
            async with await underlay.aio.open_any(target) as disk:
                print(bytes(await disk.read_bytes(12288, 7)).decode())
        asyncio.run(main())
        """,
        tiles_image,
        path=[example_plugins],
    )
    assert out.strip() == "the end"


def test_the_command_converts_and_lists_them(
    example_plugins: Path, tiles_image: Path, tmp_path: Path, run_python: RunPython
) -> None:
    raw = tmp_path / "out.raw"
    run_python(
        "", "convert", "-O", "raw", tiles_image, raw, path=[example_plugins], module="underlay"
    )
    assert raw.read_bytes().rstrip(b"\0") == CONTENT.rstrip(b"\0")
    listed = run_python("", "plugins", path=[example_plugins], module="underlay")
    assert "underlay-tiles" in listed
    assert "underlay-zip" in listed


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("zip:{archive}", "zip:ARCHIVE!MEMBER"),
        ("zip:{archive}!nothing", "nothing"),
        ("zip:{archive}.missing!a", "No such file"),
        ("zip:{image}!a", "no zip archive"),
    ],
)
def test_what_a_strangers_storage_refuses_is_an_error_of_underlay(
    example_plugins: Path, tiles_image: Path, run_python: RunPython, url: str, says: str
) -> None:
    out = run_python(
        """
        import sys, underlay
        try:
            underlay.open_any(sys.argv[1])
        except underlay.UnderlayError as error:
            print(error)
        """,
        url.format(archive=f"{tiles_image}.zip", image=tiles_image),
        path=[example_plugins],
    )
    assert says in out


@pytest.mark.parametrize("example", ["third-party-format", "third-party-storage"])
def test_the_examples_pass_the_contract_suites(
    repository: Path, example_plugins: Path, clean_environment: dict[str, str], example: str
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("--rootdir", str(repository / "examples" / example)),
            *("-c", str(repository / "examples" / example / "pyproject.toml")),
            str(repository / "examples" / example),
        ],
        env={
            **clean_environment,
            "PYTHONPATH": str(example_plugins),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
