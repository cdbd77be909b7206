"""Lines of the header in cases that need another machine."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.report.header import header, ollama_lines
from pytest_gpushare.units import GB

from .scene import Scene
from .test_planning_sizing import DEFAULTS, device, plan

REMOTE = OllamaFacts(
    address="gpu-box:11434", asked=True, answered=True, reachable=True, version="0.33.0",
    on_this_host=False, found_by="OLLAMA_HOST",
)  # fmt: skip


def lines(ollama: OllamaFacts, **settings: Any) -> list[str]:
    given = DEFAULTS._replace(**settings)
    run: Any = SimpleNamespace(
        ollama=ollama,
        settings=given,
        plan=plan(device(22), ollama=ollama, **settings),
        gpus=SimpleNamespace(simulated=False),
    )
    return [line.text for line in ollama_lines(run, 0)]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (
            {},
            ", on another machine (VRAM is reserved here all the same, unless "
            "gpu_share_ollama_gpu = none)",
        ),
        (
            {"ollama_gpu": ("none",)},
            ", on another machine (no VRAM is reserved for it here)",
        ),
        (
            {"ollama_host": "auto", "ollama_gpu": ("none",)},
            ", found as OLLAMA_HOST, on another machine (no VRAM is reserved for it here)",
        ),
    ],
)
def test_on_another_machine(settings: dict[str, Any], where: str) -> None:
    """The line says what that means for the VRAM of this one."""
    assert lines(REMOTE, **settings) == [
        f"  Ollama 0.33.0 at gpu-box:11434{where}: no model in VRAM"
    ]


def test_nobody_found() -> None:
    """All places that were tried are named."""
    nobody = OllamaFacts(
        address="127.0.0.1:11434, host.docker.internal:11434", asked=True,
        problem="nothing listens there; cannot be reached: Name or service not known",
    )  # fmt: skip
    assert lines(nobody, ollama_host="auto") == [
        "  Ollama at 127.0.0.1:11434, host.docker.internal:11434: nothing listens there; cannot be "
        "reached: Name or service not known; its VRAM reservation stands"
    ]


@pytest.mark.parametrize(
    ("free", "verbosity", "settings", "is_there"),
    [
        (22, 0, {}, False),
        (22, 1, {}, True),
        # Others hold 9 GB, as much as a slot.
        (15, 0, {"ollama_vram_reservation": Fraction(4 * GB)}, True),
        (15, 1, {"ollama_vram_reservation": Fraction(4 * GB), "cpu_workers": 1}, False),
        # No worker, nothing to wait for.
        (10, 1, {}, False),
    ],
)
def test_vram_that_is_not_waited_for(
    free: float, verbosity: int, settings: dict[str, Any], is_there: bool
) -> None:
    """Said at -v, and where other processes may well matter; CPU workers bring admission."""
    run = Scene(free=free, **settings).active
    texts = [line.text for line in header(run, verbosity)]
    assert any("only tests with a need of their own wait for it" in t for t in texts) is is_there
