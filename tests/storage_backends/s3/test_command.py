"""What a user of the command does and sees: options for several names, and errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from underlay.cli import main

from .servers import BUCKET, Server
from .workloads import Waits

#: The status, and what came on stdout and on stderr.
Said = tuple[int, str, str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def command(*arguments: object) -> Said:
        with pytest.raises(SystemExit) as ending:
            main([str(argument) for argument in arguments])
        assert isinstance(ending.value.code, int)
        out, err = capsys.readouterr()
        return ending.value.code, out, err

    return command


def said(flag: str, options: dict[str, object]) -> list[str]:
    """Options as one types them."""
    return [word for name, value in options.items() for word in (flag, f"{name}={value}")]


def test_options_go_to_the_names_that_they_are_for(
    run: Callable[..., Said], seaweed: Server, prefix: str, tmp_path: Path
) -> None:
    there = f"s3://{BUCKET}/{prefix}/disk.qcow2"
    here, overlay = tmp_path / "here.raw", tmp_path / "overlay.qcow2"
    here.write_bytes(b"bytes" * 4096 * 64)
    to_read = said("--storage-option", seaweed.options())
    to_make = said("--target-storage-option", seaweed.options())
    assert run("convert", "-O", "qcow2", *to_make, here, there) == (0, "", "")
    for two in ((here, there), (there, here)):
        assert run("compare", *to_read, *two) == (0, "Images are identical.\n", "")
    status, out, _ = run("digest", *to_read, here, there)
    assert status == 0
    assert len({line.split()[0] for line in out.splitlines()}) == 1

    # A local overlay upon an image in a bucket, made, filled and moved.
    upon = ("-b", there, "-F", "qcow2")
    assert run("create", "-f", "qcow2", *upon, *to_read, overlay)[::2] == (0, "")
    looked = run("compare", "--gate=permissive", *to_read, overlay, there)
    assert looked[0] == 2  # what an image names of another scheme is told nothing
    assert "no credentials" in looked[2]
    made = run("convert", "-O", "qcow2", "-B", there, "-F", "qcow2", *to_read, here, overlay)
    assert made == (0, "", "")
    new = f"s3://{BUCKET}/{prefix}/new.qcow2"
    assert run("create", "-f", "qcow2", *to_make, new, "1M")[::2] == (0, "")
    assert run("rebase", *to_read, "-b", "disk.qcow2", "-F", "qcow2", new) == (0, "", "")

    status, _, err = run("compare", "--storage-option", "sideways=1", here, there)
    assert (status, err.count("\n")) == (2, 1)
    assert "has a storage option 'sideways'" in err
    status, _, err = run("create", "-f", "qcow2", *to_read, new, "1M")
    assert status == 1
    assert "say --target-storage-option" in err


@pytest.mark.parametrize("as_json", [False, True])
def test_no_error_repeats_the_secrets_of_a_description(
    run: Callable[..., Said], seaweed: Server, prefix: str, *, as_json: bool
) -> None:
    options = {**seaweed.options(), "filename": f"s3://{BUCKET}/{prefix}/none", "driver": "s3"}
    if as_json:
        image = "json:" + json.dumps({"driver": "raw", "file": options})
        status, _, err = run("info", image)
    else:
        words = ",".join(f"file.{name}={value}" for name, value in options.items())
        status, _, err = run("info", "--image-opts", f"driver=raw,{words}")
    assert status == 1
    assert "NoSuchKey" in err
    assert "***" in err
    assert "nobody-may-see-this" not in err


@pytest.mark.parametrize("scheme", ["s3", "s3+blocks"])
@pytest.mark.parametrize(
    ("bucket", "changed", "told"),
    [
        (BUCKET, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "403"),
        ("no-such-bucket", {}, "create the bucket first"),
        (BUCKET, {}, "NoSuchKey"),
        (BUCKET, {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "no connection"),
    ],
)
def test_what_does_not_work_is_one_line_and_soon(
    run: Callable[..., Said],
    seaweed: Server,
    monkeypatch: pytest.MonkeyPatch,
    waits: Waits,
    *,
    scheme: str,
    bucket: str,
    changed: dict[str, str],
    told: str,
) -> None:
    for name, value in {**seaweed.environment(), **changed}.items():
        monkeypatch.setenv(name, value)
    begun = waits.now
    status, out, err = run("info", "--storage-option=deadline=80", f"{scheme}://{bucket}/none")
    assert waits.now - begun <= 10
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert told in err
    assert "nobody-may-see-this" not in err
