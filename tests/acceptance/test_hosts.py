"""Runs on several hosts: real sshd on loopback, each host with its own /tmp, devices and Python."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from simulator import Device

from .conftest import Project
from .other_hosts import OtherHost, missing, other_host

if reason := missing():
    pytest.skip(reason, allow_module_level=True)

SUITE = """
    import os
    import pytest

    @pytest.mark.parametrize("i", range(12))
    @pytest.mark.gpu
    def test_place(i, gpu_share, tmp_path, record_property):
        (tmp_path / "file").write_text("x")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu_share.device
        record_property("device", gpu_share.device)
"""


def git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


def commit(project: Project) -> None:
    project.file(".gitignore", "__pycache__/\n")
    git(project.path, "init", "-q")
    git(project.path, "add", "-A")
    git(project.path, "commit", "-qm", "all")


def clone(project: Project, host: OtherHost) -> None:
    """The project as it is, on a host."""
    git(project.path, "clone", "-q", str(project.path), str(host.checkout))


@pytest.fixture
def hosts(
    tmp_path: Path, project: Project, nvml_library: Path
) -> Iterator[Callable[..., OtherHost]]:
    """Start a host with these devices; it has the project as it is committed."""
    with ExitStack() as stack:

        def start(name: str, *devices: Device, **options: object) -> OtherHost:
            host = stack.enter_context(
                other_host(tmp_path / "hosts", name, nvml_library, *devices, **options)  # type: ignore[arg-type]
            )
            clone(project, host)
            return host

        (tmp_path / "hosts").mkdir()
        yield start


def test_each_host_is_sized_by_its_own_devices(
    project: Project, hosts: Callable[..., OtherHost]
) -> None:
    """1 × 24 GB and 2 × 80 GB: 2 + 4 workers, each on a device of its host; nothing is left."""
    project.write(test_project=SUITE)
    commit(project)
    small = hosts("small", Device(total="24GB", used="2GB"))
    large = hosts("large", Device(total="80GB"), Device(total="80GB"))
    done = project.pytest(
        "--gpu-share", "--tx", small.tx, "--tx", large.tx, "-v", "test_project.py"
    )
    assert done.code == 0, done.out + done.err
    print(done.out)
    assert done.passed == 12
    assert "6 GPU workers" in done.out
    for host in (small, large):
        assert git(host.checkout, "status", "--porcelain") == ""
