"""Lines for a terminal: no word is cut, no line is longer than the terminal, figures in columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.report.output import INDENT, Line, aligned, laid_out
from pytest_gpushare.text import width_of, wrapped


@pytest.mark.parametrize(
    ("text", "columns", "lines"),
    [
        ("short", 60, ["short"]),
        ("exactly ten", 11, ["exactly ten"]),
        ("one two three four", 11, ["one two", "    three", "    four"]),
        ("  detail of more", 12, ["  detail of", "    more"]),
        ("a tests/test_long.py::test_x b", 12, ["a", "    tests/test_long.py::test_x", "    b"]),
        ("日本 日本", 6, ["日本", "    日本"]),
        ("é" * 6, 6, ["é" * 6]),
        ("a 10.5 GB 100 %), 5 s", 9, ["a 10.5 GB", "    100 %),", "    5 s"]),
        ("or -o gpu_share_x=1 it", 8, ["or", "    -o gpu_share_x=1", "    it"]),
        ("", 6, [""]),
        ("   ", 2, ["   "]),
    ],
)
def test_wrapped(text: str, columns: int, lines: list[str]) -> None:
    assert wrapped(text, columns, INDENT) == lines


@given(st.text("ab -:_", max_size=80), st.integers(1, 60), st.integers(0, 8))
def test_no_word_is_lost_or_cut(text: str, columns: int, indent: int) -> None:
    """A line is too long only where one word is."""
    lines = wrapped(text, columns, indent)
    assert " ".join(lines).split() == text.split()
    assert all(width_of(line) <= columns or len(line.split()) <= 1 for line in lines)


def test_widths() -> None:
    assert width_of("GPU 0 ▇▇▁") == 9
    assert width_of("日本") == 4
    assert width_of("e\u0301") == 1
    assert width_of("a\u200bb") == 2


def test_figures_in_columns() -> None:
    """Only lines that say the same of several things; words after the last figure do not count."""
    texts = [
        "gpu-share: GPU 0 VRAM peak 4.09 of 24.0 GB, tests 12.5 of 13.0 GB",
        "gpu-share: GPU 10 VRAM peak 14.5 of 80.0 GB, tests 9.0 of 9.0 GB (0.5 GB unattributed)",
        "  VRAM 900 MB: test_b",
        "  gw0 on GPU 0: VRAM peak 2.09 of 4.5 GB",
        "  gw10 on GPU 0: VRAM peak 12.1 of 4.5 GB, crashed",
    ]
    assert [line.text for line in aligned(Line(text) for text in texts)] == [
        "gpu-share: GPU 0 VRAM peak 4.09 of 24.0 GB, tests 12.5 of 13.0 GB",
        "gpu-share: GPU 10 VRAM peak 14.5 of 80.0 GB, tests 9.0 of 9.0 GB (0.5 GB unattributed)",
        "  VRAM 900 MB: test_b",
        "  gw0 on GPU 0: VRAM peak  2.09 of 4.5 GB",
        "  gw10 on GPU 0: VRAM peak 12.1 of 4.5 GB, crashed",
    ]


def test_each_part_keeps_what_the_line_is() -> None:
    line = Line("gpu-share: " + "word " * 20, problem=True, mark="red")
    parts = laid_out([line], 40)
    assert len(parts) > 1
    assert {(part.problem, part.colour) for part in parts} == {(True, "red")}
