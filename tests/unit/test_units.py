"""Sizes as users write them, and as they are shown."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.units import GB, MB, format_gb, format_number, parse_size, plural


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("12288", "MB", 12288 * MB),
        ("3.0", "GB", 3 * GB),
        ("12GB", "MB", 12 * GB),
        ("12 GB", "MB", 12 * GB),
        ("4.5 GiB", "MB", 4 * GB + GB // 2),
        ("512MB", "GB", 512 * MB),
        ("512mib", "GB", 512 * MB),
        ("512 m", "GB", 512 * MB),
        ("1T", "MB", 1024 * GB),
        ("2TiB", "MB", 2048 * GB),
        ("7K", "MB", 7 * 1024),
        ("7kB", "MB", 7 * 1024),
        ("100B", "GB", 100),
        ("  8 GB ", "MB", 8 * GB),
        (".5GB", "MB", GB // 2),
        ("5.", "GB", 5 * GB),
        ("0", "MB", 0),
        ("0.1GB", "MB", Fraction(GB, 10)),
        ("0.29", "GB", Fraction(29 * GB, 100)),
    ],
)
def test_parse_size(text: str, unit: str, expected: int | Fraction) -> None:
    """A number with a unit, or in the unit of its key; exact."""
    assert parse_size(text, unit) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GB",
        "-1GB",
        "+1GB",
        "1,5GB",
        "1_000MB",
        "1e3MB",
        "12GBit",
        "12 PB",
        "4.5.1GB",
        "0x10",
        "NaN",
        "inf",
        "1 0 MB",
        "1" * 25,
        "١GB",
        "1\u212aB",
        "1Mıb",
        "1MB\nGB",
    ],
)
def test_no_size(text: str) -> None:
    """Anything else is refused; also signs that only look like a digit or a K."""
    with pytest.raises(ValueError, match=r".*"):
        parse_size(text, "MB")


@given(st.text(max_size=30))
def test_any_text(text: str) -> None:
    """Whatever is written: a size that is not negative, or a ValueError."""
    try:
        size = parse_size(text, "MB")
    except ValueError:
        return
    assert size >= 0


@given(st.decimals(0, 10**6, places=3), st.sampled_from(["MB", "GB"]))
def test_decimals_are_exact(number: object, unit: str) -> None:
    """Decimal figures mean what they say, whatever binary floats make of them."""
    assert parse_size(f"{number}", unit) == Fraction(f"{number}") * (MB if unit == "MB" else GB)


def test_a_hundred_times_029() -> None:
    """The sum that binary floats get wrong: 28.999999999999996."""
    assert int(100 * 0.29) == 28
    assert 100 * parse_size("0.29", "GB") == 29 * GB


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 GB"),
        (GB, "1.0 GB"),
        (4 * GB + GB // 2, "4.5 GB"),
        (10 * GB // 3, "3.33 GB"),
        (12 * GB, "12.0 GB"),
        (Fraction(GB, 10), "0.1 GB"),
        (1, "1 MB"),
        (51 * MB, "51 MB"),
        (102 * MB, "102 MB"),
        (103 * MB, "0.1 GB"),
    ],
)
def test_format_gb(size: int | Fraction, text: str) -> None:
    """One decimal where that is exact, else two."""
    assert format_gb(size) == text


def test_small_words() -> None:
    """Ratios as a user would write them, and nouns in their number."""
    assert [format_number(Fraction(n)) for n in ("0.25", "2", "1/3")] == ["0.25", "2", "0.333333"]
    assert [plural(n, "worker") for n in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]
