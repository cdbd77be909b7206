"""Run the whole test suite: `python3 tests/run.py [arguments of pytest]`.

Makes a virtual environment in `.venv-tests` at the first run. Needs Python 3.10 or newer
and a C compiler, for the simulated NVML. Ends with pytest's exit code.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "examples"))

from own_venv import own_venv  # noqa: E402 - its folder is on the path only now


def main(arguments: list[str]) -> int:
    """Run pytest with *arguments*, by default on as many workers as there are CPUs."""
    pyproject = ROOT / "pyproject.toml"
    groups = [f"{pyproject}:{name}" for name in ("test", "browser")]
    requirements = ["--editable", str(ROOT), *(f"--group={group}" for group in groups)]
    python = own_venv(ROOT / ".venv-tests", requirements, [pyproject])
    command = [str(python), "-m", "pytest", "-n", "auto", *arguments]
    try:
        return subprocess.run(command, cwd=ROOT).returncode
    except KeyboardInterrupt:
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
