"""Where a model goes when it is loaded: Ollama's and llama.cpp's rules, as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 1024 << 20
"""Bytes that llama.cpp wants to stay free on each device: LLAMA_ARG_FIT_TARGET."""

SHARE = (4, 5)
"""Of the free VRAM, what a model may take on a device of several, or beside other models."""


@dataclass(frozen=True)
class Room:
    """A device as Ollama sees it at load: free bytes, after the runner's own context."""

    uuid: str
    free: int

    def capacity(self, margin: int, *, shared: bool) -> int:
        """Bytes that a model may take here."""
        most = self.free - margin
        if shared:
            most = min(most, self.free * SHARE[0] // SHARE[1])
        return max(0, most)


@dataclass(frozen=True)
class Placement:
    """Bytes on each device; what is missing to the need is on the CPU."""

    shares: tuple[tuple[str, int], ...]

    @property
    def vram(self) -> int:
        """Bytes on all devices together."""
        return sum(nbytes for _, nbytes in self.shares)


def place_beside(need: int, rooms: Sequence[Room], margin: int = MARGIN) -> Placement | None:
    """Place a model beside others that are loaded; None if one of them must leave first."""
    return _on_one(need, rooms, margin, shared=True) or _spread(need, rooms, margin, shared=True)


def place_alone(need: int, layers: int, rooms: Sequence[Room], margin: int = MARGIN) -> Placement:
    """Place a model where nothing else is loaded: wholly if it fits, else in part."""
    whole = _on_one(need, rooms, margin, shared=len(rooms) > 1)
    whole = whole or _spread(need, rooms, margin, shared=False)
    return whole or _partly(need, layers, rooms, margin)


def forced(need: int, layers: int, rooms: Sequence[Room], num_gpu: int) -> Placement:
    """Place as many layers as the option `num_gpu` says on the freest device.

    Nobody asks whether they fit: if not, loading fails.
    """
    freest = max(rooms, key=lambda room: room.free)
    share = need if num_gpu >= layers else need * num_gpu // (layers + 1)
    return _placement([freest], [share])


def _on_one(need: int, rooms: Sequence[Room], margin: int, *, shared: bool) -> Placement | None:
    """On the freest device, if it fits there."""
    if not rooms:
        return None
    freest = max(rooms, key=lambda room: room.free)
    if need > freest.capacity(margin, shared=shared):
        return None
    return Placement(((freest.uuid, need),))


def _spread(need: int, rooms: Sequence[Room], margin: int, *, shared: bool) -> Placement | None:
    """Over all devices, in proportion to what they can take."""
    capacities = [room.capacity(margin, shared=shared) for room in rooms]
    if need > sum(capacities) or len(rooms) < 2:
        return None
    shares = [need * capacity // sum(capacities) for capacity in capacities]
    for i, capacity in enumerate(capacities):  # what rounding down left over
        shares[i] += min(capacity - shares[i], need - sum(shares))
    return _placement(rooms, shares)


def _partly(need: int, layers: int, rooms: Sequence[Room], margin: int) -> Placement:
    """As many whole layers as fit; the output layer counts as one and comes last."""
    each = -(-need // (layers + 1))
    left = layers
    shares = []
    for room in rooms:
        count = min(left, room.capacity(margin, shared=False) // each)
        left -= count
        shares.append(count * each)
    return _placement(rooms, shares)


def _placement(rooms: Sequence[Room], shares: Sequence[int]) -> Placement:
    taken = zip(rooms, shares, strict=True)
    return Placement(tuple((room.uuid, nbytes) for room, nbytes in taken if nbytes))
