"""A few hundred command lines, run through qemu-img and through us on copies of the same images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import pytest

from .all_lines import TABLE
from .running import Answer, file_differences, like
from .table import Line

_DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "qemu-img.md"


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.text)
def test_a_command_line_answers_as_qemu_img_does(
    line: Line,
    theirs: Mapping[str, Future[Answer]],
    ours: Callable[[Line], Answer],
    pool: Path,
) -> None:
    we = ours(line)
    they = theirs[line.text].result()
    differs = line.differs
    for field in ("status", "out", "err"):
        our, their = getattr(we, field), getattr(they, field)
        expected = None if differs is None else getattr(differs, field)
        if expected is None:
            assert our == their, f"{field}; all of ours: {we}"
            continue
        assert our != their, f"{field}: the difference is none any more"
        if isinstance(expected, str):
            assert like(expected, our), f"{field}: {our!r}\n(qemu-img: {their!r})"
        else:
            assert our == expected
    found = dict(file_differences(we.folder, they.folder, pool))
    assert found.keys() == set(() if differs is None else differs.files), found


def test_no_line_stands_in_the_table_twice() -> None:
    texts = [line.text for line in TABLE]
    assert sorted(texts) == sorted(set(texts))


def test_each_difference_is_argued_in_the_documents_and_none_besides() -> None:
    argued = re.findall(
        r"^\| \*([a-z-]+)\* \|", _DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(argued) == sorted(set(argued))
    assert set(argued) == {line.differs.why for line in TABLE if line.differs is not None}
