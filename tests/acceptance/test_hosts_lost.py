"""Hosts that are lost during a run on several, and workers that cannot start there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from simulator import Device

from .conftest import Project
from .other_hosts import LONG, REPORTS, Link, OtherHost, commit, lose, missing, on

if reason := "CI does not start other hosts" if os.environ.get("CI") else missing():
    pytest.skip(reason, allow_module_level=True)


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
