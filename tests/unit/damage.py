"""Documents of which one value each is replaced, or left out, for tests of those who read them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

_IN_PLACE = (None, True, 1, -1, 0.5, "text", [], {}, [1], [[]], {"a": 1})
ODD = (float("nan"), 2**70, "x\x1b[31m", "y" * 10_000)
"""What no schema refuses by its type."""


class Damaged(NamedTuple):
    """A damaged copy of a document, and where it is damaged."""

    document: Any
    place: tuple[Any, ...]


def damaged(document: Any, count: int, odd: tuple[Any, ...] = ()) -> Iterator[Damaged]:
    """So many copies of a JSON document: every third lacks a value, the others have another one.

    `odd`: more values to put in place.
    """
    chance = random.Random(20)
    places = list(_places(document))
    for turn in range(count):
        found = copy.deepcopy(document)
        place = chance.choice(places)
        *way, last = place
        at: Any = found
        for step in way:
            at = at[step]
        if isinstance(at, dict) and turn % 3 == 0:
            del at[last]
        else:
            at[last] = chance.choice((*_IN_PLACE, *odd))
        yield Damaged(found, place)


def _places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*way, key)
        if isinstance(part, (dict, list)):
            yield from _places(part, (*way, key))
