"""Sizes as people write them."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from underlay.errors import OptionError
from underlay.units import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (5, 5),
        ("0", 0),
        ("512", 512),
        ("007", 7),
        ("1b", 1),
        ("1k", 1024),
        ("1K", 1024),
        ("3M", 3 << 20),
        ("2G", 2 << 30),
        ("1T", 1 << 40),
        ("1p", 1 << 50),
        ("7E", 7 << 60),
        ("1.5G", 3 << 29),
        ("0.1k", 102),
        ("0x10", 16),
        ("0x10k", 16384),
        ("0Xff", 255),
        (" 64k ", 65536),
        ((1 << 63) - 1, (1 << 63) - 1),
    ],
)
def test_a_size(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "k",
        "-1",
        "+1",
        "1.5",
        "1.",
        ".5k",
        "1 k",
        "1kk",
        "1kb",
        "1e3",
        "0x",
        "0x1.5k",
        "1_000",
        "\u0661",
        "ten",
        "8E",
        "9" * 30,
        "9" * 5000,
        "0x" + "f" * 5000,
        "1\n2",
        -1,
        1 << 63,
        10**5000,
        -(10**5000),
        True,
        1.5,
        None,
        b"1",
        [],
    ],
    ids=lambda value: str(type(value).__name__ if isinstance(value, int) else value)[:12],
)
def test_no_size(text: object) -> None:
    with pytest.raises(OptionError) as caught:
        parse_size(text, option="cluster_size")  # type: ignore[arg-type]
    assert caught.value.option == "cluster_size"
    assert "cluster_size" in str(caught.value)
    assert len(str(caught.value)) < 500


def test_whatever_counts_is_a_size() -> None:
    class Index:
        def __index__(self) -> int:
            return 4096

    assert parse_size(Index()) == 4096  # type: ignore[arg-type]


@given(st.integers(0, (1 << 63) - 1))
def test_numbers_stay_what_they_are(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(hex(size)) == size


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_an_option_error(text: str) -> None:
    with contextlib.suppress(OptionError):
        assert 0 <= parse_size(text) < 1 << 63
