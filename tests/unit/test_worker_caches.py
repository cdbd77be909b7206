"""What is given back between tests: frames of failures, and every framework's caches."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_gpushare.worker.counters import clear_frames, empty


class Big:
    """Something that a test holds."""


def fail(chain: bool) -> tuple[BaseException, list[weakref.ref[Big]]]:
    """A failure whose frames, and those of its cause, hold something."""
    seen = []

    def cause() -> None:
        inner = Big()
        seen.append(weakref.ref(inner))
        raise ValueError("cause")

    def outer() -> None:
        local = Big()
        seen.append(weakref.ref(local))
        try:
            cause()
        except ValueError as error:
            if chain:
                raise RuntimeError("outer") from error
            raise

    try:
        outer()
    except Exception as error:
        # As pytest does when it shows the variables: until 3.12 that leaves a snapshot.
        step = error.__traceback__
        while step is not None:
            assert step.tb_frame.f_locals is not None
            step = step.tb_next
        return error, seen
    raise AssertionError


@pytest.mark.parametrize("chain", [False, True])
def test_frames_let_go(chain: bool) -> None:
    error, seen = fail(chain)
    assert [ref() is not None for ref in seen] == [True, True]
    clear_frames(error)
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert error.__traceback__ is not None


def test_frames_that_still_run_are_left_alone() -> None:
    kept = Big()
    try:
        raise ValueError
    except ValueError as error:
        clear_frames(error)
    assert isinstance(kept, Big)
    clear_frames(None)


def test_what_python_keeps_for_a_debugger(monkeypatch: pytest.MonkeyPatch) -> None:
    error, seen = fail(chain=False)
    monkeypatch.setattr(sys, "last_value", error, raising=False)
    empty({})
    assert [ref() for ref in seen] == [None, None]


def test_every_cache_is_emptied_where_cuda_is_up() -> None:
    done: list[str] = []

    def pool(name: str) -> Any:
        return lambda: SimpleNamespace(free_all_blocks=lambda: done.append(name))

    def frameworks(up: bool) -> dict[str, Any]:
        return {
            "torch": SimpleNamespace(
                cuda=SimpleNamespace(
                    is_initialized=lambda: up, empty_cache=lambda: done.append("torch")
                )
            ),
            "cupy": SimpleNamespace(
                cuda=SimpleNamespace(driver=SimpleNamespace(ctxGetCurrent=lambda: int(up))),
                get_default_memory_pool=pool("cupy"),
                get_default_pinned_memory_pool=pool("pinned"),
            ),
            "jax": SimpleNamespace(clear_caches=lambda: done.append("jax")),
            "jax._src.xla_bridge": SimpleNamespace(backends_are_initialized=lambda: up),
        }

    empty(frameworks(up=False))
    assert done == []
    empty(frameworks(up=True))
    assert done == ["jax", "torch", "cupy", "pinned"]


def test_one_that_fails_does_not_stop_the_others() -> None:
    done = []
    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_initialized=lambda: True, empty_cache=lambda: done.append(1))
    )
    empty({"jax": object(), "jax._src.xla_bridge": object(), "torch": torch})
    assert done == [1]
