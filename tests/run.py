"""Run the whole test suite: `python3 tests/run.py [arguments of pytest]`.

Makes a virtual environment in `.venv-tests` at the first run. Needs Python 3.10 or newer
and a C compiler, for the simulated NVML. Ends with pytest's exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 3 * 3600.0
"""Seconds for the whole suite, also with `--pdb`; each test has a limit of its own."""

sys.path.insert(0, str(ROOT / "docs" / "examples"))

from own_venv import own_venv  # noqa: E402 - its folder is on the path only now


def main(arguments: list[str]) -> int:
    """Run pytest with *arguments*, by default on more workers than there are CPUs."""
    pyproject = ROOT / "pyproject.toml"
    groups = [f"{pyproject}:{name}" for name in ("test", "browser")]
    requirements = ["--editable", str(ROOT), *(f"--group={group}" for group in groups)]
    python = own_venv(ROOT / ".venv-tests", requirements, [pyproject])
    collect_seldom(python.parents[1])
    command = [str(python), "-m", "pytest", *distribution(), *arguments]
    # Many processes import the same modules: their bytecode is kept.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT).returncode
    except subprocess.TimeoutExpired:
        print(f"the tests were ended after {LIMIT:g} seconds", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 2


def collect_seldom(environment: Path) -> None:
    """Let Python collect garbage hardly ever, and not when it ends: a quarter of a short run.

    Only here: the environments of tox collect as Python does by itself.
    """
    text = "import atexit, gc; atexit.register(gc.freeze); gc.set_threshold(200_000, 20, 50)\n"
    for packages in environment.glob("lib/python*/site-packages"):
        (packages / "collect_seldom.pth").write_text(text)


def distribution() -> list[str]:
    """The options of pytest-xdist: three workers a CPU, since tests wait half of the time."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["-n", str(3 * cpus), "--dist", "loadgroup"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
