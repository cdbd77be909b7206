"""What a worker tells of the tests that it collected, small enough to be sent in one message.

Neighbours in a suite have the same markers and fixtures, so values are sent as runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from pytest_gpushare.plan.declared import Declared

T = TypeVar("T", bound=Hashable)

_MOST_TESTS = 10_000_000
"""Beyond that a message is not believed."""


class Told(NamedTuple):
    """One worker's tests, in its order."""

    pid: int
    declared: Sequence[Declared]
    groups: Sequence[str]
    """The class, module or package whose fixtures a test uses; empty where it uses none."""
    skips: Sequence[bool]
    """Whether a `skip` or `skipif` marker skips the test in this worker."""


def written(told: Told) -> dict[str, Any]:
    """The message, in the builtin types that execnet carries."""
    return {
        "pid": told.pid,
        "declared": squeezed(tuple(declared) for declared in told.declared),
        "groups": squeezed(told.groups),
        "skips": squeezed(told.skips),
    }


def read(message: Mapping[str, Any]) -> Told:
    """What the message says. Raises `ValueError`, `TypeError` or `KeyError` for nonsense."""
    values, runs = message["declared"]
    return Told(
        int(message["pid"]),
        spread([Declared(*value) for value in values], runs),
        spread(*message["groups"]),
        spread(*message["skips"]),
    )


def squeezed(values: Iterable[T]) -> tuple[list[T], list[int]]:
    """The different values, and runs of them: number of the value, length, and so on."""
    numbers: dict[T, int] = {}
    runs: list[int] = []
    before = -1
    for value in values:
        number = numbers.setdefault(value, len(numbers))
        if number == before:
            runs[-1] += 1
        else:
            runs += (number, 1)
        before = number
    return list(numbers), runs


def spread(values: Sequence[T], runs: Sequence[int]) -> list[T]:
    """The values one by one, from what `squeezed` made of them."""
    if sum(runs[1::2]) > _MOST_TESTS:
        raise ValueError("too many tests")
    result: list[T] = []
    for number, length in zip(runs[::2], runs[1::2], strict=True):
        result += [values[number]] * length
    return result
