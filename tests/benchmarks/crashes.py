"""A random worker is killed in the middle of a run, many times.

Every test must have a result, and every replacement the device of the worker that died.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import threading
import time
import xml.etree.ElementTree as ElementTree

from .scene import LIMIT, PYTEST, Scene, scene

SUITE = """
import os, pathlib, time
import pytest

@pytest.mark.parametrize("i", range(24))
def test_step(i):
    number, seen = os.environ["PYTEST_GPUSHARE_NUMBER"], os.environ["CUDA_VISIBLE_DEVICES"]
    pathlib.Path(f"worker-{os.getpid()}").write_text(f"{number} {seen}")
    time.sleep(0.05)
"""
ARGUMENTS = (
    *("--gpu-share", "-n4", "-o", "gpu_share_ollama_gpu=none", "--junit-xml=results.xml"),
    "--gpu-share-strict",
)


def main() -> None:
    """Print what happened; exit code 1 where a result or a device was lost."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    dice = random.Random(options.seed)
    killed = lost = moved = 0
    for number in range(options.runs):
        with scene(SUITE, devices=2) as here:
            killed_now, results, devices = _once(here, dice)
        killed += killed_now
        lost += results != 24
        moved += any(len(seen) > 1 for seen in devices.values())
        print(f"\r{number + 1} runs", end="", flush=True)
    print(
        f"\r{options.runs} runs, a worker killed in {killed}: results were missing in {lost}, "
        f"a replacement had another device in {moved}"
    )
    raise SystemExit(1 if lost or moved else 0)


def _once(here: Scene, dice: random.Random) -> tuple[bool, int, dict[str, set[str]]]:
    killed: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 20
        victims: list[int] = []
        while not victims and time.monotonic() < until:
            time.sleep(0.01)
            victims = [int(path.name.split("-")[1]) for path in here.path.glob("worker-*")]
        time.sleep(dice.uniform(0.0, 0.25))
        victim = dice.choice(victims)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)

    thread = threading.Thread(target=kill)
    thread.start()
    subprocess.run(
        (*PYTEST, *ARGUMENTS),
        cwd=here.path,
        env=here.environment,
        capture_output=True,
        timeout=LIMIT,
    )
    thread.join(LIMIT)
    cases = ElementTree.parse(here.path / "results.xml").iter("testcase")
    results = {case.get("name") for case in cases}
    devices: dict[str, set[str]] = {}
    for path in here.path.glob("worker-*"):
        # Killed while it wrote, a worker leaves an empty file.
        if text := path.read_text():
            number, seen = text.split()
            devices.setdefault(number, set()).add(seen)
    return bool(killed), len(results), devices


if __name__ == "__main__":
    main()
