"""The report of a run: what is in it, and that it is whole or absent, whatever happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from simulator import Machine

from .conftest import Project

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "docs/reference/report-schema.json").read_text(encoding="utf-8")
)
GB = 1024**3

SUITE = """
    import time
    import gpusim
    import pytest

    @pytest.mark.parametrize("size", ["1GB", "2GB"])
    def test_model(size):
        with gpusim.alloc(size):
            time.sleep(1.3)

    def test_fails():
        assert False

    @pytest.mark.xfail
    def test_fails_as_it_should():
        assert False

    def test_skips():
        pytest.skip("not here")

    @pytest.fixture
    def broken():
        yield
        raise OSError

    def test_breaks_at_its_end(broken):
        pass
"""


def strict(schema: Any) -> Any:
    """The schema without room for names that it does not know."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if "properties" in schema else {}
    return {**closed, **{name: strict(part) for name, part in schema.items()}}


def read(path: Path) -> dict[str, Any]:
    """The document, which is valid, and has no name that the schema does not tell of."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for schema in (SCHEMA, strict(SCHEMA)):
        Draft202012Validator(schema).validate(document)
    return document


def test_document(project: Project, machine: Machine) -> None:
    """What the terminal says, and more, in numbers that agree with the machine's own."""
    project.write(test_project=SUITE)
    result = project.pytest(
        "--gpu-share", "--gpu-share-report=out/run.json", "--gpu-share-report=page.HTML"
    )
    assert result.code == 1, result.out
    told = read(project.path / "out" / "run.json")
    assert "<html" in (project.path / "page.HTML").read_text(encoding="utf-8")
    assert sorted(path.name for path in (project.path / "out").iterdir()) == ["run.json"]
    assert (told["run"]["exit_status"], told["run"]["finished"]) == (1, True)
    outcomes = {test["nodeid"].partition("::")[2]: test["outcome"] for test in told["tests"]}
    assert outcomes == {
        "test_model[1GB]": "passed",
        "test_model[2GB]": "passed",
        "test_fails": "failed",
        "test_fails_as_it_should": "xfailed",
        "test_skips": "skipped",
        "test_breaks_at_its_end": "error",
    }
    (device,) = told["devices"]
    (state,) = machine.snapshot()
    assert device["peak_used_bytes"] == state.peak_used
    samples = told["samples"]["devices"][device["uuid"]]
    assert max(samples["used_bytes"]) == state.peak_used
    assert device["peak_workers_bytes"] == max(
        sum(held or 0 for held in row)
        for row in zip(*samples["workers_bytes"].values(), strict=True)
    )
    peaks = {test["nodeid"]: test["peak_bytes"] for test in told["tests"]}
    assert peaks["test_project.py::test_model[2GB]"] == 2 * GB + 600 * 1024**2
    assert [w["id"] for w in told["workers"]] == ["gw0", "gw1"]
    assert all(w["started_s"] < w["ended_s"] and w["pid"] for w in told["workers"])
    assert told["summary"] == [line for line in told["summary"] if line in result.out]
    assert told["plan"]["settings"]["ollama_vram_reservation_mb"] == {
        "value": "12288",
        "origin": "default",
    }
    assert told["leaks"] == told["hints"] == told["problems"] == []
