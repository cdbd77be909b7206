"""Foreign text, made fit to be printed: node ids, answers of servers, names of files."""

from __future__ import annotations


def printable(text: str, most: int | None = None) -> str:
    """The text with `?` for each character that a terminal would not show as it is.

    `most`: the number of characters that are kept from its start; None keeps all.
    """
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def one_line(text: str, most: int) -> str:
    """The text on one line: blanks and line breaks become one blank each, the rest printable."""
    return printable(" ".join(text[: 4 * most].split()), most)
