"""Settings of several lines: what markers mean, and needs by node id."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pytest_gpushare.errors import LineError as LineError
from pytest_gpushare.units import GB, parse_size

MOST_LINES = 1000
MOST_LENGTH = 500
MOST_DEVICES = 64
MOST_VRAM = 1024**2 * GB

MEANINGS = "vram=SIZE, devices=NUMBER, exclusive, required, gpu, cpu"
"""What a marker can mean, for messages."""

_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_HEAD = re.compile(rf"({_IDENTIFIER})\s*(?:\(\s*((?:{_IDENTIFIER}\s*,?\s*)*)\))?")
_PLACE = re.compile(rf"\{{({_IDENTIFIER})\}}")


class Alias(NamedTuple):
    """`profiled_vram_gib(n) = vram={n}GB`: what a marker of the suite means to us."""

    marker: str
    parameters: tuple[str, ...]
    """Names for the marker's arguments, by position or by keyword."""
    meanings: tuple[tuple[str, str], ...]
    """(`vram`, `{n}GB`), (`exclusive`, ``): names and texts in which parameters may stand."""
    line: str
    """As the user wrote it."""


class VramRule(NamedTuple):
    """`tests/test_llm.py = 8GB`: the need of tests by their node ids."""

    pattern: str
    vram: int
    """Bytes."""


def parse_aliases(raw: object) -> tuple[Alias, ...]:
    """The meanings of markers. Raises `LineError` for a line, `ValueError` for no lines at all."""
    aliases = tuple(_alias(line) for line in _lines(raw))
    seen: set[str] = set()
    for alias in aliases:
        if alias.marker in seen:
            raise LineError(alias.line, "the marker stands there twice; keep one line")
        seen.add(alias.marker)
    return aliases


def parse_rules(raw: object) -> tuple[VramRule, ...]:
    """The needs by node id, in their order; of several that match the first one holds."""
    return tuple(_rule(line) for line in _lines(raw))


def parse_vram(text: str) -> int:
    """Bytes of a size that names its unit. Raises `ValueError`; the unit is never guessed."""
    size = parse_size(text, "B")
    if text.strip()[-1:].isdigit() or text.strip()[-1:] == ".":
        raise ValueError(f"{text} has no unit")
    if not 0 < size <= MOST_VRAM:
        raise ValueError(f"{text} is not between 0 and {MOST_VRAM // GB} GB")
    return -(-size // 1)


def parse_devices(text: str) -> int:
    """A number of devices. Raises `ValueError`."""
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MOST_DEVICES:
        raise ValueError(f"{text} is not a number from 1 to {MOST_DEVICES}")
    return int(text)


READERS: Mapping[str, Callable[[str], int]] = {"vram": parse_vram, "devices": parse_devices}
FLAGS = ("exclusive", "required", "gpu", "cpu")


def _lines(raw: object) -> Sequence[str]:
    """A text of several lines, a list of lines, or in JSON an object of them."""
    if isinstance(raw, Mapping):
        raw = [f"{name} = {value}" for name, value in raw.items()]
    if isinstance(raw, str):
        raw = raw.splitlines()
    if not isinstance(raw, (list, tuple)) or not all(isinstance(line, str) for line in raw):
        raise ValueError(raw)
    lines = [line.strip() for line in raw]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) > MOST_LINES:
        raise LineError(lines[MOST_LINES], f"there are more than {MOST_LINES} lines")
    for line in lines:
        if len(line) > MOST_LENGTH:
            raise LineError(line, f"has more than {MOST_LENGTH} characters")
    return lines


def _alias(line: str) -> Alias:
    head, equals, meaning = line.partition("=")
    match = _HEAD.fullmatch(head.strip())
    if match is None or not equals:
        raise LineError(line, "is not MARKER = meaning")
    parameters = tuple(re.findall(_IDENTIFIER, match[2] or ""))
    if len(set(parameters)) < len(parameters):
        raise LineError(line, "names a parameter twice")
    meanings = tuple(_meaning(line, part) for part in re.split(r"[\s,]+", meaning.strip()))
    names = [name for name, _ in meanings]
    if len(set(names)) < len(names):
        raise LineError(line, "says one thing twice")
    if "cpu" in names and len(names) > 1:
        raise LineError(line, "means a CPU test and a need of the GPU")
    for name, text in meanings:
        _check(line, name, text, parameters)
    return Alias(match[1], parameters, meanings, line)


def _meaning(line: str, part: str) -> tuple[str, str]:
    name, equals, text = part.partition("=")
    if (name in READERS) != bool(equals) or name not in (*READERS, *FLAGS):
        raise LineError(line, f"{part or 'nothing'} is no meaning")
    return name, text


def _check(line: str, name: str, text: str, parameters: Sequence[str]) -> None:
    if name not in READERS:
        return
    for used in _PLACE.findall(text):
        if used not in parameters:
            raise LineError(line, f"{{{used}}} is no parameter of the marker")
    try:
        # Any number will do to see whether the rest of the text makes sense.
        READERS[name](_PLACE.sub("1", text))
    except ValueError:
        raise LineError(line, f"{name}={text} cannot be read") from None


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text with the parameters' values in their places."""
    return _PLACE.sub(lambda match: values[match[1]], text)


def _rule(line: str) -> VramRule:
    # Parameters of tests may have an equals sign in their ids: the last one counts.
    pattern, equals, size = line.rpartition("=")
    if not equals or not pattern.strip():
        raise LineError(line, "is not PATTERN = SIZE")
    try:
        return VramRule(pattern.strip(), parse_vram(size.strip()))
    except ValueError:
        raise LineError(line, f"{size.strip() or 'nothing'} is no size with a unit") from None
