"""How messages show what a user wrote: on one line, short, with the nearest word that is known."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pytest_gpushare.text import printable


def nearest(raw: object, choices: Iterable[str]) -> str:
    """`; the nearest is aggressive`, where one of the words is almost a choice."""
    import difflib

    texts = raw[:8] if isinstance(raw, (list, tuple)) else [raw]
    words = [w for text in texts if isinstance(text, str) for w in re.split(r"[\s,]+", text[:200])]
    near = [near for word in words for near in difflib.get_close_matches(word, choices, 1)]
    wrong = [name for name in near if name not in words]
    return f"; the nearest is {wrong[0]}" if wrong else ""


def shown(raw: object) -> str:
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
