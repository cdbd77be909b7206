"""Each benchmark runs as a module, and `tox run -e bench` runs all of them."""

from __future__ import annotations

import configparser
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELPERS = {"__init__", "pairs", "scene"}
BY_HAND = {"public_suites", "xdist_suite"}
"""They run the tests of other projects, whose sources have to be unpacked first."""
NAMES = sorted({path.stem for path in (ROOT / "tests" / "benchmarks").glob("*.py")} - HELPERS)


def test_all_are_in_tox() -> None:
    """Neither is one forgotten, nor one run that is gone."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    commands = tox["testenv:bench"]["commands"].split("\n")
    assert sorted(filter(None, commands)) == [
        f"python -m tests.benchmarks.{name}" for name in NAMES if name not in BY_HAND
    ]


@pytest.mark.parametrize("name", NAMES)
def test_begins(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that it imports is there, and it shows its help."""
    if name == "report_page":
        pytest.importorskip("playwright", reason="playwright is not installed here")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    benchmark = importlib.import_module(f"tests.benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    assert ended.value.code == 0
    assert "usage:" in capsys.readouterr().out
