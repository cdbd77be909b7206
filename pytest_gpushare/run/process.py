"""This process: placed where it runs the tests itself, and put back as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping


def set_variables(wanted: Mapping[str, str]) -> Callable[[], None]:
    """Set environment variables of this process; the result undoes that."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    return lambda: _restore(before)


def cuda_is_up(own_process_has_context: bool) -> bool:
    """Whether CUDA was initialised in this process, so that its visibility is settled.

    Asks no framework to load: what is not imported has not initialised anything.
    """
    torch = sys.modules.get("torch")
    cuda = getattr(torch, "cuda", None)
    is_initialized = getattr(cuda, "is_initialized", None)
    return own_process_has_context or bool(is_initialized and is_initialized())


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
