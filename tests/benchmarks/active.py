"""Active and healthy: `--gpu-share` against `-n K` with the same K, and Ollama in a black hole."""

from __future__ import annotations

import argparse
import socket

from .pairs import HEAD, compare
from .scene import PYTEST, scene


def main() -> None:
    """Print the ratios of wall times."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    asking, stock = (*PYTEST, "--gpu-share"), (*PYTEST, "-n", "2")
    print(HEAD)
    with scene() as here:
        healthy = compare(asking, stock, here.path, here.environment, pairs)
        print(healthy.row("--gpu-share / -n 2, Ollama answers"))
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


if __name__ == "__main__":
    main()
