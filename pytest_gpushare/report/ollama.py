"""The header's lines on Ollama: where it is, what it holds, what its models need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pytest_gpushare.plan.placed import placed
from pytest_gpushare.probe.address import AUTO
from pytest_gpushare.probe.facts import OllamaFacts
from pytest_gpushare.units import MB, format_gb

if TYPE_CHECKING:
    from pytest_gpushare.plan.model_needs import Demand, ModelNeed
    from pytest_gpushare.run.started import Started


class Text(NamedTuple):
    """A line, and whether it is one that `-q` must not swallow."""

    text: str
    problem: bool = False


def ollama_lines(started: Started, verbosity: int) -> Iterator[Text]:
    """The server and its models; what the models need, where some are named."""
    # Where there is no device, a server that is not there either is no news.
    if started.ollama.asked and (started.plan.devices or started.ollama.reachable):
        yield _server(started)
    if started.plan.demand is not None and started.plan.devices:
        yield from _demand(started, started.plan.demand, verbosity)


def _server(started: Started) -> Text:
    ollama = started.ollama
    who = f"Ollama {ollama.version}" if ollama.version else "Ollama"
    if not ollama.answered:
        text = f"  {who} at {ollama.address}: {ollama.problem}; {what_stands(started)}"
        return Text(text, problem=ollama.reachable)
    models = ", ".join(placed(model) for model in ollama.models)
    spilled = any(model.is_spilled for model in ollama.models)
    where = _found(started, ollama) + _elsewhere(started)
    return Text(f"  {who} at {ollama.address}{where}: {models or 'no model in VRAM'}", spilled)


def what_stands(started: Started) -> str:
    """What becomes of the reservation where the server does not answer."""
    if not started.plan.devices:
        return "no GPU to share with it"
    if started.plan.is_released:
        return "no VRAM is reserved for it (gpu_share_ollama_unreachable = release)"
    if started.settings.ollama_vram_reservation is None:
        return "its VRAM is reserved by the sizes in its models' names"
    if started.settings.ollama_unreachable == "release":
        return "something is there, so its VRAM reservation stands"
    return "its VRAM reservation stands"


def _found(started: Started, ollama: OllamaFacts) -> str:
    """How an address was found that nobody wrote down."""
    tried = started.settings.ollama_host.strip().lower() == AUTO
    return f", found as {ollama.found_by}" if tried and ollama.found_by else ""


def _elsewhere(started: Started) -> str:
    if started.ollama.on_this_host:
        return ""
    if started.settings.ollama_gpu == ("none",):
        return ", on another machine (no VRAM is reserved for it here)"
    return (
        ", on another machine (VRAM is reserved here all the same, unless "
        "gpu_share_ollama_gpu = none)"
    )


def _demand(started: Started, demand: Demand, verbosity: int) -> Iterator[Text]:
    follows = started.settings.ollama_vram_reservation is None
    if demand.asked and (follows or verbosity >= 1):
        each = ", ".join(f"{n.name} {format_gb(n.vram)} ({n.source.value})" for n in demand.needs)
        margin = format_gb(demand.margin)
        yield Text(f"  VRAM that Ollama needs: {each}; {margin} to stay free when it loads")
    for need in demand.needs:
        # Without an answer all are taken by name, as the line above has said.
        if need.reason and demand.asked:
            name, size = need.name, format_gb(need.vram)
            text = f"  VRAM for {name}: {size} by the size in its name: {need.reason}"
            yield Text(text, problem=True)
    short = 0 if follows else _shortage(started, demand)
    if short:
        yield Text(
            f"  VRAM that Ollama needs is more than is reserved: "
            f"gpu_share_ollama_vram_reservation_mb = {short // MB} would hold its models",
            problem=True,
        )
    if verbosity >= 1:
        yield from (Text(f"  {text}") for need in demand.needs for text in _parts(need))


def _shortage(started: Started, demand: Demand) -> int:
    """The reservation, in bytes and whole MB, that would have held the models; 0 where it does."""
    kept = [device for device in started.plan.devices if device.reservation]
    if not demand.asked or not kept:
        return 0
    least = min(device.reservation for device in kept)
    wanted = sum(need.vram for need in demand.needs) + demand.margin
    return -(-wanted // MB) * MB if least < wanted else 0


def _parts(need: ModelNeed) -> Iterator[str]:
    prediction = need.prediction
    if prediction is None:
        return
    yield (
        f"VRAM of {need.name} as predicted: weights {format_gb(prediction.weights)}, KV cache "
        f"{format_gb(prediction.kv_cache)} for {prediction.context} tokens, buffers "
        f"{format_gb(prediction.graph)}, CUDA context {format_gb(prediction.cuda_context)}"
    )
    if need.difference is not None:
        more = "more" if need.difference >= 0 else "less"
        yield (
            f"VRAM of {need.name} {need.source.value}: {format_gb(need.vram)}, "
            f"{format_gb(abs(need.difference))} {more} than predicted"
        )
