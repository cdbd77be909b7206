"""What tells one process from another that had its number before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from simulator.child import wait_for

from pytest_gpushare.gpu.host import identity, pid_space

pytestmark = pytest.mark.skipif(identity(os.getpid()) is None, reason="no /proc here")


def test_zombie_is_dead() -> None:
    """A process that nobody has waited for holds nothing any more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: identity(process.pid) is None)
    process.wait(30)


def test_identity_names_boot_namespace_and_start() -> None:
    space, _, start = str(identity(os.getpid())).rpartition("/")
    assert space == pid_space()
    assert start.isdigit()
    assert identity(2**22 + 1) is None
