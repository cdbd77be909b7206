"""What a process can give back between two tests: garbage, dead frames, frameworks' caches.

A failed test's traceback keeps its frames, and these keep its tensors: 2.4 GB were seen pinned
until the next failure. Imports no framework and brings CUDA up in none.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pytest_gpushare.run.peaks import cuda_has_context

_MOST_ERRORS = 100
"""Of one failure; chains can be long, and are not worth more."""


def empty(modules: Mapping[str, Any] = sys.modules) -> None:
    """Collect garbage, clear the frames of the last failure, empty the frameworks' caches."""
    forget_last_failure()
    gc.collect()
    for name, give_back in _CACHES:
        if (module := modules.get(name)) is not None:
            try:
                give_back(module, modules)
            except Exception:
                # A framework in an odd state keeps what it has; the tests go on.
                continue


def clear_frames(error: BaseException | None) -> None:
    """Let go of what the local variables of a failure hold, its causes and members included.

    Its report must have been made: the values of variables are gone afterwards.
    """
    for each in errors_of(error):
        step = each.__traceback__
        while step is not None:
            frame, step = step.tb_frame, step.tb_next
            # A frame that still runs, or waits to go on, keeps what it has.
            with contextlib.suppress(RuntimeError):
                frame.clear()
                # Until Python 3.12 a snapshot of the variables, made when the failure was
                # shown, outlives them until it is asked for again.
                _ = frame.f_locals


def errors_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and the members of groups; each once."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < _MOST_ERRORS:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        waiting += (each.__context__, each.__cause__)
        members = getattr(each, "exceptions", ())
        if isinstance(members, tuple | list):
            waiting += (one for one in members if isinstance(one, BaseException))


def forget_last_failure() -> None:
    """Clear the frames of what pytest and Python keep for a debugger after the fact."""
    for name in ("last_exc", "last_value"):
        error = getattr(sys, name, None)
        if isinstance(error, BaseException):
            clear_frames(error)


def _torch(torch: Any, _modules: Mapping[str, Any]) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _cupy(cupy: Any, modules: Mapping[str, Any]) -> None:
    if cuda_has_context(cupy, modules):
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def _jax(jax: Any, modules: Mapping[str, Any]) -> None:
    bridge = modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        # Compiled functions hold their constants on the device.
        jax.clear_caches()


_CACHES: tuple[tuple[str, Callable[[Any, Mapping[str, Any]], None]], ...] = (
    ("jax", _jax),
    ("torch", _torch),
    ("cupy", _cupy),
)
