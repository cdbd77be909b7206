"""The types of options: each reads what a user wrote, says what it accepts, and writes.

A type raises `ValueError`, `TypeError` or `ArithmeticError` for a value that it does not accept,
and `LineError` for one line of several. `read` turns these into messages.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from typing import TYPE_CHECKING, TypeAlias

from pytest_gpushare.config.settings import (
    Alias,
    ModelRule,
    VramRule,
    parse_aliases,
    parse_lines,
    parse_model_rules,
    parse_rules,
)
from pytest_gpushare.errors import LineError, SettingsError
from pytest_gpushare.text import nearest, shown_text, shown_value
from pytest_gpushare.units import GB, MB, format_number, parse_size

if TYPE_CHECKING:
    from pytest_gpushare.config.options import Option

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_UNITS = {"MB": MB, "GB": GB}
_NUMBER = re.compile(r"[+-]?([0-9]{1,24}(\.[0-9]{0,24})?|\.[0-9]{1,24})([eE][+-]?[0-9]{1,3})?")


ReadLines: TypeAlias = (
    "tuple[str, ...] | tuple[Alias, ...] | tuple[VramRule, ...] | tuple[ModelRule, ...]"
)
Value: TypeAlias = "Fraction | int | bool | str | ReadLines | None"


class Kind(ABC):
    """The type of an option."""

    allowed = ""
    """What is accepted, as messages and the reference say it: `allowed is ...`."""
    choices: tuple[str, ...] = ()
    """The words that are accepted, where there is a list of them."""

    @abstractmethod
    def read(self, raw: object) -> Value:
        """The value that `raw` means."""

    def is_untyped(self, _text: str) -> bool:
        """Whether a source with types of its own, as JSON, writes the text without quotes."""
        return False

    def read_or_explain(self, raw: object, place: str, *, typed: bool = False) -> Value:
        """What `read` returns; its errors become a `SettingsError` that names the place.

        `typed`: the source has types of its own, so a number in quotes is not accepted.
        """
        try:
            value = self.read(raw)
        except LineError as error:
            problem = shown_text(error.problem)
            raise SettingsError(
                f"{place}, line {shown_value(error.line)}: {problem}: {self.allowed}"
            ) from None
        except (ValueError, ArithmeticError, TypeError):
            hint = nearest(raw, self.choices)
            raise SettingsError(f"{place} = {shown_value(raw)}: {self.allowed}{hint}") from None
        if typed and isinstance(raw, str) and self.is_untyped(raw):
            raise SettingsError(
                f"{place} = {shown_value(raw)}: {self.allowed}; write it without quotes"
            )
        return value

    def write(self, value: object) -> str:
        """The value as a user would write it; `read` accepts the result."""
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class Boolean(Kind):
    """True or false; in ini files a word for one."""

    allowed = "allowed is true or false"

    def read(self, raw: object) -> bool:  # noqa: D102
        return raw if isinstance(raw, bool) else _word(raw, _TRUE | _FALSE) in _TRUE

    def is_untyped(self, _text: str) -> bool:  # noqa: D102
        return True

    def write(self, value: object) -> str:  # noqa: D102
        return str(value).lower()


class Number(Kind):
    """An exact number between two bounds; without a unit, or in seconds."""

    what = "a number"

    def __init__(self, *, low: str = "0", high: str, unit: str = "", auto: bool = False) -> None:
        self.low, self.high, self.unit = low, high, unit
        self.auto = auto
        """Whether `auto` is accepted too; it is read as None."""
        self.allowed = f"allowed is {'auto, or ' * auto}{self._described()}"

    def _described(self) -> str:
        return f"{self.what} from {self.low} to {self.high}{' seconds' if self.unit else ''}"

    def read(self, raw: object) -> Fraction | int | None:
        """The number, checked against the bounds."""
        if self.auto and isinstance(raw, str) and raw.strip().lower() == "auto":
            return None
        return self._bounded(_decimal(raw))

    def is_untyped(self, text: str) -> bool:
        """A text that is a number."""
        return _NUMBER.fullmatch(text.strip()) is not None

    def write(self, value: object) -> str:
        """`0.25`, `auto`."""
        if value is None:
            return "auto"
        return format_number(value) if isinstance(value, Fraction) else str(value)

    def _bounded(self, value: Fraction, scale: int | Fraction = 1) -> Fraction:
        if not Fraction(self.low) * scale <= value <= Fraction(self.high) * scale:
            raise ValueError(value)
        return value


class Integer(Number):
    """A whole number between two bounds."""

    what = "a whole number"

    def read(self, raw: object) -> int | None:
        """The number; 3.0 is a whole number too."""
        value = super().read(raw)
        if value is None:
            return None
        if value.denominator != 1:
            raise ValueError(raw)
        return int(value)


class Size(Number):
    """A size: a number in `unit` (MB or GB), or a text that names its unit. Read as bytes."""

    def _described(self) -> str:
        number = f"a number of {self.unit} from {self.low} to {self.high}"
        return f"{number}, or a size such as 512MB or 4.5GB"

    def read(self, raw: object) -> Fraction | None:
        """The size in bytes; exact, so perhaps a fraction of a byte."""
        scale = _UNITS[self.unit]
        if isinstance(raw, str):
            if self.auto and raw.strip().lower() == "auto":
                return None
            if not _NUMBER.fullmatch(raw.strip()):
                return self._bounded(parse_size(raw, self.unit), scale)
        return self._bounded(_decimal(raw) * scale, scale)

    def write(self, value: object) -> str:
        """`1024` where the unit is MB."""
        if isinstance(value, (int, Fraction)):
            value = Fraction(value) / _UNITS[self.unit]
        return super().write(value)


class Choice(Kind):
    """One of several words."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices
        *first, last = choices
        self.allowed = f"allowed is {', '.join(first)} or {last}"

    def read(self, raw: object) -> str:
        """The word in lower case."""
        return _word(raw, self.choices)


class Text(Kind):
    """Any text, as it is."""

    allowed = "allowed is a text"

    def read(self, raw: object) -> str:  # noqa: D102
        if not isinstance(raw, str) or len(raw) > 4096 or "\0" in raw:
            raise ValueError(raw)
        return raw


class Name(Kind):
    """The name of a marker or a parameter."""

    def __init__(self, noun: str, pattern: str) -> None:
        self.allowed, self._pattern = f"allowed is the name of a {noun}", pattern

    def read(self, raw: object) -> str:  # noqa: D102
        if not isinstance(raw, str) or not re.fullmatch(self._pattern, raw.strip()):
            raise ValueError(raw)
        return raw.strip()


class Presets(Kind):
    """One or several names of presets, between spaces, commas or lines."""

    def __init__(self, choices: tuple[str, ...]) -> None:
        self.choices = choices
        self.allowed = f"allowed is one or several of {', '.join(choices)}"

    def read(self, raw: object) -> tuple[str, ...]:
        """The names in their order."""
        words = _words(raw)
        if not words or not set(words) <= set(self.choices):
            raise ValueError(raw)
        return words


class Devices(Kind):
    """Devices by index or UUID, or one of the words `auto` and `none`."""

    allowed = "allowed is auto, none, or indices and UUIDs of devices"

    def read(self, raw: object) -> tuple[str, ...]:
        """The words; nobody has checked yet whether there is such a device."""
        words = _words(raw)
        if not words or (len(words) > 1 and {"auto", "none"} & set(words)):
            raise ValueError(raw)
        return words


class Names(Kind):
    """Texts between spaces, commas or lines; none at all is allowed."""

    def __init__(self, noun: str, most: int) -> None:
        self.most = most
        self.allowed = f"allowed is up to {most} {noun}"

    def read(self, raw: object) -> tuple[str, ...]:
        """The texts in their order."""
        return _words(raw, self.most)


class Lines(Kind):
    """Lines of one form, in their order."""

    def __init__(self, form: str, parse: Callable[[object], ReadLines]) -> None:
        self.allowed, self._parse = f"allowed are lines {form}", parse

    def read(self, raw: object) -> ReadLines:  # noqa: D102
        return self._parse(raw)


def _decimal(raw: object) -> Fraction:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, Decimal, str)):
        raise TypeError(raw)
    if isinstance(raw, str) and not _NUMBER.fullmatch(raw.strip()):
        raise ValueError(raw)
    if isinstance(raw, float):
        # The shortest text that reads back as this float is what the user wrote in TOML.
        raw = repr(raw)
    number = Decimal(raw)
    # A Fraction of 1e999999999 would fill the memory: look at the exponent first.
    if not number.is_finite() or (number and not -30 < number.adjusted() < 30):
        raise ValueError(raw)
    exponent = number.as_tuple().exponent
    if isinstance(exponent, int) and exponent < -100:
        raise ValueError(raw)
    return Fraction(number) if number else Fraction(0)


def _word(raw: object, choices: Iterable[str]) -> str:
    if not isinstance(raw, str):
        raise TypeError(raw)
    word = raw.strip().lower()
    if word not in choices:
        raise ValueError(raw)
    return word


def _words(raw: object, most: int = 64) -> tuple[str, ...]:
    parts = raw if isinstance(raw, (list, tuple)) else (raw,)
    words = tuple(word for part in parts for word in re.split(r"[\s,]+", _as_text(part)) if word)
    if len(words) > most or not all(word.isprintable() and len(word) <= 256 for word in words):
        raise ValueError(raw)
    return words


def _as_text(part: object) -> str:
    """A text; or a number in TOML and JSON, such as the index of a device."""
    if isinstance(part, str):
        return part
    if isinstance(part, (int, Decimal)) and re.fullmatch("[0-9]{1,9}", str(part)):
        return str(part)
    raise TypeError(part)


TYPES: Mapping[str, Callable[..., Kind]] = {
    "boolean": Boolean,
    "number": Number,
    "integer": Integer,
    "size": Size,
    "text": Text,
    "choice": Choice,
    "presets": Presets,
    "devices": Devices,
    "names": Names,
    "marker name": partial(Name, "marker", "[A-Za-z_][A-Za-z0-9_]{0,99}"),
    "parameter name": partial(Name, "parameter", "[A-Za-z0-9_]{0,100}"),
    "hosts": partial(
        Lines, "user@box:/srv/project, with options of ssh and python=PATH", parse_lines
    ),
    "aliases": partial(
        Lines,
        "MARKER = meaning or MARKER(n) = meaning; meanings: vram=SIZE, devices=NUMBER, exclusive, "
        "required, gpu, cpu, ollama, ollama=MODEL, context=TOKENS",
        parse_aliases,
    ),
    "rules": partial(Lines, "PATTERN = SIZE, such as tests/test_llm.py = 8GB", parse_rules),
    "model rules": partial(
        Lines, "PATTERN = MODEL, such as tests/rag/* = qwen2.5:14b", parse_model_rules
    ),
}
"""The types that the table of options names."""


@cache
def kind_of(option: Option) -> Kind:
    """The type of an option."""
    return TYPES[option.type](**option.accepts)


def read(
    option: Option, raw: object, where: str, *, written: str = "", typed: bool = False
) -> Value:
    """The value that `raw` means.

    `where` is the place ("pytest.ini") and `written` the name that stands there; both go into the
    `SettingsError` that is raised for a value that is not accepted. `typed`: the source has types
    of its own, so a number in quotes is not accepted.
    """
    place = f"{where}: {written or option.key}"
    return kind_of(option).read_or_explain(raw, place, typed=typed)


def defaults(options: Iterable[Option]) -> dict[str, Value]:
    """Key -> the value of an option that nobody sets."""
    return {option.key: read(option, option.default, "default") for option in options}
