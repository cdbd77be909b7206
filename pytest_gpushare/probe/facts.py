"""What was found out: frozen values in bytes; what could not be found out is None."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from pytest_gpushare.probe.address import Address
from pytest_gpushare.quick import dataclass


class GpuProcess(NamedTuple):
    """A process that holds VRAM on a device, from NVML's list of compute processes."""

    pid: int
    used: int | None
    """Bytes of VRAM; None where the driver does not tell (WDDM, WSL 2, containers)."""
    is_ollama: bool = False
    """Whether it is a runner of an Ollama server."""


class Memory(NamedTuple):
    """VRAM of a device at one moment, in bytes."""

    total: int
    used: int
    free: int


class ComputeMode(Enum):
    """How many processes may use a device at once (nvidia-smi -c)."""

    DEFAULT = 0
    PROHIBITED = 2
    EXCLUSIVE = 3


@dataclass(frozen=True)
class Device:
    """One GPU or one MIG instance, as NVML described it."""

    uuid: str
    name: str
    index: str
    """NVML's index as nvidia-smi shows it: "0", or "0.1" for a MIG instance of GPU 0."""
    total: int
    """Bytes of VRAM."""
    used: int
    """Bytes in use, by whomever; on memory that is shared with the CPU, by the whole system."""
    free: int
    """Bytes that NVML says are free: decisions are made on this."""
    processes: tuple[GpuProcess, ...] | None = None
    """Who holds VRAM there; None where the driver does not tell."""
    compute_mode: ComputeMode = ComputeMode.DEFAULT
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability; (0, 0) where the driver does not tell."""
    parent: str = ""
    """UUID of the GPU of which this is a MIG instance; empty for a whole GPU."""
    variable: str = "CUDA_VISIBLE_DEVICES"
    """The environment variable by which a process is shown this device."""
    visible_as: str = ""
    """What is written there; empty: its UUID."""
    unified: bool = False
    """Whether the device has no memory of its own but shares the host's."""

    @property
    def label(self) -> str:
        """`GPU 0`, as lines of output name it."""
        return f"GPU {self.index}"


class GpuFacts(NamedTuple):
    """All that the probe of the devices found."""

    devices: tuple[Device, ...] = ()
    """The devices that this process may use, in the order of its visibility."""
    all_devices: tuple[Device, ...] = ()
    """Every device of the host, also those that the outer CUDA_VISIBLE_DEVICES hides."""
    absence: str = ""
    """Why there is no device to use, with the remedy; empty where there is one."""
    problems: tuple[str, ...] = ()
    """What went wrong on the way: devices that were left out, and why."""
    driver: str | None = None
    simulated: bool = False
    """Whether a what-if of the user stands in for NVML."""
    own_process_has_context: bool = False
    """Whether NVML lists the probing process itself: CUDA is up in it already."""


class LoadedModel(NamedTuple):
    """A model that Ollama holds in memory, from its `/api/ps`."""

    name: str
    size: int
    """Bytes in all."""
    size_vram: int
    """Bytes on GPUs; less than `size` where part of the model is on the CPU (a spill)."""
    digest: str = ""
    """The digest of its manifest; empty where the server tells none."""
    context: int | None = None
    """Tokens of context that it was loaded with; None before Ollama 0.10."""

    @property
    def is_spilled(self) -> bool:
        """Whether part of it is on the CPU."""
        return self.size_vram < self.size

    @property
    def is_whole(self) -> bool:
        """Whether all of it is on GPUs, as the server says; where it says that more than all
        of it is there, nobody knows."""
        return self.size_vram == self.size > 0


class ModelFacts(NamedTuple):
    """A model that a run relies on, from `/api/tags` and `/api/show`; nothing is checked yet."""

    name: str
    """As the user wrote it."""
    digest: str = ""
    file_bytes: int | None = None
    """Bytes of its files; None where the server does not list it."""
    parameter_size: str = ""
    """`14.8B`, as the server says."""
    num_ctx: int | None = None
    """Tokens of context that its own settings ask for; None where they do not."""
    info: Mapping[str, object] | None = None
    """The metadata of its file; None where there are none."""
    is_remote: bool = False
    """Whether it runs in the cloud, so that it needs no VRAM here."""
    problem: str = ""
    """Why there are no metadata."""


class OllamaFacts(NamedTuple):
    """What the Ollama server said, or why it said nothing."""

    address: str = ""
    """host:port as messages name it; empty where nobody was asked."""
    asked: bool = False
    answered: bool = False
    """Whether `/api/ps` gave a list of models that makes sense."""
    version: str | None = None
    models: tuple[LoadedModel, ...] = ()
    problem: str = ""
    """Why there is no (sensible) answer."""
    reachable: bool = False
    """Whether something answered over HTTP, sensibly or not."""
    on_this_host: bool = True
    """Whether what it holds can be on this host's devices."""
    found_by: str = ""
    """How its address was found: the setting or variable that names it, or what was tried."""
    server: Address | None = None
    """Where it is called, for whoever asks more later; None where nobody was asked."""
    relied_on: tuple[ModelFacts, ...] = ()
    """What it says of the models that the user named."""

    @property
    def vram(self) -> int:
        """Bytes of VRAM that its models hold, as the server says."""
        return sum(model.size_vram for model in self.models)


class HostFacts(NamedTuple):
    """What the host can carry."""

    cpus: int
    """Workers that xdist's `auto` would start."""
    available_ram: int | None = None
    """Bytes of RAM that can be had without swapping; None where unknown."""
    outer_slot: int | None = None
    """Bytes of the slot in which this whole run lives, as a test of another run started it."""


def full_name(name: str) -> str:
    """A model's name as Ollama completes it, for comparisons: with its tag, in lower case."""
    name = name.strip().lower()
    for start in ("registry.ollama.ai/", "library/"):
        name = name.removeprefix(start)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"
