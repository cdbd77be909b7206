"""Report files are foreign: each is checked, and what is wrong with one is a single line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from browser import documents
from jsonschema import Draft202012Validator

from pytest_gpushare.report import reading
from pytest_gpushare.report.html import page
from pytest_gpushare.report.html.comparison import compare
from pytest_gpushare.report.reading import ReportFileError, difference, read_report

from .damage import damaged

SCHEMA = json.loads(
    (Path(reading.__file__).with_name("report-schema.json")).read_text(encoding="utf-8")
)


def written(directory: Path, content: bytes | dict[str, Any]) -> Path:
    path = directory / "report.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def refused(path: Path) -> str:
    with pytest.raises(ReportFileError) as caught:
        read_report(path)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 500
    return text


@pytest.mark.parametrize(
    "make", [documents.small, documents.eventful, documents.empty, documents.hostile]
)
def test_reads_what_runs_write(tmp_path: Path, make: Any) -> None:
    document = json.loads(json.dumps(make()))
    assert read_report(written(tmp_path, document)) == document


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "broken JSON at line 1"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", "no report of pytest-gpushare"),
        (b"{}", "no report of pytest-gpushare"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"schema": ' + b"9" * 5000 + b"}", "no number"),
        (b'{"schema": NaN}', "no number"),
        (b'{"schema": 2}', "version 2 of the report's schema"),
        (b'{"schema": true}', "version True"),
        (b'{"schema": "\\u001b[31m"}', "version ?[31m"),
        (b'{"schema": 1}', "is missing"),
    ],
)
def test_names_what_is_wrong(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refused(written(tmp_path, content))


def test_refuses_what_is_no_regular_file_or_too_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe.json"
    os.mkfifo(pipe)
    assert "no regular file" in refused(pipe)
    assert "no regular file" in refused(tmp_path)
    assert "No such file" in refused(tmp_path / "missing\x1b[2J.json")
    monkeypatch.setattr(reading, "MOST_BYTES", 10)
    assert "at most" in refused(written(tmp_path, b" " * 11))


def test_agrees_with_a_full_validator_on_damaged_reports() -> None:
    """Each value of a report is replaced by values of other types: both find the same."""
    validator = Draft202012Validator(SCHEMA)
    document = json.loads(json.dumps(documents.eventful()))
    document["tests"], document["events"] = document["tests"][:3], document["events"][:3]
    document["samples"]["devices"] = {}
    refusals = 0
    for changed, place in damaged(document, 400):
        fits = validator.is_valid(changed)
        refusals += not fits
        assert bool(difference(changed, SCHEMA, "")) != fits, place
    assert refusals > 100


def test_figures_are_bounded() -> None:
    for huge in (2**63, -(2**70), 1e300, float("inf")):
        assert difference(huge, {"type": "number"}, "a")
    assert difference(float(2**40), {"type": "integer"}, "a") == "a is not integer"


ADDED = {
    "plan": ("in_process", "shortage"),
    "ollama": ("on_this_host",),
    "samples": ("leases",),
    "devices": ("peak_used_exact", "peak_tests_exact", "peak_unattributed_bytes"),
    "workers": ("need_bytes", "peak_exact"),
    "tests": ("peak_exact",),
}


def test_what_an_earlier_version_did_not_write_has_a_default(tmp_path: Path) -> None:
    """So whoever reads the document later finds every field that it has since."""
    document, older = documents.small(), documents.small()
    del older["shortages"]
    for part, names in ADDED.items():
        for held in older[part] if isinstance(older[part], list) else [older[part]]:
            for name in names:
                del held[name]
    found = read_report(written(tmp_path, older))
    assert found["shortages"] == found["samples"]["leases"] == []
    assert found["plan"] == document["plan"]
    for part in ("devices", "workers", "tests"):
        assert [set(each) for each in found[part]] == [set(each) for each in document[part]]
        assert {each[ADDED[part][0]] for each in found[part]} == {None}
    assert page(found)
    assert compare(found, document)


def test_a_model_whose_place_the_server_does_not_tell(tmp_path: Path) -> None:
    """Ollama before 0.1.38 does not: what a run writes of it can be read again."""
    document = documents.small()
    document["ollama"]["models"][0]["size_vram_bytes"] = None
    assert read_report(written(tmp_path, document))["ollama"] == document["ollama"]
    assert "<td>unknown</td>" in page(document)
