"""Foreign text is printable and short."""

from __future__ import annotations

from pytest_gpushare.text import one_line, printable


def test_printable_replaces_what_a_terminal_would_obey() -> None:
    assert printable("a\x1b[31mb\u202ec\n") == "a?[31mb?c?"
    assert printable("12345", 3) == "123"


def test_one_line_joins_lines_and_cuts() -> None:
    assert one_line("a\n  b\tc\x07", 100) == "a b c?"
    assert one_line("word " * 1000, 12) == "word word wo"
