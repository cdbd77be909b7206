"""Hosts that are lost during a run on several, and workers that cannot start there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from simulator import Device

from pytest_gpushare.report.reading import read_report

from .conftest import Project
from .other_hosts import (
    LONG,
    REPORTS,
    Link,
    OtherHost,
    await_calls,
    background,
    commit,
    lose,
    on,
    skip_where_missing,
)

skip_where_missing()


@pytest.mark.parametrize("after", [3, 11])
def test_a_lost_host_loses_its_workers_and_no_test(
    project: Project, two: Callable[[], list[OtherHost]], after: int
) -> None:
    """Its tests that had begun are reported as crashed, all others run elsewhere."""
    project.write(test_project=LONG)
    project.file("conftest.py", REPORTS)
    found = two()
    process = found[0].process
    assert process is not None
    lose(project, found, after, process.kill)


def test_a_cut_link_is_a_lost_host(project: Project, hosts: Callable[..., OtherHost]) -> None:
    """The network is gone and nobody says so: a host that is silent for 20 seconds is lost."""
    project.write(test_project=LONG)
    project.file("conftest.py", REPORTS)
    commit(project)
    with ExitStack() as stack:
        try:
            link = stack.enter_context(Link(1))
        except (OSError, subprocess.SubprocessError):
            pytest.skip("network namespaces are not allowed here")
        far = hosts("far", Device(total="24GB", used="2GB"), link=link)
        near = hosts("near", Device(total="24GB", used="2GB"))
        begun = time.monotonic()
        lose(project, [far, near], 5, link.cut)
        assert time.monotonic() - begun < 90


def test_a_slow_host_holds_no_other_back(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """One does not answer for 8 seconds: the tests of the other go on, and none is lost."""
    project.write(
        test_project="""
            import time
            import pytest

            @pytest.mark.gpu(vram="3GB")
            @pytest.mark.parametrize("i", range(100))
            def test_it(i):
                time.sleep(0.25)
        """
    )
    project.file("conftest.py", REPORTS)
    commit(project)
    slow, other = (hosts(name, Device(total="24GB", used="2GB")) for name in ("slow", "other"))
    report = tmp_path / "r.json"
    arguments = [*on(slow, other), f"--gpu-share-report={report}"]
    with background(project, *arguments) as process:
        await_calls(project, process, 6)
        before = (project.path / "reports").read_text().count(" call ")
        with paused(slow):
            # What it has sent is on its way.
            time.sleep(8)
            after = (project.path / "reports").read_text().count(" call ")
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert " 100 passed" in out
    assert " was lost" not in out
    # Two workers, and a machine that has others to serve.
    assert after - before > 12, out
    assert {test["host"] for test in read_report(report)["tests"]} == {"slow", "other"}


@contextmanager
def paused(host: OtherHost) -> Iterator[None]:
    """All processes of a host stand still."""
    space = Path(f"/proc/{host.first_pid}/ns/pid").readlink()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "ns/pid").readlink() == space:
                found.append(int(process.name))
    assert len(found) > 3
    for pid in found:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def test_workers_that_cannot_start_do_not_hang_the_run(
    project: Project, hosts: Callable[..., OtherHost]
) -> None:
    """A plugin that is missing there: the host takes no part, and the run ends."""
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    project.write(here_only="")
    done = project.command(
        [sys.executable, "-m", "pytest", "-p", "here_only", *on(host)],
    )
    assert done.code == 2, done.out + done.err
    assert "host small was lost: gw" in done.out
    assert 'No module named "here_only"' in done.out.replace("'", '"')
