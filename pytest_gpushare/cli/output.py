"""Rows of pieces with styles: in colour where rich is installed, the same text without it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A part of a line."""

    text: str
    style: str = ""
    """In rich's words, such as `bold red`; empty: plain."""


Row = Sequence[Piece]

_PLAIN = str.maketrans({"×": "x", "█": "#", "▒": "=", "░": ".", "…": "~", "→": ">"})


def text_of(row: Row) -> str:
    """The line without its styles."""
    return "".join(piece.text for piece in row)


def encodable(text: str, encoding: str | None) -> str:
    """The text as a terminal of this encoding can show it; Windows code pages lack signs."""
    if not encoding:
        # Not a terminal but an object of Python's, which takes every text.
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return text


def can_show(text: str) -> bool:
    """Whether standard output can show these signs."""
    return encodable(text, getattr(sys.stdout, "encoding", None)) == text


def show(rows: Iterable[Row]) -> None:
    """Print the rows to standard output."""
    console = rich_console()
    encoding = getattr(sys.stdout, "encoding", None)
    for row in rows:
        if console is None:
            sys.stdout.write(encodable(text_of(row), encoding).rstrip() + "\n")
        else:
            console.print(styled(row, encoding), soft_wrap=True)
    sys.stdout.flush()


def show_json(document: Mapping[str, Any]) -> None:
    """Print a document, readable by people too."""
    json.dump(document, sys.stdout, indent=1, ensure_ascii=True)
    sys.stdout.write("\n")
    sys.stdout.flush()


def terminal_width() -> int | None:
    """Columns of the terminal; None where the output goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def rich_console() -> Any:
    """A console of rich for standard output; None without rich, or where nobody sees colour."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


def styled(row: Row, encoding: str | None = None) -> Any:
    """The row as rich's Text; only where rich is there."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    for piece in row:
        text.append(encodable(piece.text, encoding), piece.style)
    text.rstrip()
    return text
