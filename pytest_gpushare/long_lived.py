"""What a run loads at its start lives until its end: the cyclic collector need not look at it.

pytest collects everything at the end of a run, which takes longer the more is loaded, and an
import may set off a collection of what was loaded before it. For processes that run no tests.
"""

from __future__ import annotations

import gc
from collections.abc import Callable


def spare_collector() -> Callable[[], None]:
    """Keep all that is alive now out of collections, until the result is called.

    What is in no cycle is freed as ever.
    """
    gc.freeze()
    return gc.unfreeze


def spare_collector_more() -> None:
    """The same for what came to life since."""
    gc.freeze()
