"""Pending tests in the order in which they are to start, found by what fits."""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = 1 << 62
"""A need that fits nowhere: what is not pending."""


class Order:
    """Ranks 0, 1, 2 ... with a need each, or nothing; the first that fits is found in log n steps.

    A tree of minima: 100,000 tests with as many different needs are searched 64 workers long.
    """

    def __init__(self, needs: Sequence[int]) -> None:
        """The needs by rank, in bytes; `NOTHING` for what is not pending."""
        self._leaves = 1 << max(0, len(needs) - 1).bit_length()
        tree = [NOTHING] * (2 * self._leaves)
        tree[self._leaves : self._leaves + len(needs)] = needs
        width = self._leaves
        while width > 1:
            below = tree[width : 2 * width]
            width //= 2
            tree[width : 2 * width] = map(min, below[::2], below[1::2])
        self._tree = tree
        self._front = self._leaves
        """No leaf before this one is pending."""

    @property
    def smallest(self) -> int:
        """The smallest pending need, in bytes; `NOTHING` where none is pending."""
        return self._tree[1]

    @property
    def front(self) -> int:
        """The first pending rank; -1 where none is pending."""
        tree, leaf = self._tree, self._front
        if tree[1] == NOTHING:
            return -1
        # Those that were taken are passed once in all, and not again for each test.
        while tree[leaf] == NOTHING:
            leaf += 1
        self._front = leaf
        return leaf - self._leaves

    def take(self, rank: int) -> None:
        """Make this rank pending no more."""
        tree = self._tree
        node = self._leaves + rank
        tree[node] = NOTHING
        while node > 1:
            # The smaller one of a node and its sibling is above them.
            least, other = tree[node], tree[node ^ 1]
            node >>= 1
            if other < least:
                least = other
            if tree[node] == least:
                break
            tree[node] = least

    def first(self, most: int, start: int = 0) -> int:
        """The first rank from `start` on whose need is at most `most`; -1 where there is none."""
        tree, leaves = self._tree, self._leaves
        if most < 0 or tree[1] > most or start >= leaves:
            return -1
        # Up from the first that is pending: what fits is mostly near it, the root is far away.
        node = max(leaves + start, self._front)
        while tree[node] > most:
            # To the subtree on the right of this one.
            while node & 1:
                node >>= 1
            if not node:
                return -1
            node += 1
        while node < leaves:
            node *= 2
            if tree[node] > most:
                node += 1
        return node - leaves
