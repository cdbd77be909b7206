"""A placement that somebody else changed: noticed, and traced to the file that did it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

_MOST_BYTES = 1024 * 1024
_MOST_FILES = 2000


def difference(wanted: Mapping[str, str], found: Mapping[str, str]) -> str:
    """What a process sees against what it was given: `NAME was A, is B`; empty where equal."""
    changes = [
        f"{name} was {text or 'empty'}, is {_shown(found.get(name))}"
        for name, text in wanted.items()
        if found.get(name) != text
    ]
    return "; ".join(changes)


def culprit(names: Iterable[str], files: Iterable[str | None]) -> str:
    """`conftest.py:12`: the first line that writes one of the variables; empty where none does."""
    writes = re.compile(
        rf"^(?!\s*#).*\b({'|'.join(map(re.escape, names))})\b[\"']?\s*[\],=)].*", re.M
    )
    for name in list(dict.fromkeys(file for file in files if file))[:_MOST_FILES]:
        text = _text(Path(name))
        for match in writes.finditer(text):
            line = match.group()
            if "env" in line and not _reads(line):
                return f"{_relative(name)}:{text.count(chr(10), 0, match.start()) + 1}"
    return ""


def _reads(line: str) -> bool:
    """Whether a line only asks for the variable."""
    return re.search(r"environ(\.get\(|\[[^\]]*\](?!\s*=[^=]))|getenv", line) is not None


def _shown(text: str | None) -> str:
    return "unset" if text is None else text[:200] or "empty"


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return ""


def _relative(name: str) -> str:
    try:
        return str(Path(name).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return name
