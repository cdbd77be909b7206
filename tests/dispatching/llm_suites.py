"""Random suites of tests that use models, GPU tests, both and neither, run by real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from inner_pytest import inner_command
from simulator import Device, Machine
from simulator.ollama import Model, OllamaServer

LIMIT = 200.0
"""Seconds that a run may take."""

MODULE = """
import json, os, pathlib, time, urllib.request
import pytest
import gpusim

TESTS = json.loads(pathlib.Path("tests.json").read_text())

def marked(test):
    marks = []
    if test["vram"]:
        marks.append(pytest.mark.gpu(vram=f"{test['vram']}GB"))
    if test["model"] or test["bare"]:
        model = test["model"]
        marks.append(pytest.mark.ollama(model=model) if model else pytest.mark.ollama)
    if test["group"]:
        marks.append(pytest.mark.xdist_group(test["group"]))
    return pytest.param(test, marks=marks, id=f"t{test['number']}")

def ask(model, seconds):
    body = {"model": model, "prompt": f"take {seconds:.3f} s", "stream": False}
    url = "http://" + os.environ["OLLAMA_HOST"] + "/api/generate"
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()

@pytest.mark.parametrize("test", [marked(test) for test in TESTS])
def test_it(test):
    with open("begun.txt", "a") as file:
        file.write(f"{test['number']}\\n")
    if test["crashes"]:
        os._exit(1)
    size = test["vram"] and gpusim.available()
    with gpusim.alloc(f"{test['vram'] * 1024 - 700}MB") if size else open(os.devnull):
        if test["model"]:
            ask(test["model"], test["seconds"])
        else:
            time.sleep(test["seconds"])
    assert not test["fails"]
"""


class Checked(NamedTuple):
    """What came of one suite."""

    tests: int
    loads: int
    seed: int
    wrong: list[str]


class LlmSuite:
    """One suite, its machine and its server, drawn by a seed."""

    def __init__(self, seed: int) -> None:
        draw = Random(seed)
        self.seed = seed
        self.sizes = {f"m{n}:1b": draw.randint(1, 10) for n in range(draw.randint(1, 4))}
        self.absent = {name for name in self.sizes if draw.random() < 0.15}
        self.is_down = draw.random() < 0.07
        self.parallel = draw.choice([1, 1, 2, 3])
        self.max_loaded = draw.choice([1, 1, 2, 3])
        self.dist = draw.choice(["load", "load", "worksteal", "loadgroup", "loadscope"])
        self.workers = draw.choice(["-n1", "-n2", "-n3", "-n0"])
        self.cpus = draw.choice(["0", "auto"])
        self.phase = draw.choice(["auto", "auto", "beside", "before", "after"])
        self.retries = draw.random() < 0.2
        groups = self.dist == "loadgroup"
        self.tests: list[dict[str, Any]] = []
        for number in range(draw.randint(8, 30)):
            model = draw.choice(["", *self.sizes])
            self.tests.append(
                {
                    "number": number,
                    "model": model,
                    "bare": not model and draw.random() < 0.1,
                    # A test of both kinds fits next to the largest model.
                    "vram": draw.choice([0, 0, draw.randint(2, 8)]),
                    "group": draw.choice(["", "", "x", "y"]) if groups else "",
                    "seconds": draw.uniform(0.01, 0.15),
                    "crashes": self.workers != "-n0" and draw.random() < 0.03,
                    "fails": draw.random() < 0.05,
                }
            )

        if self.phase == "beside" or self.workers == "-n0":
            # Then VRAM is kept for all named models all the time.
            most = int(22 - sum(1.5 + 1.25 * self.sizes[name] for name in self.named))
            for test in self.tests:
                test["vram"] = min(test["vram"], most) if most >= 2 else 0

    @property
    def named(self) -> list[str]:
        """The models of `gpu_share_ollama_models`: one alone is that of a test that names none."""
        return sorted(self.sizes.keys() - self.absent) or sorted(self.sizes)

    @property
    def ini(self) -> str:
        """The settings; the reservation follows the models."""
        return f"""[pytest]
gpu_share = true
gpu_share_ollama_vram_reservation_mb = auto
gpu_share_ollama_models = {" ".join(self.named)}
gpu_share_ollama_context = 4096
gpu_share_ollama_param = nothing
gpu_share_ollama_phase = {self.phase}
gpu_share_ollama_parallel = {self.parallel}
gpu_share_cpu_workers = {self.cpus}
gpu_share_min_vram_per_worker_gb = 2.5
gpu_share_leases = {{leases}}
"""

    def is_run(self, test: dict[str, Any]) -> bool:
        """Whether the test begins."""
        only = self.named[0] if len(self.named) == 1 else ""
        model = test["model"] or (only if test["bare"] else "")
        uses = test["model"] or test["bare"]
        return not uses or not (self.is_down or model in self.absent)

    def check(self, path: Path, library: Path) -> Checked:
        """Run it in this folder, which is empty."""
        project = path / "project"
        project.mkdir()
        (project / "test_suite.py").write_text(MODULE, encoding="utf-8")
        (project / "tests.json").write_text(json.dumps(self.tests), encoding="utf-8")
        text = self.ini.format(leases=path / "leases")
        (project / "pytest.ini").write_text(text, encoding="utf-8")
        machine = Machine.create(path / "vram", [Device(total="24GB", used="1GB")])
        models = [Model(name, f"{size}GB") for name, size in self.sizes.items()]
        there = [model for model in models if model.name not in self.absent]
        options = {"max_loaded": self.max_loaded, "load_delay": 0.1, "parallel": self.parallel}
        with OllamaServer(machine, there, **options) as server:
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("PYTEST")},
                **machine.env(library),
                "OLLAMA_HOST": "127.0.0.1:9" if self.is_down else server.host,
                "PYTEST_XDIST_AUTO_NUM_WORKERS": "64",
            }
            beside = ["rerunfailures"] if self.retries else []
            command = inner_command(self.workers, f"--dist={self.dist}", beside=beside)
            command += ["-p", "no:randomly", "--gpu-share-report=r.json", "-q", "-rA"]
            # Each crash of a test that is run again counts: xdist would end the run before.
            command.append("--max-worker-restart=100")
            command += ["--reruns=1"] if self.retries else []
            try:
                done = subprocess.run(
                    command,
                    cwd=project,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=LIMIT,
                )
            except subprocess.TimeoutExpired as error:
                shown = (error.stdout or b"").decode("utf-8", "replace")
                return Checked(len(self.tests), 0, self.seed, ["it hangs", shown[-3000:]])
            wrong = self._wrong(project, server, done)
        if wrong:
            wrong.append(done.stdout[-3000:] + done.stderr[-1000:])
        return Checked(len(self.tests), len(server.scheduler.loads), self.seed, wrong)

    def _wrong(
        self, project: Path, server: OllamaServer, done: subprocess.CompletedProcess[str]
    ) -> list[str]:
        wrong = [] if done.returncode in (0, 1) else [f"exit code {done.returncode}"]
        if not (project / "r.json").exists():
            return [*wrong, "no report"]
        report = json.loads((project / "r.json").read_text(encoding="utf-8"))
        outcomes = {int(t["nodeid"].split("[t")[1].split("]")[0]): t for t in report["tests"]}
        begun: Counter[int] = Counter()
        if (project / "begun.txt").exists():
            begun.update(map(int, (project / "begun.txt").read_text(encoding="utf-8").split()))
        for test in self.tests:
            number, runs = test["number"], self.is_run(test)
            again = self.retries and (test["fails"] or test["crashes"])
            if not (runs <= begun[number] <= runs * (1 + again)):
                wrong.append(f"t{number} began {begun[number]} times")
            expected = {"failed"} if test["fails"] else {"passed"}
            expected = {"crashed"} if test["crashes"] else expected
            expected = expected if runs else {"skipped"}
            found = outcomes.get(number, {}).get("outcome")
            if found not in expected:
                wrong.append(f"t{number}: {found} instead of {expected}")
        for name, most in server.scheduler.most_at_once.items():
            if most > self.parallel:
                wrong.append(f"{most} requests at once for {name}, not {self.parallel}")
        if server.scheduler.spills:
            wrong.append(f"spills: {server.scheduler.spills}")
        if re.search("out of memory|INTERNALERROR|Traceback", done.stdout):
            wrong.append("an error that no test asked for")
        return wrong
