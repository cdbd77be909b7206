"""The models of an Ollama server, what the server answered, and the models that a run uses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


class RunModel(NamedTuple):
    """One model with one context, as the server would run it."""

    name: str = ""
    """As the user wrote it first; empty: unknown."""
    context: int = 0
    """Tokens of context that requests ask for; 0: none, the server's own."""
    facts: ModelFacts | None = None
    """What the server says of it; None where it was not asked."""
    names: tuple[str, ...] = ()
    """All names that the tests have for it."""

    @property
    def options(self) -> Mapping[str, int]:
        """The options of requests for it; others would have the server load it again."""
        return {"num_ctx": self.context} if self.context else {}

    @property
    def key(self) -> str:
        """What makes it one process of the server: its file, where that is known, and context."""
        blob = self.facts.blob if self.facts is not None else ""
        return f"{blob or full_name(self.name)}@{self.context}"

    @property
    def shown(self) -> str:
        """As messages name it."""
        if not self.name:
            return "an unknown model"
        return f"{self.name} at {self.context} tokens" if self.context else self.name

    def is_same(self, loaded: LoadedModel) -> bool:
        """Whether this is a loaded model, with the context that it has."""
        facts = self.facts
        known = {full_name(name) for name in self.names}
        same = full_name(loaded.name) in known or (
            facts is not None and bool(facts.digest) and facts.digest == loaded.digest
        )
        wanted = self.context or (facts.num_ctx if facts is not None else None)
        return same and (not wanted or not loaded.context or loaded.context == wanted)


def grouped(
    uses: Iterable[tuple[str, int]], facts: Mapping[str, ModelFacts]
) -> tuple[list[RunModel], dict[tuple[str, int], int]]:
    """The different models, and for each (name, context) which of them it means.

    Two names of one file are one process, and so are two contexts that the server cuts to the
    same. `facts` is by full name; what it lacks was not asked for.
    """
    models: dict[tuple[str, int], RunModel] = {}
    meant: dict[tuple[str, int], tuple[str, int]] = {}
    for use in dict.fromkeys(uses):
        name, declared = use
        found = facts.get(full_name(name)) if name else None
        context = _effective(declared, found)
        key = (
            (found.blob if found is not None else "") or (full_name(name) if name else ""),
            context,
        )
        meant[use] = key
        before = models.get(key)
        if before is None:
            models[key] = RunModel(name, context, found, (name,) if name else ())
        elif name not in before.names:
            models[key] = before._replace(names=(*before.names, name))
    numbers = {key: number for number, key in enumerate(models)}
    return list(models.values()), {use: numbers[key] for use, key in meant.items()}


def _effective(declared: int, facts: ModelFacts | None) -> int:
    """The context that decides: never more than the model's own; 0 where that is what it has."""
    if not declared or facts is None:
        return declared
    trained = _trained(facts)
    context = min(declared, trained) if trained else declared
    return 0 if context == facts.num_ctx else context


def _trained(facts: ModelFacts) -> int | None:
    info = facts.info or {}
    value = info.get(f"{info.get('general.architecture')}.context_length")
    return value if type(value) is int and value > 0 else None


def in_order(
    models: Sequence[RunModel], loaded: Sequence[LoadedModel], work: Sequence[float]
) -> list[int]:
    """The numbers of the models in the order to load them.

    What is loaded already comes first, as nothing has to be loaded for it and another model might
    evict it; then the most work (in seconds, or any measure), so that what is limited by its
    model does not come last. An unknown model comes at the end.
    """

    def rank(number: int) -> tuple[bool, bool, float, int]:
        model = models[number]
        is_there = any(model.is_same(each) for each in loaded)
        return (not model.name, not is_there, -work[number], number)

    return sorted(range(len(models)), key=rank)
