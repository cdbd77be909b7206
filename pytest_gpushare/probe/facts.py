"""Deprecated path, kept for one release: import these types from `pytest_gpushare`."""

from __future__ import annotations

from functools import partial

from pytest_gpushare import _moved

__getattr__ = partial(_moved, __name__)
