"""Run all checks on the GPU of this machine: `python tests/gpu/run.py`.

Prints a Markdown table of the card, the versions, and each check's result and figure.
Needs pytest, pytest-xdist and nvidia-ml-py; checks the frameworks that are installed. Exit
code 0: what could be checked is right; 1: a check failed; 2: nothing could be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.gpu.card import (  # noqa: E402 - its folder is on the path only now
    Card,
    NoCardError,
    environment,
    find_card,
    plugin_arguments,
    versions,
)

_WORDS = {"passed": "right", "failed": "WRONG", "skipped": "not checked"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print the tables, and return the exit code."""
    parser = argparse.ArgumentParser(description="Check pytest-gpushare on a real GPU.")
    parser.add_argument("--only", metavar="WORDS", help="run the checks that pytest's -k selects")
    parser.add_argument(
        "--real", type=int, default=10, metavar="PAIRS", help="pairs of timed runs; 0: none"
    )
    options = parser.parse_args(arguments)
    try:
        card = find_card()
    except NoCardError as error:
        print(f"nothing was checked: {error}")
        return 2
    print(_about(card), flush=True)
    code, results = _check(["-k", options.only] if options.only else [])
    print(_table(results), flush=True)
    timed = True
    if options.real:
        timed = _time(options.real)
    if code not in (0, 1) or not any(r["outcome"] != "skipped" for r in results):
        print("\nnothing was checked" if code in (0, 5) else f"\npytest ended with code {code}")
        return 2
    return 0 if code == 0 and timed else 1


def _about(card: Card) -> str:
    size, free = (f"{part / 1024**3:.2f} GB" for part in (card.total, card.free))
    lines = {
        "GPU": f"{card.name}, {size} ({free} free), {len(card.others)} more beside it",
        "driver": f"{card.driver}, for CUDA up to {card.cuda}",
        "system": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "Python": platform.python_version(),
        **versions(),
    }
    rows = [f"| {name} | {text} |" for name, text in lines.items()]
    return "\n".join(["| what | which |", "|---|---|", *rows, ""])


def _check(selection: list[str]) -> tuple[int, list[dict[str, Any]]]:
    """pytest's exit code, and a line for each check."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "results.jsonl")
        command = [sys.executable, "-m", "pytest", "tests/gpu", *plugin_arguments()]
        done = subprocess.run(
            [
                *command,
                "-p",
                "no:cacheprovider",
                "-o",
                "timeout=900",
                "--tb=short",
                "-q",
                *selection,
            ],
            cwd=ROOT,
            env=environment(GPUSHARE_GPU_RESULTS=str(path)),
            # The tables alone go to the standard output.
            stdout=sys.stderr,
            check=False,
            timeout=2 * 3600,
        )
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return done.returncode, [json.loads(line) for line in lines]


def _table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        case = result["name"].partition("[")[2].rstrip("]")
        more = "; ".join(filter(None, [*result["figures"], result["reason"]]))
        check = f"{result['check']} ({case})" if case else result["check"]
        rows.append(f"| {check} | {_WORDS[result['outcome']]} | {more.replace('|', '/')} |")
    return "\n".join(["| check | result | figure |", "|---|---|---|", *rows])


def _time(pairs: int) -> bool:
    """Print what asking costs; in a process of its own, as the commands it times may fail."""
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "timing.py"), "--pairs", str(pairs)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, encoding="utf-8", check=False, timeout=2 * 3600
    )
    print(f"\n{done.stdout}", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
