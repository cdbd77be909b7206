"""Text: foreign text made fit for messages, secrets removed, files read and written safely."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any


class NotRegularFileError(OSError):
    """A directory, a pipe, a device or the like, where a file was expected."""


class FileTooLargeError(OSError):
    """A file of more bytes than are read."""

    def __init__(self, size: int) -> None:
        super().__init__(f"has {size} bytes or more")
        self.size = size
        """Bytes, as far as known."""


def read_regular(path: Path, most: int) -> bytes:
    """The bytes of a regular file.

    Raises `NotRegularFileError` for anything else: a FIFO or a device may block, or never end;
    `FileTooLargeError` for a file of more than `most` bytes, and any other `OSError`.
    """
    # Looked at first: to open a device may have effects of its own.
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotRegularFileError("not a regular file")
    with _opened(path, os.O_RDONLY, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        # A file of /proc calls itself regular and may wait for data all the same.
        content = file.read(most + 1) if size <= most else None
        if content is None or len(content) > most:
            raise FileTooLargeError(max(size, most + 1))
    return content


def append_regular(path: Path, text: str) -> None:
    """Add to a regular file, which is created where it is missing. Raises `OSError`."""
    with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, "ab") as file:
        file.write(text.encode("utf-8", "replace"))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that whoever opens it finds all of it, or what was there before."""
    if path.is_dir():
        raise IsADirectoryError(f"{path.name} is a directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(f"{path.parent.name} is not a directory") from None
    # In the same directory: a file can be renamed only within its file system.
    scratch = path.with_name(f".{path.name[:100]}-{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        with scratch.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise


def _opened(path: Path, flags: int, mode: str) -> IO[bytes]:
    # Opening a FIFO blocks until its other end is opened; these flags exist on POSIX only.
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularFileError("not a regular file")
        return os.fdopen(descriptor, mode)
    except BaseException:
        os.close(descriptor)
        raise


def printable(text: str, most: int | None = None) -> str:
    """The text with `?` for each character that a terminal would not show as it is.

    `most`: the number of characters that are kept from its start; None keeps all.
    """
    return "".join(c if c.isprintable() else "?" for c in text[:most])


def one_line(text: str, most: int) -> str:
    """The text on one line: blanks and line breaks become one blank each, the rest printable."""
    return printable(" ".join(text[: 4 * most].split()), most)


def nearest(raw: object, choices: Iterable[str]) -> str:
    """`; the nearest is aggressive`, where one of the words is almost a choice."""
    import difflib

    texts = raw[:8] if isinstance(raw, (list, tuple)) else [raw]
    words = [w for text in texts if isinstance(text, str) for w in re.split(r"[\s,]+", text[:200])]
    near = [near for word in words for near in difflib.get_close_matches(word, choices, 1)]
    wrong = [name for name in near if name not in words]
    return f"; the nearest is {wrong[0]}" if wrong else ""


def shown_value(raw: object) -> str:
    """A value as a user wrote it, short enough for one line of a message."""
    if isinstance(raw, (list, tuple)):
        # Not deeper: what is nested a thousand times cannot be printed at all.
        text = f"[{', '.join(_shown_part(part) for part in raw[:9])}]"
    else:
        text = _shown_part(raw)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown_text(text: str, most: int = 80) -> str:
    """A text that may hold what a user wrote, safe to print and short enough for a message."""
    text = printable(text)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _shown_part(raw: object) -> str:
    if raw is None:
        return "null"
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, (dict, list, tuple)):
        return "{...}" if isinstance(raw, dict) else "[...]"
    try:
        return repr(raw) if isinstance(raw, str) else str(raw)
    except ValueError:
        # Python writes no integer of more than 4300 digits; TOML may have one in hexadecimal.
        return "a number of thousands of digits"


def width_of(text: str) -> int:
    """Columns that a text takes in a terminal: two for wide signs, none for combining ones."""
    if text.isascii():
        return len(text)
    return sum(
        0
        if unicodedata.combining(c) or unicodedata.category(c) in ("Cf", "Me", "Mn")
        else 2
        if unicodedata.east_asian_width(c) in "WF"
        else 1
        for c in text
    )


def cut(text: str, columns: int) -> str:
    """As much of the text, from its start, as so many columns show."""
    while width_of(text) > columns:
        text = text[:-1]
    return text


_BARS = "▁▂▃▄▅▆▇█"
_ASCII = str.maketrans(f"{_BARS}▓▒░×·…→", "_.-=+*#@%=.x|~>")


def encodable(text: str, encoding: str | None) -> str:
    """The text with what this encoding lacks replaced; Windows code pages lack block characters.

    A file without an encoding takes any text.
    """
    encoding = encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(_ASCII).encode(encoding, "replace").decode(encoding)
    return text


def sparkline(parts: Iterable[float]) -> str:
    """One character for each part from 0 to 1, in eighths."""
    return "".join(_BARS[min(7, max(0, int(part * 8)))] for part in parts)


_TIED = "\0"
_TIE = r"(?<=\d) (?=(?:[GMk]?B|ms|s|%)(?!\w))|(?<= -o) | (?== \S)|(?<= [=×]) (?=\S)|(?<=\d) (?=×)"


def wrapped(text: str, columns: int, indent: int) -> list[str]:
    """The text in lines of at most so many columns, broken at blanks alone.

    The first line keeps its own indent, the others have `indent` blanks. A word that is longer
    than a line stands alone in one. A number stays with its unit, `-o` with its setting, a
    setting with its value, and a product whole.
    """
    if width_of(text) <= columns or not text.strip():
        return [text]
    words = [word.replace(_TIED, " ") for word in re.sub(_TIE, _TIED, text).split(" ")]
    # The blanks at the start are empty words.
    first = next((at for at, word in enumerate(words) if word), 0)
    lines, line, is_empty = [], " " * first, True
    for word in words[first:]:
        longer = f"{line}{word}" if is_empty else f"{line} {word}"
        if not is_empty and width_of(longer) > columns:
            lines.append(line.rstrip())
            longer = f"{' ' * indent}{word}"
        line, is_empty = longer, False
    return [*lines, line]


_HIDDEN = "***"
_SECRET_NAME = (
    r"(?i)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL"
    r"|(?<![^_])AUTH)S?(?![^_])"
)
"""Whole words, or their ends: PGPASSWORD and NPM_AUTH, but not GIT_AUTHOR_NAME or TOKENIZERS."""
_SHORTEST = 8
"""A value of fewer characters is no secret, and would be found in harmless words."""

_USER = r"(?<=://)[^/\s@]*@"
_QUERY = r"(?i)(\b[a-z][a-z0-9+.-]*://[^\s?#'\"]+)[?#][^\s'\"]*"


def redactor(
    environment: Mapping[str, str] = os.environ, home: str | None = None
) -> Callable[[str], str]:
    """A function that takes secrets out of a text.

    Values of variables that by their names are secret, user names, passwords and queries of
    URLs become `***`; the home directory becomes `~`.
    """
    values = {
        value
        for name, value in environment.items()
        if re.search(_SECRET_NAME, name) and len(value) >= _SHORTEST
    }
    # The longest first: one secret may begin another.
    secrets = [re.escape(value) for value in sorted(values, key=len, reverse=True)]
    known = re.compile("|".join(secrets)) if secrets else None
    directory = _home() if home is None else home
    # A whole path, or the start of one: /home/user is no part of /home/user2 or /mnt/home/user.
    at_home = (
        re.compile(rf"(?<![\w.~-]){re.escape(directory)}(?![\w-]|\.\w)") if directory else None
    )

    def redact(text: str) -> str:
        if known is not None:
            text = known.sub(_HIDDEN, text)
        if "://" in text:
            text = re.sub(_QUERY, rf"\1?{_HIDDEN}", re.sub(_USER, f"{_HIDDEN}@", text))
        return at_home.sub("~", text) if at_home is not None else text

    return redact


def redacted(value: Any, redact: Callable[[str], str]) -> Any:
    """The same in every text of a document, keys included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(key)): redacted(part, redact) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        # Lists of figures are long, and have no texts.
        if value and isinstance(value[0], (int, float)):
            return list(value)
        return [redacted(part, redact) for part in value]
    return value


def _home() -> str:
    try:
        home = str(Path.home())
    except RuntimeError:
        return ""
    # A home of "/" is no secret, and would be found everywhere.
    return home if len(home) > 3 else ""
