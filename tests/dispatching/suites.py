"""Random suites with fixtures of every scope, and what must hold of any run of them.

A suite writes down what happens in it: each set-up, each teardown, and each report that the
controller hears. The rules are those of stock pytest, and are checked of its runs too.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pytest

IN_REVERSE = pytest.version_tuple >= (8, 2)
"""Whether what was set up later is torn down earlier; before that, whoever used it last counts."""

SCOPES = ("session", "package", "module", "class", "function")

_CONFTEST = """
import json, os
import pytest

FAIL_UP, FAIL_DOWN = json.loads({failing!r})

def note(*words):
    with open("happened.jsonl", "a") as file:
        file.write(json.dumps([os.environ.get("PYTEST_XDIST_WORKER", "main"), *words]) + "\\n")

def current():
    return os.environ.get("PYTEST_CURRENT_TEST", "")

def make(name, scope, params, needs):
    @pytest.fixture(scope=scope, name=name, params=params)
    def fixture(request):
        if needs:
            request.getfixturevalue(needs)
        where = request.node.nodeid
        what = [name, scope, where, getattr(request, "param", None)]
        if [name, where] in FAIL_UP:
            note("broken", *what)
            raise RuntimeError(f"set-up of {{name}}")
        note("up", *what)
        yield
        failing = [name, where] in FAIL_DOWN
        note("down", *what, current(), failing)
        if failing:
            raise RuntimeError(f"teardown of {{name}}")
    return fixture

{fixtures}

def pytest_runtest_logreport(report):
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        row = [report.nodeid, report.when, report.outcome, hasattr(report, "wasxfail")]
        with open("reports.jsonl", "a") as file:
            file.write(json.dumps(row) + "\\n")
"""


class Suite:
    """What a seed stands for."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._draw = draw = Random(seed)
        self._fixtures: dict[str, list[str]] = {scope: [] for scope in SCOPES}
        self._parametrised: set[str] = set()
        self._needs: dict[str, str] = {}
        """Fixture -> the one that it asks for while it is set up."""
        self._lines: list[str] = []
        self._places: dict[str, list[str]] = {scope: [] for scope in SCOPES}
        self._pause = draw.choice([0, 0, 0.01, 0.03])
        for scope in SCOPES:
            for number in range(draw.randint(1, 2)):
                self._fixture(scope, f"{scope}{number}")
        self.gpus = draw.randint(1, 2)
        self.cpus = draw.randint(1, 2)

    @property
    def ours(self) -> tuple[str, ...]:
        """The arguments of a run with CPU and GPU workers."""
        counts = {"cpu_workers": self.cpus, "max_workers_per_gpu": self.gpus}
        options = (("-o", f"gpu_share_{key}={count}") for key, count in counts.items())
        return ("--gpu-share", *(part for option in options for part in option))

    def _fixture(self, scope: str, name: str) -> None:
        draw = self._draw
        wider = [n for s in SCOPES[: SCOPES.index(scope) + 1] for n in self._fixtures[s]]
        # pytest cannot ask for a parametrised one by name, unless the test does, too.
        wider = [n for n in wider if n not in self._parametrised]
        needs = draw.choice(wider) if wider and draw.random() < 0.3 else None
        params = [1, 2] if scope in ("module", "class") and draw.random() < 0.25 else None
        self._fixtures[scope].append(name)
        if needs:
            self._needs[name] = needs
        if params:
            self._parametrised.add(name)
        self._lines.append(f"{name} = make({name!r}, {scope!r}, {params}, {needs!r})")

    def write(self) -> None:
        """Write the files of the suite."""
        draw = self._draw
        folders = ["", *(f"package{n}/" for n in range(draw.randint(0, 2)))]
        for folder in folders:
            if folder:
                (self._path / folder).mkdir()
                (self._path / folder / "__init__.py").touch()
                self._places["package"].append(folder.rstrip("/"))
            for number in range(draw.randint(1, 2)):
                self._module(f"{folder}test_m{number}.py")
        self._places["session"].append("")
        failing = json.dumps([self._choose(0.25), self._choose(0.8)])
        text = _CONFTEST.format(failing=failing, fixtures="\n".join(self._lines))
        (self._path / "conftest.py").write_text(text)

    def _choose(self, chance: float) -> list[list[str]]:
        """Fixtures and the places where they fail."""
        found = []
        for scope, names in self._fixtures.items():
            places = self._places[scope]
            if places and self._draw.random() < chance:
                found.append([self._draw.choice(names), self._draw.choice(places)])
        return found

    def _module(self, path: str) -> None:
        self._places["module"].append(path)
        lines = ["import time", "import pytest", ""]
        for number in range(self._draw.randint(1, 3)):
            if self._draw.random() < 0.5:
                lines += self._test(path, f"test_{number}", "")
            else:
                lines.append(f"class Test{number}:")
                self._places["class"].append(f"{path}::Test{number}")
                for inner in range(self._draw.randint(1, 4)):
                    lines += self._test(f"{path}::Test{number}", f"test_{inner}", "    ")
        (self._path / path).write_text("\n".join(lines) + "\n")

    def _test(self, place: str, name: str, indent: str) -> list[str]:
        draw = self._draw
        usable = [n for scope in SCOPES for n in self._fixtures[scope]]
        wanted = draw.sample(usable, draw.randint(0, min(4, len(usable))))
        # What is only asked for while a test runs cannot be known when it is handed out.
        for asked in wanted:
            if (needed := self._needs.get(asked)) and needed not in wanted:
                wanted.append(needed)
        self._places["function"].append(f"{place}::{name}")
        marks = []
        if draw.random() < 0.45:
            marks.append(draw.choice(["gpu", "gpu(vram='2GB')", "gpu(vram='6GB')"]))
        marks += draw.choice([[], [], [], [], ["skip"], ["xfail"]])
        body = draw.choice(["pass", "pass", "pass", "assert False", "pytest.skip('now')"])
        arguments = ", ".join(["self", *wanted] if indent else wanted)
        return [
            *(f"{indent}@pytest.mark.{mark}" for mark in marks),
            f"{indent}def {name}({arguments}):",
            f"{indent}    time.sleep({self._pause})",
            f"{indent}    {body}",
            "",
        ]


class Happened:
    """What a run wrote down, and which rules it broke."""

    def __init__(self, path: Path) -> None:
        self.wrong: list[str] = []
        self._reports = _taken(path / "reports.jsonl")
        self._workers: dict[str, list[list[Any]]] = defaultdict(list)
        for worker, *words in _taken(path / "happened.jsonl"):
            self._workers[worker].append(words)
        self.outcomes: dict[str, list[Any]] = {}
        """Node id -> how its set-up and its call went; teardowns depend on who ran what."""
        self._teardowns: dict[str, tuple[str, bool]] = {}
        self._setups: dict[str, tuple[str, bool]] = {}
        self.disturbed: set[str] = set()
        """Tests whose set-up had to tear down what an earlier one had left, which failed."""
        self.most: Counter[tuple[str, str, str, Any]] = Counter()
        """Fixture, scope, place and parameter -> how often one worker set it up at most."""
        self._read()
        for worker, lines in self._workers.items():
            self._check(worker, lines)
        self._check_errors()

    def _read(self) -> None:
        seen: Counter[tuple[str, str]] = Counter()
        for nodeid, when, outcome, xfailed in self._reports:
            seen[nodeid, when] += 1
            if when == "teardown":
                self._teardowns[nodeid] = outcome, xfailed
            else:
                self.outcomes.setdefault(nodeid, []).append((when, outcome, xfailed))
                if when == "setup":
                    self._setups[nodeid] = outcome, xfailed
        for (nodeid, when), count in seen.items():
            if count != 1:
                self.wrong.append(f"{count} reports of {when}: {nodeid}")
        if self._teardowns.keys() != self.outcomes.keys():
            self.wrong.append("tests without a teardown")

    def _check(self, worker: str, lines: list[list[Any]]) -> None:
        """Everything that is set up is torn down, once, the narrower and the later first."""
        up: list[tuple[str, str, str, Any]] = []
        counts: Counter[tuple[str, str, str, Any]] = Counter()
        for what, name, scope, where, param, *_ in lines:
            if scope == "package" and not where:
                # Outside of packages: as long as the session.
                scope = "session"
            elif scope == "class" and "::Test" not in where:
                # Outside of classes: as long as the test.
                scope = "function"
            key = name, scope, where, param
            if what == "up":
                if any(other[:3] == key[:3] for other in up):
                    self.wrong.append(f"{worker}: set up twice at once: {key}")
                up.append(key)
                counts[key] += 1
            elif what == "down":
                if key not in up:
                    self.wrong.append(f"{worker}: torn down, but never set up: {key}")
                    continue
                later = up[up.index(key) + 1 :]
                # A parametrised fixture makes way for its next value.
                came_later = any(it[1:3] == key[1:3] and it[3] is None for it in later)
                if IN_REVERSE and param is None and came_later:
                    self.wrong.append(f"{worker}: torn down before what came later: {key}")
                narrower = SCOPES[SCOPES.index(scope) + 1 :]
                if param is None and any(it[1] in narrower and it[3] is None for it in up):
                    self.wrong.append(f"{worker}: torn down before what is narrower: {key}")
                up.remove(key)
        if up:
            self.wrong.append(f"{worker}: never torn down: {up}")
        for key, count in counts.items():
            self.most[key] = max(self.most[key], count)

    def _check_errors(self) -> None:
        """An error in a teardown stands in the report of the test and phase in which it was."""
        expected = set()
        for lines in self._workers.values():
            for what, *_, current, failing in lines:
                if what == "down" and failing:
                    nodeid, _, phase = current.rpartition(" ")
                    expected.add((nodeid, phase.strip("()")))
        self.disturbed = {nodeid for nodeid, phase in expected if phase == "setup"}
        for nodeid, phase in sorted(expected):
            outcome, xfailed = self._teardowns.get(nodeid, ("missing", False))
            if phase == "setup":
                outcome, xfailed = self._setups.get(nodeid, ("missing", False))
            if outcome != "failed" and not xfailed:
                self.wrong.append(f"an error of the {phase} is not told: {nodeid} {outcome}")
        for nodeid, (outcome, _) in self._teardowns.items():
            if outcome == "failed" and (nodeid, "teardown") not in expected:
                self.wrong.append(f"an error that was none: {nodeid}")


def differences(stock: Happened, alone: Happened, mine: Happened) -> list[str]:
    """What is wrong with a run of ours, given stock ones, with workers and in one process."""
    found = [f"stock: {text}" for text in (*stock.wrong, *alone.wrong)] + mine.wrong
    for nodeid in {**stock.outcomes, **mine.outcomes}:
        if nodeid in stock.disturbed | mine.disturbed:
            continue
        pair = stock.outcomes.get(nodeid), mine.outcomes.get(nodeid)
        if pair[0] != pair[1]:
            found.append(f"{nodeid}: {pair[0]} in stock, {pair[1]} here")
    for key, count in mine.most.items():
        # A worker of stock runs a part of the tests in their order: no more than all of them.
        if count > max(1, alone.most[key]):
            found.append(f"set up {count} times by one worker, not {alone.most[key]}: {key}")
    return found


def _taken(path: Path) -> list[list[Any]]:
    """The lines of a file, which is taken away."""
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    return lines
