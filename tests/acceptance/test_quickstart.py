"""The quick start, run as its reader runs it, but in the Python that runs the tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "docs" / "examples" / "quickstart" / "run.py"


@pytest.mark.timeout(400)
def test_quickstart() -> None:
    """Before: tests fail and the model spills; after: all pass and it is wholly on the GPU."""
    done = subprocess.run(
        [sys.executable, str(RUN), "--here", "--simulate"],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = re.findall(r"^(\d GB a test, \S+(?: 3)?) +(.*?) +(\d+) %$", done.stdout, re.MULTILINE)
    before, one_too_many, after = rows
    assert before[0] == "8 GB a test, -n 3"
    assert re.fullmatch(r"\d failed, \d+ passed", before[1])
    assert int(before[2]) < 50
    assert one_too_many[:2] == ("4 GB a test, -n 3", "12 passed")
    assert 50 < int(one_too_many[2]) < 100
    assert after == ("4 GB a test, --gpu-share", "12 passed", "100")
    assert "gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB" in done.stdout
    assert done.stdout.endswith(
        "\nWith --gpu-share the tests passed, and Ollama kept its model on the GPU.\n"
    )
