"""The word `gpu-auto` in the grammar of xdist's `-n`. Imported in every run: keep it light."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

GPU_AUTO = "gpu-auto"


def accept_gpu_auto(parser: pytest.Parser) -> None:
    """Let `-n gpu-auto` parse; xdist's own type refuses it.

    Up to pytest 8.4 arguments are made lazily from `attrs()`; 9.0 copies them eagerly, so
    there the argparse action is what counts; from 9.1 `attrs()` is the action's own dict.
    """
    for option in parser.getgroup("xdist").options:
        if "--numprocesses" in option.names():
            accepting = _accepting(option.attrs().get("type", int))
            option.attrs()["type"] = accepting
            actions = getattr(getattr(parser, "optparser", None), "_option_string_actions", {})
            if "--numprocesses" in actions:
                actions["--numprocesses"].type = accepting


def _accepting(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    # argparse names the type in its message: "invalid parse_numprocesses value".
    def parse_numprocesses(text: str) -> Any:
        return text if text == GPU_AUTO else parse(text)

    return parse_numprocesses
