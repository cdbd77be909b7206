"""Quick dataclasses are dataclasses: the same behaviour, side by side with the real ones."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest

from pytest_gpushare import quick


@dataclasses.dataclass(frozen=True)
class Real:
    """What Python makes of it."""

    a: int
    b: str = "b"
    c: list[int] = field(default_factory=list, compare=False)
    d: float = field(default=0.5, repr=False)

    @property
    def double(self) -> int:
        """Twice a."""
        return 2 * self.a


@quick.dataclass(frozen=True)
class Quick:
    """What we make of the same fields."""

    a: int
    b: str = "b"
    c: list[int] = field(default_factory=list, compare=False)
    d: float = field(default=0.5, repr=False)

    @property
    def double(self) -> int:
        """Twice a."""
        return 2 * self.a


BOTH = pytest.mark.parametrize("cls", [Real, Quick])


@BOTH
def test_values_and_defaults(cls: Any) -> None:
    """By position, by name, by default; each has a list of its own."""
    value = cls(1, d=2.0)
    assert (value.a, value.b, value.c, value.d, value.double) == (1, "b", [], 2.0, 2)
    assert value.c is not cls(1).c


@BOTH
def test_equality_and_hash(cls: Any) -> None:
    """By the fields that are compared, and only within the class."""
    assert cls(1, c=[1]) == cls(1, c=[2])
    assert hash(cls(1, c=[1])) == hash(cls(1))
    assert cls(1) != cls(2)
    assert cls(1) != (1, "b", [], 0.5)


def test_shown_alike() -> None:
    """Without the fields that are not to be shown."""
    assert repr(Quick(1)) == repr(Real(1)).replace("Real", "Quick")


@BOTH
def test_frozen(cls: Any) -> None:
    """Neither assigned to nor deleted."""
    value = cls(1)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'a'"):
        value.a = 2
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot delete field 'a'"):
        del value.a
    assert value.a == 1


@BOTH
@pytest.mark.parametrize(
    "make",
    [
        lambda cls: cls(),
        lambda cls: cls(1, a=1),
        lambda cls: cls(1, e=1),
        lambda cls: cls(1, "b", [], 0.5, 5),
    ],
    ids=["missing", "twice", "unknown", "too many"],
)
def test_wrong_calls(cls: Any, make: Callable[[Any], object]) -> None:
    """What does not fit is a `TypeError`."""
    with pytest.raises(TypeError):
        make(cls)


@BOTH
def test_tools_of_dataclasses(cls: Any) -> None:
    """`replace`, `fields`, `asdict`, `match`, copies and pickles work as with any other."""
    value = cls(1, "x", [3])
    assert dataclasses.replace(value, a=2) == cls(2, "x", [3])
    assert [f.name for f in dataclasses.fields(cls)] == ["a", "b", "c", "d"]
    assert dataclasses.asdict(value) == {"a": 1, "b": "x", "c": [3], "d": 0.5}
    assert copy.deepcopy(value) == value
    assert pickle.loads(pickle.dumps(value)).c == [3]
    match value:
        case Real(a, b) | Quick(a, b):
            assert (a, b) == (1, "x")
