"""A vendor of GPUs that exist in a folder: the module that another vendor needs.

`devices.json` there has [name, bytes in all, bytes in use by nobody] for each device; a process
holds VRAM by a file `held-PID` with the device's number and the bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, Memory
from pytest_gpushare.gpu.vendors import NeighbourOf, Vendor

VARIABLE = "HIP_VISIBLE_DEVICES"


class Toy:
    """Reads the folder that `TOY_GPUS` names."""

    library = "toy"

    def __init__(self, neighbour_of: NeighbourOf) -> None:
        self._neighbour_of = neighbour_of
        self._folder = Path(os.environ.get("TOY_GPUS", "nowhere"))
        self._devices: list[tuple[str, int, int]] = []
        self._absence = "toy is not open"

    def open(self) -> None:
        try:
            self._devices = json.loads((self._folder / "devices.json").read_text())
        except (OSError, ValueError) as error:
            self._absence = f"toy library not found: {error}"

    def read(self, environment: Mapping[str, str]) -> GpuFacts:
        memory, processes = self.memory(), self.processes()
        devices = tuple(
            Device(
                uuid,
                self._devices[number][0],
                f"toy{number}",
                *memory[uuid],
                processes=processes[uuid],
                variable=VARIABLE,
                visible_as=str(number),
            )
            for number, uuid in enumerate(memory)
        )
        shown = environment.get(VARIABLE, ",".join(map(str, range(len(devices))))).split(",")
        visible = tuple(device for device in devices if device.visible_as in shown)
        absence = "" if visible else self._absence if not devices else f"{VARIABLE} hides all"
        return GpuFacts(visible, devices, absence, driver="toy 1.0" if devices else None)

    def remedy_when_slow(self, _environment: Mapping[str, str]) -> str:
        return "check the disk"

    def memory(self) -> dict[str, Memory]:
        found = {}
        for number, (_, total, others) in enumerate(self._devices):
            held = sum(process.used or 0 for process in self._on(number))
            found[f"TOY-{number}"] = Memory(total, others + held, total - others - held)
        return found

    def processes(self) -> dict[str, tuple[GpuProcess, ...] | None]:
        return {f"TOY-{number}": self._on(number) for number in range(len(self._devices))}

    def processes_on(self, uuid: str) -> tuple[GpuProcess, ...] | None:
        return self.processes().get(uuid)

    def versions(self) -> Mapping[str, str]:
        return {"toy library": "1.0"}

    def close(self) -> None:
        pass

    def _on(self, number: int) -> tuple[GpuProcess, ...]:
        found = []
        for path in sorted(self._folder.glob("held-*")):
            pid, (where, size) = int(path.name[5:]), map(int, path.read_text().split())
            if where == number and Path(f"/proc/{pid}").exists():
                found.append(GpuProcess(pid, size, self._neighbour_of(pid)))
        return tuple(found)


TOY = Vendor(Toy, VARIABLE, caps=("CuPy",))
