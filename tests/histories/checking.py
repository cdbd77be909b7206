"""Running a scene, and comparing its report with what really happened."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from inner_pytest import inner_command
from simulator import Machine
from simulator.ollama import OllamaServer

from .scenes import Scene, draw_scene
from .truth import History, Stretch, at, highest, plateaus, within

NEAR = 0.95
DEVICE_LASTS, PROCESS_LASTS = 0.4, 2.0
"""Seconds after which a peak is seen at the latest: by design, on a machine with time to read."""
SLACK = 0.05
"""Seconds by which clocks and logs may differ."""

OTHER = """
import gpusim, sys, time
time.sleep(float(sys.argv[2]))
with gpusim.alloc(f"{sys.argv[1]}GB"):
    time.sleep(3)
"""


@dataclass
class Checked:
    """What a run came to."""

    seed: int
    wrong: list[str] = field(default_factory=list)
    figures: dict[str, int] = field(default_factory=dict)
    """How many figures were compared, by kind."""
    output: str = ""

    def count(self, kind: str) -> None:
        """A figure was compared."""
        self.figures[kind] = self.figures.get(kind, 0) + 1


def check_seed(seed: int, place: Path, library: Path, environment: Mapping[str, str]) -> Checked:
    """Run the scene of a seed in an empty folder, and compare."""
    scene = draw_scene(seed)
    project = place / "project"
    project.mkdir(parents=True)
    scene.write(project)
    machine = Machine.create(place / "vram", list(scene.devices), log=True)
    # The first line of the log: what was there before.
    machine.set_used(0, machine.snapshot()[0].used)
    result = Checked(seed)
    whole = {**environment, **machine.env(library), "PYTEST_XDIST_AUTO_NUM_WORKERS": "8"}
    # Sessions beside this one are on machines of their own.
    whole["PYTEST_GPUSHARE_LEASES"] = str(place / "leases")
    if scene.framework:
        frameworks = Path(__file__).parents[1] / "simulator" / "frameworks"
        whole["PYTHONPATH"] += f":{frameworks}"
    code = _run(scene, project, machine, whole, result)
    path = project / "report.json"
    if code != 0 or not path.exists():
        result.wrong.append(f"exit code {code}")
        return result
    document = json.loads(path.read_text())
    history = History(place / "vram", time.time())
    _check(scene, document, history, project, result)
    return result


def _run(
    scene: Scene, project: Path, machine: Machine, environment: dict[str, str], result: Checked
) -> int:
    command = inner_command(*scene.arguments, "--gpu-share-report=report.json")
    command += ["--gpu-share-report=report.html"]
    done = threading.Event()
    with ExitStack() as stack:
        server = None
        if scene.loaded:
            server = stack.enter_context(OllamaServer(machine, {scene.loaded: "4GB"}))
            environment["OLLAMA_HOST"] = server.host
            if not scene.loads_at:
                server.load(scene.loaded)
        if scene.other:
            size, delay = scene.other
            other = subprocess.Popen(
                [sys.executable, "-c", OTHER, str(size), str(delay)], env=environment
            )
            stack.callback(other.wait, 60)
        began = time.monotonic()
        loads = bool(server and scene.loads_at)

        def look() -> None:
            # What dead processes held is taken from them by whoever looks next.
            nonlocal loads
            while not done.wait(0.05):
                machine.snapshot()
                if loads and server and time.monotonic() - began > scene.loads_at:
                    loads = False
                    server.load(scene.loaded)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            finished = subprocess.run(
                command, cwd=project, env=environment, capture_output=True, text=True, timeout=120
            )
        finally:
            done.set()
            thread.join(30)
        result.output = finished.stdout + finished.stderr
        return finished.returncode


def _check(
    scene: Scene, document: dict[str, Any], history: History, project: Path, result: Checked
) -> None:
    began = datetime.fromisoformat(document["run"]["started"]).timestamp()
    over = began + document["run"]["duration_s"]
    sampled: dict[str, list[float]] = {}
    for number, device in enumerate(document["devices"]):
        samples = (document["samples"]["devices"].get(device["uuid"]) or {}).get("at_s") or []
        sampled[device["uuid"]] = moments = [began + second for second in samples]
        _check_device(device, number, history, began, over, moments, result)
        _check_budget(device, result)
    workers = {worker["id"]: worker for worker in document["workers"]}
    for worker in workers.values():
        _check_worker(worker, history.worker(worker["id"]), result)
    ends = {}
    if (project / "ends.jsonl").exists():
        for line in (project / "ends.jsonl").read_text().splitlines():
            told = json.loads(line)
            ends[told["nodeid"]] = told["at"]
    is_listed = scene.devices[0].processes == "normal"
    for test in document["tests"]:
        start, end = began + test["start_s"], began + test["end_s"]
        held = history.worker(test["worker"])
        most = highest(within(held, start - SLACK, end + SLACK))
        _never_above(test["nodeid"], test["peak_bytes"], most, result)
        stretches = within(held, start + SLACK, end - SLACK)
        if is_listed and _starved(sampled.get(test["device"], []), start - 1, end + 1):
            result.count("test while the sampler starved")
            continue
        _check_test(test, stretches, ends.get(test["nodeid"]), is_listed, result)
    page = (project / "report.html").read_text()
    _check_page(page, document, result)


def _starved(moments: list[float], start: float, end: float) -> bool:
    """Whether readings 0.2 s apart came much later in this time: the machine had none to give."""
    near = [moment for moment in moments if start <= moment <= end]
    return any(later - earlier > 0.5 for earlier, later in itertools.pairwise(near))


def _never_above(what: str, printed: int | None, true: int, result: Checked) -> None:
    result.count("never above")
    if printed is not None and printed > true:
        result.wrong.append(f"{what}: printed {printed}, never more than {true}")


def _check_device(
    device: dict[str, Any],
    number: int,
    history: History,
    began: float,
    over: float,
    moments: list[float],
    result: Checked,
) -> None:
    used, tests = history.device(number), history.tests(number)
    name = f"device {number}"
    _never_above(f"{name} in use", device["peak_used_bytes"], highest(used), result)
    _never_above(f"{name} workers", device["peak_workers_bytes"], highest(tests), result)
    _never_above(f"{name} tests", device["peak_tests_bytes"], highest(tests), result)
    for kind, found in (("used", used), ("tests", tests)):
        printed, true = device[f"peak_{kind}_bytes"], highest(found)
        if device[f"peak_{kind}_exact"]:
            result.count("device exact")
            if printed < NEAR * true:
                result.wrong.append(f"{name} {kind}: printed {printed} as exact, was {true}")
    if not moments:
        return
    inside = within(used, moments[0], moments[-1])
    true = highest(inside)
    for start, end in plateaus(inside, int(NEAR * true)):
        seen = [moment for moment in moments if start <= moment <= end]
        if end - start < DEVICE_LASTS:
            continue
        if not seen:
            # Nothing was read in all that time: the machine had none.
            result.count("device peak while the sampler starved")
            continue
        result.count("device peak that lasted")
        if (device["peak_used_bytes"] or 0) < NEAR * true:
            result.wrong.append(
                f"{name}: {true} in use for {end - start:.2f} s, printed "
                f"{device['peak_used_bytes']}"
            )


def _check_budget(device: dict[str, Any], result: Checked) -> None:
    """The arithmetic of the header, of its parts."""
    result.count("budget")
    free = device["free_at_start_bytes"] - device["outstanding_bytes"]
    budget = max(0, free - device["safety_buffer_bytes"] - device["leases_bytes"])
    if device["budget_bytes"] != budget:
        result.wrong.append(f"budget {device['budget_bytes']}, its parts give {budget}")
    outstanding = max(0, device["reservation_bytes"] - device["resident_bytes"])
    if device["outstanding_bytes"] != outstanding:
        result.wrong.append(f"outstanding {device['outstanding_bytes']} is not {outstanding}")


def _check_worker(worker: dict[str, Any], stretches: list[Stretch], result: Checked) -> None:
    true, printed = highest(stretches), worker["peak_bytes"]
    name = f"worker {worker['id']}"
    _never_above(name, printed, true, result)
    if worker["peak_exact"]:
        result.count("worker exact")
        if printed < NEAR * true:
            result.wrong.append(f"{name}: printed {printed} as exact, held {true}")


def _check_test(
    test: dict[str, Any],
    stretches: list[Stretch],
    end_of_call: float | None,
    is_listed: bool,
    result: Checked,
) -> None:
    true, printed = highest(stretches), test["peak_bytes"]
    name = f"{test['nodeid']} ({test['end_s'] - test['start_s']:.2f} s)"
    if test["peak_exact"]:
        result.count("test exact")
        if printed < NEAR * true:
            result.wrong.append(f"{name}: printed {printed} as exact, held {true}")
        return
    if test["peak_source"] == "frameworks" or not is_listed:
        return
    lasted = max((end - start for start, end in plateaus(stretches, int(NEAR * true))), default=0)
    # A process that has ended holds its VRAM until somebody looks.
    if true and lasted >= PROCESS_LASTS + 0.15:
        result.count("test peak that lasted")
        if (printed or 0) < NEAR * true:
            result.wrong.append(f"{name}: held {true} for {lasted:.2f} s, printed {printed}")
    # Four readings a second while nothing is held.
    if end_of_call is not None and test["end_s"] - test["start_s"] > 0.4:
        held = at(stretches, end_of_call)
        if held:
            result.count("test held at the end of its call")
            if (printed or 0) < NEAR * held:
                result.wrong.append(f"{name}: {held} at the end of the call, printed {printed}")


def _check_page(page: str, document: dict[str, Any], result: Checked) -> None:
    """The figures from which the page's script draws the lines of the budget."""
    start = page.index('id="data"')
    text = page[page.index(">", start) + 1 : page.index("</script>", start)]
    drawn = json.loads(text)["devices"]
    for device, told in zip(document["devices"], drawn, strict=True):
        result.count("page")
        for name in ("total", "used_at_start", "reservation", "resident", "safety_buffer",
                     "budget"):  # fmt: skip
            if told[name] != device[f"{name}_bytes"]:
                result.wrong.append(f"page: {name} {told[name]}, {device[f'{name}_bytes']}")
        if told["budget"] and not device["leases_bytes"]:
            # The budget's line plus the buffer is where what is kept for Ollama begins.
            ground = told["used_at_start"] - min(told["resident"], told["reservation"])
            top = ground + told["budget"] + told["safety_buffer"] + told["reservation"]
            if top != told["total"]:
                result.wrong.append(f"page: the lines add up to {top} of {told['total']}")


def in_words(checked: Checked) -> Iterator[str]:
    """The lines on what was wrong."""
    for text in checked.wrong:
        yield f"{checked.seed}: {text}"
