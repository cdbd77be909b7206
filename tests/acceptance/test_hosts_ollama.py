"""Ollama on other hosts: what is loaded there before the tests, and where tests use which model."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine
from simulator.child import wait_for
from simulator.ollama import OllamaServer, Settings

from pytest_gpushare.report.reading import read_report

from .conftest import Project
from .other_hosts import (
    HOLD,
    REPORTS,
    OtherHost,
    await_calls,
    background,
    commit,
    git,
    holding,
    on,
    skip_where_missing,
    there,
)

skip_where_missing()

QWEN = "qwen2.5:14b"
PRELOAD = ("-o", f"gpu_share_ollama_models={QWEN}", "-o", "gpu_share_ollama_preload=true")
SLOW_TESTS = """
    import time
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(60))
    def test_it(i):
        time.sleep(0.5)
"""


def loaded(host: OtherHost) -> dict[str, float]:
    """The models that a host's server has loaded -> seconds for which it keeps each."""
    url = f"http://{host.environment['OLLAMA_HOST']}/api/ps"
    with urllib.request.urlopen(url, timeout=5) as answer:
        models: list[dict[str, Any]] = json.load(answer)["models"]
    found = {}
    for model in models:
        text = re.sub(r"\.(\d{1,6})\d*", r".\1", model["expires_at"]).replace("Z", "+00:00")
        left = datetime.fromisoformat(text) - datetime.now(timezone.utc)
        found[model["name"]] = left.total_seconds()
    return found


@pytest.fixture
def box(hosts: Callable[..., OtherHost]) -> Callable[..., OtherHost]:
    """Start a host of 24 GB whose server has a model that is not loaded."""

    def start(name: str = "box", **options: object) -> OtherHost:
        device = Device(total="24GB", used="2GB")
        return hosts(name, device, ollama={QWEN: "10.8GB"}, has_loaded=False, **options)

    return start


def test_models_are_loaded_there_before_the_workers_start(
    project: Project, box: Callable[..., OtherHost], hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """The plan of the host knows the model as resident; another host has no Ollama and says so."""
    project.write(
        test_project="""
            import json
            import os
            import urllib.request
            import pytest

            @pytest.mark.gpu
            @pytest.mark.parametrize("i", range(6))
            def test_it(i):
                if os.environ["OLLAMA_HOST"].endswith(os.environ.get("BOX", "-")):
                    url = f"http://{os.environ['OLLAMA_HOST']}/api/ps"
                    with urllib.request.urlopen(url, timeout=5) as answer:
                        assert [m["name"] for m in json.load(answer)["models"]] == ["qwen2.5:14b"]
        """
    )
    commit(project)
    host, other = box(), hosts("other", Device(total="24GB", used="2GB"))
    tx = host.tx + f"//env:BOX={host.environment['OLLAMA_HOST'].rpartition(':')[2]}"
    report = tmp_path / "r.json"
    arguments = ["--gpu-share", "--tx", tx, "--tx", other.tx, *PRELOAD]
    done = project.pytest(*arguments, f"--gpu-share-report={report}")
    assert (done.code, done.passed) == (0, 6), done.out + done.err
    assert f"  other: {QWEN} was not preloaded: Ollama at " in done.out
    assert f"Ollama: {QWEN} 10.8 GB, 100 % on GPU" in done.out
    events = [e for e in read_report(report)["events"] if e["kind"] == "ollama-preloaded"]
    assert len(events) == 1
    assert events[0]["text"].startswith(f"box: Ollama loaded {QWEN} 10.8 GB")
    # As long as the server itself keeps it, and no longer.
    assert 0 < loaded(host)[QWEN] <= 300
    plan = project.pytest(*arguments, "-o", "gpu_share_ollama_preload_failed=fail")
    assert plan.code == 4
    assert f"host other: not preloaded: {QWEN}" in plan.err


def test_nothing_is_loaded_for_a_run_that_does_not_start(
    project: Project, box: Callable[..., OtherHost]
) -> None:
    """Another commit on one of the hosts: none of them has loaded anything."""
    commit(project)
    host, other = box(), box("other")
    git(other.checkout, "commit", "-qm", "next", "--allow-empty")
    done = project.pytest(*on(host, other), *PRELOAD)
    assert done.code == 4, done.out + done.err
    assert "host other: has commit" in done.err
    assert loaded(host) == loaded(other) == {}


@pytest.mark.parametrize("how", ["end", "kill"])
def test_a_keep_alive_of_ours_is_given_back(
    project: Project, box: Callable[..., OtherHost], how: str
) -> None:
    """A server that unloads at once is asked to keep the model until the run ends, or is killed."""
    project.write(test_project=SLOW_TESTS)
    project.file("conftest.py", REPORTS)
    commit(project)
    host = box(keep_alive="0")
    tests = ("-k", "test_it and (1 or 2)") if how == "kill" else ("-k", "5")
    with background(project, *on(host), *PRELOAD, *tests) as process:
        await_calls(project, process, 2)
        assert loaded(host)[QWEN] > 300
        if how == "kill":
            process.kill()
        else:
            assert process.wait(60) == 0, process.communicate(timeout=10)[0]
        wait_for(lambda: QWEN not in loaded(host))


def test_what_was_loaded_here_stays_after_the_wait(
    project: Project, box: Callable[..., OtherHost], machine_with: Callable[..., Machine]
) -> None:
    """This host is planned once more when it waits for VRAM: its models are still the run's."""
    project.write(test_project=SLOW_TESTS)
    project.file("conftest.py", REPORTS)
    commit(project)
    machine = machine_with(Device(total="24GB", used="2GB"))
    names = ("-o", "gpu_share_ollama_models=small:1b", "-o", "gpu_share_ollama_preload=true")
    reservation = ("-o", "gpu_share_ollama_vram_reservation_mb=12288")
    host, here = box(cpus=1), [sys.executable, "-c", HOLD]
    with (
        OllamaServer(machine, {"small:1b": "1GB"}, settings=Settings(keep_alive="0")) as server,
        holding(here, "8GB", cwd=project.path, env=project.environment) as give_back,
        holding(there(host), "8GB"),
    ):
        project.environment["OLLAMA_HOST"] = server.host
        arguments = [*on(host), "--tx", "gpu-auto*popen", *names, *reservation, "-k", "5"]
        with background(project, *arguments) as process:
            assert process.stdout is not None
            assert "waiting for 3.0 GB of VRAM" in process.stdout.readline()
            assert len(server.ps()) == 1
            give_back()
            await_calls(project, process, 1)
            assert len(server.ps()) == 1
            assert process.wait(60) == 0, process.communicate(timeout=10)[0]
        assert server.ps() == []


def test_tests_use_models_of_this_host(
    project: Project,
    hosts: Callable[..., OtherHost],
    machine_with: Callable[..., Machine],
    tmp_path: Path,
) -> None:
    """Only this host has Ollama: tests that use models run here, all others everywhere."""
    project.write(
        test_project="""
            import time
            import pytest

            @pytest.mark.ollama(model="small:1b")
            @pytest.mark.parametrize("i", range(4))
            def test_model(i, ollama):
                assert ollama.base_url.startswith("http://127.0.0.1:")

            @pytest.mark.gpu
            @pytest.mark.parametrize("i", range(8))
            def test_any(i):
                time.sleep(0.5)
        """
    )
    commit(project)
    machine = machine_with(Device(total="24GB", used="2GB"))
    with OllamaServer(machine, {"small:1b": "1GB"}) as server:
        project.environment["OLLAMA_HOST"] = server.host
        host = hosts("box", Device(total="24GB", used="2GB"))
        report = tmp_path / "r.json"
        done = project.pytest(*on(host), "--tx", "gpu-auto*popen", f"--gpu-share-report={report}")
    assert (done.code, done.passed) == (0, 12), done.out + done.err
    places = {
        (t["nodeid"].partition("::")[2][:10], t["host"]) for t in read_report(report)["tests"]
    }
    assert {host for name, host in places if name == "test_model"} == {None}
    assert {host for name, host in places if name.startswith("test_any")} == {None, "box"}


@pytest.mark.parametrize(
    ("how", "outcome"), [("skip", "skipped"), ("fail", "error"), ("pull", "error")]
)
def test_a_model_that_no_host_has_is_said(
    project: Project, box: Callable[..., OtherHost], how: str, outcome: str
) -> None:
    """Nothing hangs, and nothing is pulled there."""
    project.write(
        test_project="""
            import pytest

            @pytest.mark.ollama(model="nobody-has:1b")
            def test_missing(ollama):
                raise AssertionError("not reached")
        """
    )
    commit(project)
    host = box()
    done = project.pytest(*on(host), "-rsE", "-o", f"gpu_share_without_ollama={how}")
    assert f"1 {outcome}" in done.out, done.out + done.err
    assert "no model nobody-has:1b at " in done.out
    assert f"gpu_share_without_ollama = {how}" in done.out
    assert "not reached" not in done.out
