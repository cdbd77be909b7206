"""Ollama as a neighbour: how it is asked at the start, its processes, and what is kept for it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import Device, GpuFacts
from pytest_gpushare.gpu.host import command_line, parent_of
from pytest_gpushare.neighbours import Neighbour, NeighbourShare, resident_bytes
from pytest_gpushare.ollama.address import Address, Candidate, candidates
from pytest_gpushare.ollama.models import OLLAMA, ModelFacts, OllamaFacts
from pytest_gpushare.ollama.prediction import NOTHING_KNOWN, KnownSizes
from pytest_gpushare.ollama.reservation import devices_of_ollama, reserve
from pytest_gpushare.timed import TimedCall

if TYPE_CHECKING:
    from pytest_gpushare.ollama.client import Connection

_GRACE = 0.02
"""Seconds for a question that ran into its own limit to say so."""


class Ollama(Neighbour):
    """See `Neighbour`."""

    name = OLLAMA
    limit = None

    def ask(self, settings: Settings, environment: Mapping[str, str]) -> OllamaFacts:
        """See `ask_ollama`."""
        return ask_ollama(settings, environment)

    def ask_again(
        self, settings: Settings, environment: Mapping[str, str], before: OllamaFacts | None
    ) -> OllamaFacts:
        """The address that answered alone, else all; no model by name, which takes more GETs."""
        if before is None or not before.answered or before.server is None:
            return ask_ollama(settings._replace(ollama_models=()), environment)
        from pytest_gpushare.ollama.catalog import ask

        again = ask(before.server, float(settings.ollama_timeout))
        return again._replace(server=before.server, found_by=before.found_by)

    def owns(self, pid: int) -> bool:
        """See `holds_model`."""
        return holds_model(pid)

    def devices(self, settings: Settings, gpus: GpuFacts) -> tuple[Device, ...] | None:
        """See `devices_of_ollama`."""
        return devices_of_ollama(settings.ollama_gpu, gpus)

    def share(
        self,
        settings: Settings,
        gpus: GpuFacts,
        answer: OllamaFacts,
        sizes: KnownSizes = NOTHING_KNOWN,
    ) -> NeighbourShare:
        """Its reservation follows the settings, and its models where those say so."""
        known = self.devices(settings, gpus)
        resident = resident_bytes(self.name, answer, known, gpus)
        kept = reserve(settings, gpus, answer, known, resident, sizes)
        return NeighbourShare(self.name, kept.per_device, resident, kept.is_released, kept.demand)

    def with_nothing_held(self, answer: OllamaFacts) -> OllamaFacts:
        """See `Neighbour`."""
        return answer._replace(models=())


def ask_ollama(settings: Settings, environment: Mapping[str, str]) -> OllamaFacts:
    """Every address that may be Ollama's is asked at once; the best that answers is taken.

    All its questions together have the one time limit.
    """
    if not settings.enable_ollama_detection:
        return OllamaFacts()
    limit = float(settings.ollama_timeout)
    places = candidates(settings.ollama_host, environment)
    # Imported in this thread, so that its cost does not count against Ollama's time limit.
    from pytest_gpushare.ollama.catalog import ask
    from pytest_gpushare.ollama.client import load

    load()
    until = time.monotonic() + limit
    asked = [_OllamaAsking(place, until, partial(ask, place.address, limit)) for place in places]
    facts = []
    for asking in asked:
        facts.append(asking.finish(limit))
        if facts[-1].answered:
            break
    for asking in asked:
        asking.hang_up()
    found = facts[-1] if facts[-1].answered else _no_answer(facts)
    if found.answered and settings.ollama_models:
        place = places[len(facts) - 1]
        return found._replace(relied_on=_ask_models(place.address, settings, until))
    return found


def _no_answer(facts: Sequence[OllamaFacts]) -> OllamaFacts:
    """None of the addresses gave an answer: one report for all."""
    if len(facts) == 1:
        return facts[0]
    reachable = [each for each in facts if each.reachable]
    if reachable:
        return reachable[0]
    return facts[0]._replace(
        address=", ".join(each.address for each in facts),
        problem="; ".join(dict.fromkeys(each.problem for each in facts)),
        found_by="",
    )


class _OllamaAsking:
    """One address being asked in the background."""

    def __init__(self, place: Candidate, end: float, ask: Callable[[Any], OllamaFacts]) -> None:
        self._place, self._end = place, end
        self._connections: list[Connection] = []
        self._call = TimedCall(lambda: ask(self._connections.append), "ollama")

    def finish(self, limit: float) -> OllamaFacts:
        """The answer in time, or a report that there is none."""
        from pytest_gpushare.ollama.catalog import unanswered

        self._call.wait_until(self._end + _GRACE)
        facts = self._call.value or unanswered(self._place.address, f"no answer within {limit:g} s")
        return facts._replace(found_by=self._place.found_by, server=self._place.address)

    def hang_up(self) -> None:
        """Close connections that are still open, without waiting for answers."""
        _hang_up(self._connections)


def _ask_models(address: Address, settings: Settings, until: float) -> tuple[ModelFacts, ...]:
    from pytest_gpushare.ollama.catalog import ask_models

    names, connections = settings.ollama_models, list[Any]()
    call = TimedCall(lambda: ask_models(address, names, until, connections.append), "ollama")
    call.wait_until(until + _GRACE)
    models = call.value
    _hang_up(connections)
    problem = "no answer in time: raise gpu_share_ollama_timeout_s"
    return models or tuple(ModelFacts(name, problem=problem) for name in names)


def _hang_up(connections: Sequence[Connection]) -> None:
    for connection in connections:
        connection.hang_up()


def holds_model(pid: int) -> bool:
    """Whether it is a process in which an Ollama server holds a model.

    Since 0.30 that is `llama-server`, a name that stand-alone llama.cpp has too: then the
    model's path or the parent decides. Before, `ollama runner` or `ollama_llama_server`.
    """
    arguments = command_line(pid)
    if not arguments:
        return False
    name = re.split(r"[/\\]", arguments[0])[-1].removesuffix(".exe").lower()
    if name == "ollama":
        return True
    if name not in _RUNNERS:
        return False
    if name != "llama-server" or any(re.search(_BLOB, argument) for argument in arguments):
        return True
    parent = parent_of(pid)
    return parent is not None and "ollama" in (command_line(parent) or ("",))[0].lower()


_RUNNERS = ("llama-server", "ollama_llama_server", "ollama-runner")
_BLOB = r"[/\\]blobs[/\\]sha256-[0-9a-f]+$"
