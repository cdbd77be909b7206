"""The HTML page as text: what it says, what it must never contain, and how large it is."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from browser import documents
from jsonschema import Draft202012Validator

import pytest_gpushare.report.html as package
from pytest_gpushare.report.html import page
from pytest_gpushare.report.html.data import (
    data,
    differences,
    drawn,
    settled,
    thinned,
    without_workers,
)
from pytest_gpushare.report.html.markup import clock, label, listed, percent, size, span
from pytest_gpushare.report.html.sections import answers, outcome

GB, MB = documents.GB, documents.MB
ASSETS = Path(package.__file__).parent / "assets"

EVERY = (
    documents.small,
    documents.eventful,
    documents.cpu_only,
    documents.empty,
    documents.second_server,
    documents.untold,
    documents.hostile,
    documents.simulated,
    documents.cut_off,
    documents.several_hosts,
)


def held(text: str) -> dict[str, Any]:
    """The data in the page, as its script reads it."""
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return dict(json.loads(found[0]))


def scripts(text: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", text, re.S)


SCHEMA = Path(__file__).parents[2] / "pytest_gpushare/report/report-schema.json"

# --- the page as a whole ---


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_documents_are_such_as_runs_write(make: Any) -> None:
    """What the page is tested with is valid."""
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(make())


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_is_one_whole_page(make: Any) -> None:
    """Every element is closed, nothing is fetched, and the same document gives the same page."""
    text = page(make())
    assert text == page(make())
    assert text.startswith('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">')
    assert text.endswith("</script></body></html>\n")
    assert len(scripts(text)) == 2
    without = re.sub(r"<(script|style)[ >].*?</\1>", "", text, flags=re.S)
    for name in ("section", "article", "div", "table", "tr", "td", "p", "ul", "li", "svg", "rect"):
        opened, closed = len(re.findall(f"<{name}[ >]", without)), without.count(f"</{name}>")
        assert opened == closed, name
    fetched = re.findall(r'(?:src|href|action|poster|srcset)="([^"]*)"', without)
    assert set(fetched) <= {"data:,", "#tests"}
    assert not re.findall(r"<[^>]+ (?:style|on\w+)=", without)
    text.encode("utf-8")


def test_policy_allows_its_own_scripts_and_nothing_else() -> None:
    text = page(documents.small())
    policy = html.unescape(re.findall(r'Content-Security-Policy" content="(.*?)">', text)[0])
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    style = re.findall(r"<style>(.*?)</style>", text, re.S)
    for rule, parts in (("script-src", scripts(text)), ("style-src", style)):
        hashes = [
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in parts
        ]
        assert rules[rule] == " ".join(hashes)


def test_names_are_escaped_everywhere() -> None:
    document = documents.hostile()
    text = page(document)
    for script in scripts(text):
        text = text.replace(script, "")
    assert not re.findall(r"<(?:script>alert|img|svg onload|i>card|b>note|u>)", text)
    assert text.count("</script>") == text.count("<script") == 3
    for sign in ("\u202e", "\u2028", "\udc80", "\x00"):
        assert sign not in text
    assert held(text)["tests"]["name"][0] == documents.HOSTILE.removeprefix("test_x.py")
    assert html.escape(documents.HOSTILE) in text


def test_hosts_have_a_section_of_their_own() -> None:
    document = documents.several_hosts()
    text = page(document)
    for script in scripts(text):
        text = text.replace(script, "")
    section = re.sub(r"<[^>]+>", " ", text.partition('id="hosts"')[2].partition("</section>")[0])
    words = " ".join(section.split())
    ran = Counter(test["host"] for test in document["tests"])
    assert f"this host 0 1 {ran[None]} 3.12.1 no GPU" in words
    assert f"&lt;b&gt;box 2 0 {ran['<b>box']} 3.11.2" in words
    assert f"rack 2 0 {ran['rack']} 3.11.2 lost: silent for &lt;i&gt;20 s" in words
    assert 'id="hosts"' not in page(documents.small())


def test_size_for_ten_thousand_tests() -> None:
    """Below 5 MB, with names of 200 characters still; a small run is a small page."""
    document = documents.large()
    assert len(page(document).encode()) < 2_500_000
    for number, test in enumerate(document["tests"]):
        test["nodeid"] = f"{test['nodeid']}{number:0{200 - len(test['nodeid'])}d}"
    assert len(document["tests"][0]["nodeid"]) == 200
    assert len(page(document).encode()) < 5_000_000
    assert len(page(documents.small()).encode()) < 150_000


def test_a_day_of_unthinned_samples_stays_small() -> None:
    """The page thins what the document has: 432,000 samples of one device."""
    document = documents.small()
    samples = next(iter(document["samples"]["devices"].values()))
    times = len(samples["at_s"])
    for name in ("used_bytes", "ollama_bytes", "others_bytes"):
        samples[name] = [samples[name][n % times] for n in range(432_000)]
    samples["workers_bytes"] = {
        worker: [values[n % times] for n in range(432_000)]
        for worker, values in samples["workers_bytes"].items()
    }
    samples["at_s"] = [n / 5 for n in range(432_000)]
    assert len(page(document).encode()) < 1_500_000


def test_text_is_legible_in_both_themes() -> None:
    """Contrast of 4.5 and more for text, of 3 for the colours of parts (WCAG AA)."""
    css = (ASSETS / "page.css").read_text(encoding="utf-8")
    for theme in re.findall(r":root[^{]*\{\s*color-scheme[^}]*\}", css):
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", theme))
        for name in ("text", "dim", "link", "good", "warning", "bad", "neutral"):
            assert contrast(colours[name], colours["panel"]) >= 4.5, name
        for name in ("budget", "ollama-line", "total"):
            for ground in ("panel", "kept"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


def contrast(one: str, other: str) -> float:
    low, high = sorted(luminance(colour) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(part * weight for part, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))


def test_licence_of_the_library_goes_with_it() -> None:
    licence = (ASSETS / "uPlot.LICENSE.txt").read_text(encoding="utf-8")
    assert "MIT License" in licence
    assert licence in page(documents.small())


# --- the verdict ---


def test_verdict_of_a_good_run() -> None:
    who, near, ollama, change = answers(documents.small())
    assert (who.state, who.answer) == ("good", "2 workers on 1 GPU")
    assert who.details == ["GPU 0 NVIDIA GeForce RTX 3090 Ti: gw0 and gw1, 4.5 GB each"]
    assert (near.state, near.answer) == ("good", "83 % full")
    assert near.details[0] == "19.97 GB of 24.0 GB at the peak"
    assert (ollama.state, ollama.answer) == ("good", "No")
    assert ollama.details == documents.small()["ollama"]["verdict"]
    assert (change.state, change.answer) == ("neutral", "1 suggestion")


def test_verdict_of_a_run_in_trouble() -> None:
    document = documents.eventful()
    _, near, ollama, change = answers(document)
    assert (near.state, near.answer) == ("bad", "1 test ran out of memory")
    assert "the fullest of 2 GPUs" in near.details[0]
    assert (ollama.state, ollama.answer) == ("bad", "Yes, while tests ran")
    assert change.state == "warning"
    assert change.details[-1] == "1 test left 0.6 GB behind: see the leaks below"


def test_what_would_have_kept_a_model_is_a_suggestion() -> None:
    document = documents.small()
    document["hints"] = []
    setting = "gpu_share_ollama_vram_reservation_mb = 13000 would have kept it on the GPU"
    document["ollama"]["verdict"] = [
        f"Ollama put 5.0 GB of m on the CPU; VRAM then: 1.1 GB free; short: {setting}; by the end"
    ]
    change = answers(document)[3]
    assert (change.answer, change.details) == ("1 suggestion", [setting])


def test_verdict_is_never_nothing_where_vram_lacked() -> None:
    document = {**documents.eventful(), "hints": [], "leaks": [], "problems": []}
    document["shortages"] = ["29 GPU tests failed on CPU workers, which see no GPU"]
    change = answers(document)[3]
    assert (change.state, change.answer) == ("warning", "No setting would have helped")
    assert change.details == document["shortages"]


def test_verdict_where_nobody_can_tell() -> None:
    _, near, ollama, change = answers(documents.untold())
    assert near.details[-1] == "what tests held of their budget of 9.0 GB is unknown"
    assert (ollama.state, ollama.answer) == ("neutral", "Unknown")
    assert (change.state, change.answer) == ("good", "Nothing")
    assert answers(documents.empty())[1].answer == "Not measured"
    assert answers(documents.cpu_only())[0].details == [
        "2 CPU workers",
        "NVML library not found: is the NVIDIA driver installed?",
    ]
    assert "As it was planned" in page(documents.simulated())
    assert answers(documents.simulated())[0].answer == "Nobody: simulated devices"


def test_peak_in_the_safety_buffer_is_a_warning() -> None:
    document = documents.small()
    document["devices"][0]["peak_used_bytes"] = int(23.5 * GB)
    near = answers(document)[1]
    assert near.state == "warning"
    assert near.details[1] == "0.5 GB into the safety buffer of 1.0 GB"


@pytest.mark.parametrize(("exact", "least"), [(True, ""), (False, "at least "), (None, "")])
def test_lower_bounds_of_a_device(exact: bool | None, least: str) -> None:
    """`None`: an earlier version did not say whether they are."""
    document = documents.small()
    document["devices"][0].update(
        peak_used_bytes=20 * GB,
        peak_used_exact=exact,
        peak_tests_bytes=7 * GB,
        peak_tests_exact=exact,
    )
    details = answers(document)[1].details
    assert details[0] == f"{least}20.0 GB of 24.0 GB at the peak"
    assert details[1].startswith(f"tests held {least}7.0 GB of their budget")
    assert f"{least}20.0 GB</b> of 24.0 GB used" in page(document)


def test_a_part_of_the_tests_peak_is_unattributed() -> None:
    document = documents.small()
    document["devices"][0].update(
        peak_tests_bytes=7 * GB, peak_tests_exact=False, peak_unattributed_bytes=4 * GB
    )
    detail = answers(document)[1].details[1]
    assert detail.startswith("tests held at least 7.0 GB (4.0 GB of it unattributed) of their")


def test_budget_overrun_is_a_warning() -> None:
    document = documents.small()
    document["devices"][0]["peak_tests_bytes"] = 10 * GB
    assert answers(document)[1].state == "warning"


@pytest.mark.parametrize(
    ("change", "state", "text"),
    [
        ({}, "good", "22 passed, 2 skipped"),
        ({"exit_status": 1}, "bad", "22 passed, 2 skipped"),
        (
            {"exit_status": 2, "finished": False},
            "bad",
            "22 passed, 2 skipped; the run did not finish",
        ),
    ],
)
def test_outcome(change: dict[str, Any], state: str, text: str) -> None:
    document = documents.small()
    document["run"].update(change)
    assert outcome(document) == (state, text)


def test_leak_of_which_only_suspects_are_known() -> None:
    document = documents.hostile()
    document["leaks"] = [{**document["leaks"][1], "suspects": ["a", "b"]}]
    assert "<bdi>one of a, b and 7 more</bdi>" in page(document)


# --- samples ---


def test_thinning_keeps_the_peak_and_the_ends() -> None:
    values: list[float | None] = [float(n % 7) for n in range(10_000)]
    values[7123], values[31] = 99.0, -5.0
    kept = thinned(values, 200)
    assert len(kept) <= 202
    assert {0, 9_999, 7123, 31} <= set(kept)
    assert kept == sorted(kept)
    assert thinned(values[:50], 200) == list(range(50))


def test_thinning_keeps_a_gap() -> None:
    values: list[float | None] = [1.0] * 1000 + [None] * 1000 + [1.0] * 1000
    assert any(values[index] is None for index in thinned(values, 100))


def test_differences_give_the_values_back() -> None:
    values = [5.4, 5.6, None, 5.5, -1.0]
    before, back = 0, []
    for step in differences(values):
        before += step or 0
        back.append(None if step is None else before)
    assert back == [5, 6, None, 6, -1]


def test_another_server_is_a_part_of_its_own() -> None:
    """It is not among what nobody accounts for, and its reservation is not Ollama's."""
    document = documents.second_server()
    (device,) = data(document)["devices"]
    kinds = [(part["kind"], part["name"]) for part in device["samples"]["parts"]]
    assert kinds[:3] == [("ollama", ""), ("others", ""), ("server", "ToyServe")]
    assert "rest" not in dict(kinds)
    assert device["kept"] == [
        {"name": "Ollama", "reservation": 12 * GB, "resident": int(10.8 * GB)},
        {"name": "ToyServe", "reservation": 3 * GB, "resident": 2 * GB},
    ]
    bar = package.meters(document)
    words = re.sub(r"<[^>]*>", " ", bar)
    assert re.search(r"kept for Ollama\s+12\.0 GB\s+of it resident\s+10\.8 GB", words), words
    assert re.search(r"kept for ToyServe\s+3\.0 GB\s+of it resident\s+2\.0 GB", words), words
    assert "Ollama 10.8 GB, ToyServe 2.0 GB of 24.0 GB" in bar


def test_another_server_before_and_after_the_workers() -> None:
    """What it held at the nearest reading is part of what accounts for all."""
    used: list[float | None] = [7 * GB, 8 * GB, 7 * GB]
    ollama: list[float | None] = [GB, GB, GB]
    others: list[float | None] = [None, 2 * GB, None]
    server: list[float | None] = [None, 4 * GB, None]
    worker: list[float | None] = [None, GB, None]
    assert without_workers(used, [ollama, others, server, worker], 24 * GB, 3) == [
        ollama, [2 * GB] * 3, [4 * GB] * 3, [None, GB, None],
    ]  # fmt: skip


def test_what_nobody_accounts_for_is_a_part() -> None:
    samples = {
        "at_s": [0.0, 4.0],
        "used_bytes": [8 * GB, 8 * GB],
        "ollama_bytes": [None, None],
        "others_bytes": [None, None],
        "workers_bytes": {"gw0": [None, 3 * GB]},
    }
    found = drawn(samples, 100, 24 * GB, [])
    assert found is not None
    assert [(part["kind"], part["held"]) for part in found["parts"]] == [
        ("rest", [8192, -3072]),
        ("worker", [None, 3072]),
    ]


def test_samples_take_the_reading_that_accounts_for_them() -> None:
    """Who holds what is read once a second: what came in between is known by the next reading."""
    times = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 9.0]
    used = [GB, GB, 2 * GB, 5 * GB, 5 * GB, 5 * GB, GB]
    first, second = [GB] * 5 + [GB, GB], [0.0] * 5 + [4.0 * GB, 0.0]
    assert settled(times, used, [first, second], 24 * GB) == [
        [GB] * 7,
        [0.0, 0.0, 0.0, 4.0 * GB, 4.0 * GB, 4.0 * GB, 0.0],
    ]
    unknown = [None, None, GB]
    assert settled([0.0, 8.0, 9.0], [GB, GB, GB], [unknown], 24 * GB) == [[None, GB, GB]]


def test_samples_beside_the_workers_lives_are_told_apart_where_the_sum_is_right() -> None:
    used = [2 * GB, 5 * GB, 6 * GB, 5 * GB, 3 * GB, 6 * GB, 4 * GB]
    ollama: list[float | None] = [0, None, 3 * GB, None, None, None, 2 * GB]
    others: list[float | None] = [None, None, 2 * GB, None, None, None, None]
    worker: list[float | None] = [None, None, GB, None, None, None, None]
    assert without_workers(used, [ollama, others, worker], 24 * GB) == [
        [0, 3 * GB, 3 * GB, 3 * GB, None, 3 * GB, 2 * GB],
        [2 * GB, 2 * GB, 2 * GB, 2 * GB, None, 2 * GB, 2 * GB],
        [None, None, GB, None, None, GB, None],
    ]


# --- data ---


def test_columns_of_equal_values_are_one() -> None:
    columns = data(documents.large())["tests"]
    assert columns["attempts"] != {"all": 1}
    assert columns["outcome"]["words"] == ["passed", "skipped", "failed"]
    assert data(documents.small())["tests"]["attempts"] == {"all": 1}


def test_figures_of_tests_are_exact() -> None:
    document = documents.small()
    columns = data(document)["tests"]
    assert columns["peak_bytes"] == [test["peak_bytes"] for test in document["tests"]]
    names = [columns["files"][file] for file in columns["file"]]
    assert [f"{file}{name}" for file, name in zip(names, columns["name"], strict=True)] == [
        test["nodeid"] for test in document["tests"]
    ]


def test_leases_of_other_sessions_stand_by_their_device() -> None:
    document = documents.small()
    uuid = document["devices"][0]["uuid"]
    lease = {"device": uuid, "session": "pid 7, ci", "start_s": 1.0, "end_s": 2.5, "bytes": GB}
    document["samples"]["leases"] = [
        lease,
        {**lease, "device": "GPU-other"},
    ]
    found = data(document)["devices"][0]["leases"]
    assert found == [{"start": 1.0, "end": 2.5, "bytes": GB, "session": "pid 7, ci"}]


# --- words ---


def test_words() -> None:
    assert [size(value) for value in (None, 0, 5 * MB, int(4.5 * GB))] == [
        "unknown",
        "0.0 GB",
        "5 MB",
        "4.5 GB",
    ]
    assert [span(value) for value in (0.004, 0.25, 12.34, 200, 7500)] == [
        "4 ms",
        "0.25 s",
        "12.3 s",
        "3 min 20 s",
        "2 h 05 min",
    ]
    assert [clock(value) for value in (3.21, 725, 12005.0)] == ["0:03.2", "12:05.0", "3:20:05"]
    assert percent(999, 1000) == "99 %"
    assert listed([]) == ""
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([str(n) for n in range(14)]) == "0, 1, 2, 3, 4 and 9 more"
    assert [label({"index": "0", "host": host}) for host in (None, "box")] == ["GPU 0", "box GPU 0"]
