"""Driver, library, devices, and which of them are visible."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pytest_gpushare.cli.doctor.examine import Examined, Surroundings
from pytest_gpushare.cli.doctor.findings import Finding, broken, look, ok
from pytest_gpushare.gpu.devices import ComputeMode, Device
from pytest_gpushare.gpu.visibility import VARIABLE
from pytest_gpushare.units import format_gb, plural

_CONTAINER = "start the container with the GPU: docker run --gpus all"
_LIBRARY_CODES = {
    4: ("nvml-no-permission", "ls -l /dev/nvidia*, and let this user read and write them"),
    9: ("driver-not-loaded", "sudo modprobe nvidia; nvidia-smi must work"),
    12: ("nvml-missing", "install the NVIDIA driver; nvidia-smi must work"),
    18: ("driver-mismatch", "reboot, or unload and load the kernel modules of the driver"),
    999: ("nvml-unknown", "nvidia-smi; in a container, restart it"),
}
_DEVICE_CODES = {
    4: ("gpu-no-permission", "ls -l /dev/nvidia*, and let this user read and write them"),
    15: (
        "gpu-lost",
        "sudo nvidia-smi -i {index} --gpu-reset, or reboot; dmesg | grep NVRM says why",
    ),
}


def driver(found: Examined) -> Iterator[Finding]:
    """The library and the driver, or why there is neither."""
    gpus = found.started.gpus
    if gpus.driver:
        told = [f"driver {gpus.driver}"]
        told += [f"NVML {found.nvml.nvml}"] if found.nvml.nvml else []
        told += [f"CUDA up to {found.nvml.cuda}"] if found.nvml.cuda else []
        yield ok(", ".join(told))
    elif gpus.absence:
        yield _no_library(gpus.absence, found)
    given = found.environment.get("NVIDIA_VISIBLE_DEVICES")
    if given in ("void", "none"):
        yield broken("container-without-gpu", f"NVIDIA_VISIBLE_DEVICES={given}", _CONTAINER)


def devices(found: Examined) -> Iterator[Finding]:
    """Each device, and those that were left out."""
    gpus = found.started.gpus
    for device in gpus.all_devices:
        yield ok(_described(device))
        yield from _traps(device)
    for problem in gpus.problems:
        if problem.startswith("GPU "):
            yield _left_out(problem)
    if gpus.driver and not gpus.all_devices and not gpus.problems:
        yield broken("no-device", "NVML finds no device", "lspci | grep -i nvidia; nvidia-smi -L")


def visibility(found: Examined) -> Iterator[Finding]:
    """What the environment makes of the devices."""
    gpus, value = found.started.gpus, found.environment.get(VARIABLE)
    for name in ("CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"):
        if found.environment.get(name) and found.environment[name] not in ("void", "none"):
            yield ok(f"{name}={found.environment[name]}")
    if value is None:
        yield ok(f"{VARIABLE} is not set: every device counts")
        return
    if not gpus.all_devices:
        yield ok(f"{VARIABLE}={value}")
        return
    if not value.strip():
        yield broken("visible-empty", f"{VARIABLE} is empty: no device is visible", _UNSET)
    # Where nothing is left to see, the reason stands in the absence alone.
    said = dict.fromkeys((*gpus.problems, gpus.absence))
    odd = [text for text in said if text.startswith(VARIABLE) and "is empty" not in text]
    for problem in odd:
        yield _odd_value(problem, seen=bool(gpus.devices))
    if not odd and gpus.devices:
        seen = ", ".join(device.label for device in gpus.devices)
        yield ok(f"{VARIABLE}={value}: {seen} of {plural(len(gpus.all_devices), 'device')}")


_UNSET = f"unset {VARIABLE}, or name a device: nvidia-smi -L lists their UUIDs"


def _no_library(absence: str, found: Examined) -> Finding:
    match = re.search(r"\(NVML error (\d+)\)", absence)
    code, mend = _LIBRARY_CODES.get(int(match[1]) if match else 0, ("nvml-fails", "nvidia-smi"))
    if "pynvml cannot be imported" in absence:
        code, mend = "pynvml-unusable", "python -m pip install --force-reinstall nvidia-ml-py"
    elif "did not answer" in absence:
        code, mend = "nvml-hangs", "nvidia-smi; if it hangs too, reboot"
    elif code == "nvml-missing":
        mend = _no_library_here(found.where) or mend
    elif "NVML finds no device" in absence or "no device can be used" in absence:
        code, mend = "no-device", "lspci | grep -i nvidia; nvidia-smi -L"
    return broken(code, absence, mend)


def _no_library_here(where: Surroundings) -> str:
    if where.is_wsl:
        return (
            "export LD_LIBRARY_PATH=/usr/lib/wsl/lib:$LD_LIBRARY_PATH"
            if where.wsl_library
            else "install the NVIDIA driver on Windows, then wsl --shutdown; none in Linux"
        )
    return _CONTAINER if where.is_container else ""


def _described(device: Device) -> str:
    kind = ", MIG instance" if device.parent else ""
    capability = ".".join(map(str, device.capability)) if any(device.capability) else "unknown"
    held = (
        "processes are not told"
        if device.processes is None
        else plural(len(device.processes), "process").replace("processs", "processes")
    )
    return (
        f"{device.label} {device.name} ({device.uuid}){kind}: total {format_gb(device.total)}, "
        f"used {format_gb(device.used)}, free {format_gb(device.free)}, compute capability "
        f"{capability}, {held}"
    )


def _traps(device: Device) -> Iterator[Finding]:
    whole = device.index.partition(".")[0]
    mend = f"sudo nvidia-smi -i {whole} -c DEFAULT"
    if device.compute_mode is ComputeMode.PROHIBITED:
        fact = f"{device.label}: compute mode PROHIBITED lets no process in"
        yield broken("compute-mode", fact, mend)
    if device.compute_mode is ComputeMode.EXCLUSIVE:
        fact = (
            f"{device.label}: compute mode EXCLUSIVE_PROCESS lets one process in, Ollama included"
        )
        yield look("compute-mode", fact, mend)
    if device.unified:
        yield look(
            "unified-memory",
            f"{device.label} has no VRAM of its own: it shares the host's memory, which every "
            "process of the host takes from",
            "leave more free: gpu_share_safety_buffer_mb = 4096, and say what a worker needs: "
            "gpu_share_ram_per_worker_gb",
        )
    if device.processes and all(process.used is None for process in device.processes):
        yield look(
            "processes-untold",
            f"{device.label}: the driver does not tell what each process holds (WSL, WDDM, a "
            "container)",
            "nothing to mend: peaks come from the frameworks' own counters; name Ollama's device "
            f"with gpu_share_ollama_gpu = {device.index} if there are several",
        )


def _left_out(problem: str) -> Finding:
    match = re.match(r"GPU (\d+)", problem)
    index = match[1] if match else "0"
    if "MIG mode and has no instance" in problem:
        mend = f"sudo nvidia-smi mig -i {index} -cgi 19 -C, or sudo nvidia-smi -i {index} -mig 0"
        return broken("mig-without-instance", problem, mend)
    number = re.search(r"\(NVML error (\d+)\)", problem)
    code, mend = _DEVICE_CODES.get(int(number[1]) if number else 0, ("gpu-left-out", "nvidia-smi"))
    return broken(code, problem, mend.format(index=index))


def _odd_value(problem: str, *, seen: bool) -> Finding:
    if "twice" in problem:
        return broken("visible-twice", problem, f"export {VARIABLE} with each device once")
    if "own order" in problem:
        return look("visible-order", problem, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return (look if seen else broken)("visible-unknown", problem, _UNSET)
