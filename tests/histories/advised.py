"""Random machines on which a suite runs and its advice is followed: it gives what it promises."""

from __future__ import annotations

import json
import random
import re
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from inner_pytest import inner_command
from simulator import Device, Machine
from simulator.ollama import OllamaServer

TEST = """
@MARK
@pytest.mark.parametrize("i", range(COUNT))
def test_NUMBER(i):
    held = take(SIZE)
    time.sleep(SECONDS)
"""
HEAD = """
import time
import pytest
"""
RAW = """
import gpusim

def take(gigabytes):
    return gpusim.alloc(f"{gigabytes}GB")
"""
TORCH = """
import torch

def take(gigabytes):
    return torch.empty(int(gigabytes * 1024**3), dtype=torch.uint8, device="cuda")
"""


class Host(NamedTuple):
    """A machine, its Ollama, and a suite with the settings of its user."""

    devices: tuple[Device, ...]
    model: float
    """GB of a model that Ollama has loaded; 0: there is no Ollama."""
    ini: tuple[tuple[str, str], ...]
    number: int | None
    cpus: int
    text: str
    marked: frozenset[str]
    """Names of the tests that have the marker."""
    framework: bool


def enumerate_tests(parts: list[str]) -> list[tuple[str, bool]]:
    """Name of each test, and whether it has the marker."""
    found = [re.search(r"def (test_\d+)", part) for part in parts]
    return [
        (match[1], "pytest.mark.gpu" in part)
        for part, match in zip(parts, found, strict=True)
        if match
    ]


def draw_host(seed: int) -> Host:
    """The machine of a seed."""
    draw = random.Random(seed)
    devices = []
    for _ in range(draw.choice([1, 1, 1, 2])):
        total = draw.choice([4, 6, 8, 10, 12, 16, 24, 48])
        devices.append(
            Device(total=f"{total}GB", used=f"{round(draw.uniform(0, 0.4) * total, 1)}GB")
        )
    ini = [("preset", draw.choice(["conservative"] * 4 + ["aggressive", "ultra-conservative",
                                                          "packed", "no-ollama"]))]  # fmt: skip
    if draw.random() < 0.3:
        ini.append(("min_vram_per_worker_gb", str(draw.choice([1.5, 2, 4, 5, 6]))))
    if draw.random() < 0.3:
        ini.append(("ollama_vram_reservation_mb", str(draw.choice([2048, 6000, 8192]))))
    if draw.random() < 0.2:
        ini.append(("cpu_workers", "1"))
    framework = draw.random() < 0.6
    parts = [HEAD, TORCH if framework else RAW]
    for number in range(draw.choice([1, 2, 3])):
        mark = draw.choice(
            ["pytest.mark.gpu", "pytest.mark.gpu", "", "pytest.mark.gpu(vram='SIZEGB')"]
        )
        mark = mark.replace("SIZE", str(draw.choice([1, 2, 3, 6])))
        text = TEST.replace("@MARK\n", f"@{mark}\n" if mark else "")
        text = text.replace("NUMBER", str(number)).replace("COUNT", str(draw.choice([1, 2, 4])))
        text = text.replace("SIZE", str(draw.choice([0.5, 1, 2, 3, 5])))
        parts.append(text.replace("SECONDS", str(draw.choice([0.0, 0.1, 0.3]))))
    least = min(int(str(device.total).removesuffix("GB")) for device in devices)
    model = draw.choice([0, 0, 1.5, 3]) if least >= 6 else 0
    return Host(
        tuple(devices),
        model,
        tuple(ini),
        draw.choice([None, None, None, 1, 2]),
        draw.choice([2, 4]),
        "".join(parts),
        frozenset(name for name, is_marked in enumerate_tests(parts) if is_marked),
        framework,
    )


@dataclass
class Followed:
    """What came of a machine's advice."""

    seed: int
    wrong: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    lacked: bool = False
    """Whether tests failed for lack of VRAM."""


class _Runs:
    """Runs of one suite on one machine."""

    def __init__(self, host: Host, place: Path, library: Path, env: Mapping[str, str]) -> None:
        self.host, self._place, self._library = host, place, library
        self._environment = dict(env)
        self._count = 0
        self._made: dict[tuple[str, ...], tuple[str, dict[str, Any], str]] = {}

    def run(self, *more: str, text: str = "") -> tuple[str, dict[str, Any], str]:
        """Output, report and page of a run with more settings; the machine is as before.

        Suggestions for several cases of a test are one edit, which is run once.
        """
        key = (text, *more)
        if key not in self._made:
            self._made[key] = self._run(*more, text=text)
        return self._made[key]

    def _run(self, *more: str, text: str) -> tuple[str, dict[str, Any], str]:
        host, self._count = self.host, self._count + 1
        place = self._place / str(self._count)
        place.mkdir(parents=True)
        (place / "test_host.py").write_text(text or host.text)
        ini = "".join(f"gpu_share_{key} = {value}\n" for key, value in host.ini)
        (place / "pytest.ini").write_text(
            f"[pytest]\nmarkers =\n    gpu: uses a GPU\n{ini}", encoding="utf-8"
        )
        machine = Machine.create(place / "vram", list(host.devices))
        env = {**self._environment, **machine.env(self._library)}
        env["PYTEST_GPUSHARE_LEASES"] = str(self._place / "leases")
        env["PYTEST_XDIST_AUTO_NUM_WORKERS"] = str(host.cpus)
        if host.framework:
            env["PYTHONPATH"] += f":{Path(__file__).parents[1] / 'simulator' / 'frameworks'}"
        reports = ("--gpu-share-report=r.json", "--gpu-share-report=r.html")
        command = inner_command("--gpu-share", *reports)
        command += [f"-n{host.number}"] if host.number else []
        for setting in more:
            command += ["-o", setting]
        with ExitStack() as stack:
            if host.model:
                models = {"m:3b": f"{host.model}GB"}
                server = stack.enter_context(OllamaServer(machine, models))
                env["OLLAMA_HOST"] = server.host
                server.load("m:3b")
            done = subprocess.run(
                command, cwd=place, env=env, capture_output=True, text=True, timeout=120
            )
        document = json.loads((place / "r.json").read_text())
        page = (place / "r.html").read_text(encoding="utf-8")
        return done.stdout + done.stderr, document, page


def follow(seed: int, place: Path, library: Path, environment: Mapping[str, str]) -> Followed:
    """Run the suite of a seed, follow each suggestion, and compare with its promise."""
    host, found = draw_host(seed), Followed(seed)
    runs = _Runs(host, place, library, environment)
    output, document, page = runs.run()
    found.hints = document["hints"]
    failed = [t for t in document["tests"] if t["outcome"] in ("failed", "error")]
    out_of_vram = bool(document["events"]) and any(e["kind"] == "oom" for e in document["events"])
    without_gpu = [t for t in failed if t["device"] is None]
    found.lacked = out_of_vram or (bool(without_gpu) and not document["plan"]["gpu_workers"])
    if found.lacked:
        if "no better setting was found" in page:
            found.wrong.append(f"no better setting, though {document['shortages']}")
        has_failed = any(re.split(r"::|\[", t["nodeid"])[1] in host.marked for t in failed)
        if not document["shortages"] and (out_of_vram or has_failed):
            names = [t["nodeid"] for t in failed]
            found.wrong.append(f"no shortage named: {names}")
    for hint in found.hints:
        try:
            _follow(hint, runs, document, found)
        except Exception as error:
            found.wrong.append(f"{hint}: {type(error).__name__}: {error}")
    if found.wrong:
        found.wrong.append(output)
    return found


def _follow(hint: str, runs: _Runs, before: dict[str, Any], found: Followed) -> None:
    settings, more = re.findall(r"-o (\S+)", hint), ""
    declared = re.search(r"^(\S+?) (?:held|ran out).*declare .*?vram=\"?([\d.]+GB)", hint)
    if declared:
        size, number = declared[2], re.search(r"::test_(\d+)", declared[1])
        assert number is not None
        own = re.compile(rf"(\(vram=')[^']*('\)\n[^\n]*\ndef test_{number[1]}\()")
        if own.search(runs.host.text):
            # A marker goes before a rule: it is changed where it stands.
            more = own.sub(rf"\g<1>{size}\g<2>", runs.host.text)
        else:
            settings.append(f"gpu_share_vram={declared[1]} = {size}")
    if not (settings or more):
        return
    _, document, _ = runs.run(*settings, text=more)
    problem = _broken(hint, document, before, declared[1] if declared else "", runs.host.marked)
    if problem:
        found.wrong.append(f"{hint}: {problem}")


def _broken(
    hint: str,
    document: dict[str, Any],
    before: dict[str, Any],
    declared: str,
    marked: frozenset[str],
) -> str:
    """What the run with the suggestion lacks of its promise."""
    slots = [w["slot_bytes"] for w in document["workers"] if w["role"] == "gpu"]
    promise = re.search(
        r"would (?:allow|be enough for small tests, in) (\d+) (?:GPU )?workers?"
        r"(?: of (?:at least )?([\d.]+) GB)?", hint
    )  # fmt: skip
    enough = re.search(r"would give enough, to (\d+) worker", hint)
    if "would skip such tests" in hint:
        failed = [
            test["nodeid"]
            for test in document["tests"]
            if test["outcome"] in ("failed", "error")
            and re.split(r"::|\[", test["nodeid"])[1] in marked
        ]
        return f"failed all the same: {failed}" if failed else ""
    if promise:
        if len(slots) < int(promise[1]):
            return f"{len(slots)} GPU workers"
        if promise[2] and min(slots) < float(promise[2]) * 1024**3 * 0.995:
            return f"slots of {min(slots)} bytes"
        return ""
    if enough:
        peaks = [w["peak_bytes"] or 0 for w in before["workers"] if w["role"] == "gpu"]
        if len(slots) != int(enough[1]) or min(slots) < max(peaks):
            return f"slots {slots}, peaks {peaks}"
        return ""
    if declared:
        over = [text for text in document["hints"] if text.startswith(f"{declared} ")]
        return f"named again: {over}" if over else ""
    return "" if "would have saved" in hint else "no promise that is known"
