"""Node ids and patterns for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Patterns(Generic[T]):
    """Values by patterns of node ids; of several that match, the first one holds.

    A pattern names a test, or as on pytest's command line a directory, a file, a class or a
    test without its parameters; `*` and `?` stand for any characters and for one. Brackets
    stand for themselves, since parameters are written in them.
    """

    def __init__(self, pairs: Iterable[tuple[str, T]]) -> None:
        self._plain: dict[str, tuple[int, T]] = {}
        self._wild: list[tuple[int, re.Pattern[str], T]] = []
        for number, (pattern, value) in enumerate(pairs):
            name = pattern.replace("\\", "/").rstrip("/") if "::" not in pattern else pattern
            if "*" in name or "?" in name:
                self._wild.append((number, _compiled(name), value))
            else:
                self._plain.setdefault(name, (number, value))

    def find(self, nodeid: str) -> T | None:
        """The value for this test; None where no pattern matches."""
        found: tuple[int, T] | None = None
        if self._plain:
            found = min(
                (self._plain[name] for name in _names(nodeid) if name in self._plain),
                key=lambda pair: pair[0],
                default=None,
            )
        for number, pattern, value in self._wild:
            if found is not None and found[0] < number:
                break
            if pattern.match(nodeid):
                return value
        return found[1] if found else None


def _names(nodeid: str) -> Iterable[str]:
    """The node id, and what of it names more than this one test."""
    yield nodeid
    name = nodeid.partition("[")[0]
    if name != nodeid:
        yield name
    path, colons, rest = name.partition("::")
    while colons and "::" in rest:
        rest = rest.rpartition("::")[0]
        yield f"{path}::{rest}"
    if colons:
        yield path
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def _compiled(pattern: str) -> re.Pattern[str]:
    first, *rest = (_fixed(part) for part in re.split(r"\*+", pattern))
    text = first
    # Each star but the last takes the first place that fits and never tries another, as in
    # `fnmatch`: patterns of many stars would backtrack for ever.
    for number, part in enumerate(rest[:-1]):
        text += f"(?=(?P<star{number}>.*?{part}))(?P=star{number})"
    text += "".join(f".*{part}" for part in rest[-1:])
    return re.compile(rf"(?s:{text})(?:\Z|(?=/|::|\[))")


def _fixed(part: str) -> str:
    return ".".join(re.escape(piece) for piece in part.split("?"))
