"""Leases on other hosts: what other sessions there hold is waited for, and shared by the test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from simulator import Device, Machine

from pytest_gpushare.report.reading import read_report

from .conftest import Project
from .other_hosts import (
    HOLD,
    REPORTS,
    SUITE,
    OtherHost,
    await_calls,
    background,
    commit,
    holding,
    on,
    skip_where_missing,
    there,
)

skip_where_missing()


def test_a_lease_there_is_waited_for(project: Project, hosts: Callable[..., OtherHost]) -> None:
    """The only host is full: the run says who has leased it, and starts once that is given back."""
    project.write(test_project=SUITE)
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    with holding(there(host), "8GB") as give_back, background(project, *on(host)) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("gpu-share: host small: waiting for 3.0 GB of VRAM"), line
        assert "8.0 GB" in line
        give_back()
        out, _ = process.communicate(timeout=60)
    assert "gpu-share: 2 GPU workers" in out
    assert " 12 passed" in out


def test_a_host_is_not_waited_for_while_another_has_room(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    project.write(test_project=SUITE)
    commit(project)
    full, free = (
        hosts(name, Device(total="24GB", used="2GB"), cpus=1) for name in ("full", "free")
    )
    report = tmp_path / "r.json"
    with holding(there(full), "8GB"):
        done = project.pytest(*on(full, free), f"--gpu-share-report={report}")
        command = [sys.executable, "-m", "pytest_gpushare", "plan", "--", *on(full, free)[1:]]
        plan = project.command(command)
    assert (done.code, done.passed) == (0, 12), done.out + done.err
    assert "waiting" not in done.err
    assert {test["host"] for test in read_report(report)["tests"]} == {"free"}
    assert "full: VRAM is leased: pid " in done.out
    assert "  free: 1 GPU worker × 9.0 GB" in plan.out, plan.out + plan.err
    assert "would wait" not in plan.out


def test_the_wait_there_has_an_end(project: Project, hosts: Callable[..., OtherHost]) -> None:
    """After `gpu_share_wait` CPU workers run there, as on this host."""
    project.write(test_project=SUITE.replace('os.environ["CUDA_VISIBLE_DEVICES"]', "None"))
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"), cpus=2)
    with holding(there(host), "8GB"):
        done = project.pytest(*on(host), "--gpu-share-wait=2")
    assert (done.code, done.passed) == (0, 12), done.out + done.err
    assert "gpu-share: 2 CPU workers" in done.out
    assert "small: waited 2 s for VRAM: pid " in done.out


def test_this_host_and_another_are_waited_for_together(
    project: Project,
    hosts: Callable[..., OtherHost],
    machine_with: Callable[..., Machine],
    tmp_path: Path,
) -> None:
    """Both are full: the run starts where VRAM is given back first."""
    machine_with(Device(total="24GB", used="2GB"))
    project.write(test_project=SUITE)
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"), cpus=1)
    project.environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = "1"
    report = tmp_path / "r.json"
    here = [sys.executable, "-c", HOLD]
    options = {"cwd": project.path, "env": project.environment}
    arguments = [*on(host), "--tx", "gpu-auto*popen", f"--gpu-share-report={report}"]
    for place in (None, "small"):
        with (
            holding(there(host), "8GB") as give_back_there,
            holding(here, "8GB", **options) as give_back_here,
            background(project, *arguments) as process,
        ):
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "waiting for 3.0 GB of VRAM" in line
            (give_back_here if place is None else give_back_there)()
            out, _ = process.communicate(timeout=60)
        assert " 12 passed" in out
        assert {test["host"] for test in read_report(report)["tests"]} == {place}


def test_a_session_there_gets_what_tests_give_back(
    project: Project, hosts: Callable[..., OtherHost]
) -> None:
    """Of two workers' lease another session gets its part as tests end; the others go on."""
    project.write(
        test_project="""
            import time
            import gpusim
            import pytest

            @pytest.mark.gpu(vram="3.5GB")
            @pytest.mark.parametrize("i", range(60))
            def test_it(i):
                with gpusim.alloc("2.5GB"):
                    time.sleep(0.5)
        """
    )
    project.file("conftest.py", REPORTS)
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    with background(project, *on(host)) as process:
        await_calls(project, process, 4)
        with holding(there(host), "4GB") as give_back:
            # One of them has it, the other still runs tests.
            before = (project.path / "reports").read_text().count(" call ")
            assert before < 50
            await_calls(project, process, before + 3)
            assert host.machine.snapshot()[0].used <= 13 * 1024**3
            give_back()
        out, _ = process.communicate(timeout=90)
    assert " 60 passed" in out
    assert host.machine.snapshot()[0].oom_count == 0


def test_what_a_session_there_gives_back_is_used(
    project: Project, hosts: Callable[..., OtherHost]
) -> None:
    """A test that is larger than what was left at the start waits, and runs uncapped by that."""
    project.write(
        test_project="""
            import os
            import pytest

            @pytest.mark.gpu
            def test_large():
                _, _, fraction = os.environ["PYTORCH_ALLOC_CONF"].rpartition("fraction:")
                assert float(fraction) > 8 / 24

            @pytest.mark.gpu(vram="3GB")
            @pytest.mark.parametrize("i", range(4))
            def test_small(i): pass
        """
    )
    project.file("conftest.py", REPORTS)
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"), frameworks=True)
    rule = ("-o", "gpu_share_vram=*test_large = 8GB")
    with holding(there(host), "4GB") as give_back, background(project, *on(host), *rule) as process:
        await_calls(project, process, 2)
        assert "test_large" not in (project.path / "reports").read_text()
        give_back()
        out, _ = process.communicate(timeout=60)
    assert " 5 passed" in out, out
