"""How wrong settings are told: what was found, what is allowed, what is nearest."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pytest_gpushare.errors import SettingsError
from pytest_gpushare.settings.options import Option


def nearest(raw: object, choices: Iterable[str]) -> str:
    """`; the nearest is aggressive`, where one of the words is almost a choice."""
    # Here and below: only who has to tell a user something pays for what finds the words.
    import difflib

    texts = raw[:8] if isinstance(raw, (list, tuple)) else [raw]
    words = [w for text in texts if isinstance(text, str) for w in re.split(r"[\s,]+", text[:200])]
    near = [near for word in words for near in difflib.get_close_matches(word, choices, 1)]
    wrong = [name for name in near if name not in words]
    return f"; the nearest is {wrong[0]}" if wrong else ""


def allowed(option: Option) -> str:
    """What an option accepts, for error messages and the reference: `allowed is ...`."""
    if option.kind == "boolean":
        return "allowed is true or false"
    if option.kind == "text":
        return "allowed is a text"
    if option.kind == "marker":
        return "allowed is the name of a marker"
    if option.kind == "aliases":
        from pytest_gpushare.settings.lines import MEANINGS

        return f"allowed are lines MARKER = meaning or MARKER(n) = meaning; meanings: {MEANINGS}"
    if option.kind == "rules":
        return "allowed are lines PATTERN = SIZE, such as tests/test_llm.py = 8GB"
    if option.kind == "choice":
        *first, last = option.choices
        return f"allowed is {', '.join(first)} or {last}"
    if option.kind == "names":
        return f"allowed is up to {option.high} {option.noun}"
    if option.kind == "words":
        known = ", ".join(option.choices)
        return (
            f"allowed is one or several of {known}"
            if known
            else "allowed is auto, none, or indices and UUIDs of devices"
        )
    numbers = "a whole number" if option.kind == "integer" else "a number"
    bounds = f"from {option.low} to {option.high}"
    start = "allowed is auto, or" if option.auto else "allowed is"
    if option.kind == "size":
        return f"{start} a number of {option.unit} {bounds}, or a size such as 512MB or 4.5GB"
    return f"{start} {numbers} {bounds}{' seconds' if option.unit == 's' else ''}"


def unknown(name: str, where: str, names: Iterable[str]) -> SettingsError:
    """The error for a name that does not exist, with the nearest that does."""
    import difflib

    # Without a cutoff there always is a nearest one; a list of all would fill the screen.
    near = difflib.get_close_matches(name[:80], sorted(names), 1, 0.0)
    return SettingsError(f"{where}: unknown key {shown(name)}: the nearest known one is {near[0]}")


def shown(raw: object) -> str:
    """A value as a user wrote it, short enough for one line of a message."""
    if isinstance(raw, (list, tuple)):
        # Not deeper: what is nested a thousand times cannot be printed at all.
        text = f"[{', '.join(_shown_part(part) for part in raw[:9])}]"
    else:
        text = _shown_part(raw)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shown_text(text: str) -> str:
    """A text that may hold what a user wrote, safe to print and short enough for a message."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
