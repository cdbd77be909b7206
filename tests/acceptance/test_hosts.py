"""Runs on several hosts: real sshd on loopback, each host with its own /tmp, devices and Python."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from xml.etree import ElementTree

import pytest
from simulator import Device, Machine
from simulator.child import child_process

from pytest_gpushare.report.reading import read_report

from .conftest import Project
from .other_hosts import Link, OtherHost, missing, other_host

if reason := "CI does not start other hosts" if os.environ.get("CI") else missing():
    pytest.skip(reason, allow_module_level=True)

GB = 1024**3

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
    project.file(".gitignore", "__pycache__/\nreports\n")
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


@pytest.fixture
def two(project: Project, hosts: Callable[..., OtherHost]) -> Callable[[], list[OtherHost]]:
    """Start 1 × 24 GB and 2 × 80 GB, once the project is written."""

    def start() -> list[OtherHost]:
        commit(project)
        small = hosts("small", Device(total="24GB", used="2GB"))
        return [small, hosts("large", Device(total="80GB"), Device(total="80GB"))]

    return start


def on(*found: OtherHost) -> list[str]:
    """The options for these hosts."""
    return ["--gpu-share", *(part for host in found for part in ("--tx", host.tx))]


def names(junit: Path) -> list[str]:
    """The tests in a JUnit file, in order of their names."""
    cases = ElementTree.parse(junit).iter("testcase")
    return sorted(f"{case.get('classname')}::{case.get('name')}" for case in cases)


def test_each_host_is_sized_by_its_own_devices(
    project: Project, two: Callable[[], list[OtherHost]], tmp_path: Path
) -> None:
    """2 + 4 workers, each on a device of its host; the same tests; nothing is left behind."""
    project.write(test_project=SUITE)
    found = two()
    report, here, there = (tmp_path / name for name in ("r.json", "here.xml", "there.xml"))
    done = project.pytest(
        *on(*found), "-v", f"--gpu-share-report={report}", f"--junit-xml={there}", "test_project.py"
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
    local = project.pytest("-p", "no:gpu-share", f"--junit-xml={here}", "--collect-only", "-q")
    assert local.out.count("::test_place") == 12
    assert [name.partition("::")[2] for name in names(there)] == sorted(
        line.rpartition("::")[2] for line in local.out.splitlines() if "::" in line
    )
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

            @pytest.mark.gpu(vram="3GB")
            @pytest.mark.parametrize("i", range(12))
            def test_it(i, gpu_share):
                assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu_share.device
                with gpusim.alloc("2GB"):
                    time.sleep(1.2)
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


def test_a_host_that_cannot_take_part_is_one_line(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """Each check, with exit code 4 and within its limit; what was started is ended."""
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    bare = host.tmp / "bare"
    venv.create(bare, with_pip=False)
    config = host.config.read_text()
    unknown, keyless, silent = (tmp_path / name for name in ("unknown", "keyless", "silent"))
    unknown.write_text(config.replace("small-known", "nothing-known"))
    keyless.write_text(config.replace("small-user", "no-such-key"))
    cases = {
        "gpu-auto*ssh=nowhere.invalid//chdir=/x": "host nowhere.invalid: ssh: Could not resolve",
        host.tx.replace(host.root, "/nowhere"): "host small: there is no directory /nowhere",
        host.tx.replace(host.python, "/no/python"): "host small: /no/python cannot be started",
        host.tx.replace(host.python, "/tmp/bare/bin/python"): "host small: pytest is not installed",
        host.tx.replace(str(host.config), str(unknown)): "host small: Host key verification failed",
        host.tx.replace(str(host.config), str(keyless)): "Permission denied",
        host.tx.replace("gpu-auto*", "gpu-auto*nice=3//"): "nice is not understood",
    }
    for tx, words in cases.items():
        done = project.pytest("--gpu-share", "--tx", tx)
        assert done.code == 4, done.out + done.err
        assert words in done.err
        assert len(done.err.strip().splitlines()) == 1
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        port = listener.getsockname()[1]
        silent.write_text(f"Host small\n  HostName 127.0.0.1\n  Port {port}\n")
        begun = time.monotonic()
        done = project.pytest("--gpu-share", "--tx", host.tx.replace(str(host.config), str(silent)))
        assert done.code == 4
        assert time.monotonic() - begun < 13
        assert "host small: " in done.err


def test_hosts_have_the_same_tests(project: Project, hosts: Callable[..., OtherHost]) -> None:
    """Other uncommitted changes are a warning, an error under strict; another commit is one."""
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    (host.checkout / "test_project.py").write_text("def test_other(): pass\n")
    done = project.pytest(*on(host))
    assert done.passed == 1
    assert "  small: its uncommitted changes differ from those of this host" in done.said
    strict = project.pytest(*on(host), "--gpu-share-strict")
    assert strict.code == 4
    assert "uncommitted changes differ" in strict.err
    git(project.path, "commit", "-qm", "next", "--allow-empty")
    other = project.pytest(*on(host))
    assert other.code == 4
    assert "host small: has commit" in other.err


def test_plan_and_ini(project: Project, hosts: Callable[..., OtherHost]) -> None:
    """`plan` shows every host; the configuration file names them, too; -n is this host alone."""
    project.write(test_project=SUITE)
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    plan = project.command([sys.executable, "-m", "pytest_gpushare", "plan", "--", "--tx", host.tx])
    assert plan.code == 0, plan.err
    assert "  small: 2 GPU workers × 4.5 GB on GPU 0" in plan.out
    doctor = project.command(
        [sys.executable, "-m", "pytest_gpushare", "doctor", "--", "--tx", host.tx]
    )
    assert "small: 2 GPU workers × 4.5 GB on GPU 0" in doctor.out, doctor.out + doctor.err
    gone = project.command(
        [sys.executable, "-m", "pytest_gpushare", "doctor", "--json", "--", "--tx", host.tx + "x"]
    )
    assert "host-unusable" in gone.out, gone.out + gone.err
    line = f"small:{host.root} -F {host.config} python={host.python}"
    project.file("pytest.ini", f"[pytest]\ngpu_share = true\ngpu_share_hosts =\n    {line}\n")
    shutil.copy(project.path / "pytest.ini", host.checkout)
    done = project.pytest()
    assert done.passed == 12, done.out + done.err
    assert "created: 2/2 workers" in done.out
    local = project.pytest("-n", "1", "-k", "nothing")
    assert "this host" not in local.out
    assert "small" not in local.out


LONG = """
    import os
    import time
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(40))
    def test_long(i):
        time.sleep(0.25)
"""


REPORTS = """
    import pathlib

    def pytest_runtest_logreport(report):
        if hasattr(report, "node"):
            with open("reports", "a") as file:
                file.write(f"{report.nodeid} {report.when} {report.outcome}\\n")
"""


def lose(project: Project, found: list[OtherHost], after: int, cut: Callable[[], object]) -> None:
    """Run `LONG` there and lose the first host after so many tests; every test is reported."""
    reports = project.path / "reports"
    # pytest-rerunfailures has its workers connect to the controller's port on their own loopback.
    left_out = ["-p", "no:cacheprovider", "-p", "no:rerunfailures"]
    command = [sys.executable, "-m", "pytest", *left_out, *on(*found)]
    with child_process(
        command,
        cwd=project.path,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        until = time.monotonic() + 60
        while not reports.exists() or reports.read_text().count(" call ") < after:
            assert time.monotonic() < until
            assert process.poll() is None, process.communicate(timeout=10)[0]
            time.sleep(0.05)
        cut()
        out, _ = process.communicate(timeout=120)
    assert "INTERNALERROR" not in out, out
    rows = [line.split() for line in reports.read_text().splitlines()]
    crashed = [row for row in rows if row[1] == "???"]
    calls = [row[0] for row in rows if row[1] == "call"]
    assert len(crashed) <= 2
    assert sorted({*calls, *(row[0] for row in crashed)}) == sorted(
        f"test_project.py::test_long[{i}]" for i in range(40)
    ), out
    assert len(calls) == len(set(calls))
    assert len({(row[0], row[1]) for row in rows}) == len(rows)
    assert f"gpu-share: host {found[0].name} was lost: " in out
    assert process.returncode == (1 if crashed else 0)


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


def test_another_minor_version_of_python(project: Project, hosts: Callable[..., OtherHost]) -> None:
    """The environment that GPUSHARE_TEST_OTHER_VENV names has the same packages."""
    prefix = os.environ.get("GPUSHARE_TEST_OTHER_VENV")
    if not prefix:
        pytest.skip("no other Python: GPUSHARE_TEST_OTHER_VENV names its environment")
    project.write(test_project=SUITE)
    commit(project)
    found = [
        hosts("small", Device(total="24GB", used="2GB")),
        hosts("other", Device(total="24GB", used="2GB"), prefix=prefix),
    ]
    done = project.pytest(*on(*found), "-v")
    assert done.code == 0, done.out + done.err
    assert done.passed == 12
    versions = set(re.findall(r"\[gw[0-9]\] linux Python (3\.[0-9]+)", done.out))
    assert len(versions) == 2, versions


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


def test_a_run_on_this_host_imports_nothing_of_this(project: Project) -> None:
    """Neither an idle run nor an active one knows of other hosts."""
    project.file(
        "conftest.py",
        """
        import sys

        def pytest_sessionfinish():
            found = [name for name in sys.modules if "hosts" in name and "gpushare" in name]
            print("imported:", found)
        """,
    )
    for arguments in (["-s"], ["-s", "--gpu-share", "-n1"]):
        done = project.pytest(*arguments)
        assert "imported: []" in done.out
