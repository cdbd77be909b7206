"""What the host can carry: RAM in containers, where page cache is not in use."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_gpushare.gpu import host
from pytest_gpushare.units import GB


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mount point of control groups, of a host with more RAM than any of them has."""
    monkeypatch.setattr(host, "_CGROUPS", tmp_path)
    monkeypatch.setattr(host, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(host, "_meminfo", lambda _key: 512 * GB)
    return tmp_path


def test_page_cache_is_available_in_version_2(groups: Path) -> None:
    """A container of 16 GB with 13 GB of reclaimable cache and 2 GB in use has 14 GB."""
    write(groups, own="0::/", memory__max=16 * GB, memory__current=15 * GB)
    write(groups, memory__stat=f"anon {2 * GB}\ninactive_file {13 * GB}\nactive_file 7")
    assert host.available_ram() == 14 * GB


def test_page_cache_is_available_in_version_1(groups: Path) -> None:
    """The path of the group is the host's; what is mounted is the container's own group."""
    write(groups, own="9:name=systemd:/\n4:memory:/docker/1a2b\n3:cpuset:/")
    write(
        groups / "memory",
        memory__limit_in_bytes=16 * GB,
        memory__usage_in_bytes=15 * GB,
        memory__stat=f"inactive_file 5\ntotal_inactive_file {13 * GB}",
    )
    assert host.available_ram() == 14 * GB


def test_the_tightest_group_above_counts(groups: Path) -> None:
    """As of a job of Slurm, or a unit of systemd."""
    write(groups, own="0::/job.slice/step.scope")
    write(groups / "job.slice", memory__max=8 * GB, memory__current=3 * GB)
    write(groups / "job.slice/step.scope", memory__max=6 * GB, memory__current=2 * GB)
    assert host.available_ram() == 4 * GB
    write(groups / "job.slice", memory__current=7 * GB)
    assert host.available_ram() == GB


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_no_limit(groups: Path, limit: str) -> None:
    write(groups, own="0::/", memory__max=limit, memory__current=15 * GB)
    assert host.available_ram() == 512 * GB


def test_more_cache_than_use(groups: Path) -> None:
    """The figures are read one after the other."""
    write(groups, own="0::/", memory__max=4 * GB, memory__current=GB)
    write(groups, memory__stat=f"inactive_file {2 * GB}")
    assert host.available_ram() == 4 * GB


def test_kind_of_file_system() -> None:
    assert host.file_system(Path("/proc").stat().st_dev) == "proc"
    assert host.file_system(12345) == ""
