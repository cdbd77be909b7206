"""From a checked value back to what a user would write."""

from __future__ import annotations

from fractions import Fraction

from pytest_gpushare.settings.lines import Alias, VramRule
from pytest_gpushare.settings.options import Option
from pytest_gpushare.units import format_gb, format_number, parse_size


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
