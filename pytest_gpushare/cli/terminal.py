"""Output of the command: exit codes, styled rows, and a terminal that is redrawn."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pytest_gpushare.text import cut, encodable, width_of

OK, FOUND, INTERNAL, REFUSED = 0, 1, 3, 4
"""Exit codes: success; doctor found an [x]; an internal error; the run would refuse to start, as
pytest does with its code 4. 2 is argparse's, for wrong usage."""

_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35,
          "cyan": 36}  # fmt: skip


class Piece(NamedTuple):
    """A part of a line."""

    text: str
    style: str = ""
    """Words of `_CODES`, such as `bold red`; empty: plain."""


Row = Sequence[Piece]


def text_of(row: Row) -> str:
    """The line without its styles."""
    return "".join(piece.text for piece in row)


def show(rows: Iterable[Row]) -> None:
    """Print the rows to standard output."""
    in_colour = has_colour()
    write_lines(styled(row) if in_colour else text_of(row).rstrip() for row in rows)


def write_lines(lines: Iterable[str]) -> None:
    """Print the lines to standard output."""
    _write("".join(f"{line}\n" for line in lines))


def show_json(document: Mapping[str, Any]) -> None:
    """Print a document as indented JSON."""
    write_lines([json.dumps(document, indent=1)])


def terminal_width() -> int | None:
    """Columns of the terminal; None where standard output is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def has_colour(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether to print in colour, by the same variables as pytest's `--color=auto`."""
    if environment.get("PY_COLORS") in ("0", "1"):
        return environment["PY_COLORS"] == "1"
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and environment.get("TERM") != "dumb" and _understands_codes()


def styled(row: Row) -> str:
    """The line with the codes of its styles."""
    last = len(row) - 1
    parts = []
    for at, piece in enumerate(row):
        text = piece.text.rstrip() if at == last else piece.text
        codes = ";".join(str(_CODES[word]) for word in piece.style.split())
        parts.append(f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text)
    return "".join(parts)


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

    def draw(rows: Rows) -> None:
        width, height = shutil.get_terminal_size()
        form = styled if has_colour() else text_of
        shown = [form(row) for row in _cropped(rows(width), width, height)]
        text = "\r\n".join(f"{line}{_END_OF_LINE}" for line in shown)
        _write(f"{_HOME}{text}{_REST}")

    _write(_ENTER)
    try:
        yield draw
    finally:
        _write(_LEAVE)


def _write(text: str) -> None:
    sys.stdout.write(encodable(text, getattr(sys.stdout, "encoding", None)))
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
    left, fitting = width, []
    for piece in row:
        text = cut(piece.text, left)
        fitting.append(piece._replace(text=text))
        left -= width_of(text)
    return fitting


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
