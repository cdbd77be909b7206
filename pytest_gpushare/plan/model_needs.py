"""What Ollama's models need on the GPU, from the best source there is for each.

A loaded model needs what it holds. Of the others, a size that was seen in an earlier run
wins over a prediction, and a prediction over the size in a model's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from pytest_gpushare.plan.demand import (
    MARGIN,
    SHARE,
    Prediction,
    Server,
    by_name,
    context_of,
    predict,
)
from pytest_gpushare.plan.shape import ShapeUnknownError
from pytest_gpushare.probe.facts import LoadedModel, ModelFacts, OllamaFacts, full_name


class Source(str, Enum):
    """Where a figure comes from, in the words of the output."""

    LOADED = "loaded"
    SEEN = "seen in an earlier run"
    PREDICTED = "predicted"
    NAME = "by the size in its name"
    CLOUD = "runs in the cloud"


@dataclass(frozen=True)
class ModelNeed:
    """What one model needs."""

    name: str
    vram: int
    """Bytes that have to be free, or held by it, so that it is wholly on the GPU."""
    source: Source
    reason: str = ""
    """Why there is nothing better than its name to go by."""
    prediction: Prediction | None = None
    """What was predicted, whether or not something better was found."""
    missing: int = 0
    """Bytes of a loaded model that are not on the GPU."""

    @property
    def difference(self) -> int | None:
        """Bytes by which the model takes more than predicted; None where one is not known."""
        if self.prediction is None or self.source not in (Source.LOADED, Source.SEEN):
            return None
        if self.source is Source.LOADED:
            return self.vram - self.prediction.buffers
        return self.vram - self.prediction.vram


@dataclass(frozen=True)
class Demand:
    """What all the models together need."""

    needs: tuple[ModelNeed, ...] = ()
    asked: bool = True
    """Whether the server could be asked; if not, the figures are whole reservations."""

    @property
    def pending(self) -> int:
        """Bytes that models still have to be given: those not loaded, and what is missing."""
        return sum(
            need.missing if need.source is Source.LOADED else need.vram for need in self.needs
        )

    @property
    def margin(self) -> int:
        """Bytes that have to stay free beside a model when it is loaded."""
        return MARGIN if self.asked else 0

    def room(self, choices: int) -> int:
        """Bytes that must be free on a device, beside what Ollama holds there already.

        Where Ollama has several devices to choose from it takes no more than 80 % of what is
        free on one, so that so much more must be free.
        """
        least = self.pending + self.margin
        if choices < 2 or not self.asked:
            return least
        return max(least, -(-self.pending * SHARE[1] // SHARE[0]))

    def document(self) -> list[dict[str, object]]:
        """The needs in builtin types, for reports; sizes in bytes."""
        return [
            {
                "name": need.name,
                "vram_bytes": need.vram,
                "source": need.source.value,
                "predicted_bytes": need.prediction.vram if need.prediction else None,
                "difference_bytes": need.difference,
                "reason": need.reason,
            }
            for need in self.needs
        ]


def demand_of(
    names: Sequence[str], ollama: OllamaFacts, server: Server, seen: Mapping[str, int]
) -> Demand:
    """What the named models need, and what is loaded beside them.

    `seen` has the sizes of earlier runs in bytes, under the keys of `Server.key`.
    """
    if not ollama.answered:
        return Demand(
            tuple(_by_name(name, "Ollama cannot be asked") for name in names), asked=False
        )
    told = {full_name(model.name): model for model in ollama.relied_on}
    loaded = {full_name(model.name): model for model in ollama.models}
    digests = {model.digest for model in ollama.models} - {""}
    needs = [_loaded(model, told.get(name), server) for name, model in loaded.items()]
    if not ollama.on_this_host:
        # What is loaded elsewhere is not resident here, so that room for all of it is kept.
        needs = [replace(need, missing=need.vram) for need in needs]
    for name, written in {full_name(written): written for written in names}.items():
        model = told.get(name, ModelFacts(written, problem="it was not asked for"))
        if name not in loaded and model.digest not in digests:
            needs.append(_need(model, server, seen))
    return Demand(tuple(needs))


def _loaded(model: LoadedModel, told: ModelFacts | None, server: Server) -> ModelNeed:
    """What it holds; one that the run relies on wants what it lacks, too, when it is reloaded."""
    if told is None:
        return ModelNeed(model.name, model.size_vram, Source.LOADED)
    # Predicted for the context that it has, so that the two figures can be compared.
    as_loaded = server._replace(context=model.context or server.context)
    return ModelNeed(
        model.name,
        max(model.size, model.size_vram),
        Source.LOADED,
        prediction=_prediction(told._replace(num_ctx=None), as_loaded),
        missing=max(0, model.size - model.size_vram),
    )


def _prediction(model: ModelFacts, server: Server) -> Prediction | None:
    try:
        return predict(model, server)
    except ShapeUnknownError:
        return None


def _need(model: ModelFacts, server: Server, seen: Mapping[str, int]) -> ModelNeed:
    if model.is_remote:
        return ModelNeed(model.name, 0, Source.CLOUD)
    reason, prediction = "", None
    try:
        prediction = predict(model, server)
    except ShapeUnknownError as error:
        reason = str(error)
    context = prediction.context if prediction else context_of(model.num_ctx, server)
    known = seen.get(server.key(model.digest, context)) if model.digest else None
    if known is not None:
        return ModelNeed(model.name, known, Source.SEEN, prediction=prediction)
    if prediction is None:
        return _by_name(model.name, reason, model)
    return ModelNeed(model.name, prediction.vram, Source.PREDICTED, prediction=prediction)


def _by_name(name: str, reason: str, model: ModelFacts | None = None) -> ModelNeed:
    size = by_name(name, model.parameter_size, model.file_bytes) if model else by_name(name)
    return ModelNeed(name, size, Source.NAME, reason)
