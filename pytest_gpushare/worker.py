"""The worker's side: what an xdist worker does because the controller's plugin is active."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

PLACED = "gpushare_placed"
"""The key of workerinput that says so; unlike the environment, nested runs do not inherit it."""


def keep_log_file(config: pytest.Config) -> None:
    """Append to `log_file`, where pytest's default is to empty it.

    Every worker opens the controller's file anew: the VRAM analysis was gone from it before
    the first test. Must run before pytest's logging plugin opens the file.
    """
    if config.option.log_file_mode is None:
        config.option.log_file_mode = "a"
