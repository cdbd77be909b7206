"""Which tests use a model of Ollama's: what their markers, parameters and rules say.

`@pytest.mark.ollama` is in use elsewhere, too: what it says beyond a model and a context is left
alone and reported once, and a bare marker is a test whose model is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.config.settings import parse_context, parse_model

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Alias

MARKER = "ollama"
"""The marker of tests that use a model."""


class ModelUse(NamedTuple):
    """What a test says of the model that it uses; builtin values, so that a worker can send it."""

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


def uses_models(alias: Alias) -> bool:
    """Whether a marker of the suite means that a test uses a model."""
    return any(name in ("ollama", "context") for name, _ in alias.meanings)


def taken_out(meanings: dict[str, Any]) -> dict[str, Any]:
    """What a marker's meanings say of a model, taken out of them."""
    return {name: meanings.pop(name) for name in ("ollama", "context") if name in meanings}


def use_of(said: Sequence[Mapping[str, Any]]) -> ModelUse:
    """What markers say together, the closest to the test first."""
    merged: dict[str, Any] = {}
    for found in said:
        merged = {**found, **merged}
    return ModelUse(merged.get("ollama", ""), merged.get("context", 0), merged.get("odd", ""))


def own_marker(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What `@pytest.mark.ollama(...)` says; a single text is the model."""
    found: dict[str, Any] = {}
    odd: list[str] = []
    if len(args) == 1 and "model" not in kwargs:
        kwargs = {"model": args[0], **kwargs}
    elif args:
        odd.append("arguments by position")
    for name, value in kwargs.items():
        if name == "model" and isinstance(value, str):
            try:
                found["ollama"] = parse_model(value)
            except ValueError:
                odd.append(name)
        elif name == "context" and type(value) is int:
            try:
                found["context"] = parse_context(str(value))
            except ValueError:
                odd.append(name)
        else:
            odd.append(str(name))
    if odd:
        found["odd"] = ", ".join(odd)[:200]
    return found


def with_parameter(use: tuple[str, int, str] | None, value: object) -> ModelUse | None:
    """The use, where a parameter names the model; a marker that names one goes before it."""
    found = None if use is None else ModelUse(*use)
    if not isinstance(value, str) or (found is not None and found.model):
        return found
    try:
        model = parse_model(value)
    except ValueError:
        return found
    return (found or ModelUse())._replace(model=model)


def use_by_rules(
    nodeid: str,
    use: tuple[str, int, str] | None,
    rule: Callable[[str], str | None],
    only_model: str,
) -> ModelUse | None:
    """The model that a test uses: by marker or parameter, by rule, or the only one of the run.

    `rule` gives the model of a node id by the rules; `only_model` is empty where the run relies
    on none, or on several. None: it uses no model.
    """
    found = None if use is None else ModelUse(*use)
    if found is not None and found.model:
        return found
    by_rule = rule(nodeid)
    if by_rule is not None:
        return (found or ModelUse())._replace(model=by_rule)
    if found is not None and only_model:
        return found._replace(model=only_model)
    return found


def only_one(models: Sequence[str]) -> str:
    """The one model that the run relies on; empty where there are none or several."""
    return models[0] if len(models) == 1 else ""
