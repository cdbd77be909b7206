"""Running a project, and reading what the run left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

RECORDER = Path(__file__).parent / "path"
STOCK_TWICE = bool(os.environ.get("GPUSHARE_STOCK_TWICE"))
"""Set to try the comparison itself: stock is compared with stock, and nothing may differ."""

OURS = () if STOCK_TWICE else ("--gpu-share", "--gpu-share-preset=no-ollama")
"""What turns the plugin on, on the simulated device of 24 GB."""

NEEDS = () if STOCK_TWICE else ("-o", "gpu_share_vram=* = 1GB")
"""A need for every test, which puts the own scheduler in charge."""

KILLED = -signal.SIGKILL
"""The exit code of a run that did not end within its time."""

_LEFT_OUT = [part for name in ("hypothesispytest", "anyio") for part in ("-p", f"no:{name}")]


@dataclass
class Run:
    """How a run ended and all that it left."""

    code: int
    out: str
    err: str
    rows: dict[str, list[list[Any]]]
    """Process ("controller" or a worker's PID) -> what it wrote down, in order."""
    junit: list[tuple[str, ...]] | None
    """The test cases of the JUnit XML file in their order; None without a file."""
    junit_counts: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Results files that the project's own hooks wrote: name -> text."""

    @cached_property
    def reports(self) -> list[dict[str, Any]]:
        return [row[2] for row in self.rows.get("controller", []) if row[1] == "report"]

    @cached_property
    def workers(self) -> dict[str, list[list[Any]]]:
        return {name: rows for name, rows in self.rows.items() if name != "controller"}

    def worker_rows(self, *kinds: str) -> list[list[Any]]:
        """Rows of all workers, without the worker's name and the kind."""
        return [row[2:] for rows in self.workers.values() for row in rows if row[1] in kinds]

    @cached_property
    def begun(self) -> Counter[str]:
        """Node id -> how often a worker began the test."""
        return Counter(row[0] for row in self.worker_rows("begun"))

    @cached_property
    def collected(self) -> set[str]:
        return {nodeid for (nodeids,) in self.worker_rows("collected") for nodeid in nodeids}

    @cached_property
    def setups(self) -> Counter[str]:
        """Scope -> how often a fixture of this scope was set up, the sum over all workers."""
        return Counter(row[1] for row in self.worker_rows("up"))

    @cached_property
    def outcomes(self) -> dict[str, list[tuple[Any, ...]]]:
        """Node id -> how its set-up and its call went (and the report of a crash).

        Errors of a teardown are counted in `errors`: which test bears those of a wider fixture
        depends on how the tests are distributed.
        """
        found: dict[str, list[tuple[Any, ...]]] = {}
        for it in self.reports:
            outcomes = found.setdefault(it["nodeid"], [])
            if it["when"] != "teardown":
                xfail = it["wasxfail"] is not None
                outcomes.append((it["when"], it["outcome"], xfail, it["kind"], it["context"]))
        return found

    @cached_property
    def errors(self) -> int:
        """How many teardowns failed."""
        return sum(it["when"] == "teardown" and it["outcome"] == "failed" for it in self.reports)

    @cached_property
    def own_scheduler(self) -> bool:
        """Whether the plugin's own scheduler handed the tests out."""
        return ["controller", "scheduler", True] in self.rows.get("controller", [])

    @cached_property
    def crashed(self) -> list[str]:
        return [it["nodeid"] for it in self.reports if it["when"] == "???"]

    @cached_property
    def collect_errors(self) -> set[str]:
        return {row[2] for row in self.rows.get("controller", []) if row[1] == "collect"}

    @cached_property
    def internal_errors(self) -> list[str]:
        return [row[2] for row in self.rows.get("controller", []) if row[1] == "internal error"]

    @cached_property
    def summary(self) -> list[str]:
        """The lines of the short test summary, sorted, and the last line's counts."""
        return sorted(re.findall(r"(?m)^(?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS) .*", self.out))

    @property
    def normal_out(self) -> str:
        """The output without the plugin's own lines, times and the number of the process."""
        kept, ours = [], False
        for line in self.out.splitlines():
            ours = line.startswith("gpu-share:") or (ours and line.startswith("  "))
            if not ours:
                kept.append(line.rstrip())
        text = "\n".join(kept)
        text = without_pluggy(text)
        text = re.sub(r"(?m)^(platform|rootdir:|cachedir:|plugins:|configfile:).*\n", "", text)
        text = re.sub(r"(?m)^(scheduling tests via|bringing up nodes|created:).*\n", "", text)
        text = re.sub(r" in \d+\.\d+s( \(.*?\))?", " in TIME", text)
        return re.sub(r"(?m)^([=_-])+ (.*?) \1+$", r"\1 \2", text)


def without_pluggy(text: str) -> str:
    """Tracebacks without pluggy's frames, short or in full."""
    text = re.sub(r"(?m)^.*pluggy/_\w+\.py:\d+: in \w+\n(?: {4}.*\n)+", "", text)
    frames = re.split(r"(?m)^(?:_ )+_?\n", text)
    for at, frame in enumerate(frames):
        if re.search(r"pluggy/_\w+\.py:\d+:\s*\Z", frame):
            # Before the first frame of an error stand its title and the last one of another.
            titles = list(re.finditer(r"(?m)^_{3,} .* _{3,}\n", frame))
            frames[at] = frame[: titles[-1].end()] if titles else ""
    return "".join(frames)


def run(
    project: Path,
    place: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    steps: Sequence[Sequence[str]] = (),
    files: Sequence[str] = (),
    timeout: float = 60,
    order: Sequence[str] | None = None,
    results: Callable[[Path], dict[str, str]] | None = None,
) -> Run:
    """Run pytest on a copy of *project* made in *place*.

    steps: arguments of further runs in the same copy, beside *arguments*; the last one counts.
    files: results files to read afterwards, as the project's hooks write them.
    order: node ids; these tests are run, in this order.
    results: reads what a plugin wrote into the copy; it belongs to the results files.
    """
    copy = place / project.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    shutil.copytree(project, copy)
    if order is not None:
        (place / "order.json").write_text(json.dumps(order))
        environment = {**environment, "FIDELITY_ORDER": str(place / "order.json")}
    for step in steps[:-1]:
        _once(copy, place / "before", [*arguments, *step], environment, timeout)
    last = [*arguments, *(steps[-1] if steps else ())]
    code, out, err = _once(copy, place / "record", last, environment, timeout)
    prefix = str(copy)

    def normal(text: str) -> str:
        text = re.sub(r"0x[0-9a-f]{6,}", "0x", text.replace(prefix, "ROOT"))
        # Temporary directories of runs, and threads in the dumps of time-outs.
        text = re.sub(r"(pytest-of-[^/]+/pytest-)\d+", r"\1N", text)
        return re.sub(r"(Stack of \S+ )\(\d+\)", r"\1(N)", text)

    rows = {
        path.name.removeprefix("record."): [
            json.loads(line) for line in normal(path.read_text("utf-8", "replace")).splitlines()
        ]
        for path in sorted(place.glob("record.*"))
    }
    cases, counts = _junit(copy / "junit.xml", normal)
    read = {name: (copy / name).read_text() for name in files if (copy / name).exists()}
    if results is not None:
        read |= results(copy)
    return Run(code, normal(out), normal(err), rows, cases, counts, read)


def _once(
    copy: Path, record: Path, arguments: Sequence[str], environment: Mapping[str, str], limit: float
) -> tuple[int, str, str]:
    """Run pytest; a run that lasts longer than *limit* is killed, with its workers."""
    path = os.pathsep.join(filter(None, (environment.get("PYTHONPATH", ""), str(RECORDER))))
    command = [
        *(sys.executable, "-m", "pytest", *_LEFT_OUT, "-p", "fidelity_recorder"),
        *("--junit-xml=junit.xml", "-rA", *arguments),
    ]
    process = subprocess.Popen(
        command,
        cwd=copy,
        env={**environment, "PYTHONPATH": path, "FIDELITY_RECORD": str(record)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate(timeout=30)
        return KILLED, out, err + f"\nkilled after {limit} s"
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err


def _junit(
    path: Path, normal: Callable[[str], str]
) -> tuple[list[tuple[str, ...]] | None, dict[str, str]]:
    if not path.exists():
        return None, {}
    root = ElementTree.fromstring(normal(path.read_text("utf-8")))
    cases = []
    for case in root.iter("testcase"):
        inner = [f"{it.tag}: {it.get('message', '')}" for it in case]
        cases.append((case.get("classname", ""), case.get("name", ""), *inner))
    suite = next(root.iter("testsuite"))
    names = ("tests", "failures", "errors", "skipped")
    return cases, {name: suite.get(name, "") for name in names}
