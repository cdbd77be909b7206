"""`pytest-gpushare hold`: any command under a lease of VRAM."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping

from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.leases import Lease, acquire
from pytest_gpushare.planning.placement import ROLE, SLOT

_PASSED_ON = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGQUIT")
"""Signals for the command; Ctrl-C reaches it from the terminal, as it does this process."""


def hold(options: argparse.Namespace) -> int:
    """Wait for the VRAM, run the command, and return its exit code."""
    if not options.pytest_arguments:
        raise GpuShareError("hold runs a command: write it after --, as in: hold --vram 8GB -- CMD")
    with acquire(options.device, options.vram, options.wait, directory=options.leases) as lease:
        return _run(options.pytest_arguments, lease)


def _run(command: list[str], lease: Lease) -> int:
    inherited = () if lease.descriptor is None or os.name == "nt" else (lease.descriptor,)
    try:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment(lease)},
            # Also where this process is killed, the lease lasts as long as the command.
            pass_fds=inherited,
        )
    except OSError as error:
        raise GpuShareError(f"{command[0][:200]} cannot be run: {error.strerror}") from None
    with _passing_on(process):
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                # The command decides what becomes of it.
                continue
    return 128 - code if code < 0 else code


def environment(lease: Lease) -> Mapping[str, str]:
    """The variables by which the command sees its device, and a run in it its share."""
    return {**lease.environment, ROLE: "gpu", SLOT: str(lease.size)}


@contextlib.contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    numbers = [getattr(signal, name) for name in _PASSED_ON if hasattr(signal, name)]
    before = {
        number: signal.signal(number, lambda received, _: process.send_signal(received))
        for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
