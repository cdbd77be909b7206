"""Python code run against a simulated machine, in a subprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .build import build
from .child import child_process
from .machine import Machine

_HIDDEN = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OLLAMA_HOST")


def library_directory(variant: str = "full") -> Path:
    """Return a directory with the compiled NVML, kept between runs of this user."""
    shared = Path(tempfile.gettempdir(), f"gpushare-simulator-{os.getuid()}", variant)
    build(shared, variant)
    return shared


def environment(
    machine: Machine, variant: str = "full", env: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return a whole environment for a subprocess, without what would pick devices."""
    inherited = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    return {**inherited, **machine.env(library_directory(variant)), **(env or {})}


def start(
    machine: Machine, code: str, *, variant: str = "full", env: Mapping[str, str] | None = None
) -> AbstractContextManager[subprocess.Popen[str]]:
    """Run Python on *code* beside a block, with pipes for its input and output."""
    return child_process(
        [sys.executable, "-c", code],
        env=environment(machine, variant, env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    machine: Machine,
    code: str,
    *,
    variant: str = "full",
    env: Mapping[str, str] | None = None,
    timeout: float = 30.0,
) -> Any:
    """Run *code* and return what it prints, decoded from JSON.

    Raises RuntimeError with the error output if it fails; *timeout* is in seconds.
    """
    with start(machine, code, variant=variant, env=env) as process:
        output, errors = process.communicate(timeout=timeout)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}\n{errors}")
    return json.loads(output)
