"""The page as a reader has it: it says what the document says, and it can be worked with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pytest_gpushare.report.html as package
from pytest_gpushare.report.html.markup import clock, size, span

from . import documents
from .conftest import TOGETHER, Opened

pytestmark = TOGETHER

Open = Callable[..., Opened]
ASSETS = Path(package.__file__).parent / "assets"

EVERY = (
    "small",
    "eventful",
    "cpu_only",
    "empty",
    "untold",
    "hostile",
    "simulated",
    "cut_off",
    "several_hosts",
    "second_server",
)


def ordered(document: dict[str, Any], figure: str, *, down: bool) -> list[str]:
    """Node ids as the table sorts them: equal ones in the document's order, unknown ones last."""
    known = [test for test in document["tests"] if test[figure] is not None]
    unknown = [test for test in document["tests"] if test[figure] is None]
    known.sort(key=lambda test: -test[figure] if down else test[figure])
    return [test["nodeid"] for test in [*known, *unknown]]


@pytest.mark.parametrize("name", EVERY)
def test_opens(name: str, opened: Open) -> None:
    """No error, no request, nothing wider than the screen, whatever is unknown or hostile."""
    document = getattr(documents, name)()
    here = opened(document)
    assert len(here.texts("#verdict article")) == 4
    charts = len(document["samples"]["devices"]) + bool(document["tests"])
    assert here.tab.locator("#charts canvas").count() == charts
    words = here.text("body").lower()
    assert not [word for word in ("undefined", "nan", "none ", "null") if word in words]
    for width in (1280, 390):
        here.tab.set_viewport_size({"width": width, "height": 800})
        assert here.tab.evaluate("document.documentElement.scrollWidth") <= width


def test_figures_are_the_documents(opened: Open) -> None:
    """Three tests and two peaks, read from the page, to the byte and as written."""
    document = documents.eventful()
    here = opened(document)
    peaks = here.tab.locator("#devices .figure b")
    for number, device in enumerate(document["devices"]):
        assert peaks.nth(number).get_attribute("data-bytes") == str(device["peak_used_bytes"])
        assert peaks.nth(number).inner_text() == size(device["peak_used_bytes"])
    assert len(document["devices"]) == 2
    names = here.names()
    for test in (document["tests"][index] for index in (0, 44, 89)):
        row = here.tab.locator("#test-table tbody tr").nth(names.index(test["nodeid"]))
        cells = row.locator("td")
        assert cells.nth(0).locator(".nodeid").inner_text() == test["nodeid"]
        assert cells.nth(1).inner_text().strip() == test["worker"]
        assert cells.nth(2).inner_text().split()[-1] == test["outcome"]
        peak = cells.nth(5)
        if test["peak_bytes"] is None:
            assert peak.get_attribute("data-bytes") is None
        else:
            assert peak.get_attribute("data-bytes") == str(test["peak_bytes"])
            assert peak.inner_text().strip() == size(test["peak_bytes"])


def test_leases_of_other_sessions(opened: Open) -> None:
    """A line in the chart of their device, and who they are at the moment under the pointer."""
    document = documents.eventful()
    uuid, end = document["devices"][0]["uuid"], document["run"]["duration_s"]
    document["samples"]["leases"] = [
        {
            "device": uuid,
            "session": "pid 7, ci",
            "start_s": 0.0,
            "end_s": end,
            "bytes": documents.GB,
        }
    ]
    here = opened(document)
    keys = here.texts("#charts .swatch.leases")
    assert len(keys) == 1
    here.tab.locator("#charts .u-over").first.hover()
    assert "leased by pid 7, ci" in here.text("body")


def test_script_and_python_write_figures_alike(opened: Open) -> None:
    """Or the same figure would differ between the head of the page and its table."""
    here = opened(documents.empty())
    words = (ASSETS / "words.js").read_text(encoding="utf-8")
    eighths = [n * documents.GB // 8 for n in range(200)]
    sizes = [None, 0, 1, *eighths, *(n * n * 7919 * 1013 for n in range(2000))]
    times = [None, *(n / 8 for n in range(900)), *(n * n / 1000 for n in range(3000))]
    written = here.tab.evaluate(
        f"""([sizes, times]) => {{
            {words}
            return [sizes.map(size), times.map(span), times.map(clock)];
        }}""",
        [sizes, times],
    )
    assert written == [
        [size(value) for value in sizes],
        [span(value) for value in times],
        [clock(value) for value in times],
    ]


def test_table_sorts(opened: Open) -> None:
    """By pointer and by keyboard, both ways; the highest_peaks first from the start."""
    document = documents.eventful()
    here = opened(document)
    assert here.names() == ordered(document, "peak_bytes", down=True)
    head = here.tab.locator("#test-table th").filter(has_text="peak")
    assert head.get_attribute("aria-sort") == "descending"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert here.names() == ordered(document, "peak_bytes", down=False)
    here.tab.locator("#test-table th").filter(has_text="start").locator("button").focus()
    here.tab.keyboard.press("Enter")
    assert here.names() == ordered(document, "start_s", down=False)
    assert head.get_attribute("aria-sort") is None


def test_table_filters(opened: Open) -> None:
    """By words of the name, by outcome, by worker, and by what the timeline shows."""
    document = documents.eventful()
    here = opened(document)
    here.tab.fill("#find", "CONV2D bfloat16")
    wanted = {
        test["nodeid"]
        for test in document["tests"]
        if "conv2d" in test["nodeid"] and "bfloat16" in test["nodeid"]
    }
    here.says("#shown", f"{len(wanted)} of {len(wanted)} tests, filtered from 90")
    assert set(here.names()) == wanted
    here.tab.fill("#find", "")
    here.tab.select_option("#outcome", "failed")
    wrong = {test["nodeid"] for test in document["tests"] if test["outcome"] == "failed"}
    assert set(here.names()) == wrong
    here.tab.select_option("#outcome", "")
    here.tab.select_option("#worker", "gw5")
    here.tab.locator("#charts").focus()
    here.tab.check("#in-view")
    here.tab.click("[data-zoom=in]")
    low, high = here.view()
    assert set(here.names()) == {
        test["nodeid"]
        for test in document["tests"]
        if test["worker"] == "gw5" and test["start_s"] <= high and test["end_s"] >= low
    }


def test_hover_tells_what_was_held(opened: Open) -> None:
    """Over VRAM: the sample of that moment; over a bar: the test; in all charts at once."""
    document = documents.small()
    here = opened(document)
    box, share = here.chart(0), 0.5
    here.tab.mouse.move(box["x"] + box["width"] * share, box["y"] + 60)
    here.tab.wait_for_selector(".tip:visible")
    at = document["run"]["duration_s"] * share
    samples = next(iter(document["samples"]["devices"].values()))
    index = max(n for n, moment in enumerate(samples["at_s"]) if moment <= at)
    # The page rounds samples to MiB, and a pixel is a fortieth of a second here.
    near = {size(round(samples["used_bytes"][n] / 2**20) * 2**20) for n in (index - 1, index)}
    told = here.text(".tip")
    assert near & set(told.split("\n")), told
    held = samples["workers_bytes"]["gw0"]
    key = here.texts("#charts .key li")
    assert any(f"gw0 {size(round(held[n] / 2**20) * 2**20)}" in key for n in (index - 1, index))
    lines = here.tab.locator("#charts .u-cursor-x").evaluate_all(
        "lines => lines.map(line => Math.round(line.getBoundingClientRect().x))"
    )
    assert len(lines) == 2
    assert abs(lines[0] - lines[1]) <= 1

    longest = max(document["tests"], key=lambda test: test["end_s"] - test["start_s"])
    box = here.chart(1)
    row = ["gw0", "gw1"].index(longest["worker"])
    middle = (longest["start_s"] + longest["end_s"]) / 2 / document["run"]["duration_s"]
    x, y = box["x"] + box["width"] * middle, box["y"] + box["height"] * (row + 0.5) / 2
    here.tab.mouse.move(x, y)
    told = here.text(".tip")
    assert longest["nodeid"] in told
    assert size(longest["peak_bytes"]) in told
    here.tab.mouse.click(x, y)
    assert longest["nodeid"] in here.text("#test-table .chosen")
    here.tab.mouse.move(4, 4)
    here.tab.wait_for_selector(".tip", state="hidden")


def test_zoom(opened: Open) -> None:
    """By dragging, by buttons, by keys; all charts together; and back."""
    document = documents.eventful()
    here = opened(document)
    whole = (0.0, document["run"]["duration_s"])
    assert here.view() == whole
    box = here.chart(0)
    y = box["y"] + box["height"] / 2
    here.tab.mouse.move(box["x"] + box["width"] * 0.25, y)
    here.tab.mouse.down()
    here.tab.mouse.move(box["x"] + box["width"] * 0.5, y, steps=5)
    here.tab.mouse.up()
    low, high = here.view()
    assert low == pytest.approx(whole[1] * 0.25, abs=0.3)
    assert high == pytest.approx(whole[1] * 0.5, abs=0.3)
    # What is at the left edge now is what was at a quarter.
    bars = here.chart(2)
    here.tab.mouse.move(bars["x"] + 1, bars["y"] + 5)
    assert here.text(".tip")
    here.tab.mouse.dblclick(box["x"] + box["width"] / 2, here.chart(0)["y"] + 50)
    assert here.view() == whole
    here.tab.click("[data-zoom=in]")
    low, high = here.view()
    assert high - low == pytest.approx(whole[1] / 2)
    here.tab.click("[data-zoom=on]")
    assert here.view()[0] > low
    here.tab.locator("#charts").focus()
    for key in ("+", "ArrowRight", "ArrowRight"):
        here.tab.keyboard.press(key)
    low, high = here.view()
    assert high - low == pytest.approx(whole[1] / 4)
    assert "GPU 0" in here.tab.locator("#moment").inner_text()
    here.tab.keyboard.press("0")
    assert here.view() == whole


def test_events_and_tests_lead_to_their_moment(opened: Open) -> None:
    """The button of an event, or of a test, shows it on the timeline."""
    document = documents.eventful()
    here = opened(document)
    event = next(event for event in document["events"] if event["kind"] == "ollama-spilled")
    here.tab.locator("#events li").filter(has_text="38 %").locator("button").click()
    low, high = here.view()
    assert low <= event["at_s"] <= high
    assert high - low < document["run"]["duration_s"] / 2
    here.tab.locator("#test-table tbody tr button").first.click()
    low, high = here.view()
    name = here.names()[0]
    test = next(test for test in document["tests"] if test["nodeid"] == name)
    assert low <= test["start_s"] <= test["end_s"] <= high


def test_hostile_names_are_text(opened: Open) -> None:
    """No element comes of a name; what hides or turns text round is written as an escape."""
    here = opened(documents.hostile())
    assert here.tab.locator("main img, main script, main svg:not(.meter), main u").count() == 0
    assert documents.HOSTILE in here.names()
    assert documents.HOSTILE in here.text("#leaks")
    assert "test_x.py::test_c[\\u202egnp.exe]" in here.names()
    assert "test_x.py::test_d[\\udc80\\x00\\u2028]" in here.names()
    here.tab.locator("#test-table tbody tr").filter(has_text="onerror").locator("button").click()
    box = here.chart(1)
    here.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 10)
    assert here.tab.locator(".tip img").count() == 0


def test_network_is_forbidden(opened: Open) -> None:
    """Even a script that got into the page could send nothing."""
    here = opened(documents.small())
    refused = here.tab.evaluate(
        """() => new Promise(done => {
            document.addEventListener("securitypolicyviolation", event =>
                done(event.effectiveDirective));
            fetch("https://example.invalid/").catch(() => {});
        })"""
    )
    assert refused == "connect-src"
    inline = here.tab.evaluate(
        """() => new Promise(done => {
            document.addEventListener("securitypolicyviolation", event =>
                done(event.effectiveDirective));
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
        })"""
    )
    assert inline == "script-src-elem"
    assert here.tab.evaluate("window.ran") is None
    assert all("Content Security Policy" in wrong for wrong in here.wrong)
    here.wrong.clear()


def test_reads_without_scripts(opened: Open) -> None:
    """Where scripts are forbidden, as by some CI servers, the facts are there all the same."""
    document = documents.eventful()
    here = opened(document, java_script_enabled=False)
    assert "Yes, while tests ran" in here.text("#verdict")
    assert size(document["devices"][0]["peak_used_bytes"]) in here.text("#devices")
    assert len(here.texts("#events li")) == len(document["events"])
    assert "needs JavaScript" in here.text("#tests noscript")


def test_controls_have_names(opened: Open) -> None:
    """Every control says to a screen reader what it is, and the focus can be seen."""
    here = opened(documents.eventful())
    nameless = here.tab.locator("button, input, select").evaluate_all(
        """held => held.filter(one => !(one.getAttribute("aria-label") || one.textContent.trim()
            || one.closest("label")?.textContent.trim())).map(one => one.outerHTML)"""
    )
    assert nameless == []
    here.tab.keyboard.press("Tab")
    assert here.tab.evaluate("document.activeElement.className") == "skip"
    pictures = here.tab.locator("svg[role=img]")
    assert all(pictures.nth(n).get_attribute("aria-label") for n in range(pictures.count()))


def test_ten_thousand_tests_over_a_day(opened: Open) -> None:
    """All are found, the first are shown, more on demand."""
    document = documents.large()
    here = opened(document)
    assert here.text("#shown") == "100 of 10,000 tests"
    assert here.names() == ordered(document, "peak_bytes", down=True)[:100]
    here.tab.click("#more")
    assert here.text("#shown") == "600 of 10,000 tests"
    here.tab.fill("#find", "-9999]")
    here.says("#shown", "1 of 1 tests, filtered from 10,000")
    assert here.names() == [document["tests"][9999]["nodeid"]]


def test_another_server_hangs_below_ollama(opened: Open) -> None:
    """Each has a name and a colour of its own."""
    here = opened(documents.second_server())
    key = here.texts("#charts .key li")
    at = key.index("Ollama max 10.8 GB")
    assert key[at + 1] == "ToyServe max 2.0 GB"
    colours = here.tab.evaluate(
        """() => {
            const canvas = document.querySelector("#charts canvas");
            const { data } = canvas.getContext("2d")
                .getImageData(Math.floor(canvas.width / 2), 0, 1, canvas.height);
            const seen = [];
            for (let at = 0; at < data.length; at += 4) {
                const colour = data.slice(at, at + 3).join();
                if (seen.at(-1) !== colour) seen.push(colour);
            }
            return seen;
        }"""
    )
    ollama, server = "235,162,30", "138,115,80"
    assert ollama in colours, colours
    assert server in colours, colours
    assert colours.index(ollama) < colours.index(server)


# Chromium's own colours of what must be seen, from the stylesheet: the page, Ollama, worker 0.
THEMES = {
    "light": ("rgb(244, 245, 247)", (235, 162, 30), (36, 103, 181)),
    "dark": ("rgb(14, 18, 23)", (230, 159, 0), (74, 144, 226)),
}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", [1280, 390])
def test_screenshots(theme: str, width: int, opened: Open, output: Path) -> None:
    """In both themes and on small screens; the chart is painted in the theme's colours."""
    page, ollama, worker = THEMES[theme]
    here = opened(
        documents.eventful(),
        color_scheme=theme,
        viewport={"width": width, "height": 900},
    )
    assert here.tab.evaluate("getComputedStyle(document.body).backgroundColor") == page
    pixels = here.tab.evaluate(
        """() => {
            const canvas = document.querySelector("#charts canvas");
            const { data } = canvas.getContext("2d")
                .getImageData(0, 0, canvas.width, canvas.height);
            const seen = {};
            for (let at = 0; at < data.length; at += 4) {
                const colour = data.slice(at, at + 3).join();
                seen[colour] = (seen[colour] ?? 0) + 1;
            }
            return seen;
        }"""
    )
    field = sum(pixels.values())
    assert pixels[",".join(map(str, ollama))] > field / 10
    assert pixels[",".join(map(str, worker))] > field / 200
    name = f"{theme}{'-narrow' if width < 640 else ''}.png"
    here.tab.screenshot(path=str(output / name), full_page=True)
    assert (output / name).stat().st_size > 50_000


def test_prints_light_and_short(opened: Open, output: Path) -> None:
    """Paper is light though the screen is dark, and a long table does not fill it."""
    here = opened(documents.eventful(), color_scheme="dark")
    here.tab.evaluate(
        """() => addEventListener("beforeprint", () => {
            window.printed = [getComputedStyle(document.documentElement)
                .getPropertyValue("--panel"), document.querySelectorAll("tbody tr").length];
        })"""
    )
    path = output / "print.pdf"
    here.tab.pdf(path=str(path), format="A4", print_background=True)
    colour, rows = here.tab.evaluate("window.printed")
    assert colour == "#ffffff"
    assert rows < 60
    assert path.read_bytes().startswith(b"%PDF")
    # The screen has its theme and all its rows back.
    here.says("#shown", "90 of 90 tests")
    assert here.tab.locator("html.printing").count() == 0
