"""A virtual environment that a script makes for itself, and makes anew when that is needed.

For `tests/run.py` and `docs/examples/quickstart/run.py`: standard library only, any
Python from 3.10.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

OLDEST = (3, 10)

LIMIT = 1800.0
"""Seconds that an installation may take, over a slow line."""


def own_venv(directory: Path, requirements: Sequence[str], made_from: Sequence[Path]) -> Path:
    """Return the Python of a venv in *directory* that has the *requirements*.

    requirements: arguments for `pip install`.
    made_from: files; when one of them changes, the venv is made anew.
    """
    if sys.version_info < OLDEST:
        sys.exit(f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; this is {sys.version}")
    python = directory / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = directory / "made-from.txt"
    wanted = _digest(requirements, made_from)
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {directory} ...", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        venv.create(directory, with_pip=True, symlinks=os.name != "nt")
    except subprocess.CalledProcessError as error:
        # Debian and its kin ship Python without ensurepip.
        sys.exit(
            f"{error}\nno venv can be made: install the venv module (apt install python3-venv)"
        )
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    # Dependency groups came with pip 25.1.
    newer = ["--upgrade", "pip>=25.1"]
    groups = any(part.startswith("--group") for part in requirements)
    for arguments in (newer, requirements) if groups else (requirements,):
        done = subprocess.run([*pip, *arguments], stdin=subprocess.DEVNULL, timeout=LIMIT)
        if done.returncode:
            sys.exit(f"pip install {' '.join(arguments)} failed")
    stamp.write_text(wanted)
    return python


def _digest(requirements: Sequence[str], made_from: Sequence[Path]) -> str:
    digest = hashlib.sha256(repr((sys.version, sys.base_prefix, list(requirements))).encode())
    for path in made_from:
        digest.update(path.read_bytes())
    return digest.hexdigest()
