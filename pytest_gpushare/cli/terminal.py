"""Output of the command: exit codes, styled rows, and a terminal that is redrawn.

rich draws where it is installed, else the common escape codes do.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

OK, FOUND, USAGE, INTERNAL, REFUSED = 0, 1, 2, 3, 4
"""Exit codes: success; doctor found an [x]; wrong usage; an internal error; the run would refuse
to start, as pytest does with its code 4."""


class Piece(NamedTuple):
    """A part of a line."""

    text: str
    style: str = ""
    """A style of rich, such as `bold red`; empty: plain."""


Row = Sequence[Piece]

_PLAIN = str.maketrans({"×": "x", "█": "#", "▒": "=", "░": ".", "…": "~", "→": ">"})


def text_of(row: Row) -> str:
    """The line without its styles."""
    return "".join(piece.text for piece in row)


def encodable(text: str, encoding: str | None) -> str:
    """The text with what this encoding lacks replaced; Windows code pages lack block characters."""
    if not encoding:
        # A Python object instead of a terminal: it takes any text.
        return text
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
    return text


def can_show(text: str) -> bool:
    """Whether standard output can show these characters."""
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
    """Print a document as indented JSON."""
    json.dump(document, sys.stdout, indent=1, ensure_ascii=True)
    sys.stdout.write("\n")
    sys.stdout.flush()


def terminal_width() -> int | None:
    """Columns of the terminal; None where standard output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def rich_console() -> Any:
    """A console of rich for standard output; None without rich, or where it is no terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


def styled(row: Row, encoding: str | None = None) -> Any:
    """The row as rich's Text; rich must be installed."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop")
    for piece in row:
        text.append(encodable(piece.text, encoding), piece.style)
    text.rstrip()
    return text


Rows = Callable[[int], Iterable[Row]]
"""The rows for a width in columns."""

Draw = Callable[[Rows], None]

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[H", "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"


@contextmanager
def screen() -> Iterator[Draw | None]:
    """The terminal's alternate screen, restored at the end; None where the terminal has none."""
    if os.environ.get("TERM", "") == "dumb" or not _understands_codes():
        yield None
        return
    console = rich_console()
    if console is None:
        with _plain() as draw:
            yield draw
        return
    from rich.console import Group
    from rich.live import Live

    with Live(console=console, screen=True, auto_refresh=False) as live:

        def draw(rows: Rows) -> None:
            width, height = console.size
            texts = [styled(row, console.encoding) for row in _cropped(rows(width), width, height)]
            live.update(Group(*texts), refresh=True)

        yield draw


@contextmanager
def _plain() -> Iterator[Draw]:
    def draw(rows: Rows) -> None:
        width, height = shutil.get_terminal_size()
        shown = [text_of(row) for row in _cropped(rows(width), width, height)]
        text = "\r\n".join(f"{line}{_END_OF_LINE}" for line in shown)
        _write(f"{_HOME}{text}{_REST}")

    _write(_ENTER)
    try:
        yield draw
    finally:
        _write(_LEAVE)


def _write(text: str) -> None:
    sys.stdout.write(encodable(text, sys.stdout.encoding))
    sys.stdout.flush()


def _cropped(rows: Iterable[Row], width: int, height: int) -> list[Row]:
    """The rows that fit; the last one counts those that do not."""
    every = [_row(row, width) for row in rows]
    if len(every) <= height:
        return every

    kept = max(0, height - 1)
    return [*every[:kept], [Piece(f"... {len(every) - kept} more lines")]]


def _row(row: Row, width: int) -> Row:
    """The row, cut at the terminal's width: a wrapped line would push the others down."""
    left, cut = width, []
    for piece in row:
        cut.append(piece._replace(text=piece.text[:left]))
        left -= len(cut[-1].text)
    return cut


def _understands_codes() -> bool:
    """Whether the terminal obeys escape codes; Windows consoles must be switched to it."""
    return sys.platform != "win32" or _switch_codes_on()


def _switch_codes_on() -> bool:  # pragma: no cover - runs on Windows alone
    import ctypes

    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return False
    kernel, mode = windll.kernel32, ctypes.c_ulong()
    handle = kernel.GetStdHandle(-11)
    return bool(
        kernel.GetConsoleMode(handle, ctypes.byref(mode))
        and kernel.SetConsoleMode(handle, mode.value | 4)
    )
