"""From what a user wrote to a checked value; every refusal says what would be accepted."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TYPE_CHECKING, TypeAlias

from pytest_gpushare.errors import LineError, SettingsError
from pytest_gpushare.settings.options import BY_KEY, Option
from pytest_gpushare.settings.wording import allowed, nearest, shown, shown_text
from pytest_gpushare.units import parse_size

if TYPE_CHECKING:
    from pytest_gpushare.settings.lines import Alias, VramRule

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
    from pytest_gpushare.settings.lines import parse_aliases

    return parse_aliases(raw)


def _rules(_: Option, raw: object) -> tuple[VramRule, ...]:
    if raw == "":
        return ()
    from pytest_gpushare.settings.lines import parse_rules

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
