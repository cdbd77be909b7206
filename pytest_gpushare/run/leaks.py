"""What tests leave behind, by the counters of the frameworks in one process.

What a later test gives back of it is taken off again: VRAM that was returned is no leak. The
fixtures of wider scopes are not in these figures; whoever measures leaves them out.
"""

from __future__ import annotations

from pytest_gpushare.units import MB

LEAST = 100 * MB
"""Bytes. Handles of cuBLAS and cuDNN keep up to some 64 MB from their first use on, and no
test is to blame for them; the smallest models are larger."""

LEAST_BY_NVML = 256 * MB
"""The same where only NVML tells: a CUDA context grows by so much as libraries are loaded."""

_ALIKE = 0.05
"""What comes back is taken for what a test left if it is as large, within this part of it."""


class Growths:
    """What the tests of one process left, less what came back."""

    def __init__(self) -> None:
        self._left: list[tuple[str, int]] = []
        self._small = 0
        self.told = False
        """Whether the counters said anything."""

    def ran(self, nodeid: str, left: int) -> None:
        """A test ended; bytes that it left behind, negative where it gave something back."""
        self.told = True
        if left > LEAST:
            self._left.append((nodeid, left))
        elif left > 0:
            self._small += left
        elif left < 0:
            self._returned(-left)

    def leaks(self) -> list[tuple[str, int]]:
        """(node id, bytes) of the tests that left more than `LEAST`, oldest first."""
        return [(nodeid, left) for nodeid, left in self._left if left > LEAST]

    def _returned(self, size: int) -> None:
        """Of what one test left, else of small things, else of the newest."""
        for at in reversed(range(len(self._left))):
            if abs(self._left[at][1] - size) <= _ALIKE * size:
                del self._left[at]
                return
        taken = min(size, self._small)
        self._small -= taken
        size -= taken
        while size > 0 and self._left:
            nodeid, left = self._left.pop()
            if left > size:
                self._left.append((nodeid, left - size))
            size -= left
