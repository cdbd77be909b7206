"""One report of several: every test once a shard, peaks never added up, and texts escaped."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from browser import documents

from pytest_gpushare.cli.main import main
from pytest_gpushare.report import merge
from pytest_gpushare.report.html import page
from pytest_gpushare.report.html.comparison import compare
from pytest_gpushare.report.merge import exit_status, merged, names_of
from pytest_gpushare.report.reading import ReportFileError, read_report
from pytest_gpushare.units import GB

from .damage import ODD, damaged


def whole(make: Any, started: str = "2026-01-01T10:00:00.000+00:00") -> dict[str, Any]:
    document = make()
    document["run"] = {**document["run"], "started": started}
    return dict(json.loads(json.dumps(document)))


def thinned(part: Any) -> Any:
    """Every twentieth value of each list."""
    if isinstance(part, dict):
        return {key: thinned(value) for key, value in part.items()}
    return part[::20] if isinstance(part, list) else part


def test_every_test_of_every_shard_is_there_once() -> None:
    one, two = whole(documents.small), whole(documents.eventful)
    result = merged([one, two], ["a", "b"])
    found = [(test["shard"], test["nodeid"], test["worker"]) for test in result["tests"]]
    wanted = [
        (name, test["nodeid"], f"{name}/{test['worker']}")
        for name, document in (("a", one), ("b", two))
        for test in document["tests"]
    ]
    assert found == wanted
    assert len({worker["id"] for worker in result["workers"]}) == len(one["workers"]) + len(
        two["workers"]
    )


def test_peaks_of_a_device_are_the_highest_and_never_the_sum() -> None:
    one = whole(documents.small)
    two = copy.deepcopy(one)
    two["devices"][0]["peak_used_bytes"] = one["devices"][0]["peak_used_bytes"] - 1
    two["devices"][0]["peak_workers_bytes"] = None
    one["devices"][0].update(peak_used_exact=True, peak_tests_exact=True)
    two["devices"][0].update(peak_used_exact=False, peak_tests_exact=None)
    (device,) = merged([one, two], ["a", "b"])["devices"]
    assert device["peak_used_bytes"] == one["devices"][0]["peak_used_bytes"]
    assert device["peak_workers_bytes"] == one["devices"][0]["peak_workers_bytes"]
    # One lower bound makes the highest of all a lower bound.
    assert (device["peak_used_exact"], device["peak_tests_exact"]) == (False, True)


def test_times_are_those_of_one_clock() -> None:
    """The second shard started a minute later: its tests and samples come a minute later."""
    one = whole(documents.small)
    two = whole(documents.small, "2026-01-01T12:01:00.000+02:00")
    result = merged([one, two], ["a", "b"])
    first, second = (
        [test["start_s"] for test in result["tests"] if test["shard"] == shard] for shard in "ab"
    )
    assert [round(late - early, 3) for early, late in zip(first, second, strict=True)] == [
        60.0
    ] * len(first)
    assert result["run"]["duration_s"] == pytest.approx(two["run"]["duration_s"] + 60)
    (columns,) = result["samples"]["devices"].values()
    assert columns["at_s"] == sorted(columns["at_s"])
    assert len(columns["at_s"]) == 2 * len(next(iter(one["samples"]["devices"].values()))["at_s"])
    assert {len(column) for column in columns["workers_bytes"].values()} == {len(columns["at_s"])}


def test_samples_of_uneven_length_are_as_long_as_the_shortest() -> None:
    one = whole(documents.small)
    (columns,) = one["samples"]["devices"].values()
    columns["used_bytes"] = columns["used_bytes"][:7]
    (found,) = merged([one], ["a"])["samples"]["devices"].values()
    assert {len(found[name]) for name in ("at_s", "used_bytes", "others_bytes")} == {7}


def test_other_servers_than_ollama(tmp_path: Path) -> None:
    """What they held stays theirs, in the shards that had them; one server is there once."""
    one = whole(documents.small)
    bare = copy.deepcopy(one)
    server = {
        "name": "ToyServe", "address": "127.0.0.1:9000", "version": "1.2", "answered": True,
        "on_this_host": True, "problem": "", "vram_bytes": 3 * GB,
    }  # fmt: skip
    one["servers"] = [server]
    (columns,) = one["samples"]["devices"].values()
    count = len(columns["at_s"])
    columns["servers_bytes"] = {"ToyServe": [4 * GB] * count}
    two = copy.deepcopy(one)
    silent = {"version": None, "answered": False, "problem": "no answer", "vram_bytes": None}
    two["servers"] = [{**server, **silent}]
    result = merged([one, bare, two], ["a", "b", "c"])
    assert result["servers"] == [{**server, "problem": "c: no answer"}]
    (samples,) = result["samples"]["devices"].values()
    held = samples["servers_bytes"]["ToyServe"]
    assert len(held) == len(samples["at_s"]) == 3 * count
    assert (held.count(4 * GB), held.count(None)) == (2 * count, count)
    path = tmp_path / "whole.json"
    path.write_text(json.dumps(result))
    assert read_report(path)["servers"] == result["servers"]
    assert "servers" not in merged([bare], ["a"])


def test_more_tests_than_a_report_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "MOST_TESTS", 30)
    result = merged([whole(documents.small), whole(documents.small)], ["a", "b"])
    assert len(result["tests"]) == 30
    assert result["problems"] == ["18 more tests ran than a report can hold"]


def test_leases_and_a_start_that_nobody_knows() -> None:
    """Without its start a shard begins with the first one."""
    one, two = whole(documents.small), whole(documents.small, "2026-01-01T10:00:02.000+00:00")
    lease = {"device": "GPU-0", "session": "pid 7", "start_s": 1.0, "end_s": 2.5, "bytes": 1}
    two["samples"]["leases"] = [lease]
    odd = whole(documents.small, "yesterday")
    result = merged([one, two, odd], ["a", "b", "c"])
    assert result["samples"]["leases"] == [{**lease, "start_s": 3.0, "end_s": 4.5}]
    assert [shard["started_s"] for shard in result["shards"]] == [0.0, 2.0, 0.0]
    assert merged([odd], ["c"])["run"]["started"] == "yesterday"


def test_a_report_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "a.json", tmp_path / "all.json"
    path.write_text(json.dumps(whole(documents.small)))
    out.mkdir()
    assert main(["merge", str(path), "-o", str(out)]) == 4
    assert capsys.readouterr().err == f"ERROR: no report in {out}: all.json is a directory\n"


@pytest.mark.parametrize(
    ("codes", "code"), [([0, 0], 0), ([0, 5], 0), ([5, 5], 5), ([0, 1, 2], 1), ([3, 1], 3)]
)
def test_exit_status(codes: list[int], code: int) -> None:
    assert exit_status(codes) == code


def test_names_of_shards_differ() -> None:
    assert names_of([Path("a/x.json"), Path("b/y.json")]) == ["x", "y"]
    assert names_of([Path("a/x.json"), Path("b/x.json")]) == ["a/x", "b/x"]
    assert names_of([Path("a/x.json"), Path("a/x.json")]) == ["a/x", "a/x#2"]
    assert names_of([Path("\x1b[31m.json")]) == ["?[31m"]


def test_command_merges_hostile_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page of foreign reports has none of their markup; the JSON is a valid report again."""
    for number in (1, 2):
        (tmp_path / f"<b>{number}.json").write_text(json.dumps(whole(documents.hostile)))
    paths = [str(path) for path in sorted(tmp_path.glob("*.json"))]
    html, out = tmp_path / "all.html", tmp_path / "all.json"
    assert main(["merge", *paths, "-o", str(html), "-o", str(out)]) == 0
    assert "2 reports with 12 tests merged into all.html, all.json" in capsys.readouterr().out
    text = html.read_text(encoding="utf-8")
    for markup in ("<img", "<svg onload", "<i>card", "<b>1", "<u>x", "<!--]", "alert(1)</script"):
        assert markup not in text
    assert len(read_report(out)["tests"]) == 12


@pytest.mark.parametrize("make", [documents.eventful, documents.hostile])
def test_damaged_reports_are_refused_or_merged(tmp_path: Path, make: Any) -> None:
    """What is read as a report makes a report and a page; all else is refused in one line."""
    good, path, refused = whole(documents.small), tmp_path / "a.json", 0
    document = whole(make)
    document["tests"], document["events"] = document["tests"][:3], document["events"][:3]
    # Few samples: the damage is to be elsewhere as well.
    document["samples"] = thinned(document["samples"])
    for changed, _ in damaged(document, 300, ODD):
        path.write_text(json.dumps(changed))
        try:
            found = read_report(path)
        except ReportFileError:
            refused += 1
            continue
        assert all(compare(*pair) for pair in ((found, good), (good, found)))
        result = merged([found, good], ["a", "b"])
        path.write_text(json.dumps(result, allow_nan=False))
        read_report(path)
        assert "<img" not in page(result)
    assert 100 < refused < 290


def test_a_report_of_another_schema_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({**whole(documents.small), "schema": 2}))
    assert main(["merge", str(path), "-o", str(tmp_path / "all.json")]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "schema" in error


def test_a_merged_report_can_be_merged_again(tmp_path: Path) -> None:
    once = merged([whole(documents.small), whole(documents.eventful)], ["a", "b"])
    (tmp_path / "one.json").write_text(json.dumps(once))
    document = read_report(tmp_path / "one.json")
    again = merged([document, whole(documents.cpu_only)], ["one", "c"])
    assert len(again["tests"]) == len(once["tests"]) + 24
    assert page(again)


def test_command_names_a_file_that_is_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.json"
    path.write_text("{}")
    assert main(["merge", str(path), "-o", str(tmp_path / "all.json")]) == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "all.json").exists()
