"""Idle costs nothing: what the installed plugin adds to a run that does not ask for it."""

from __future__ import annotations

import argparse
import subprocess
import sys

from .pairs import HEAD, compare
from .scene import PYTEST, scene

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
                    [sys.executable, "-c", _IMPORT], env=here.environment, text=True
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


if __name__ == "__main__":
    main()
