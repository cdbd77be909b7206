"""The models of an Ollama server, and what the server answered, as values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pytest_gpushare.ollama.address import Address
from pytest_gpushare.units import format_gb

OLLAMA = "Ollama"
"""The name of the neighbour, in process lists and messages."""


class LoadedModel(NamedTuple):
    """A model that Ollama holds in memory, from its `/api/ps`."""

    name: str
    size: int
    """Bytes in all; they include the token embeddings only where part of it is on the CPU."""
    size_vram: int | None
    """Bytes on GPUs; less than `size` where part of the model is on the CPU (a spill). None
    where the server does not report them, or reports more than `size`."""
    digest: str = ""
    """The digest of its manifest; empty where the server does not report one."""
    context: int | None = None
    """Tokens of context that it was loaded with; None before Ollama 0.10."""
    expires_at: str = ""
    """When it will be unloaded, as the server writes it; empty where it does not."""

    @property
    def on_gpu(self) -> int:
        """Bytes that are on GPUs for certain: 0 where that is unknown."""
        return self.size_vram or 0

    @property
    def is_spilled(self) -> bool:
        """Whether part of it is known to be on the CPU."""
        return self.size_vram is not None and self.size_vram < self.size

    @property
    def is_whole(self) -> bool:
        """Whether all of it is on GPUs, as the server says."""
        return self.size_vram == self.size > 0


class Tensors(NamedTuple):
    """The tensors of a model's file, summed up."""

    number: int
    """How many go to the GPU where the whole model does."""
    size: int
    """Their bytes."""
    in_host_ram: int = 0
    """Bytes of the token embeddings, where they stay in host RAM: they do where the model has
    an output tensor of its own."""


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
    tensors: Tensors | None = None
    """The sizes of its tensors; None where the server does not list them."""
    is_remote: bool = False
    """Whether it runs in the cloud, so that it needs no VRAM here."""
    problem: str = ""
    """Why there are no metadata."""
    blob: str = ""
    """The digest of its file; models of one file share one process. Empty where unknown."""
    is_missing: bool = False
    """Whether the server does not have it."""


class OllamaFacts(NamedTuple):
    """What the Ollama server answered, or why it did not."""

    address: str = ""
    """host:port as messages name it; empty where no server was asked."""
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
    """Where it is called, for later questions; None where no server was asked."""
    relied_on: tuple[ModelFacts, ...] = ()
    """What it says of the models that the user named."""
    odd: tuple[str, ...] = ()
    """Entries of `/api/ps` that make no sense, one phrase each; they are left out."""

    @property
    def vram(self) -> int:
        """Bytes of VRAM that its models hold, as far as the server reports them."""
        return sum(model.on_gpu for model in self.models)


def full_name(name: str) -> str:
    """A model's name as Ollama completes it, for comparisons: with its tag, in lower case."""
    name = name.strip().lower()
    for start in ("registry.ollama.ai/", "library/"):
        name = name.removeprefix(start)
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def described(model: LoadedModel) -> str:
    """`qwen2.5:14b 10.8 GB, 100 % on GPU`."""
    size = format_gb(model.size)
    if model.size_vram is None or not model.size:
        return f"{model.name} {size}, how much of it on GPU is unknown"
    if not model.size_vram:
        return f"{model.name} {size}, on the CPU, not on GPU"
    # Rounded down, so that only a model that is wholly there is called 100 %.
    part = f"{100 * model.size_vram // model.size} % on GPU"
    # Buffers are on the GPU also where no layer is.
    return f"{model.name} {size}, {part}{', perhaps no layer' if has_no_layer(model) else ''}"


_BUFFERS = 10
"""Per cent of a model that may be on the GPU though no layer of it is."""


def has_no_layer(model: LoadedModel) -> bool:
    """Whether what is on the GPU is so little that it may be buffers alone."""
    return model.is_spilled and 100 * model.on_gpu < _BUFFERS * model.size
