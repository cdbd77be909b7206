"""What monitoring Ollama costs: CPU time beside a loaded model, and time at the end of a run."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.planning.plan import Request
from pytest_gpushare.planning.startup import PlanHooks
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.start import Host, start

from .scene import LIMIT, scene

# In a process of its own: the simulated library has to be there before it starts.
_WATCH = "import sys; from tests.benchmarks.ollama_monitor import watch; watch(float(sys.argv[1]))"


def watch(seconds: float) -> None:
    """Monitor the Ollama of the environment for so long, and print what that took."""
    here = Path.cwd()
    settings = load(Written({}, {}, {}, "", here, here, here))
    facts = start(settings, Request(number=2), Host((), 2, dict(os.environ)), PlanHooks())
    run = ActiveRun(facts)
    assert run.monitor is not None
    run.monitor.start()
    time.sleep(1)
    cpu, began = time.process_time(), time.monotonic()
    time.sleep(seconds)
    share = (time.process_time() - cpu) / (time.monotonic() - began)
    ended = time.monotonic()
    run.monitor.stop()
    took = time.monotonic() - ended
    run.close()
    print(
        f"{100 * share:.2f} % of one core, {run.monitor.asked} questions in {seconds + 1:g} s; "
        f"{1000 * took:.1f} ms at the end of the run"
    )


def main() -> None:
    """Run it; about half a minute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    with scene() as at:
        at.ollama.load("qwen2.5:14b")
        command = [sys.executable, "-c", _WATCH, str(options.seconds)]
        subprocess.run(command, env=at.environment, check=True, timeout=options.seconds + LIMIT)


if __name__ == "__main__":
    main()
