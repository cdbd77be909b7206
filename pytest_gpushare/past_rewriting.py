"""Imports of this package past pytest's assertion rewriting.

pytest rewrites the assertions in all modules of a plugin, as if they were tests. Looking for the
rewritten ones takes about as long again as importing, and where site-packages cannot be written
to, each run rewrites them anew. There are no assertions here that a user should see explained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class PastRewriting:
    """A finder that comes before pytest's, for this package alone."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As Python itself would find it; None for what is not ours."""
        if name.startswith("pytest_gpushare."):
            return PathFinder.find_spec(name, path, target)
        return None


def go_past_rewriting() -> Callable[[], None]:
    """Import our modules quickly from now on, until the result is called."""
    # One of its own for each run: an inner run in the same process must not end the outer one's.
    finder = PastRewriting()
    sys.meta_path.insert(0, finder)
    return lambda: sys.meta_path.remove(finder)
