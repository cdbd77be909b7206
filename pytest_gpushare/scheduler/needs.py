"""What a test needs: VRAM, by its markers, rules, what was learned, or its slot; and a model of
Ollama's, by its markers, parameters and rules.

`@pytest.mark.ollama` is in use elsewhere, too: what it says beyond a model and a context is left
alone and reported once, and a bare marker is a test whose model is unknown.
"""

from __future__ import annotations

import ast
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from pytest_gpushare.config.settings import (
    FLAGS,
    MOST_DEVICES,
    READERS,
    Alias,
    Settings,
    filled,
    parse_context,
    parse_model,
    parse_vram,
)
from pytest_gpushare.wire import spread, squeezed

T = TypeVar("T")

MARKER = "ollama"
"""The marker of tests that use a model."""


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
    # `fnmatch`: patterns of many stars would backtrack forever.
    for number, part in enumerate(rest[:-1]):
        text += f"(?=(?P<star{number}>.*?{part}))(?P=star{number})"
    text += "".join(f".*{part}" for part in rest[-1:])
    return re.compile(rf"(?s:{text})(?:\Z|(?=/|::|\[))")


def _fixed(part: str) -> str:
    return ".".join(re.escape(piece) for piece in part.split("?"))


class Declared(NamedTuple):
    """What a test's markers say; builtin values, so that a worker can send it."""

    route: str = ""
    """`gpu`, `cpu`, or empty where no marker says."""
    vram: int | None = None
    devices: int | None = None
    exclusive: bool = False
    required: bool = False
    refusal: str = ""
    """Why the test fails without being run: a marker that cannot be understood."""
    llm: tuple[str, int, str] | None = None
    """The model of Ollama's that it uses, as `ModelUse`; None where no marker says so."""

    def asks(self) -> bool:
        """Whether the markers ask for more than to be run on a GPU worker."""
        several = self.devices is not None and self.devices > 1
        return self.vram is not None or several or self.exclusive or bool(self.refusal)


def means_cpu(aliases: Iterable[Alias]) -> bool:
    """Whether a marker of the suite names the CPU tests, so that all others are GPU tests."""
    return any(name == "cpu" for alias in aliases for name, _ in alias.meanings)


def excludes_gpu_tests(expression: str, settings: Settings) -> bool:
    """Whether an expression of `-m` selects no test with a marker of GPU tests.

    What cannot be understood here may select some.
    """
    if means_cpu(settings.markers) or settings.vram:
        # There tests are GPU tests by other rules than their markers.
        return False
    names = {settings.marker, *(alias.marker for alias in settings.markers)}
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return all(_selects(tree, name) is False for name in names)


def _selects(node: ast.expr, marker: str) -> bool | None:
    """Whether an expression selects tests with this marker; None where others decide."""
    if isinstance(node, ast.Name):
        return True if node.id == marker else None
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _selects(node.operand, marker)
        return None if inner is None else not inner
    if isinstance(node, ast.BoolOp):
        found = [_selects(value, marker) for value in node.values]
        decisive = isinstance(node.op, ast.Or)
        if decisive in found:
            return decisive
        return None if None in found else not decisive
    return None


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

    def asks(self) -> bool:
        """Whether it asks for more than a slot of one device."""
        return self.source != "slot" or self.devices > 1 or self.exclusive


class Mark(NamedTuple):
    """A marker of a test, the closest to it first in a list of them."""

    name: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


class Wanted(NamedTuple):
    """Markers, rules and what was learned, weighed: what the dispatcher knows of a test."""

    marked: bool
    need: Need | None


class MarkerError(ValueError):
    """A marker that cannot be understood; the text says what is allowed."""


def declared(marks: Iterable[Mark], marker: str, aliases: Sequence[Alias]) -> Declared:
    """What the markers of one test say together.

    `marks` come closest first, as `Item.iter_markers` gives them. Each thing is taken from
    the closest mark that has it, but the plugin's own marker goes before aliases.
    """
    by_name = {alias.marker: alias for alias in aliases}
    own: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    routes: list[str] = []
    models: list[Mapping[str, Any]] = []
    try:
        for mark in marks:
            if mark.name == marker:
                own.append(_by_marker(mark, marker))
                routes.append("gpu")
            elif mark.name in by_name:
                found = dict(_by_alias(mark, by_name[mark.name]))
                uses = {key: found.pop(key) for key in _OF_MODELS if key in found}
                models += [uses] if uses else []
                if found or not uses:
                    routes.append("cpu" if found.pop("cpu", False) else "gpu")
                    others.append(found)
            elif mark.name == MARKER:
                models.append(_by_ollama_marker(mark))
    except MarkerError as error:
        return Declared(route="gpu", refusal=str(error))
    llm = _use_of(models).sent if models else None
    route = routes[0] if routes else ""
    if route == "cpu":
        return Declared(route="cpu", llm=llm)
    merged = dict(ChainMap(*own, *others))
    merged.pop("gpu", None)
    return Declared(route=route, llm=llm, **merged)


def wanted(
    nodeid: str,
    said: Declared,
    rules: Patterns[int],
    *,
    learned: int | None = None,
    gpu_unless_marked: bool = False,
) -> Wanted:
    """Whether a test is a GPU test, and its need: marker > rule > learned > slot.

    `gpu_unless_marked`: a marker of the suite means `cpu`, so a test without it is a GPU test.
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


def _by_marker(mark: Mark, marker: str) -> dict[str, Any]:
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
        if name in FLAGS and not text:
            yield name, "" if name == MARKER else True
            continue
        if name == MARKER and text.startswith("{") and not (mark.args or mark.kwargs):
            # A marker that may name its model, and does not.
            yield name, ""
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


class ModelUse(NamedTuple):
    """What a test says of the model that it uses."""

    model: str = ""
    """As the user wrote it; empty: unknown."""
    context: int = 0
    """Tokens of context; 0: those that the server itself gives."""
    odd: str = ""
    """What the marker says that means nothing here; empty where it says no more."""

    @property
    def sent(self) -> tuple[str, int, str]:
        """As a worker sends it: a plain tuple."""
        return self.model, self.context, self.odd


_OF_MODELS = ("ollama", "context")
"""The meanings of a marker that say something of a model."""


def _use_of(said: Sequence[Mapping[str, Any]]) -> ModelUse:
    """What markers say together, the closest to the test first."""
    merged = ChainMap(*map(dict, said))
    return ModelUse(merged.get("ollama", ""), merged.get("context", 0), merged.get("odd", ""))


def uses_models(alias: Alias) -> bool:
    """Whether a marker of the suite means that a test uses a model."""
    return any(name in _OF_MODELS for name, _ in alias.meanings)


def _by_ollama_marker(mark: Mark) -> dict[str, Any]:
    """What `@pytest.mark.ollama(...)` says; a single text is the model."""
    args, kwargs = mark.args, mark.kwargs
    found: dict[str, Any] = {}
    odd: list[str] = []
    if len(args) == 1 and "model" not in kwargs:
        kwargs = {"model": args[0], **kwargs}
    elif args:
        odd.append("arguments by position")
    for name, value in kwargs.items():
        try:
            if name == "model" and isinstance(value, str):
                found["ollama"] = parse_model(value)
            elif name == "context" and type(value) is int:
                found["context"] = parse_context(str(value))
            else:
                odd.append(str(name))
        except ValueError:
            odd.append(name)
    if odd:
        found["odd"] = ", ".join(odd)[:200]
    return found


def with_parameter(use: tuple[str, int, str] | None, value: object) -> ModelUse | None:
    """The use, where a parameter names the model; a marker that names one goes before it."""
    found = None if use is None else ModelUse(*use)
    if not isinstance(value, str) or (found is not None and found.model):
        return found
    try:
        return (found or ModelUse())._replace(model=parse_model(value))
    except ValueError:
        return found


def use_by_rules(
    nodeid: str, use: tuple[str, int, str] | None, rules: Patterns[str], only_model: str
) -> ModelUse | None:
    """The model that a test uses: by marker or parameter, by rule, or the only one of the run.

    `only_model` is empty where the run relies on none, or on several. None: it uses no model.
    """
    found = None if use is None else ModelUse(*use)
    if found is not None and found.model:
        return found
    by_rule = rules.find(nodeid)
    if by_rule is not None:
        return (found or ModelUse())._replace(model=by_rule)
    if found is not None and only_model:
        return found._replace(model=only_model)
    return found


def only_one(models: Sequence[str]) -> str:
    """The one model that the run relies on; empty where there are none or several."""
    return models[0] if len(models) == 1 else ""


IN_ORDER = "in order: "
"""How the key of a group begins of which a worker never runs an earlier test after a later one:
it shares parametrised fixtures, which would be set up once more."""


class CollectedTests(NamedTuple):
    """One worker's tests, in its order."""

    pid: int
    declared: Sequence[Declared]
    groups: Sequence[str]
    """The class, module or package whose fixtures a test uses; empty where it uses none."""
    skips: Sequence[bool]
    """Whether a `skip` or `skipif` marker skips the test in this worker."""


def written(tests: CollectedTests) -> dict[str, Any]:
    """The message, in the builtin types that execnet carries."""
    return {
        "pid": tests.pid,
        "declared": squeezed(tuple(declared) for declared in tests.declared),
        "groups": squeezed(tests.groups),
        "skips": squeezed(tests.skips),
    }


def read(message: Mapping[str, Any]) -> CollectedTests:
    """What the message says. Raises `ValueError`, `TypeError` or `KeyError` for nonsense."""
    values, runs = message["declared"]
    return CollectedTests(
        int(message["pid"]),
        spread([Declared(*value) for value in values], runs),
        spread(*message["groups"]),
        spread(*message["skips"]),
    )
