"""Other hosts for tests: each a real sshd on loopback, in a mount namespace of its own.

A host has its own /tmp, with its checkout, its environment of Python under another path, and its
simulated devices in it; nothing of the controller's /tmp is there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from simulator import Device, Machine
from simulator.child import child_process

from .conftest import FRAMEWORKS, XDIST_HAS_PX, Project, clean_environment, closed_port

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
_NAMESPACES = ("unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc")
SIMULATOR = Path(__file__).parents[1] / "simulator"

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

REPORTS = """
    import pathlib

    def pytest_runtest_logreport(report):
        if hasattr(report, "node"):
            with open("reports", "a") as file:
                file.write(f"{report.nodeid} {report.when} {report.outcome}\\n")
"""

LONG = """
    import os
    import time
    import pytest

    @pytest.mark.gpu
    @pytest.mark.parametrize("i", range(40))
    def test_long(i):
        time.sleep(0.25)
"""


def missing() -> str:
    """Why there can be no other host here; empty where there can."""
    if SSHD is None:
        return "no sshd: install OpenSSH's server (Debian: openssh-server)"
    if not XDIST_HAS_PX:
        return "this pytest-xdist has no --px"
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "no namespaces"
    if any(Path("/tmp") in place.parents for place in (SIMULATOR, Path(sys.prefix))):
        return "another host has a /tmp of its own, and the tests or their Python are in this one's"
    done = subprocess.run(
        [*_NAMESPACES, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10
    )
    return "" if done.returncode == 0 else "namespaces are not allowed here"


def skip_where_missing() -> None:
    """Skip a module of tests with other hosts where there can be none, and in continuous
    integration."""
    if reason := "CI does not start other hosts" if os.environ.get("CI") else missing():
        pytest.skip(reason, allow_module_level=True)


def other_python(directory: Path) -> Path | None:
    """An environment in `directory` of another minor version of Python, with the packages of this.

    Its interpreter is that of `GPUSHARE_TEST_OTHER_PYTHON`, or the first found on `PATH` or among
    pyenv's that can import them; None where there is none.
    """
    here = Path(pytest.__file__).parents[1]
    given = os.environ.get("GPUSHARE_TEST_OTHER_PYTHON")
    minors = [minor for minor in range(20, 9, -1) if minor != sys.version_info.minor]
    found = [shutil.which(f"python3.{minor}") for minor in minors]
    found += [
        str(path)
        for minor in minors
        for path in Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python")
    ]
    use = f"import site; site.addsitedir({str(here)!r})"
    check = "import pytest, xdist, httpx, pynvml, pytest_gpushare, sys; print(sys.version_info[1])"
    for python in [given] if given else filter(None, found):
        done = subprocess.run([python, "-c", f"{use}\n{check}"], capture_output=True, timeout=60)
        if done.returncode or int(done.stdout) == sys.version_info.minor:
            continue
        subprocess.run([python, "-m", "venv", "--without-pip", directory], check=True, timeout=60)
        (packages,) = directory.glob("lib/python*/site-packages")
        (packages / "here.pth").write_text(use + "\n")
        return directory
    return None


@dataclass
class OtherHost:
    """A host that answers to ssh."""

    name: str
    tmp: Path
    """Its /tmp, as seen from here; of a host that has this one's, a directory in it."""
    machine: Machine
    config: Path
    """The configuration of ssh in which it has its name."""
    environment: Mapping[str, str]
    process: subprocess.Popen[str] | None = None

    @property
    def checkout(self) -> Path:
        """The project on the host, as seen from here."""
        return self.tmp / f"srv-{self.name}" / "checkout"

    @property
    def root(self) -> str:
        """The project on the host, as the host sees it."""
        return f"/tmp/srv-{self.name}/checkout"

    @property
    def python(self) -> str:
        """The host's Python, as the host sees it."""
        return f"/tmp/venv-{self.name}/bin/python"

    @property
    def first_pid(self) -> int:
        """The process in which sshd runs, as this host numbers it."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(children.read_text().split()[0])

    @property
    def tx(self) -> str:
        """The value of `--tx`."""
        return f"gpu-auto*ssh=-F {self.config} {self.name}//chdir={self.root}//python={self.python}"


class Link:
    """A network between this host and one other, which can be cut."""

    def __init__(self, number: int) -> None:
        self.name = f"gs{os.getpid() % 100000}n{number}"
        self._net = f"10.77.{os.getpid() % 250}"
        self.address = f"{self._net}.2"
        self.inside = ("ip", "netns", "exec", self.name)

    def __enter__(self) -> Link:
        self._ip("netns", "add", self.name)
        self._ip("link", "add", f"{self.name}a", "type", "veth", "peer", "name", f"{self.name}b")
        self._ip("link", "set", f"{self.name}b", "netns", self.name)
        self._ip("addr", "add", f"{self._net}.1/24", "dev", f"{self.name}a")
        self._ip("link", "set", f"{self.name}a", "up")
        for words in (
            ("addr", "add", f"{self.address}/24", "dev", f"{self.name}b"),
            ("link", "set", f"{self.name}b", "up"),
            ("link", "set", "lo", "up"),
        ):
            self._ip("netns", "exec", self.name, "ip", *words)
        return self

    def __exit__(self, *_: object) -> None:
        for words in (("link", "del", f"{self.name}a"), ("netns", "del", self.name)):
            subprocess.run(["ip", *words], capture_output=True, timeout=10)

    def cut(self) -> None:
        """Nothing arrives any more, in either direction, and nobody is informed."""
        self._ip("netns", "exec", self.name, "ip", "link", "set", f"{self.name}b", "down")

    def _ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@contextmanager
def other_host(
    directory: Path,
    name: str,
    nvml: Path,
    *devices: Device,
    cpus: int = 64,
    ollama: Mapping[str, str] | None = None,
    has_loaded: bool = True,
    keep_alive: str = "5m",
    prefix: str = sys.prefix,
    link: Link | None = None,
    is_apart: bool = True,
    ahead: float = 0,
    frameworks: bool = False,
) -> Iterator[OtherHost]:
    """A host with these devices, while the block lasts.

    `ollama`: models that its server has, and has loaded where it `has_loaded` them; it keeps one
    for `keep_alive`. `prefix`: its environment of Python. `link`: the network by which it is
    reached; None: loopback. `is_apart`: whether it has a /tmp of its own.
    `ahead`: seconds that its clock is ahead of this one. `frameworks`: whether the stand-ins of
    torch, CuPy and JAX are installed there.
    """
    address = link.address if link else "127.0.0.1"
    tmp = directory / name
    there = "/tmp" if is_apart else str(tmp)
    venv, home = tmp / f"venv-{name}", tmp / "home"
    for each in (venv, home, tmp / "nvml"):
        each.mkdir(parents=True)
    shutil.copytree(nvml, tmp / "nvml", dirs_exist_ok=True)
    machine = Machine.create(tmp / "vram", devices)
    port = closed_port()
    config = _keys(directory, name, address, port)
    ollama_port = closed_port()
    stand_ins = [FRAMEWORKS] if frameworks else []
    environment = {
        "HOME": f"{there}/home",
        "GPUSHARE_SIM_STATE": f"{there}/vram",
        # Of a host that has this one's /tmp the sessions are others, too.
        "PYTEST_GPUSHARE_LEASES": f"{there}/leases",
        "LD_LIBRARY_PATH": f"{there}/nvml",
        "PYTHONPATH": os.pathsep.join(
            map(str, (SIMULATOR.parent, SIMULATOR / "path", f"{there}/clock", *stand_ins))
        ),
        "PYTEST_XDIST_AUTO_NUM_WORKERS": str(cpus),
        "OLLAMA_HOST": f"127.0.0.1:{ollama_port}",
        "PATH": os.environ["PATH"],
        "TMPDIR": "/tmp",
    }
    (tmp / "clock").mkdir()
    if ahead:
        (tmp / "clock/sitecustomize.py").write_text(
            f"import time\nreal = time.time\ntime.time = lambda: real() + {ahead}\n"
        )
    server = _server(tmp, there, name, address, port, environment)
    mounts = f"mount --bind {prefix} {venv}{f' && mount --rbind {tmp} /tmp' if is_apart else ''}"
    script = (
        f"{mounts} || exit 1; "
        f"{_serving(ollama, ollama_port, environment, keep_alive, has_loaded=has_loaded)}"
        f"mkdir -p /run/sshd && exec {SSHD} -D -e -f {server}"
    )
    with (
        (directory / f"{name}.log").open("w") as log,
        child_process(
            # With process numbers of its own; whatever runs there ends with its first process.
            [*(link.inside if link else ()), *_NAMESPACES, "sh", "-c", script],
            env={**clean_environment(), "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            text=True,
        ) as process,
    ):
        host = OtherHost(name, tmp, machine, config, environment, process)
        _wait_for(address, port, directory / f"{name}.log")
        if ollama:
            _wait_for("127.0.0.1", ollama_port, tmp / "ollama.log", 30)
        try:
            yield host
        finally:
            process.kill()


def _keys(directory: Path, name: str, address: str, port: int) -> Path:
    """Keys for the host and for its user; returns a configuration of ssh."""
    for kind in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / f"{name}-{kind}"],
            check=True,
            timeout=30,
        )
    public = (directory / f"{name}-host.pub").read_text()
    known = directory / f"{name}-known"
    known.write_text(f"[{address}]:{port} {public}")
    config = directory / f"{name}-ssh"
    config.write_text(
        textwrap.dedent(
            f"""
            Host {name}
                HostName {address}
                Port {port}
                IdentityFile {directory}/{name}-user
                IdentitiesOnly yes
                UserKnownHostsFile {known}
                StrictHostKeyChecking yes
            """
        )
    )
    return config


def _server(
    own: Path, there: str, name: str, address: str, port: int, environment: Mapping[str, str]
) -> str:
    """The path of sshd's configuration, on the host; `own` is its directory `there` from here."""
    for file in (f"{name}-host", f"{name}-user.pub"):
        shutil.copy(own.parent / file, own / file)
    (own / f"{name}-host").chmod(0o600)
    config = own / "sshd_config"
    variables = " ".join(f'{key}="{value}"' for key, value in environment.items())
    config.write_text(
        textwrap.dedent(
            f"""
            Port {port}
            ListenAddress {address}
            HostKey {there}/{name}-host
            AuthorizedKeysFile {there}/{name}-user.pub
            StrictModes no
            PermitRootLogin yes
            PasswordAuthentication yes
            KbdInteractiveAuthentication no
            PidFile none
            UsePAM no
            SetEnv {variables}
            """
        )
    )
    return f"{there}/sshd_config"


def _serving(
    models: Mapping[str, str] | None,
    port: int,
    environment: Mapping[str, str],
    keep_alive: str,
    *,
    has_loaded: bool,
) -> str:
    """The start of a simulated Ollama, as a part of the host's script."""
    if not models:
        return ""
    command = [sys.executable, "-m", "simulator.ollama", "--port", str(port)]
    command += ["--models", json.dumps(models), "--keep-alive", keep_alive]
    command += [word for name in models for word in ("--load", name) if has_loaded]
    variables = [f"{key}={value}" for key, value in environment.items()]
    return f"{shlex.join(['env', *variables, *command])} > /tmp/ollama.log 2>&1 & "


def _wait_for(address: str, port: int, log: Path, limit: float = 10) -> None:
    until = time.monotonic() + limit
    while True:
        with socket.socket() as client:
            client.settimeout(1)
            if client.connect_ex((address, port)) == 0:
                return
        if time.monotonic() > until:
            raise RuntimeError(f"sshd does not listen: {log.read_text()}")
        time.sleep(0.05)


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


def on(*found: OtherHost) -> list[str]:
    """The options for these hosts."""
    return ["--gpu-share", *(part for host in found for part in ("--tx", host.tx))]


HOLD = """
import sys
from pytest_gpushare.leases import acquire
with acquire(0, sys.argv[1]):
    print("leased", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holding(command: list[str], size: str, **options: object) -> Iterator[Callable[[], object]]:
    """A process that has leased so much; the result has it give that back."""
    with child_process(
        [*command, size],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while (said := process.stdout.readline()).startswith("gpu-share: waiting for "):
            pass
        assert said == "leased\n", said + process.communicate(timeout=10)[0]
        yield process.stdin.close


def there(host: OtherHost) -> list[str]:
    """The command with which a process of another session leases on a host."""
    return ["ssh", "-F", str(host.config), host.name, f"{host.python} -c '{HOLD}'"]


def outcomes(junit: Path) -> list[tuple[str, list[str]]]:
    """The tests in a JUnit file, in order of their names, with what went wrong in each."""
    cases = ElementTree.parse(junit).iter("testcase")
    return sorted(
        (f"{case.get('classname')}::{case.get('name')}", [each.tag for each in case])
        for case in cases
    )


@contextmanager
def background(project: Project, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A run in the background; its standard error comes with its output."""
    # pytest-rerunfailures has its workers connect to the controller's port on their own loopback.
    left_out = ("-p", "no:cacheprovider", "-p", "no:rerunfailures")
    with child_process(
        [sys.executable, "-m", "pytest", *left_out, *arguments],
        cwd=project.path,
        env=project.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield process


def await_calls(project: Project, process: subprocess.Popen[str], least: int) -> None:
    """Wait until so many tests of a run with `REPORTS` have been called."""
    reports, until = project.path / "reports", time.monotonic() + 90
    while not reports.exists() or reports.read_text().count(" call ") < least:
        assert process.poll() is None, process.communicate(timeout=10)[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def lose(project: Project, found: list[OtherHost], after: int, cut: Callable[[], object]) -> None:
    """Run `LONG` there and lose the first host after so many tests; every test is reported."""
    with background(project, *on(*found)) as process:
        await_calls(project, process, after)
        cut()
        out, _ = process.communicate(timeout=120)
    assert "INTERNALERROR" not in out, out
    rows = [line.split() for line in (project.path / "reports").read_text().splitlines()]
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
