"""Foreign text is printable and short."""

from __future__ import annotations

from pytest_gpushare.text import encodable, one_line, printable, sparkline


def test_printable_replaces_what_a_terminal_would_obey() -> None:
    assert printable("a\x1b[31mb\u202ec\n") == "a?[31mb?c?"
    assert printable("12345", 3) == "123"


def test_one_line_joins_lines_and_cuts() -> None:
    assert one_line("a\n  b\tc\x07", 100) == "a b c?"
    assert one_line("word " * 1000, 12) == "word word wo"


def test_encodable() -> None:
    """Every sign that is printed has one of its own in ASCII."""
    assert encodable("2 × 4 → 8 · ▁▂▃▄▅▆▇█ ▓▒░…", "ascii") == "2 x 4 > 8 | _.-=+*#@ %=.~"
    assert encodable("2 × 4", None) == "2 × 4"
    assert encodable("\ud800", None) == "?"


def test_sparkline() -> None:
    assert sparkline((-1, 0, 1 / 8, 0.5, 1, 2)) == "▁▁▂▅██"
