"""Two reports compared: what differs, and what is only noise."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from browser import documents

from pytest_gpushare.cli.main import main
from pytest_gpushare.cli.report_files import rows
from pytest_gpushare.cli.terminal import text_of
from pytest_gpushare.report.html.comparison import ComparedSubject, compare, document, page
from pytest_gpushare.units import GB


def lines(sections: list[ComparedSubject], width: int | None = None) -> list[str]:
    return [text_of(row) for row in rows(sections, width)]


def test_the_same_run() -> None:
    """Nothing but the totals."""
    run = documents.small()
    sections = compare(run, copy.deepcopy(run))
    assert [section.title for section in sections] == ["Run", "VRAM"]
    assert not any(row.change for section in sections for row in section.rows)


def changed() -> tuple[dict[str, Any], dict[str, Any]]:
    before = documents.small()
    after = copy.deepcopy(before)
    after["run"]["duration_s"] = 2 * before["run"]["duration_s"]
    after["devices"][0]["peak_used_bytes"] += GB
    after["devices"][0]["peak_used_exact"] = False
    test = after["tests"][0]
    test["outcome"] = "failed"
    test["end_s"] = test["start_s"] + 100
    test["peak_bytes"], test["peak_exact"] = 7 * GB, False
    before["tests"][0].update(peak_bytes=GB, peak_exact=True)
    after["tests"].append({**test, "nodeid": "test_new.py::test_new"})
    after["plan"]["settings"]["safety_buffer_mb"] = {"value": "2048", "origin": "pytest.ini"}
    return before, after


def test_what_differs() -> None:
    before, after = changed()
    found = {section.title: section.rows for section in compare(before, after)}
    name = before["tests"][0]["nodeid"]
    assert found["Outcomes"][0][:3] == (name, before["tests"][0]["outcome"], "failed")
    assert found["Outcomes"][0].state == "bad"
    assert found["Peaks of tests"][0] == (name, "1.0 GB", "at least 7.0 GB", "", "")
    assert found["Durations of tests"][0].after == "1 min 40 s"
    assert found["Tests of one run only"][0] == (
        "test_new.py::test_new",
        "did not run",
        "ran",
        "",
        "",
    )
    assert ("gpu_share_safety_buffer_mb", "2048") in [(r.name, r.after) for r in found["Settings"]]
    duration = next(row for row in found["Run"] if row.name == "duration")
    assert (duration.change, duration.state) == ("+100 %", "bad")
    peak = next(row for row in found["VRAM"] if row.name == "GPU 0 peak in use")
    assert peak.change == "+1.0 GB"
    assert [text.startswith("at least ") for text in (peak.before, peak.after)] == [False, True]


def test_a_model_that_spilled() -> None:
    before, after = changed()
    before["ollama"].update(models=[], verdict=["kept"], spilled_under_tests=False)
    model = {"name": "m", "size_bytes": 10 * GB, "size_vram_bytes": 4 * GB, "spilled": True}
    after["ollama"].update(models=[model], verdict=["put"], spilled_under_tests=True)
    found = {section.title: section.rows for section in compare(before, after)}["Ollama"]
    assert ("m", "not loaded", "4.0 GB of 10.0 GB on the GPU", "", "") in found
    assert next(row for row in found if row.name == "verdict").state == "bad"


def test_another_machine() -> None:
    """Its devices are compared in their order, and what nobody knows is no difference."""
    before, after = documents.small(), documents.small()
    after["devices"][0].update(uuid="GPU-other", name="RTX 4090", peak_tests_bytes=None)
    after["tests"][0]["start_s"] = None
    vram = next(section for section in compare(before, after) if section.title == "VRAM")
    assert vram.note == "the devices are not the same: they are compared by their order"
    found = {row.name: (row.before, row.after, row.change) for row in vram.rows}
    assert found["GPU 0 name"][1] == "RTX 4090"
    assert found["GPU 0 peak of tests"][1:] == ("unknown", "")


@pytest.mark.parametrize("colour", ["1", "0"])
def test_command(
    tmp_path: Path,
    colour: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In colour where it is asked for; a page that cannot be written is one line."""
    monkeypatch.setenv("PY_COLORS", colour)
    names = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for name, run in zip(names, changed(), strict=True):
        Path(name).write_text(json.dumps(run))
    assert main(["compare", *names]) == 0
    assert ("\x1b[1m" in capsys.readouterr().out) == (colour == "1")
    (tmp_path / "folder.html").mkdir()
    for page_name, words in (("a.txt", "a file that ends in .html"), ("folder.html", "be written")):
        assert main(["compare", *names, "-o", str(tmp_path / page_name)]) == 4
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("make", [documents.hostile, documents.empty, documents.eventful])
def test_foreign_documents(make: Any) -> None:
    """Whatever stands in the reports, the output is printable and the page well formed."""
    before, after = documents.small(), make()
    for sections in (compare(before, after), compare(after, before)):
        assert all(line.isprintable() for line in lines(sections))
        text = page(["a.json", "<b>.json"], sections)
        assert "<script" not in text
        assert "<b>.json" not in text
        assert document(sections)["schema"] == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_in_a_terminal(width: int) -> None:
    """No line is longer than the terminal, unless one word is."""
    for line in lines(compare(*changed()), width):
        assert len(line) <= width or len(line.split()) == 1


def test_a_file_has_one_line_for_each() -> None:
    sections = compare(*changed())
    titles = [section.title for section in sections]
    found = [line for line in lines(sections) if line and line not in titles]
    notes = sum(bool(section.note) for section in sections)
    assert len(found) == sum(len(section.rows) for section in sections) + notes
