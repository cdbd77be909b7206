"""What xdist was told, and the word `gpu-auto`. Imported in every run: keep it light."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


GPU_AUTO = "gpu-auto"

_NOT_A_RUN = (
    "collectonly",
    "help",
    "version",
    "markers",
    "showfixtures",
    "show_fixtures_per_test",
    "cacheshow",
)


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


def runs_tests(options: Any) -> bool:
    """Whether this is a run at all: `--collect-only`, `--help` and their kind probe nothing."""
    return not any(getattr(options, name, None) for name in _NOT_A_RUN)


def has_xdist(options: Any) -> bool:
    """Whether xdist is there, under whatever name it was loaded."""
    return hasattr(options, "numprocesses")


def is_in_process(options: Any) -> bool:
    """Whether the process itself runs the tests: `-n 0`, `--pdb`, or no xdist."""
    number = getattr(options, "numprocesses", 0)
    return bool(getattr(options, "usepdb", False)) or (isinstance(number, int) and number <= 0)


def announce_workers(options: Any) -> None:
    """Say in the early options that there will be workers, though nobody gave a number.

    pytest-cov looks there, before the number is known, and must start as in any run with `-n`.
    """
    if options.numprocesses is None and not options.tx:
        options.numprocesses = GPU_AUTO
