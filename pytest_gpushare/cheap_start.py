"""What makes an active start cheap: imports past pytest's rewriting, and a spared collector."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


class PastRewriting:
    """A finder for the modules of this package alone, before pytest's.

    pytest rewrites the assertions in all modules of a plugin, as if they were tests. Looking for
    the rewritten ones takes about as long again as importing, and where site-packages cannot be
    written to, each run rewrites them anew. No assertion here would tell a user anything.
    """

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As Python itself would find it; None for what is not ours."""
        if name.startswith("pytest_gpushare."):
            return PathFinder.find_spec(name, path, target)
        return None


def import_cheaply(config: pytest.Config) -> None:
    """Import our modules past the rewriting until the end of the run."""
    # One of its own for each run: an inner run in the same process must not end the outer one's.
    finder = PastRewriting()
    sys.meta_path.insert(0, finder)
    config.add_cleanup(lambda: _remove(finder))


def spare_collector(config: pytest.Config) -> None:
    """Keep all that is alive now out of collections until the end of the run.

    For a process that runs no tests. What a start loads lives that long, and pytest's collection
    at the end takes longer the more is loaded. What is in no cycle is freed as ever.
    """
    gc.freeze()
    # After pytest's own clean-up, which was added later.
    config.add_cleanup(gc.unfreeze)


def spare_collector_more() -> None:
    """The same for what came to life since."""
    gc.freeze()


def _remove(finder: PastRewriting) -> None:
    # Whoever runs pytest within pytest may have put the old list back already.
    with contextlib.suppress(ValueError):
        sys.meta_path.remove(finder)
