"""Acceptance tests run the real pytest command in a subprocess, as a user would.

Nothing is patched: the real pynvml loads the simulated library, httpx asks a real server.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from inner_pytest import inner_command
from simulator import Device, Machine, build
from simulator.ollama import OllamaServer

if TYPE_CHECKING:
    from .other_hosts import OtherHost

GOLDEN = Path(__file__).parent / "golden"
FRAMEWORKS = Path(__file__).parents[1] / "simulator" / "frameworks"
XDIST_HAS_PX = tuple(map(int, version("pytest-xdist").split(".")[:2])) >= (3, 7)
"""Whether workers can run through gateways, and so on other hosts."""

# What would let the outside shine into a run: CI systems, an outer xdist, the user's own GPU.
_REMOVED = re.compile(
    r"(PYTEST|XDIST|CUDA|NVIDIA|OLLAMA|GPUSHARE|COV|TOX|GITHUB|PYTHON)_?.*|CI|BUILD_NUMBER|.*_PROXY",
    re.I,
)

TRIVIAL = """
    import pytest

    @pytest.mark.parametrize("i", range(4))
    def test_nothing(i):
        pass
"""

SHOW_PLACE = """
    import os, pathlib
    import pytest

    @pytest.mark.parametrize("i", range(8))
    def test_place(i, worker_id):
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "unset")
        role = os.environ.get("PYTEST_GPUSHARE_ROLE", "unset")
        pathlib.Path("places").mkdir(exist_ok=True)
        pathlib.Path("places", worker_id).write_text(f"{role} {seen}")
"""


@dataclass(frozen=True)
class Result:
    """How a run ended and all that it wrote."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """The lines of the plugin: its headlines and what is indented under them."""
        lines: list[str] = []
        inside = False
        for line in self.out.splitlines():
            inside = line.startswith("gpu-share:") or (inside and line.startswith("  "))
            if inside:
                lines.append(line)
        return lines

    @property
    def passed(self) -> int:
        match = re.search(r"(\d+) passed", self.out)
        return int(match.group(1)) if match else 0

    @property
    def workers(self) -> int | None:
        """How many workers xdist created; None for a run without."""
        match = re.search(r"created: (\d+)/\d+ workers?", self.out)
        return int(match.group(1)) if match else None


class Project:
    """A user's project in a directory of its own, and the ways to run it."""

    limit = 120.0
    """Seconds that a command may take."""

    def __init__(self, path: Path, environment: Mapping[str, str]) -> None:
        self.path = path
        self.environment = {
            # Every project is on a host of its own: no other run's leases may shine into it.
            "PYTEST_GPUSHARE_LEASES": f"{path}-leases",
            # In the folder that all runs of a user share, each looks through those of the others.
            "PYTEST_DEBUG_TEMPROOT": str(path.parent),
            **environment,
        }
        self.write(test_project=TRIVIAL)

    def write(self, **modules: str) -> None:
        """Write Python modules, dedented."""
        for name, text in modules.items():
            (self.path / f"{name}.py").write_text(textwrap.dedent(text))

    def file(self, name: str, content: str | bytes) -> Path:
        """Write any other file, a text dedented."""
        path = self.path / name
        if isinstance(content, str):
            content = textwrap.dedent(content).encode()
        path.write_bytes(content)
        return path

    def command(self, command: Sequence[str], **environment: str | None) -> Result:
        """Run a command; variables that are None are taken away."""
        merged = {**self.environment, **environment}
        done = subprocess.run(
            command,
            cwd=self.path,
            env={name: value for name, value in merged.items() if value is not None},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            timeout=self.limit,
        )
        assert "Exception ignored" not in done.stderr, done.stderr
        return Result(done.returncode, done.stdout, done.stderr)

    def pytest(
        self, *arguments: str, beside: Collection[str] = (), **environment: str | None
    ) -> Result:
        """Run `pytest` with these arguments, and with the plugins *beside* it that are installed.

        They are named as by `-p`: "pytest_cov", "rerunfailures", "timeout", "cacheprovider".
        """
        return self.command(inner_command(*arguments, beside=beside), **environment)

    def with_frameworks(self) -> None:
        """Put stand-ins of torch, CuPy and JAX on the path; the machine must be there."""
        path = [self.environment["PYTHONPATH"], str(FRAMEWORKS)]
        self.environment["PYTHONPATH"] = os.pathsep.join(path)

    def places(self) -> dict[str, str]:
        """Worker -> "role CUDA_VISIBLE_DEVICES", as `SHOW_PLACE` wrote it."""
        return {path.name: path.read_text() for path in sorted((self.path / "places").iterdir())}


def clean_environment() -> dict[str, str]:
    """The environment without what would make runs differ between machines."""
    kept = {name: value for name, value in os.environ.items() if not _REMOVED.fullmatch(name)}
    return {
        **kept,
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "80",
        "TERM": "dumb",
        "OLLAMA_HOST": f"127.0.0.1:{closed_port()}",
    }


def closed_port() -> int:
    """A port of loopback on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the simulated libnvidia-ml.so.1, compiled once."""
    return build(tmp_path_factory.mktemp("nvml")).parent


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project on a machine without a GPU and without Ollama."""
    path = tmp_path / "project"
    path.mkdir()
    return Project(path, clean_environment())


@pytest.fixture
def machine_with(project: Project, tmp_path: Path, nvml_library: Path) -> Callable[..., Machine]:
    """Give the project's machine these devices; CPUs do not decide there.

    Not many of them: a run that falls back to the CPU starts that many workers.
    """

    def create(*devices: Device, **options: object) -> Machine:
        machine = Machine.create(tmp_path / "vram", devices, **options)  # type: ignore[arg-type]
        project.environment.update(machine.env(nvml_library))
        project.environment["PYTEST_XDIST_AUTO_NUM_WORKERS"] = "8"
        return machine

    return create


@pytest.fixture
def machine(machine_with: Callable[..., Machine]) -> Machine:
    """The founding write-up's machine: 24 GB, 22 GB of them free."""
    return machine_with(Device(total="24GB", used="2GB"))


@pytest.fixture
def ollama_with(
    project: Project, machine_with: Callable[..., Machine], nvml_library: Path
) -> Iterator[Callable[..., OllamaServer]]:
    """Start an Ollama beside the project, on its machine, with these models."""
    with ExitStack() as stack:

        def start(
            models: Mapping[str, object],
            *,
            load: str | None = None,
            machine: Machine | None = None,
            **options: object,
        ) -> OllamaServer:
            server = stack.enter_context(
                OllamaServer(machine or _machine_of(project), models, **options)  # type: ignore[arg-type]
            )
            if load:
                server.load(load)
            project.environment["OLLAMA_HOST"] = server.host
            return server

        yield start


def _machine_of(project: Project) -> Machine:
    return Machine.open(Path(project.environment["GPUSHARE_SIM_STATE"]))


@pytest.fixture
def golden() -> Callable[[Result, str], None]:
    """Compare a whole output with a file; `UPDATE_GOLDEN=1` writes the file anew."""

    def compare(result: Result, name: str) -> None:
        text = normal(result.out)
        path = GOLDEN / f"{name}.txt"
        if os.environ.get("UPDATE_GOLDEN"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return compare


def normal(text: str) -> str:
    """An output without what differs between machines, versions and moments."""
    text = re.sub(
        r"(?m)^(platform|rootdir:|cachedir:|plugins:|configfile:|hypothesis) ?.*\n", "", text
    )
    text = re.sub(
        r"(?m)^(Using --randomly-seed|scheduling tests via|bringing up nodes).*\n", "", text
    )
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r" in \d+\.\d+s( \(.*?\))?", " in TIME", text)
    text = re.sub(r"\d+ s into the run", "N s into the run", text)
    text = re.sub(r"(?m)^=+ (.*?) =+$", r"=== \1 ===", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.M)


@pytest.fixture
def hosts(
    tmp_path: Path, project: Project, nvml_library: Path
) -> Iterator[Callable[..., OtherHost]]:
    """Start a host with these devices; it has the project as it is committed."""
    from .other_hosts import clone, other_host

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
    from .other_hosts import commit

    def start() -> list[OtherHost]:
        commit(project)
        small = hosts("small", Device(total="24GB", used="2GB"))
        return [small, hosts("large", Device(total="80GB"), Device(total="80GB"))]

    return start
