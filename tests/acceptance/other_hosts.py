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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from simulator import Device, Machine
from simulator.child import child_process

from .conftest import clean_environment, closed_port

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
_NAMESPACES = ("unshare", "-m", "-p", "-f", "--kill-child", "--mount-proc")
SIMULATOR = Path(__file__).parents[1] / "simulator"


def missing() -> str:
    """Why there can be no other host here; empty where there can."""
    if SSHD is None:
        return "no sshd: install OpenSSH's server (Debian: openssh-server)"
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return "no namespaces"
    done = subprocess.run(
        [*_NAMESPACES, "true"], stdin=subprocess.DEVNULL, capture_output=True, timeout=10
    )
    return "" if done.returncode == 0 else "namespaces are not allowed here"


@dataclass
class OtherHost:
    """A host that answers to ssh."""

    name: str
    tmp: Path
    """Its /tmp, as seen from here."""
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
    prefix: str = sys.prefix,
    link: Link | None = None,
) -> Iterator[OtherHost]:
    """A host with these devices, while the block lasts.

    `ollama`: models that its server holds. `prefix`: its environment of Python. `link`: the
    network by which it is reached; None: loopback.
    """
    address = link.address if link else "127.0.0.1"
    tmp = directory / name
    venv, home = tmp / f"venv-{name}", tmp / "home"
    for each in (venv, home, tmp / "nvml"):
        each.mkdir(parents=True)
    shutil.copytree(nvml, tmp / "nvml", dirs_exist_ok=True)
    machine = Machine.create(tmp / "vram", devices)
    port = closed_port()
    config = _keys(directory, name, address, port)
    ollama_port = closed_port()
    environment = {
        "HOME": "/tmp/home",
        "GPUSHARE_SIM_STATE": "/tmp/vram",
        "LD_LIBRARY_PATH": "/tmp/nvml",
        "PYTHONPATH": os.pathsep.join(map(str, (SIMULATOR.parent, SIMULATOR / "path"))),
        "PYTEST_XDIST_AUTO_NUM_WORKERS": str(cpus),
        "OLLAMA_HOST": f"127.0.0.1:{ollama_port}",
        "PATH": os.environ["PATH"],
        "TMPDIR": "/tmp",
    }
    server = _server(directory, name, address, port, environment)
    script = (
        f"mount --bind {prefix} {venv} && mount --rbind {tmp} /tmp || exit 1; "
        f"{_serving(ollama, ollama_port, environment)}"
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
    directory: Path, name: str, address: str, port: int, environment: Mapping[str, str]
) -> Path:
    # Read before /tmp is another one, and so copied to where it is then.
    own = directory / name
    for file in (f"{name}-host", f"{name}-user.pub"):
        shutil.copy(directory / file, own / file)
    (own / f"{name}-host").chmod(0o600)
    config = own / "sshd_config"
    variables = " ".join(f'{key}="{value}"' for key, value in environment.items())
    config.write_text(
        textwrap.dedent(
            f"""
            Port {port}
            ListenAddress {address}
            HostKey /tmp/{name}-host
            AuthorizedKeysFile /tmp/{name}-user.pub
            StrictModes no
            PermitRootLogin yes
            PasswordAuthentication no
            KbdInteractiveAuthentication no
            PidFile none
            UsePAM no
            SetEnv {variables}
            """
        )
    )
    return Path("/tmp/sshd_config")


def _serving(models: Mapping[str, str] | None, port: int, environment: Mapping[str, str]) -> str:
    """The start of a simulated Ollama, as a part of the host's script."""
    if not models:
        return ""
    command = [sys.executable, "-m", "simulator.ollama", "--port", str(port)]
    command += ["--models", json.dumps(models)]
    command += [word for name in models for word in ("--load", name)]
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
