"""What the watch costs: CPU time of its threads, and memory for a day of samples."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tracemalloc
from typing import Any

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import Attribution, DeviceUsage
from pytest_gpushare.gpu.readings import LiveVram, Series
from pytest_gpushare.host_probe import host_probe
from pytest_gpushare.planning.plan import Plan, Request
from pytest_gpushare.session.sampler import Sampler, rows_for
from pytest_gpushare.session.workers import Workers

from .scene import LIMIT, scene

# In a process of its own: the simulated library has to be there before it starts.
_SAMPLE = """
import sys
from tests.benchmarks.watch import sample
sample(float(sys.argv[1]), int(sys.argv[2]))
"""


def sample(seconds: float, workers: int) -> None:
    """Sampler every device for so long, beside so many workers that hold VRAM."""
    from simulator import Machine

    machine = Machine.open()
    nvml = host_probe()
    nvml.open()
    devices = nvml.read({}).all_devices
    present = Workers(Plan((), 0, (), (), (), Request()), lambda _device: 0)
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
                for _ in range(workers)]  # fmt: skip
    for number, child in enumerate(children):
        machine.allocate(number % len(devices), "1GB", child.pid)
        present.join(f"gw{number}", number, 0.0)
        present.came_up(f"gw{number}", child.pid)
    reader = _Timed(nvml)
    live = LiveVram(reader)  # type: ignore[arg-type]
    watch = Sampler(
        live, Attribution(devices), [device.uuid for device in devices], present, Record()
    )
    watch.start()
    time.sleep(seconds)
    watch.stop()
    live.close()
    for child in children:
        child.communicate(b"\n", timeout=LIMIT)
    rows = sum(len(watched.series) for watched in watch.devices.values())
    print(json.dumps({"watch": watch.cpu_time, "reader": reader.cpu_time, "rows": rows}))


class _Timed:
    """The library, and the CPU time of the thread that reads it, its own work included."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.cpu_time = 0.0

    def memory(self) -> Any:
        found = self._nvml.memory()
        self.cpu_time = time.thread_time()
        return found

    def processes(self) -> Any:
        found = self._nvml.processes()
        self.cpu_time = time.thread_time()
        return found


def memory_of_a_day(devices: int, workers: int) -> tuple[int, int]:
    """Bytes for 24 hours at 5 Hz at the end and at the most; so many workers on each device."""
    held = {f"gw{number}": number for number in range(workers)}
    tracemalloc.start()
    all_series = [Series(rows_for(devices)) for _ in range(devices)]
    for at in range(24 * 3600 * 5):
        for series in all_series:
            series.add(at / 5, DeviceUsage(2000, at % 1000, 0, {"Ollama": 1}, held, 2))
    found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found


def main() -> None:
    """Print a table of CPU shares, and the memory of a day."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    seconds = parser.parse_args().seconds
    print("| devices | workers | sampling thread | reading thread | together |")
    print("| --- | --- | --- | --- | --- |")
    for devices, workers in ((1, 2), (1, 8), (8, 16)):
        with scene(devices=devices) as here:
            told = json.loads(
                subprocess.check_output(
                    [sys.executable, "-c", _SAMPLE, str(seconds), str(workers)],
                    env=here.environment,
                    text=True,
                    timeout=seconds + LIMIT,
                )
            )
        shares = [100 * told[name] / seconds for name in ("watch", "reader")]
        cells = [f"{share:.2f} %" for share in (*shares, sum(shares))]
        print(f"| {devices} | {workers} | {' | '.join(cells)} |")
    for devices, workers in ((1, 2), (1, 8), (8, 4)):
        now, most = memory_of_a_day(devices, workers)
        print(
            f"\n24 h at 5 Hz, devices: {devices}, workers on each: {workers}: "
            f"{now / 1e6:.1f} MB at the end, {most / 1e6:.1f} MB at most"
        )


if __name__ == "__main__":
    main()
