"""Checks of the machine: driver, devices, visibility, Ollama, sessions, and other hosts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from pytest_gpushare.cli.doctor.examine import Examined, Finding, Platform, broken, look, ok
from pytest_gpushare.cli.doctor.project import release
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.gpu.devices import ComputeMode, Device
from pytest_gpushare.gpu.vendors import variables
from pytest_gpushare.leases.ledger import MEETING_PLACE, OFF, Ledger, LedgerError, directory_of
from pytest_gpushare.neighbours import line_of, other_servers
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.ollama.prediction import MARGIN
from pytest_gpushare.ollama.reservation import devices_of_ollama
from pytest_gpushare.ollama.spill import has_room, uses_no_gpu, why_in_ram
from pytest_gpushare.report.header import host_line, ollama_lines, what_stands
from pytest_gpushare.session.start_facts import HostOfRun
from pytest_gpushare.units import MB, format_gb, plural

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
    """The library and the driver, or why they are missing."""
    gpus = found.started.gpus
    if gpus.driver:
        more = (f"{name} {version}" for name, version in found.versions.items())
        yield ok(", ".join((f"driver {gpus.driver}", *more)))
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
    """The environment variables that hide or order devices."""
    for name in ("CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES"):
        if found.environment.get(name) and found.environment[name] not in ("void", "none"):
            yield ok(f"{name}={found.environment[name]}")
    for variable in variables():
        yield from _shown_by(variable, found)


def _shown_by(variable: str, found: Examined) -> Iterator[Finding]:
    """What this variable hides."""
    gpus, value = found.started.gpus, found.environment.get(variable)
    total = sum(device.variable == variable for device in gpus.all_devices)
    seen = ", ".join(device.label for device in gpus.devices if device.variable == variable)
    if value is None:
        yield ok(f"{variable} is not set: every device counts")
        return
    if not total:
        yield ok(f"{variable}={value}")
        return
    if not value.strip():
        fact = f"{variable} is empty: no device is visible"
        yield broken("visible-empty", fact, _unset(variable))
    # Where no device is visible, only `absence` gives the reason.
    problems = dict.fromkeys((*gpus.problems, gpus.absence))
    odd = [text for text in problems if text.startswith(variable) and "is empty" not in text]
    for problem in odd:
        yield _odd_value(variable, problem, seen=bool(seen))
    if not odd and seen:
        yield ok(f"{variable}={value}: {seen} of {plural(total, 'device')}")


def _unset(variable: str) -> str:
    how = ": nvidia-smi -L lists their UUIDs" if variable.startswith("CUDA") else ""
    return f"unset {variable}, or name a device{how}"


def _no_library(absence: str, found: Examined) -> Finding:
    match = re.search(r"\(NVML error (\d+)\)", absence)
    code, fix = _LIBRARY_CODES.get(int(match[1]) if match else 0, ("nvml-fails", "nvidia-smi"))
    if "pynvml cannot be imported" in absence:
        code, fix = "pynvml-unusable", "python -m pip install --force-reinstall nvidia-ml-py"
    elif "did not answer" in absence:
        code, fix = "nvml-hangs", "nvidia-smi; if it hangs too, reboot"
    elif code == "nvml-missing":
        fix = _no_library_here(found.where) or fix
    elif "NVML finds no device" in absence or "no device can be used" in absence:
        code, fix = "no-device", "lspci | grep -i nvidia; nvidia-smi -L"
    return broken(code, absence, fix)


def _no_library_here(where: Platform) -> str:
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
        "processes unknown"
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
    fix = f"sudo nvidia-smi -i {whole} -c DEFAULT"
    if device.compute_mode is ComputeMode.PROHIBITED:
        fact = f"{device.label}: compute mode PROHIBITED lets no process in"
        yield broken("compute-mode", fact, fix)
    if device.compute_mode is ComputeMode.EXCLUSIVE:
        fact = (
            f"{device.label}: compute mode EXCLUSIVE_PROCESS lets one process in, Ollama included"
        )
        yield look("compute-mode", fact, fix)
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
            f"{device.label}: the driver does not report what each process holds (WSL, WDDM, a "
            "container)",
            "nothing to fix: peaks come from the frameworks' own counters; name Ollama's device "
            f"with gpu_share_ollama_gpu = {device.index} if there are several",
        )


def _left_out(problem: str) -> Finding:
    match = re.match(r"GPU (\d+)", problem)
    index = match[1] if match else "0"
    if "MIG mode and has no instance" in problem:
        fix = f"sudo nvidia-smi mig -i {index} -cgi 19 -C, or sudo nvidia-smi -i {index} -mig 0"
        return broken("mig-without-instance", problem, fix)
    number = re.search(r"\(NVML error (\d+)\)", problem)
    code, fix = _DEVICE_CODES.get(int(number[1]) if number else 0, ("gpu-left-out", "nvidia-smi"))
    return broken(code, problem, fix.format(index=index))


def _odd_value(variable: str, problem: str, *, seen: bool) -> Finding:
    if "twice" in problem:
        return broken("visible-twice", problem, f"export {variable} with each device once")
    if "own order" in problem:
        return look("visible-order", problem, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return (look if seen else broken)("visible-unknown", problem, _unset(variable))


_WATERSHED = (0, 30)
"""From this version on models run in llama-server, which fits them to the free VRAM."""


def ollama(found: Examined) -> Iterator[Finding]:
    """The Ollama server, its models, and its device."""
    server = found.started.ollama
    if not server.asked:
        why = found.started.settings.origins.get("enable_ollama_detection", "default")
        yield ok(f"not asked: gpu_share_enable_ollama_detection is false ({why})")
        return
    by = _reached_by(found)
    if not server.answered:
        yield _silent(found, server, by)
        return
    where = "on this host" if server.on_this_host else "on another machine: it holds no VRAM here"
    yield ok(f"Ollama {server.version or 'of unknown version'} at {server.address} ({by}), {where}")
    yield from _version(server)
    if not server.models:
        yield ok("no model is loaded")
    free = max((device.free for device in found.started.gpus.all_devices), default=None)
    for model in server.models:
        yield _model(model, free, found.settings.ollama_vram_reservation)
    yield from _needs(found)
    yield from _device(found, server)


def servers(found: Examined) -> Iterator[Finding]:
    """The other servers that share the devices."""
    for name, answer in other_servers(found.started.facts.answers).items():
        text = line_of(name, answer)
        if answer.answered:
            yield ok(text)
        else:
            yield look("server-silent", f"{text}; no VRAM is reserved for it", f"start {name}")


def _reached_by(found: Examined) -> str:
    server, settings = found.started.ollama, found.started.settings
    if settings.ollama_host:
        origin = settings.origins.get("ollama_host", "default")
        tried = (
            f", found as {server.found_by}"
            if settings.ollama_host == "auto" and server.found_by
            else ""
        )
        return f"gpu_share_ollama_host, {origin}{tried}"
    return "OLLAMA_HOST" if found.environment.get("OLLAMA_HOST") else "Ollama's default address"


def _silent(found: Examined, server: OllamaFacts, by: str) -> Finding:
    fact = f"Ollama at {server.address} ({by}): {server.problem}; {what_stands(found.started)}"
    patient = found.patient_ollama
    if patient is not None and patient.answered:
        return look(
            "ollama-slow",
            f"{fact}. Given more time, version {patient.version} answered",
            "gpu_share_ollama_timeout_s = 5",
        )
    if "is no port" in server.problem:
        return look("ollama-address", fact, "correct the port, as in OLLAMA_HOST=127.0.0.1:11434")
    if "status 403" in server.problem:
        return look(
            "ollama-host-check",
            f"{fact}. Ollama's Host check refuses names that it does not know, such as those of "
            "/etc/hosts or of a Compose service",
            "call it by its IP address, or by a name in .local or .internal: "
            "gpu_share_ollama_host = ADDRESS:PORT; or let it listen on 0.0.0.0",
        )
    if server.problem.startswith("no answer within"):
        return look(
            "ollama-hangs",
            f"{fact}. Something accepts connections there and does not answer, or the address "
            "leads nowhere",
            "raise gpu_share_ollama_timeout_s; where that does not help, restart it",
        )
    if server.reachable:
        return look(
            "ollama-nonsense",
            fact,
            "name Ollama's own address: gpu_share_ollama_host = HOST:PORT; Ollama before 0.1.38 "
            "cannot report what it holds",
        )
    elsewhere = ""
    if found.where.is_wsl or found.where.is_container:
        kind = "WSL" if found.where.is_wsl else "a container"
        elsewhere = (
            f"; from {kind} the host is gpu_share_ollama_host = host.docker.internal, or its "
            "gateway, and Ollama there must listen on 0.0.0.0"
        )
    return look(
        "ollama-silent",
        fact,
        "start it with ollama serve; or say where it is, gpu_share_ollama_host = HOST:PORT; or, "
        f"if there is none, gpu_share_preset = no-ollama{elsewhere}",
    )


def _version(server: OllamaFacts) -> Iterator[Finding]:
    version = server.version
    # Builds from source call themselves 0.0.0.
    if version and release(version) < _WATERSHED and release(version) != (0, 0, 0):
        yield look(
            "ollama-old",
            f"Ollama {version} is older than 0.30: the VRAM it reports is its own estimate, a "
            "model that is still loading counts as loaded, and it does not keep 1 GB free when "
            "it loads",
            "update Ollama, or keep more for it: gpu_share_ollama_vram_reservation_mb",
        )


def _model(model: LoadedModel, free: int | None, reserved: Fraction | None) -> Finding:
    """A loaded model; `reserved`: bytes as the settings have them, None where its size decides."""
    size = format_gb(model.size)
    if model.size_vram is None:
        return ok(f"{model.name}: {size}; Ollama does not say how much of it is on the GPU")
    if not model.is_spilled:
        return ok(f"{model.name}: {size}, all of it on the GPU")
    if uses_no_gpu(model, free):
        return look(
            "ollama-without-gpu",
            f"{model.name}: {size}, in RAM though {format_gb(free or 0)} of VRAM is free",
            why_in_ram(model),
        )
    held = format_gb(model.size_vram).removesuffix(" GB")
    part = 100 * model.size_vram // model.size
    where = f"{held} of {size} ({part} %) on the GPU, the rest" if model.size_vram else size
    wanted = model.size + MARGIN
    more = ""
    if reserved is not None and reserved < wanted:
        mb = -(-wanted // MB)
        more = f"; to keep room for it, gpu_share_ollama_vram_reservation_mb = {mb} or more"
    return look(
        "ollama-spilled",
        f"{model.name}: {where} on the CPU, where it is slow; it stays so until it is loaded again",
        f"{'' if has_room(model, free) else 'free VRAM, then '}ollama stop {model.name} and ask it "
        f"something{more}",
    )


def _needs(found: Examined) -> Iterator[Finding]:
    """The header's lines about `ollama_models`, where they report a problem."""
    for line in list(ollama_lines(found.started, 0))[1:]:
        fact, _, fix = line.text.strip().rpartition(": ")
        if line.problem and not re.search(r"gpu_share_|^ollama ", fix):
            fact, fix = line.text, "name the reservation: gpu_share_ollama_vram_reservation_mb"
        if line.problem:
            yield look("ollama-models", fact, fix)


def _device(found: Examined, server: OllamaFacts) -> Iterator[Finding]:
    gpus, settings = found.started.gpus, found.started.settings
    for note in found.started.notes:
        if note not in gpus.problems and note.startswith("gpu_share_ollama_gpu"):
            yield look("ollama-elsewhere", note, "gpu_share_ollama_gpu = auto, or name its device")
    if (
        not server.on_this_host
        or len(gpus.all_devices) < 2
        or settings.ollama_vram_reservation == 0
    ):
        return
    if devices_of_ollama(settings.ollama_gpu, gpus) is None:
        yield look(
            "ollama-device-unknown",
            f"which of {len(gpus.all_devices)} devices Ollama uses is unknown: the reservation is "
            "held on each of them",
            f"gpu_share_ollama_gpu = {gpus.all_devices[0].index} (or whichever it is)",
        )


def sessions(found: Examined) -> Iterator[Finding]:
    """The ledger by which sessions share the devices, and who leases what."""
    if not found.started.gpus.all_devices:
        return
    if found.settings.leases == OFF:
        yield ok("leases are off: sessions on this host take no account of each other")
        return
    directory = directory_of(found.settings.leases)
    # One that is missing is made by the first session.
    if directory.exists() or directory.is_symlink():
        yield from _ledger(directory)
    yield from (ok(text) for text in found.started.leases)
    if directory != MEETING_PLACE:
        # A directory of the user's own choice is taken to be visible to the others.
        return
    if found.where.is_container and not directory.is_mount():
        yield look(
            "leases-not-mounted",
            f"{directory} is this container's own: sessions outside are not seen",
            f"docker run -v {directory}:{directory}",
        )
    elif _is_private(directory):
        yield look(
            "leases-private",
            f"{directory} is in a private /tmp of systemd: sessions outside are not seen",
            "PrivateTmp=no, or gpu_share_leases = a directory that all sessions see",
        )


def _ledger(directory: Path) -> Iterator[Finding]:
    try:
        ledger = Ledger(directory, is_reader=True)
    except LedgerError as error:
        yield look("leases-unusable", str(error), f"remove {directory}, or set gpu_share_leases")
        return
    try:
        if os.access(directory, os.W_OK | os.X_OK):
            yield ok(f"{directory}: {plural(len(ledger.look()), 'session')}")
        else:
            fix = f"chmod 1777 {directory}"
            yield look("leases-unusable", f"{directory} cannot be written by this user", fix)
        for session in ledger.look():
            if session.problem:
                yield look(
                    "lease-not-understood",
                    f"{session.name} of {session.owner}: {session.problem}: it claims nothing",
                    "use one version of pytest-gpushare in all projects of this host",
                )
    finally:
        ledger.close()


def _is_private(directory: Path) -> bool:
    """Whether it is in a /tmp that systemd made for one service."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    places = (line.split() for line in mounts.splitlines())
    return directory.is_relative_to("/tmp") and any(
        place[4] == "/tmp" and "systemd-private" in place[3] for place in places if len(place) > 4
    )


def other_hosts(found: Examined) -> Iterator[Finding]:
    """One finding for each other host, asked as the run would: what would run there, or why not."""
    given = found.pytest.named_hosts
    if not (given or found.settings.hosts):
        return
    # Only a user who names hosts needs it.
    from pytest_gpushare.hosts.asking import look_at
    from pytest_gpushare.hosts.part import in_company
    from pytest_gpushare.hosts.specs import parse_lines, parse_tx

    try:
        specs = parse_tx(given) if given else parse_lines(found.settings.hosts, "configuration")
    except GpuShareError as error:
        yield broken("host-unusable", str(error), "correct the line")
        return
    root = Path(found.pytest.root) if found.pytest.root else Path.cwd()
    for name, answer, problem in look_at(specs, found.settings, root):
        if answer is None:
            yield broken("host-unusable", problem, "pytest-gpushare plan shows it again")
            continue
        host = HostOfRun(name, in_company(found.settings, answer).plan, answer.ollama)
        yield ok(host_line(host).strip())
        for note in answer.notes:
            yield look("host-doubtful", f"{name}: {note}", "synchronise the host")
