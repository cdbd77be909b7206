"""See it work: `python3 docs/examples/quickstart/run.py`.

Runs the twelve tests beside this file on the GPU of this machine. Where there is none it
runs them on a simulated one of 24 GB, next to a simulated Ollama: first as without the
plugin, then with it. Needs Python 3.10 or newer; for the simulation also a C compiler and
Linux. Exit code 0 if the run with the plugin went well.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(ROOT / "tests")]

from own_venv import own_venv  # noqa: E402 - its folder is on the path only now

MODEL, MODEL_SIZE = "qwen2.5:14b", "10.8GB"
GB = 1024**3
LIMIT = 600.0
"""Seconds that one run of pytest may take."""

ASK_NVML = """
import json, pynvml
pynvml.nvmlInit()
handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
print(json.dumps([[str(pynvml.nvmlDeviceGetName(h)), pynvml.nvmlDeviceGetMemoryInfo(h).total]
                  for h in handles]))
"""


@dataclass(frozen=True)
class Outcome:
    """How a run went."""

    title: str
    code: int
    tests: str
    """The counts of pytest's closing line."""
    out_of_memory: int = 0
    """How many times VRAM was refused."""
    on_gpu: int | None = None
    """Per cent of the model that Ollama held on the GPU; None: it was not asked."""

    @property
    def good(self) -> bool:
        return self.code == 0 and not self.out_of_memory and self.on_gpu in (None, 100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the quick start of pytest-gpushare.")
    parser.add_argument("--simulate", action="store_true", help="leave a real GPU alone")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--here", action="store_true", help="use the running Python as it is: make no venv"
    )
    where.add_argument(
        "--wheel", type=Path, metavar="PATH", help="install this wheel, or the one in this folder"
    )
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks the sign × shall not end the run.
        sys.stdout.reconfigure(errors="replace")
    python = sys.executable if options.here else str(_venv(options.wheel))
    gpus = [] if options.simulate else _gpus(python)
    outcomes = [_on_real_gpu(python, *gpus[0])] if gpus else _on_simulated_gpu(python)
    _verdict(outcomes)
    return 0 if outcomes[-1].good else 1


def _venv(wheel: Path | None) -> Path:
    if wheel is None:
        sources = [ROOT / "pyproject.toml"]
        return own_venv(ROOT / ".venv-demo", ["--editable", str(ROOT)], sources)
    if wheel.is_dir():
        found = sorted(wheel.glob("pytest_gpushare-*.whl"))
        if len(found) != 1:
            sys.exit(f"{wheel}: {len(found)} wheels of pytest-gpushare there: name one")
        wheel = found[0]
    return own_venv(ROOT / ".venv-demo-wheel", [str(wheel.resolve())], [wheel])


def _gpus(python: str) -> list[tuple[str, int]]:
    """(name, bytes of VRAM) of each device that NVML finds; none where there is no NVML."""
    done = subprocess.run(
        [python, "-c", ASK_NVML], capture_output=True, text=True, cwd=HERE, timeout=LIMIT
    )
    return [(name, total) for name, total in json.loads(done.stdout)] if not done.returncode else []


def _on_real_gpu(python: str, name: str, total: int) -> Outcome:
    print(f"\nGPU found: {name}, {total / GB:.1f} GB. The run uses it.")
    # The defaults are made for 24 GB; the demonstration keeps their proportions.
    scale = total / (24 * GB)
    sizes = {
        "ollama_vram_reservation_mb": round(12288 * scale),
        "safety_buffer_mb": round(1024 * scale),
        "min_vram_per_worker_gb": round(3 * scale, 3),
        "max_workers_per_gb": round(0.25 / scale, 4),
    }
    arguments = ["--gpu-share"]
    for key, value in sizes.items():
        arguments += ["-o", f"gpu_share_{key}={value}"]
    size = 4 * scale
    return _run(python, arguments, f"{size:.3g} GB a test, --gpu-share", f"{size:.2f}GB")


def _on_simulated_gpu(python: str) -> list[Outcome]:
    from simulator import CompilerMissingError, build

    print(
        "\nThe runs use a simulated GPU: 24 GB, 2 GB of them in use. Beside the tests a simulated"
        f"\nOllama loads {MODEL} ({MODEL_SIZE}) while the tests hold their VRAM."
    )
    with tempfile.TemporaryDirectory(prefix="gpushare-quickstart-") as scratch:
        try:
            library = build(Path(scratch, "nvml")).parent
        except CompilerMissingError as error:
            sys.exit(str(error))
        return [
            _beside_ollama(python, library, arguments, title, size)
            for arguments, title, size in (
                (["-n", "3"], "8 GB a test, -n 3", "8GB"),
                (["-n", "3"], "4 GB a test, -n 3", "4GB"),
                (["--gpu-share"], "4 GB a test, --gpu-share", "4GB"),
            )
        ]


def _beside_ollama(
    python: str, library: Path, arguments: list[str], title: str, size: str
) -> Outcome:
    """One run on a machine of its own, with an Ollama that is asked once all tests hold VRAM."""
    from simulator import Device, Machine
    from simulator.ollama import OllamaServer

    machine = Machine.create(library.parent / f"vram-{time.monotonic_ns()}", [Device()])
    with OllamaServer(machine, {MODEL: MODEL_SIZE}) as ollama:
        environment = {
            **machine.env(library),
            "OLLAMA_HOST": ollama.host,
            # Two workers at least, also on a machine with one CPU.
            "PYTEST_XDIST_AUTO_NUM_WORKERS": "3",
        }
        loaded: list[dict[str, int]] = []

        def ask(workers: int) -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                (gpu,) = machine.snapshot()
                if gpu.oom_count or len(gpu.processes) >= workers:
                    loaded.append(ollama.load(MODEL))
                    return
                time.sleep(0.01)

        outcome = _run(python, arguments, title, size, environment, ask)
        (gpu,) = machine.snapshot()
    share = 100 * loaded[0]["size_vram"] // loaded[0]["size"] if loaded else 0
    return Outcome(title, outcome.code, outcome.tests, gpu.oom_count, share)


def _run(
    python: str,
    arguments: Sequence[str],
    title: str,
    size: str,
    environment: Mapping[str, str] | None = None,
    when_started: Callable[[int], None] | None = None,
) -> Outcome:
    """Run pytest, show what it prints, and call *when_started* with the number of workers."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--tb=no", "-rN", *arguments]
    print(f"\n$ QUICKSTART_VRAM={size} pytest {' '.join(arguments)}", flush=True)
    left_out = _CHANGES_SIMULATION if environment else _CHANGES_RUNS
    kept = {name: value for name, value in os.environ.items() if not re.match(left_out, name)}
    process = subprocess.Popen(
        [python, *command],
        cwd=HERE,
        env={**kept, "PYTHONUTF8": "1", "QUICKSTART_VRAM": size, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    counts, thread = "no result", None
    too_long = threading.Timer(LIMIT, process.kill)
    too_long.daemon = True
    too_long.start()
    with process:
        for line in process.stdout or ():
            print("  " + line, end="", flush=True)
            created = re.match(r"created: (\d+)/\d+ workers?", line)
            if created and when_started and thread is None:
                thread = threading.Thread(target=when_started, args=(int(created[1]),))
                thread.start()
            closing = re.match(r"=+ (.*) in [\d.]+s.* =+$", line)
            counts = closing[1] if closing else counts
    too_long.cancel()
    if thread is not None:
        thread.join(LIMIT)
    return Outcome(title, process.returncode, counts)


_CHANGES_RUNS = "(PYTEST_.*|FORCE_COLOR|PY_COLORS)$"
"""Environment variables that would make the demonstration another one."""

_CHANGES_SIMULATION = f"{_CHANGES_RUNS}|(CUDA_VISIBLE_DEVICES|CUDA_DEVICE_ORDER)$"
"""In a simulation also what is meant for the real devices."""


def _verdict(outcomes: list[Outcome]) -> None:
    print(f"\n{'run':28}{'tests':22}{'the model, on the GPU':>21}")
    for outcome in outcomes:
        share = "not asked" if outcome.on_gpu is None else f"{outcome.on_gpu} %"
        print(f"{outcome.title:28}{outcome.tests:22}{share:>21}")
    last = outcomes[-1]
    fits = "" if last.on_gpu is None else ", and Ollama kept its model on the GPU"
    print(f"\nWith --gpu-share the tests passed{fits}." if last.good else "\nIt did not go well.")


if __name__ == "__main__":
    sys.exit(main())
