"""Idle costs nothing: what the installed plugin adds to a run that does not ask for it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from .pairs import HEAD, compare
from .scene import LIMIT, PYTEST, scene

ROOT = Path(__file__).resolve().parents[2]

_IMPORT = """
import time, pytest
start = time.perf_counter()
import pytest_gpushare.plugin
print((time.perf_counter() - start) * 1000)
"""


def main() -> None:
    """Print the import's cost, what was imported, and the ratio of wall times."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    with scene() as here:
        imports = [
            float(
                subprocess.check_output(
                    [sys.executable, "-c", _IMPORT],
                    env=here.environment,
                    text=True,
                    timeout=LIMIT,
                )
            )
            for _ in range(20)
        ]
        print(f"import of the idle plugin, least of 20: {min(imports):.2f} ms")
        trace = subprocess.run(
            [sys.executable, "-X", "importtime", *PYTEST[1:]],
            cwd=here.path,
            env=here.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        ).stderr
        imported = {line.rpartition("|")[2].strip() for line in trace.splitlines()}
        if "pytest_gpushare.config.options" not in imported:
            sys.exit("the plugin is not loaded here: install it")
        heavy = sorted({"pynvml", "httpx"} & imported)
        print(f"imported by an idle run: {', '.join(heavy) or 'neither pynvml nor httpx'}\n")
        print(HEAD)
        off = (*PYTEST, "-p", "no:pytest_gpushare.plugin")
        print(compare(PYTEST, off, here.path, here.environment, pairs).row("idle / not loaded"))
        print(compare(off, off, here.path, here.environment, pairs).row("not loaded / the same"))
        with tempfile.TemporaryDirectory() as directory:
            alone = environment(Path(directory, "alone"))
            installed = environment(Path(directory, "installed"), str(ROOT))
            run = PYTEST[1:]
            first, second = (installed, *run), (alone, *run)
            result = compare(first, second, here.path, here.environment, pairs)
            print(result.row("installed, not asked for / pytest and xdist alone"))
            result = compare((*first, "-p", "no:anyio"), second, here.path, here.environment, pairs)
            print(result.row("the same with `-p no:anyio` / pytest and xdist alone"))


def environment(path: Path, *more: str) -> str:
    """The interpreter of a new virtual environment with pytest, xdist and so much more."""
    subprocess.run([sys.executable, "-m", "venv", path], check=True, timeout=120)
    python = str(path / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    same = [f"{name}=={version(name)}" for name in ("pytest", "pytest-xdist")]
    command = [python, "-m", "pip", "install", "--quiet", *same, *more]
    subprocess.run(command, check=True, timeout=300)
    return python


if __name__ == "__main__":
    main()
