"""A real Ollama server on loopback, with models of its own."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from simulator.build import LAYER_NAME
from simulator.machine import STATE_VARIABLE, Machine

from .gguf import Shape, write_model

START_LIMIT = 120.0
LOAD_LIMIT = 280.0
"""Seconds; a first load compiles the kernels of its operations for the CPU."""
UNLOAD_LIMIT = 120.0

_REQUEST = re.compile(r'^\[GIN\].*?\|\s+(\d{3}) \|.*?\| (\w+)\s+"([^"]*)"', re.MULTILINE)


class AnswerError(RuntimeError):
    """The server answered with an error status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text


class Seen(NamedTuple):
    """A request as the server logged it."""

    method: str
    path: str
    status: int


class Installation(NamedTuple):
    """The server under test, and where its files are kept."""

    executable: str
    directory: Path
    """Models, kernels that were compiled, and logs."""
    layer: Path | None
    """The directory of the Vulkan layer; None where it cannot be built: then without a GPU."""

    @property
    def models(self) -> Path:
        """OLLAMA_MODELS."""
        return self.directory / "models"

    def add(self, name: str, shape: Shape, seed: int | None = None) -> None:
        """Write a model of that shape into the store, unless there is one of that name.

        `ollama create` would copy the file, zeros and all, and wants a helper that only whole
        installations have.
        """
        manifest = self.models / "manifests/registry.ollama.ai/library" / name / "latest"
        if manifest.exists():
            return
        (self.models / "blobs").mkdir(parents=True, exist_ok=True)
        path = self.models / "blobs" / f"{name}.partial"
        write_model(path, shape, seed)
        config = {
            "model_format": "gguf",
            "model_family": shape.architecture,
            "model_families": [shape.architecture],
            "model_type": "",
            "file_type": "F32" if seed is not None else "Q4_K_M",
            "architecture": "amd64",
            "os": "linux",
        }
        described = self.models / "blobs" / f"{name}-config.partial"
        described.write_text(json.dumps(config), encoding="utf-8")
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": _stored(described, "application/vnd.docker.container.image.v1+json"),
            "layers": [_stored(path, "application/vnd.ollama.image.model")],
        }
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(json.dumps(document), encoding="utf-8")

    def environment(self, port: int, machine: Machine | None) -> dict[str, str]:
        """The server's whole environment: nothing of the user's shines in."""
        found = {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(self.directory / "home"),
            "OLLAMA_HOST": f"127.0.0.1:{port}",
            "OLLAMA_MODELS": str(self.models),
            "OLLAMA_NOPRUNE": "1",
            "OLLAMA_NO_CLOUD": "1",
            "OLLAMA_VULKAN": "0",
        }
        if machine is not None and self.layer is not None:
            found |= {
                "OLLAMA_VULKAN": "1",
                STATE_VARIABLE: str(machine.path),
                "VK_LAYER_PATH": str(self.layer),
                "VK_INSTANCE_LAYERS": LAYER_NAME,
                "MESA_SHADER_CACHE_DIR": str(self.directory / "kernels"),
            }
            software = sorted(Path("/usr/share/vulkan/icd.d").glob("lvp_icd*.json"))
            if software:
                found["VK_DRIVER_FILES"] = str(software[0])
        return found


class RealOllama:
    """A running server; a context manager."""

    def __init__(
        self, installation: Installation, machine: Machine | None = None, **variables: str
    ) -> None:
        """*machine*: whose first GPU it uses; *variables*: such as OLLAMA_KEEP_ALIVE."""
        self._installation = installation
        self.port = _free_port()
        self.host = f"127.0.0.1:{self.port}"
        logs = installation.directory / "logs"
        for folder in (installation.models / "blobs", installation.directory / "home", logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{self.port}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [installation.executable, "serve"],
                env=installation.environment(self.port, machine) | variables,
                cwd=installation.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            self._wait_until_up()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> RealOllama:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and all its processes."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    @property
    def version(self) -> str:
        """As it says itself."""
        return str(self.get("/api/version")["version"])

    @property
    def uses_gpu(self) -> bool:
        """Whether it found the simulated GPU."""
        return "library=Vulkan" in self.text()

    def text(self) -> str:
        """All that it logged."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def layers(self) -> list[str]:
        """How many layers of each model that was loaded are on the GPU, as "27/49"; it says so
        long before the load is over."""
        return re.findall(r"offloaded (\d+/\d+) layers to GPU", self.text())

    def loads(self) -> int:
        """How many models it has loaded, reloads included."""
        return self.text().count('msg="loading model via llama-server"')

    def requests(self) -> list[Seen]:
        """Every request so far, as it logged them."""
        return [Seen(m[2], m[3], int(m[1])) for m in _REQUEST.finditer(self.text())]

    # --- requests ---

    def get(self, path: str, timeout: float = 60.0) -> Any:
        """The decoded answer of a GET."""
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: object, timeout: float = LOAD_LIMIT) -> Any:
        """The decoded answer of a POST; the last line of a stream."""
        return self._ask("POST", path, json.dumps(body).encode(), timeout)

    def ps(self) -> list[dict[str, Any]]:
        """The entries of /api/ps."""
        return list(self.get("/api/ps")["models"])

    def entry(self, name: str) -> dict[str, Any]:
        """The entry of a loaded model."""
        return next(e for e in self.ps() if e["name"].removesuffix(":latest") == name)

    def load(
        self, name: str, keep_alive: str | int | None = None, **options: Any
    ) -> dict[str, Any]:
        """Load a model; its entry."""
        body: dict[str, Any] = {"model": name, "stream": False}
        body |= {"options": options} if options else {}
        body |= {} if keep_alive is None else {"keep_alive": keep_alive}
        self.post("/api/generate", body)
        return self.entry(name)

    def unload(self, name: str) -> None:
        """Unload a model and wait until it is gone."""
        self.post("/api/generate", {"model": name, "keep_alive": 0, "stream": False})
        until = time.monotonic() + UNLOAD_LIMIT
        while self.runners() and any(e["name"].split(":")[0] == name for e in self.ps()):
            assert time.monotonic() < until, f"{name} is still loaded"
            time.sleep(0.05)

    def unload_all(self) -> None:
        """Unload everything, and wait until its processes have ended."""
        for entry in self.ps():
            self.unload(entry["name"].removesuffix(":latest"))
        until = time.monotonic() + UNLOAD_LIMIT
        while self.runners():
            assert time.monotonic() < until, "a runner is left"
            time.sleep(0.05)

    def runners(self) -> list[int]:
        """PIDs of the processes that hold models."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                command, _, rest = path.read_text().partition("(")[2].rpartition(")")
            except OSError:
                continue  # it has ended
            state, parent = rest.split()[:2]
            # Not by its arguments: they are gone before its memory is.
            if int(parent) == self._process.pid and command != "ollama" and state not in "ZX":
                found.append(int(path.parent.name))
        return sorted(found)

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body)
            answer = connection.getresponse()
            text = answer.read().decode()
        if answer.status >= 400:
            raise AnswerError(answer.status, text)
        return json.loads(text.strip().splitlines()[-1])

    def _wait_until_up(self) -> None:
        until = time.monotonic() + START_LIMIT
        while True:
            try:
                self.get("/api/version", timeout=2.0)
                return
            except (OSError, http.client.HTTPException):
                ended = self._process.poll() is not None
                if ended or time.monotonic() > until:
                    raise RuntimeError(
                        f"the server did not start:\n{self.text()[-2000:]}"
                    ) from None
            time.sleep(0.1)


def _stored(path: Path, media_type: str) -> dict[str, object]:
    """Rename a file to what its content is called in the store; its entry in a manifest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    size = path.stat().st_size
    path.replace(path.with_name(f"sha256-{digest.hexdigest()}"))
    return {"mediaType": media_type, "digest": f"sha256:{digest.hexdigest()}", "size": size}


_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
