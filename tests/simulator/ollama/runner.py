"""Ollama's processes: a server, and a runner for each loaded model that holds its VRAM."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from ..build import build_ollama
from ..store import start_time
from .models import BLOBS

LIMIT = 30.0
"""Seconds that the processes have to end."""


class Processes:
    """The process ``ollama serve`` and its children; all end with this process."""

    def __init__(self, version: str, directory: Path | None = None) -> None:
        """*version* decides what runners look like; *directory* keeps the compiled program."""
        self._old = (0, 0, 0) < as_tuple(version) < (0, 30, 0)
        if directory is None:
            directory = Path(tempfile.gettempdir(), f"gpushare-simulator-{os.getuid()}")
        self._lock = threading.Lock()
        self._server = subprocess.Popen(
            ["/usr/local/bin/ollama", "serve"],
            executable=build_ollama(directory),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={},
        )

    def start(self, blob: str, port: int) -> int:
        """Start a runner for the model in that blob; return its PID."""
        arguments = ["--model", f"{BLOBS}/sha256-{blob}", "--port", str(port)]
        if self._old:
            program = ["/usr/local/bin/ollama", "runner"]
        else:
            program = ["/usr/lib/ollama/llama-server"]
        pid = int(self._order("start " + " ".join(program + arguments)))
        if pid <= 0:
            raise RuntimeError("no runner can be started: the server's process has ended")
        return pid

    def stop(self, pid: int) -> None:
        """Kill a runner and wait until it is dead."""
        if start_time(pid) is None:
            return
        self._order(f"stop {pid}")
        self.wait_for_death([pid])

    @staticmethod
    def is_alive(pid: int) -> bool:
        """Tell whether a runner is still there; somebody may have killed it."""
        return start_time(pid) is not None

    @staticmethod
    def wait_for_death(pids: list[int]) -> None:
        """Wait until processes that were killed are dead, 10 s at most."""
        deadline = time.monotonic() + 10
        while any(start_time(pid) is not None for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.001)

    def close(self) -> None:
        """End all processes."""
        with self._lock:
            try:
                self._server.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait(LIMIT)
                raise

    def _order(self, line: str) -> str:
        with self._lock:
            if self._server.poll() is not None:
                return "0"  # closed
            assert self._server.stdin is not None
            assert self._server.stdout is not None
            self._server.stdin.write(line + "\n")
            self._server.stdin.flush()
            return self._server.stdout.readline().strip()


def as_tuple(version: str) -> tuple[int, ...]:
    """Return a version as numbers: ``"0.33.0-rc2"`` is (0, 33, 0)."""
    return tuple(int(part) for part in version.split("-")[0].split("."))
