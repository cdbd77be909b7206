"""What is checked before a run on several hosts, and what `plan` and `doctor` say of them."""

from __future__ import annotations

import shutil
import socket
import sys
import time
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from simulator import Device

from .conftest import Project
from .other_hosts import SUITE, OtherHost, commit, git, on, skip_where_missing

skip_where_missing()


def bare_environment(host: OtherHost) -> Path:
    """An environment on the host, /tmp/bare there, without any package; its packages' directory."""
    bare = host.tmp / "bare"
    venv.create(bare, with_pip=False)
    (packages,) = bare.glob("lib/python*/site-packages")
    return packages


def test_a_host_that_cannot_take_part_is_one_line(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """Each check, with exit code 4 and within its limit; what was started is ended."""
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    bare_environment(host)
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
        # The server would take a password, and nobody is there to type one.
        host.tx.replace(str(host.config), str(keyless)): "Permission denied (publickey,password)",
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


def test_another_version_is_one_line(project: Project, hosts: Callable[..., OtherHost]) -> None:
    commit(project)
    host = hosts("small", Device(total="24GB", used="2GB"))
    packages = bare_environment(host)
    names = ("pytest", "pytest-xdist", "pytest-gpushare")
    for name in names:
        (packages / f"{name.replace('-', '_')}-1.dist-info").mkdir()
    for other in names:
        for name in names:
            version = "0.0.1" if name == other else metadata.version(name)
            described = packages / f"{name.replace('-', '_')}-1.dist-info" / "METADATA"
            described.write_text(f"Name: {name}\nVersion: {version}\n")
        done = project.pytest(
            "--gpu-share", "--tx", host.tx.replace(host.python, "/tmp/bare/bin/python")
        )
        assert done.code == 4
        here = metadata.version(other)
        assert done.err.strip() == (
            f"ERROR: gpu-share: host small: {other} 0.0.1 is installed there, {here} here: install "
            "the same"
        )


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
    assert "a run would start" not in doctor.out
    line = f"small:{host.root} -F {host.config} python={host.python}"
    project.file("pytest.ini", f"[pytest]\ngpu_share = true\ngpu_share_hosts =\n    {line}\n")
    shutil.copy(project.path / "pytest.ini", host.checkout)
    done = project.pytest()
    assert done.passed == 12, done.out + done.err
    assert "created: 2/2 workers" in done.out
    local = project.pytest("-n", "1", "-k", "nothing")
    assert "this host" not in local.out
    assert "small" not in local.out
