"""Runs on several hosts: real sshd on loopback, each host with its own /tmp, devices and Python."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from simulator import Device, Machine

from pytest_gpushare.report.reading import read_report

from .conftest import Project
from .other_hosts import (
    LONG,
    SUITE,
    OtherHost,
    commit,
    git,
    on,
    other_python,
    outcomes,
    skip_where_missing,
)

skip_where_missing()

GB = 1024**3


def test_each_host_is_sized_by_its_own_devices(
    project: Project, two: Callable[[], list[OtherHost]], tmp_path: Path
) -> None:
    """2 + 4 workers, each on a device of its host; the same tests; nothing is left behind."""
    project.write(test_project=SUITE)
    found = two()
    report = tmp_path / "r.json"
    summary, base = tmp_path / "summary.md", f"gpu-share-{os.getpid()}"
    done = project.pytest(
        *on(*found),
        "-v",
        f"--gpu-share-report={report}",
        f"--basetemp=/tmp/{base}",
        "test_project.py",
        GITHUB_ACTIONS="true",
        GITHUB_STEP_SUMMARY=str(summary),
    )
    assert done.code == 0, done.out + done.err
    assert done.passed == 12
    assert done.said[0].startswith("gpu-share: 6 GPU workers (2 × 4.5 GB, 4 × 32.5 GB) = 139.0 GB")
    assert [line.partition(" on ")[0] for line in done.said[1:3]] == [
        "  small: 2 GPU workers × 4.5 GB",
        "  large: 4 GPU workers × 32.5 GB",
    ]
    document = read_report(report)
    assert [host["gpu_workers"] for host in document["hosts"]] == [2, 4]
    devices = {device["uuid"]: device["host"] for device in document["devices"]}
    assert sorted(devices.values()) == ["large", "large", "small"]
    assert len(document["tests"]) == 12
    for test in document["tests"]:
        assert test["host"] == devices[test["device"]]
    assert {worker["host"] for worker in document["workers"]} == {"small", "large"}
    ran = Counter(test["host"] for test in document["tests"])
    for name, workers in (("small", 2), ("large", 4)):
        assert f"| {name} | {workers} | 0 | {ran[name]} |" in summary.read_text()
    for host, worker in zip(found, ("gw0", "gw2"), strict=True):
        assert (host.tmp / f"{base}-{worker}").is_dir()
    assert all(1 < worker["pid"] < 2**22 for worker in document["workers"])
    for host in found:
        assert git(host.checkout, "status", "--porcelain") == ""


def test_needs_are_admitted_by_the_devices_of_each_host(
    project: Project, two: Callable[[], list[OtherHost]], tmp_path: Path
) -> None:
    """A test of 20 GB fits on the large host alone; VRAM is taken there and seen from here."""
    project.write(
        test_project="""
            import time
            import gpusim
            import pytest

            @pytest.mark.gpu(vram="20GB")
            @pytest.mark.parametrize("i", range(4))
            def test_large(i):
                with gpusim.alloc("18GB"):
                    time.sleep(1.5)

            @pytest.mark.gpu(vram="2GB")
            @pytest.mark.parametrize("i", range(8))
            def test_small(i):
                with gpusim.alloc("1GB"):
                    time.sleep(0.3)
        """
    )
    found = two()
    report = tmp_path / "r.json"
    done = project.pytest(*on(*found), f"--gpu-share-report={report}")
    assert done.code == 0, done.out + done.err
    tests = read_report(report)["tests"]
    hosts = {test["nodeid"].rpartition("::")[2]: test["host"] for test in tests}
    assert len(hosts) == 12
    assert {hosts[f"test_large[{i}]"] for i in range(4)} == {"large"}
    assert "small" in {hosts[f"test_small[{i}]"] for i in range(8)}
    document = read_report(report)
    peaks = [each["peak_workers_bytes"] for each in document["devices"] if each["host"] == "large"]
    assert max(peak or 0 for peak in peaks) > 18 * 1024**3


def test_this_host_takes_part(
    project: Project,
    hosts: Callable[..., OtherHost],
    machine_with: Callable[..., Machine],
    tmp_path: Path,
) -> None:
    """`popen` beside another host: devices of one UUID on both are two devices."""
    machine_with(Device(total="24GB", used="2GB"))
    project.write(
        test_project="""
            import os
            import time
            import gpusim
            import pytest
            from pytest_gpushare.leases.ledger import Ledger, default_directory

            @pytest.mark.gpu(vram="3GB")
            @pytest.mark.parametrize("i", range(12))
            def test_it(i, gpu_share):
                assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu_share.device
                with gpusim.alloc("2GB"):
                    time.sleep(1.2)
                # Other sessions of each host read the record, and find the workers there in it.
                (session,) = Ledger(default_directory(), is_reader=True).look()
                workers = [worker.pid for worker in session.record.workers]
                assert os.getpid() in workers
                assert len(workers) == 2
        """
    )
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    report = tmp_path / "r.json"
    command = [*on(host), "--tx", "gpu-auto*popen", "-v", f"--gpu-share-report={report}"]
    done = project.pytest(*command)
    assert done.code == 0, done.out + done.err
    assert "  this host: 2 GPU workers × 4.5 GB" in done.out
    document = read_report(report)
    assert {test["host"] for test in document["tests"]} == {None, "small"}
    assert len({device["uuid"] for device in document["devices"]}) == 2
    peaks = [device["peak_workers_bytes"] or 0 for device in document["devices"]]
    # At least one test's VRAM and its context; VRAM of one device is not counted on the other.
    assert all(2 * GB < peak < 6 * GB for peak in peaks), peaks


def test_ollama_is_each_hosts_own(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """The server on the loopback of a host is asked there, and monitored through its connection."""
    project.write(test_project=LONG)
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"), ollama={"qwen2.5:14b": "10.8GB"})
    report = tmp_path / "r.json"
    done = project.pytest(*on(host), f"--gpu-share-report={report}")
    assert done.code == 0, done.out + done.err
    assert "; Ollama: qwen2.5:14b 10.8 GB, 100 % on GPU" in done.out
    assert "gpu-share: small: Ollama kept qwen2.5:14b on the GPU (10.8 GB, 100 %)" in done.out


def test_arguments_mean_the_same_there(
    project: Project, two: Callable[[], list[OtherHost]]
) -> None:
    """Called in a subdirectory, with an absolute path; an ini file with relative paths."""
    project.file(
        "pytest.ini", "[pytest]\npythonpath = lib\ntestpaths = tests\nmarkers =\n    slow: slow\n"
    )
    for name in ("lib", "tests/deep"):
        (project.path / name).mkdir(parents=True)
    (project.path / "lib/helper.py").write_text("VALUE = 1\n")
    body = """
import os
import helper
import pytest

@pytest.mark.parametrize("i", range(4))
def test_one(i):
    assert helper.VALUE == 1
    assert os.getcwd().endswith("/checkout/tests")
    assert "project" not in helper.__file__

def test_two():
    assert False
"""
    (project.path / "tests/deep/test_deep.py").write_text(body)
    (project.path / "tests/test_top.py").write_text("def test_top(): assert False\n")
    found = two()
    absolute = project.path / "tests" / "deep" / "test_deep.py"
    inside = Project(project.path / "tests", project.environment)
    (project.path / "tests" / "test_project.py").unlink()
    done = inside.pytest(*on(*found), "-k", "one", str(absolute))
    assert done.code == 0, done.out + done.err
    assert done.passed == 4
    done = inside.pytest(*on(*found), "-x", "deep/test_deep.py::test_two")
    # As stock xdist, which counts -x as an interruption.
    assert done.code == 2, done.out + done.err
    assert "tests/deep/test_deep.py::test_two" in done.out.replace(
        "FAILED deep", "FAILED tests/deep"
    )
    for host in found:
        assert git(host.checkout, "status", "--porcelain") == ""


def test_last_failed_tests_are_run_there(
    project: Project, two: Callable[[], list[OtherHost]]
) -> None:
    """pytest's cache is this host's: `--lf` selects the same tests everywhere."""
    project.write(
        test_project="""
            import pytest

            @pytest.mark.parametrize("i", range(6))
            def test_it(i):
                assert i not in (2, 4)
        """
    )
    found = two()
    command = [sys.executable, "-m", "pytest", *on(*found)]
    first = project.command(command)
    assert "2 failed, 4 passed" in first.out, first.out + first.err
    again = project.command([*command, "--lf"])
    assert "2 failed" in again.out
    assert "passed" not in again.out.splitlines()[-1]
    for host in found:
        assert git(host.checkout, "status", "--porcelain") == ""


def test_what_tests_took_there_is_known_in_the_next_run(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """Needs that were measured on another host admit the same tests there."""
    project.write(
        test_project="""
            import pytest
            import torch

            @pytest.mark.gpu
            @pytest.mark.parametrize("size", [3, 2])
            def test_takes(size):
                torch.empty(size * 1024**3, dtype=torch.uint8, device="cuda")
        """
    )
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"), frameworks=True)
    presets = ("no-ollama", "packed")
    arguments = [*on(host), *(f"--gpu-share-preset={name}" for name in presets)]
    for source in ("slot", "learned"):
        report = tmp_path / f"{source}.json"
        cached = ("-p", "cacheprovider", f"--gpu-share-report={report}")
        done = project.pytest(*arguments, *cached)
        assert (done.code, done.passed) == (0, 2), done.out + done.err
        tests = {test["nodeid"]: test for test in read_report(report)["tests"]}
        assert {(t["host"], t["need_source"]) for t in tests.values()} == {("small", source)}
    need = tests["test_project.py::test_takes[3]"]["need_bytes"]
    assert need == (3 * GB + 600 * 1024**2) * 115 // 100
    assert git(host.checkout, "status", "--porcelain") == ""


def test_another_minor_version_of_python(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """One host has this version of Python, the other host another one."""
    prefix = other_python(tmp_path / "other-python")
    if prefix is None:
        pytest.skip("no other Python 3 here that can use the packages of this environment")
    project.write(test_project=SUITE)
    commit(project)
    found = [
        hosts("small", Device(total="24GB", used="2GB")),
        hosts("other", Device(total="24GB", used="2GB"), prefix=str(prefix)),
    ]
    done = project.pytest(*on(*found), "-v")
    assert done.code == 0, done.out + done.err
    assert done.passed == 12
    versions = set(re.findall(r"\[gw[0-9]\] linux Python (3\.[0-9]+)", done.out))
    assert len(versions) == 2, versions


def test_selections_and_results_are_those_of_a_run_here(
    project: Project, two: Callable[[], list[OtherHost]], tmp_path: Path
) -> None:
    """Names and outcomes in JUnit's file, by node ids, `-k`, `-m`, and with every outcome."""
    project.file("pytest.ini", "[pytest]\nmarkers =\n    slow: slow\n")
    (project.path / "sub").mkdir()
    project.write(
        test_project="""
            import pytest

            @pytest.fixture
            def broken(tmp_path):
                (tmp_path / "file").write_text("x")
                yield
                raise OSError("teardown")

            @pytest.mark.parametrize("name", ["a b", "ü/ß", "x::y", "[1]"])
            def test_names(name, tmp_path_factory):
                (tmp_path_factory.mktemp("d") / "file").write_text(name)

            class TestClass:
                @pytest.mark.slow
                @pytest.mark.gpu(vram="2GB")
                def test_method(self, tmp_path):
                    (tmp_path / "file").write_text("x")

                @pytest.mark.slow
                def test_failing(self):
                    assert False

            def test_error(broken): pass

            @pytest.mark.skip(reason="not now")
            def test_skipped(): pass

            @pytest.mark.xfail(reason="known")
            def test_xfail(): assert False
        """,
    )
    (project.path / "sub/test_other.py").write_text("def test_names(): pass\n")
    found = two()
    for arguments in (
        [],
        ["-k", "names and not x"],
        ["-m", "slow"],
        ["sub", "test_project.py::TestClass"],
    ):
        results = []
        for way in (["-p", "no:gpu-share", "-n", "2"], on(*found)):
            junit = tmp_path / "junit.xml"
            done = project.pytest(*way, f"--junit-xml={junit}", *arguments)
            results.append((done.code, outcomes(junit)))
        assert results[0] == results[1], arguments
        assert len(results[0][1]) > 1
    for host in found:
        assert git(host.checkout, "status", "--porcelain") == ""


def test_a_replaced_worker_gets_the_same_place(
    project: Project, two: Callable[[], list[OtherHost]], tmp_path: Path
) -> None:
    """Each slot of each host has a worker again after its first one has died."""
    project.write(
        test_project="""
            import os
            import time
            import pytest

            @pytest.mark.gpu
            @pytest.mark.parametrize("i", range(24))
            def test_it(i, gpu_share, worker_id):
                assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu_share.device
                if int(worker_id[2:]) < 6:
                    os._exit(1)
                time.sleep(0.5)
        """
    )
    found = two()
    report = tmp_path / "r.json"
    done = project.pytest(*on(*found), f"--gpu-share-report={report}")
    assert done.code == 1, done.out + done.err
    workers = read_report(report)["workers"]
    died = sorted((w["host"], w["device"], w["slot_bytes"]) for w in workers if w["crashed"])
    lived = sorted((w["host"], w["device"], w["slot_bytes"]) for w in workers if not w["crashed"])
    assert len(died) == 6
    assert died == lived


def test_out_of_memory_is_tried_again_alone(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """Two tests that do not fit beside each other on a device of another host."""
    project.write(
        test_project="""
            import time
            import gpusim
            import pytest

            @pytest.mark.gpu
            @pytest.mark.parametrize("i", range(2))
            def test_large(i):
                # Both have begun by then.
                time.sleep(1)
                with gpusim.alloc("12GB"):
                    time.sleep(2)
        """
    )
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    report = tmp_path / "r.json"
    done = project.pytest(*on(host), f"--gpu-share-report={report}")
    assert done.code == 0, done.out + done.err
    texts = {event["kind"]: event["text"] for event in read_report(report)["events"]}
    assert "passed alone" in texts["oom-retried"]
    # Who held what is known of processes there, too, as of that moment.
    assert re.search(
        r"had 9\.[0-9]+ GB of 24\.0 GB free: held by gw[01] 12\.[0-9]+ GB", texts["oom"]
    )


def test_models_are_used_where_they_are(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """A test that uses a model runs on a host whose server has it, with that server's address."""
    project.write(
        test_project="""
            import urllib.request
            import pytest

            @pytest.mark.ollama(model="qwen2.5:14b")
            @pytest.mark.parametrize("i", range(4))
            def test_model(i, ollama):
                with urllib.request.urlopen(f"{ollama.base_url}/api/tags", timeout=5) as answer:
                    assert b"qwen2.5:14b" in answer.read()

            @pytest.mark.ollama(model="nobody-has:1b")
            def test_missing(ollama):
                assert False

            @pytest.mark.parametrize("i", range(4))
            def test_any(i):
                pass
        """
    )
    commit(project)
    found = [
        hosts("one", Device(total="24GB", used="2GB")),
        hosts("two", Device(total="24GB", used="2GB"), ollama={"qwen2.5:14b": "10.8GB"}),
    ]
    report = tmp_path / "r.json"
    done = project.pytest(*on(*found), "-rs", f"--gpu-share-report={report}")
    assert done.code == 0, done.out + done.err
    assert done.passed == 8
    assert "1 skipped" in done.out
    tests = read_report(report)["tests"]
    assert {test["host"] for test in tests if "test_model" in test["nodeid"]} == {"two"}


def test_a_host_leases_what_its_workers_may_take(
    project: Project, hosts: Callable[..., OtherHost]
) -> None:
    """Another session there sees the lease, and the workers whose VRAM counts towards it."""
    project.write(
        test_project="""
            import time
            import gpusim
            import pytest

            @pytest.mark.gpu
            @pytest.mark.parametrize("i", range(2))
            def test_it(i):
                from pytest_gpushare.leases.ledger import Ledger, default_directory
                with gpusim.alloc("3GB"):
                    time.sleep(2.5)
                    (session,) = Ledger(default_directory(), is_reader=True).look()
                    record = session.record
                    assert {w.role for w in record.workers} == {"gpu"}
                    assert len(record.workers) == 2
                    assert all(w.pid for w in record.workers)
                    assert record.leased == 9 * 1024**3
        """
    )
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    done = project.pytest(*on(host))
    assert done.code == 0, done.out + done.err
    assert done.passed == 2


def test_times_are_put_on_the_clock_of_this_host(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """The clock of a host is an hour ahead: its tests ran when they ran."""
    project.write(test_project=LONG)
    commit(project)
    found = [
        hosts("right", Device(total="24GB", used="2GB")),
        hosts("ahead", Device(total="24GB", used="2GB"), ahead=3600.0),
    ]
    report = tmp_path / "r.json"
    done = project.pytest(*on(*found), f"--gpu-share-report={report}")
    assert done.code == 0, done.out + done.err
    document = read_report(report)
    assert {test["host"] for test in document["tests"]} == {"right", "ahead"}
    for test in document["tests"]:
        assert 0 < test["start_s"] < test["end_s"] < document["run"]["duration_s"], test
