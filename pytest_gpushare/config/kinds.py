"""The types of options: each reads what a user wrote, describes what it accepts, and writes.

A type raises `ValueError`, `TypeError` or `ArithmeticError` for a value that it does not accept,
and `LineError` for one line of several. `Option.read` turns these into messages.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import TypeAlias

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
from pytest_gpushare.units import format_gb, format_number, parse_size

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_NUMBER = re.compile(r"[+-]?([0-9]{1,24}(\.[0-9]{0,24})?|\.[0-9]{1,24})([eE][+-]?[0-9]{1,3})?")


Lines: TypeAlias = "tuple[Alias, ...] | tuple[VramRule, ...] | tuple[ModelRule, ...]"
Value: TypeAlias = "Fraction | int | bool | str | tuple[str, ...] | Lines | None"


class Kind(ABC):
    """The type of an option."""

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
                f"{place}, line {shown_value(error.line)}: {problem}: {self.describe()}"
            ) from None
        except (ValueError, ArithmeticError, TypeError):
            hint = nearest(raw, self.choices)
            raise SettingsError(f"{place} = {shown_value(raw)}: {self.describe()}{hint}") from None
        if typed and isinstance(raw, str) and self.is_untyped(raw):
            raise SettingsError(
                f"{place} = {shown_value(raw)}: {self.describe()}; write it without quotes"
            )
        return value

    @abstractmethod
    def describe(self) -> str:
        """What is accepted, as messages and the reference say it: `allowed is ...`."""

    def write(self, value: object) -> str:
        """The value as a user would write it; `read` accepts the result."""
        return str(value)


class Boolean(Kind):
    """True or false."""

    def read(self, raw: object) -> bool:
        """A boolean, or a word for one as ini files have it."""
        if isinstance(raw, bool):
            return raw
        return _word(raw, _TRUE | _FALSE) in _TRUE

    def is_untyped(self, _text: str) -> bool:
        """Every text."""
        return True

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed is true or false"

    def write(self, value: object) -> str:
        """`true` or `false`."""
        return str(value).lower()


class Number(Kind):
    """An exact number between two bounds; without a unit, or in seconds."""

    what = "a number"

    def __init__(self, *, low: str = "0", high: str, unit: str = "", auto: bool = False) -> None:
        self.low, self.high, self.unit = low, high, unit
        self.auto = auto
        """Whether `auto` is accepted too; it is read as None."""

    def read(self, raw: object) -> Fraction | int | None:
        """The number, checked against the bounds."""
        if self.auto and isinstance(raw, str) and raw.strip().lower() == "auto":
            return None
        return self._bounded(_decimal(raw))

    def is_untyped(self, text: str) -> bool:
        """A text that is a number."""
        return _NUMBER.fullmatch(text.strip()) is not None

    def describe(self) -> str:
        """See `Kind`."""
        return f"{self._start()} {self.what} {self._bounds()}{' seconds' if self.unit else ''}"

    def write(self, value: object) -> str:
        """`0.25`, `auto`."""
        if value is None:
            return "auto"
        return format_number(value) if isinstance(value, Fraction) else str(value)

    def _bounded(self, value: Fraction, scale: int | Fraction = 1) -> Fraction:
        if not Fraction(self.low) * scale <= value <= Fraction(self.high) * scale:
            raise ValueError(value)
        return value

    def _start(self) -> str:
        return "allowed is auto, or" if self.auto else "allowed is"

    def _bounds(self) -> str:
        return f"from {self.low} to {self.high}"


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

    def read(self, raw: object) -> Fraction | None:
        """The size in bytes; exact, so perhaps a fraction of a byte."""
        scale = parse_size("1", self.unit)
        if isinstance(raw, str):
            if self.auto and raw.strip().lower() == "auto":
                return None
            if not _NUMBER.fullmatch(raw.strip()):
                return self._bounded(parse_size(raw, self.unit), scale)
        return self._bounded(_decimal(raw) * scale, scale)

    def describe(self) -> str:
        """See `Kind`."""
        number = f"a number of {self.unit} {self._bounds()}"
        return f"{self._start()} {number}, or a size such as 512MB or 4.5GB"

    def write(self, value: object) -> str:
        """`1024` where the unit is MB."""
        if isinstance(value, (int, Fraction)):
            value = Fraction(value) / parse_size("1", self.unit)
        return super().write(value)


class Choice(Kind):
    """One of several words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def read(self, raw: object) -> str:
        """The word in lower case."""
        return _word(raw, self.choices)

    def describe(self) -> str:
        """See `Kind`."""
        *first, last = self.choices
        return f"allowed is {', '.join(first)} or {last}"


class Text(Kind):
    """Any text."""

    def read(self, raw: object) -> str:
        """The text as it is."""
        if not isinstance(raw, str) or len(raw) > 4096 or "\0" in raw:
            raise ValueError(raw)
        return raw

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed is a text"


class ParameterName(Kind):
    """The name of a test's parameter; empty: none."""

    def read(self, raw: object) -> str:
        """The name."""
        if not isinstance(raw, str) or not re.fullmatch("[A-Za-z0-9_]{0,100}", raw.strip()):
            raise ValueError(raw)
        return raw.strip()

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed is the name of a parameter"


class MarkerName(Kind):
    """The name of a marker, which is a Python name."""

    def read(self, raw: object) -> str:
        """The name."""
        if not isinstance(raw, str) or not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,99}", raw.strip()):
            raise ValueError(raw)
        return raw.strip()

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed is the name of a marker"


class Presets(Kind):
    """One or several names of presets, between spaces, commas or lines."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def read(self, raw: object) -> tuple[str, ...]:
        """The names in their order."""
        words = _words(raw)
        if not set(words) <= set(self.choices):
            raise ValueError(raw)
        return words

    def describe(self) -> str:
        """See `Kind`."""
        return f"allowed is one or several of {', '.join(self.choices)}"

    def write(self, value: object) -> str:
        """`no-ollama, packed`."""
        return _joined(value)


class Devices(Kind):
    """Devices by index or UUID, or one of the words `auto` and `none`."""

    def read(self, raw: object) -> tuple[str, ...]:
        """The words; nobody has checked yet whether there is such a device."""
        words = _words(raw)
        if len(words) > 1 and {"auto", "none"} & set(words):
            raise ValueError(raw)
        return words

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed is auto, none, or indices and UUIDs of devices"

    def write(self, value: object) -> str:
        """`0, 1`."""
        return _joined(value)


class Names(Kind):
    """Texts between spaces, commas or lines; none at all is allowed."""

    def __init__(self, noun: str, most: int) -> None:
        self.noun, self.most = noun, most

    def read(self, raw: object) -> tuple[str, ...]:
        """The texts in their order."""
        parts = raw if isinstance(raw, (list, tuple)) else (raw,)
        if not all(isinstance(part, str) for part in parts):
            raise TypeError(raw)
        names = tuple(name for part in parts for name in re.split(r"[\s,]+", part) if name)
        if len(names) > self.most or not all(n.isprintable() and len(n) <= 256 for n in names):
            raise ValueError(raw)
        return names

    def describe(self) -> str:
        """See `Kind`."""
        return f"allowed is up to {self.most} {self.noun}"

    def write(self, value: object) -> str:
        """`qwen2.5:14b, llama3.2:1b`."""
        return _joined(value)


class HostLines(Kind):
    """Lines that name hosts; what they mean is read where they are used."""

    def read(self, raw: object) -> tuple[str, ...]:
        """The lines, comments and empty ones left out."""
        return parse_lines(raw)

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed are lines user@box:/srv/project, with options of ssh and python=PATH"

    def write(self, value: object) -> str:
        """The lines as they were written."""
        return ", ".join(str(line) for line in _tuple(value))


class Aliases(Kind):
    """Lines that say what markers of the suite mean."""

    def read(self, raw: object) -> tuple[Alias, ...]:
        """The lines, each marker once."""
        return parse_aliases(raw)

    def describe(self) -> str:
        """See `Kind`."""
        return (
            "allowed are lines MARKER = meaning or MARKER(n) = meaning; meanings: vram=SIZE, "
            "devices=NUMBER, exclusive, required, gpu, cpu, ollama, ollama=MODEL, context=TOKENS"
        )

    def write(self, value: object) -> str:
        """The lines as they were written."""
        return ", ".join(alias.line for alias in _tuple(value) if isinstance(alias, Alias))


class Rules(Kind):
    """Lines with the need of tests by their node ids."""

    def read(self, raw: object) -> tuple[VramRule, ...]:
        """The lines in their order; of several that match a test the first one decides."""
        return parse_rules(raw)

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed are lines PATTERN = SIZE, such as tests/test_llm.py = 8GB"

    def write(self, value: object) -> str:
        """`tests/test_llm.py = 8.0GB`."""
        rules = [rule for rule in _tuple(value) if isinstance(rule, VramRule)]
        return ", ".join(f"{r.pattern} = {format_gb(r.vram).replace(' ', '')}" for r in rules)


class ModelRules(Kind):
    """Lines with the model that tests use, by their node ids."""

    def read(self, raw: object) -> tuple[ModelRule, ...]:
        """The lines in their order; of several that match a test the first one decides."""
        return parse_model_rules(raw)

    def describe(self) -> str:
        """See `Kind`."""
        return "allowed are lines PATTERN = MODEL, such as tests/rag/* = qwen2.5:14b"

    def write(self, value: object) -> str:
        """`tests/rag/* = qwen2.5:14b`."""
        rules = [rule for rule in _tuple(value) if isinstance(rule, ModelRule)]
        return ", ".join(f"{rule.pattern} = {rule.model}" for rule in rules)


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


def _word(raw: object, choices: Iterable[str]) -> str:
    if not isinstance(raw, str):
        raise TypeError(raw)
    word = raw.strip().lower()
    if word not in choices:
        raise ValueError(raw)
    return word


def _words(raw: object) -> tuple[str, ...]:
    parts = raw if isinstance(raw, (list, tuple)) else (raw,)
    words = tuple(word for part in parts for word in re.split(r"[\s,]+", _as_text(part)) if word)
    if not words or len(words) > 64 or max(map(len, words)) > 128:
        raise ValueError(raw)
    return words


def _as_text(part: object) -> str:
    """A text, or an index of a device, which TOML and JSON have as a number."""
    if isinstance(part, str):
        return part
    if isinstance(part, (int, Decimal)) and re.fullmatch("[0-9]{1,9}", str(part)):
        return str(part)
    raise TypeError(part)


def _tuple(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _joined(value: object) -> str:
    return ", ".join(str(part) for part in _tuple(value))
