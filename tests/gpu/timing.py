"""What asking costs on this machine: `pytest --gpu-share` against `pytest -n K`, in pairs."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.pairs import HEAD, LIMIT, compare
from tests.gpu.card import environment, plugin_arguments

TRIVIAL = "import pytest\n@pytest.mark.parametrize('i', range(10))\ndef test_nothing(i): pass\n"


def rows(pairs: int) -> list[str]:
    """A Markdown table: both commands start the same number of workers, on the same GPU."""
    stock = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin_arguments()]
    asking = [*stock, "--gpu-share", "--gpu-share-preset=no-ollama", "--maxprocesses=4"]
    # The usual preset asks an Ollama, whether there is one or not.
    usual = [*stock, "--gpu-share", "--maxprocesses=4"]
    table = HEAD.splitlines()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        (path / "test_project.py").write_text(TRIVIAL)
        (path / "pytest.ini").write_text("[pytest]\n")
        around = environment()
        for name, command in (("no-ollama", asking), ("conservative", usual)):
            workers, kind = _workers(command, path, around)
            against = [*stock, "-n", str(workers)]
            ratio = compare(command, against, path, around, pairs)
            table.append(ratio.row(f"--gpu-share, preset {name}: {kind} / -n {workers}"))
    return table


def _workers(command: list[str], path: Path, around: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=path, env=around, capture_output=True, encoding="utf-8", timeout=LIMIT
    )
    created = re.search(r"created: (\d+)/\d+ workers?", done.stdout)
    if created is None:
        sys.exit(f"no workers were started:\n{done.stdout}{done.stderr}")
    kind = re.search(r"gpu-share: (\d+ [GC]PU workers?)", done.stdout)
    return int(created[1]), kind[1] if kind else "unknown workers"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    print("\n".join(rows(parser.parse_args().pairs)))
