"""Deprecated path, kept for one release: import these types from `pytest_gpushare`."""

from __future__ import annotations

import warnings
from typing import Any

import pytest_gpushare


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in pytest_gpushare.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(
        f"{__name__}.{name} has moved: import it from pytest_gpushare",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(pytest_gpushare, name)
