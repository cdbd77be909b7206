"""What a test needs of the GPU: from its markers, rules, what was learned, or its slot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pytest_gpushare.plan.declared import Declared as Declared
from pytest_gpushare.plan.patterns import Patterns
from pytest_gpushare.settings.lines import (
    FLAGS,
    MOST_DEVICES,
    READERS,
    Alias,
    VramRule,
    filled,
    parse_vram,
)


class Need(NamedTuple):
    """The VRAM that a worker's whole process holds while a test runs, its context included."""

    vram: int | None = None
    """Bytes on each of its devices; None: its worker's slot."""
    devices: int = 1
    exclusive: bool = False
    """No other GPU test runs on its devices meanwhile."""
    required: bool = False
    """Without a GPU it fails, whatever `without_gpu` says."""
    source: str = "slot"
    """`marker`, `rule`, `learned` or `slot`: where `vram` is from."""


class Mark(NamedTuple):
    """A marker of a test, the closest to it first in a list of them."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class Wanted(NamedTuple):
    """Markers, rules and what was learned, weighed: what the dispatcher is told of a test."""

    marked: bool
    need: Need | None


class MarkerError(ValueError):
    """A marker that cannot be understood; the text says what is allowed."""


def declared(marks: Iterable[Mark], marker: str, aliases: Sequence[Alias]) -> Declared:
    """What the markers of one test say together.

    `marks` come closest first, as `Item.iter_markers` gives them. Each thing is taken from
    the closest mark that tells it, but the plugin's own marker goes before aliases.
    """
    by_name = {alias.marker: alias for alias in aliases}
    own: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    routes: list[str] = []
    try:
        for mark in marks:
            if mark.name == marker:
                own.append(_own(mark, marker))
                routes.append("gpu")
            elif mark.name in by_name:
                found = dict(_by_alias(mark, by_name[mark.name]))
                routes.append("cpu" if found.pop("cpu", False) else "gpu")
                others.append(found)
    except MarkerError as error:
        return Declared(route="gpu", refusal=str(error))
    route = routes[0] if routes else ""
    if route == "cpu":
        return Declared(route="cpu")
    merged: dict[str, Any] = {}
    for found in (*own, *others):
        merged = {**found, **merged}
    merged.pop("gpu", None)
    return Declared(route=route, **merged)


def wanted(
    nodeid: str,
    said: Declared,
    rules: Patterns[int],
    *,
    learned: int | None = None,
    gpu_unless_marked: bool = False,
) -> Wanted:
    """Whether a test is a GPU test, and its need: marker > rule > learned > slot.

    `gpu_unless_marked`: a marker of the suite means `cpu`, so whoever lacks it is a GPU test.
    A test with a rule is one too. None for the need: nobody knows.
    """
    if said.route == "cpu":
        return Wanted(False, Need(0, source="marker"))
    by_rule = rules.find(nodeid)
    marked = said.route == "gpu" or by_rule is not None or gpu_unless_marked
    vram, source = next(
        (
            (size, source)
            for size, source in ((said.vram, "marker"), (by_rule, "rule"), (learned, "learned"))
            if size is not None
        ),
        (None, "slot"),
    )
    if not marked and vram is None:
        return Wanted(False, None)
    return Wanted(marked, Need(vram, said.devices or 1, said.exclusive, said.required, source))


def rules_of(rules: Sequence[VramRule]) -> Patterns[int]:
    """The ini rules, ready to be asked for many node ids."""
    return Patterns((rule.pattern, rule.vram) for rule in rules)


def _own(mark: Mark, marker: str) -> dict[str, Any]:
    shown = _shown(mark)
    allowed = f'allowed is {marker}(vram="6GB", devices=2, exclusive=True, required=True)'
    if mark.args:
        raise MarkerError(f"{shown}: takes keywords alone: {allowed}")
    result: dict[str, Any] = {}
    for name, value in mark.kwargs.items():
        if name == "vram":
            result[name] = _size(value, f"{shown}: {allowed}")
        elif name == "devices":
            if type(value) is not int or not 1 <= value <= MOST_DEVICES:
                raise MarkerError(f"{shown}: devices is a number from 1 to {MOST_DEVICES}")
            result[name] = value
        elif name in ("exclusive", "required"):
            if type(value) is not bool:
                raise MarkerError(f"{shown}: {name} is True or False")
            result[name] = value
        else:
            raise MarkerError(
                f"{shown}: unknown keyword {name}: {allowed}; where the marker means "
                "something else in this suite, name another with gpu_share_marker"
            )
    return result


def _size(value: object, problem: str) -> int:
    try:
        if not isinstance(value, str):
            raise ValueError(value)
        return parse_vram(value)
    except ValueError:
        raise MarkerError(f"{problem}; vram is a size with its unit, in quotes") from None


def _by_alias(mark: Mark, alias: Alias) -> Iterator[tuple[str, Any]]:
    for name, text in alias.meanings:
        if name in FLAGS:
            yield name, True
            continue
        values = _arguments(mark, alias) if "{" in text else {}
        try:
            yield name, READERS[name](filled(text, values))
        except ValueError as error:
            raise MarkerError(
                f"{_shown(mark)}: by gpu_share_markers, line {alias.line!r}: {name}: {error}"
            ) from None


def _arguments(mark: Mark, alias: Alias) -> Mapping[str, str]:
    given = {**dict(zip(alias.parameters, mark.args, strict=False)), **mark.kwargs}
    values = {}
    for name in alias.parameters:
        value = given.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise MarkerError(
                f"{_shown(mark)}: by gpu_share_markers, line {alias.line!r}: "
                f"{name} is a number or a text"
            )
        values[name] = str(value)[:100]
    return values


def _shown(mark: Mark) -> str:
    try:
        arguments = [repr(value) for value in mark.args]
        arguments += [f"{name}={value!r}" for name, value in mark.kwargs.items()]
    except Exception:
        # The repr of whatever stands in a marker is other people's code.
        arguments = ["..."]
    text = ", ".join(arguments)
    return f"@pytest.mark.{mark.name}({text if len(text) <= 60 else text[:57] + '...'})"
