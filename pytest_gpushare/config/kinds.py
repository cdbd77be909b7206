"""From what a user wrote to a checked value; every refusal says what would be accepted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NamedTuple, TypeAlias

from pytest_gpushare.config.options import BY_KEY, Option
from pytest_gpushare.errors import LineError as LineError
from pytest_gpushare.errors import SettingsError
from pytest_gpushare.text import printable
from pytest_gpushare.units import GB, MOST_VRAM, format_gb, format_number, parse_size

MOST_LINES = 1000
MOST_LENGTH = 500
MOST_DEVICES = 64


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
    text = printable(text)
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


Lines: TypeAlias = "tuple[Alias, ...] | tuple[VramRule, ...]"
Value: TypeAlias = "Fraction | int | bool | str | tuple[str, ...] | Lines | None"

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_NUMBER = re.compile(r"[+-]?([0-9]{1,24}(\.[0-9]{0,24})?|\.[0-9]{1,24})([eE][+-]?[0-9]{1,3})?")


def parse(option: Option, raw: object, where: str, written: str | None = None) -> Value:
    """The value that `raw` means for `option`.

    `where` tells the place ("pytest.ini") and `written` the name that stands there;
    both go into the `SettingsError` that is raised for anything unusable.
    """
    name = written or option.key
    try:
        if option.auto and isinstance(raw, str) and raw.strip().lower() == "auto":
            return None
        return _READERS[option.kind](option, raw)
    except LineError as error:
        line = f"{where}: {name}, line {shown(error.line)}"
        raise SettingsError(f"{line}: {shown_text(error.problem)}: {allowed(option)}") from None
    except (ValueError, ArithmeticError, TypeError):
        hint = nearest(raw, option.choices)
        raise SettingsError(f"{where}: {name} = {shown(raw)}: {allowed(option)}{hint}") from None


def _bounded(option: Option, value: Fraction, scale: int | Fraction = 1) -> Fraction:
    if not Fraction(option.low) * scale <= value <= Fraction(option.high) * scale:
        raise ValueError(value)
    return value


def _decimal(raw: object) -> Fraction:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, Decimal, str)):
        raise TypeError(raw)
    if isinstance(raw, str) and not _NUMBER.fullmatch(raw.strip()):
        raise ValueError(raw)
    if isinstance(raw, float):
        # The shortest text that reads back as this float is what the user wrote in TOML.
        raw = repr(raw)
    try:
        number = Decimal(raw)
    except InvalidOperation:
        raise ValueError(raw) from None
    # A Fraction of 1e999999999 would fill the memory: look at the exponent first.
    if not number.is_finite() or (number and not -30 < number.adjusted() < 30):
        raise ValueError(raw)
    exponent = number.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -100:
        raise ValueError(raw)
    return Fraction(number) if number else Fraction(0)


def _size(option: Option, raw: object) -> Fraction:
    scale = parse_size("1", option.unit)
    if isinstance(raw, str) and not _NUMBER.fullmatch(raw.strip()):
        return _bounded(option, parse_size(raw, option.unit), scale)
    return _bounded(option, _decimal(raw) * scale, scale)


def _number(option: Option, raw: object) -> Fraction:
    return _bounded(option, _decimal(raw))


def _integer(option: Option, raw: object) -> int:
    value = _bounded(option, _decimal(raw))
    if value.denominator != 1:
        raise ValueError(raw)
    return int(value)


def _boolean(_: Option, raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.strip().lower() in _TRUE | _FALSE:
        return raw.strip().lower() in _TRUE
    raise ValueError(raw)


def _words(option: Option, raw: object) -> tuple[str, ...]:
    parts = raw if isinstance(raw, (list, tuple)) else (raw,)
    words = tuple(word for part in parts for word in re.split(r"[\s,]+", _word(part)) if word)
    if not words or len(words) > 64 or max(map(len, words)) > 128:
        raise ValueError(raw)
    if option.choices and not set(words) <= set(option.choices):
        raise ValueError(raw)
    if len(words) > 1 and {"auto", "none"} & set(words):
        raise ValueError(raw)
    return words


def _names(option: Option, raw: object) -> tuple[str, ...]:
    """Texts between spaces, commas or lines; none at all is allowed."""
    parts = raw if isinstance(raw, (list, tuple)) else (raw,)
    if not all(isinstance(part, str) for part in parts):
        raise TypeError(raw)
    names = tuple(n for part in parts for n in re.split(r"[\s,]+", part) if n)
    if len(names) > int(option.high) or not all(n.isprintable() and len(n) <= 256 for n in names):
        raise ValueError(raw)
    return names


def _word(part: object) -> str:
    """A text, or an index of a device, which TOML and JSON have as a number."""
    if isinstance(part, str):
        return part
    if isinstance(part, (int, Decimal)) and re.fullmatch("[0-9]{1,9}", str(part)):
        return str(part)
    raise TypeError(part)


def _choice(option: Option, raw: object) -> str:
    if not isinstance(raw, str) or raw.strip().lower() not in option.choices:
        raise ValueError(raw)
    return raw.strip().lower()


def _text(_: Option, raw: object) -> str:
    if not isinstance(raw, str) or len(raw) > 4096 or "\0" in raw:
        raise ValueError(raw)
    return raw


def _marker(_: Option, raw: object) -> str:
    if not isinstance(raw, str) or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,99}", raw.strip()):
        raise ValueError(raw)
    return raw.strip()


def _aliases(_: Option, raw: object) -> tuple[Alias, ...]:
    # Most users write no lines: what reads them is not loaded for the default.
    if raw == "":
        return ()

    return parse_aliases(raw)


def _rules(_: Option, raw: object) -> tuple[VramRule, ...]:
    if raw == "":
        return ()

    return parse_rules(raw)


_READERS: Mapping[str, Callable[[Option, object], Value]] = {
    "size": _size,
    "number": _number,
    "integer": _integer,
    "boolean": _boolean,
    "choice": _choice,
    "words": _words,
    "names": _names,
    "text": _text,
    "marker": _marker,
    "aliases": _aliases,
    "rules": _rules,
}


def default_of(key: str) -> Value:
    """The default of an option, read as a user's value would be."""
    return parse(BY_KEY[key], BY_KEY[key].default, "default")


def written_as(option: Option, value: object) -> str:
    """`1024` where the option's unit is MB, `0.25`, `true`, `auto`; several with commas."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Fraction):
        scale = parse_size("1", option.unit) if option.unit in ("MB", "GB") else 1
        return format_number(value / scale)
    if isinstance(value, Alias):
        return value.line
    if isinstance(value, VramRule):
        return f"{value.pattern} = {format_gb(value.vram).replace(' ', '')}"
    if isinstance(value, tuple):
        return ", ".join(written_as(option, part) for part in value)
    return str(value)
