"""Active and healthy: `--gpu-share` against `-n K` with the same K, and Ollama in a black hole."""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys

from .pairs import HEAD, compare
from .scene import PYTEST, Scene, scene

# As in a run's controller: pytest, xdist and the plugins beside it are there already. httpx 0.28
# imports httpcore with its first transport only.
_IMPORT = """
import time

class Measure:
    def pytest_collection(self):
        start = time.perf_counter()
        import httpx, httpcore
        print("took", time.perf_counter() - start)
        return True

import pytest, sys
pytest.main([*sys.argv[1:], "-s"], plugins=[Measure()])
"""


def main() -> None:
    """Print the ratios of wall times."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    asking, stock = (*PYTEST, "--gpu-share"), (*PYTEST, "-n", "2")
    with scene() as here:
        imports = [import_of_httpx(here)]
        print(HEAD)
        healthy = compare(asking, stock, here.path, here.environment, pairs)
        print(healthy.row("--gpu-share / -n 2, Ollama answers"))
        imports += [import_of_httpx(here) for _ in range(20)]
        # A socket that accepts and never answers; its queue is long enough for the whole run.
        with socket.create_server(("127.0.0.1", 0), backlog=512) as hole:
            environment = {**here.environment, "OLLAMA_HOST": "{}:{}".format(*hole.getsockname())}
            silent = compare(asking, stock, here.path, environment, max(2, pairs // 4))
            print(silent.row("--gpu-share / -n 2, Ollama silent"))
            here.machine.inject("nvmlInitWithFlags", delay=0.4)
            both = compare(asking, stock, here.path, environment, max(2, pairs // 4))
            print(both.row("the same, and NVML takes 0.4 s to open"))
    added = (silent.first - silent.second) - (healthy.first - healthy.second)
    print(f"\na silent Ollama adds {added:.2f} s to a healthy start; its limit is 0.5 s")
    httpx = statistics.median(imports[1:])
    part = httpx / healthy.second
    print(
        f"importing httpx takes {httpx * 1000:.0f} ms, the median of {len(imports) - 1}, which is "
        f"{part:.3f} of `-n 2`; the goal for the first ratio is 1.10 and that: {1.10 + part:.3f}; "
        f"it is {healthy.ratio:.3f}"
    )


def import_of_httpx(here: Scene) -> float:
    """Seconds that importing httpx takes in a process that has begun a run of pytest."""
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT, *PYTEST[3:]],
        cwd=here.path,
        env=here.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    took = [line for line in done.stdout.splitlines() if line.startswith("took ")]
    if not took:
        sys.exit(f"httpx was not imported:\n{done.stdout}{done.stderr}")
    return float(took[0].split()[1])


if __name__ == "__main__":
    main()
