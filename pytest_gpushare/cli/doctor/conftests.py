"""The conftest files of a project that set CUDA_VISIBLE_DEVICES."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from pytest_gpushare.probe.visibility import VARIABLE
from pytest_gpushare.run.overwritten import culprit

_MOST_SECONDS = 3.0
_MOST_FILES = 500
_SKIPPED = {"node_modules", "site-packages", "__pycache__", "build", "dist"}


def overwriting(root: Path) -> list[str]:
    """`tests/conftest.py:12` for each; a big tree is searched for three seconds at most."""
    found = []
    for number, path in enumerate(_conftests(root, time.monotonic() + _MOST_SECONDS)):
        if number == _MOST_FILES:
            break
        if where := culprit([VARIABLE], [str(path)]):
            found.append(where)
    return found


def _conftests(root: Path, until: float) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        if time.monotonic() > until:
            return
        # Sorted, so that the output is the same on every file system.
        folders[:] = sorted(
            name
            for name in folders
            if name not in _SKIPPED
            and not name.startswith(".")
            and not Path(folder, name, "pyvenv.cfg").exists()
        )
        if "conftest.py" in files:
            yield Path(folder, "conftest.py")
