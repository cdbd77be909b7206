"""The servers that share the devices with the tests: neighbours, and what is asked of each.

Whatever needs no more than a server's name, the VRAM to keep for it, what it holds and which
processes are its own goes through `SERVERS`. CONTRIBUTING.md shows how one is added.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pytest_gpushare.gpu.attribution import Attribution, Statement
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.timed import TimedCall
from pytest_gpushare.units import format_gb

if TYPE_CHECKING:
    from pytest_gpushare.config.settings import Settings
    from pytest_gpushare.gpu.devices import Device, GpuFacts
    from pytest_gpushare.ollama.prediction import KnownSizes
    from pytest_gpushare.ollama.reservation import Demand

SERVERS = ("pytest_gpushare.neighbours.ollama:Ollama",)
"""Each server as `module:class`, in the order of the output. An idle run imports none of them."""


class NeighbourShare(NamedTuple):
    """What a server on the same devices needs, as planning sees it; bytes by UUID."""

    name: str
    reservation: Mapping[str, int]
    """VRAM kept for it, the resident part included; a device without an entry keeps nothing."""
    resident: Mapping[str, int]
    """VRAM that it holds already."""
    is_released: bool = False
    """Whether nothing is kept because it was not reached."""
    demand: Demand | None = None
    """What it needs, model by model; None where no model is named."""


class ServerAnswer(Protocol):
    """What a server said, or why it said nothing; `OllamaFacts` is one, with more in it."""

    @property
    def address(self) -> str:
        """As messages name it."""

    @property
    def asked(self) -> bool:
        """Whether there was anything to ask: else no line of output names the server."""

    @property
    def answered(self) -> bool:
        """Whether the answer makes sense."""

    @property
    def version(self) -> str | None:
        """None where it is unknown."""

    @property
    def vram(self) -> int:
        """Bytes that it holds on all devices, as it says itself; 0 where it does not."""

    @property
    def problem(self) -> str:
        """Why there is no sensible answer."""

    @property
    def on_this_host(self) -> bool:
        """Whether what it holds can be on this host's devices."""


class ServerFacts(NamedTuple):
    """The answer of a server that has no more to say than every server; see `ServerAnswer`."""

    address: str = ""
    asked: bool = False
    answered: bool = False
    version: str | None = None
    vram: int = 0
    keep: int = 0
    """Bytes to keep for it on each device that it uses, what it holds there included."""
    problem: str = ""
    on_this_host: bool = True


class Neighbour(ABC):
    """A server that shares the devices: a class without state, named in `SERVERS`.

    `name`, `ask` and `owns` are all that it must have; the rest follows from what they return.
    """

    name: str
    """As process lists, messages and reports name it."""
    limit: float | None = 2.0
    """Seconds that `ask` may take, in a thread of its own; None: it keeps to a limit itself."""

    @abstractmethod
    def ask(self, settings: Settings, environment: Mapping[str, str]) -> Any:
        """The server's `ServerAnswer`; one with `asked` false where the user has no such server."""

    @abstractmethod
    def owns(self, pid: int) -> bool:
        """Whether a process that NVML lists is one in which the server holds VRAM."""

    def ask_again(self, settings: Settings, environment: Mapping[str, str], _before: Any) -> Any:
        """Its answer later on, of what it holds; `_before` is the last one, None at first."""
        return self.ask(settings, environment)

    def devices(self, _settings: Settings, gpus: GpuFacts) -> tuple[Device, ...] | None:
        """The devices that it uses; None while that is unknown, () where it uses none."""
        found = tuple(d for d in gpus.all_devices if lists(d, self.name))
        return found or (gpus.all_devices if len(gpus.all_devices) == 1 else None)

    def share(
        self, settings: Settings, gpus: GpuFacts, answer: Any, _sizes: KnownSizes
    ) -> NeighbourShare:
        """What is kept for it, and what it holds. `_sizes`: what earlier runs saw of models."""
        known = self.devices(settings, gpus)
        may_use = gpus.all_devices if known is None else known
        kept = answer.keep if answer.answered and answer.on_this_host else 0
        return NeighbourShare(
            self.name,
            {device.uuid: kept for device in may_use},
            resident_bytes(self.name, answer, known, gpus),
        )

    def with_nothing_held(self, answer: Any) -> Any:
        """The answer under a what-if: what the server holds is on real devices."""
        return answer._replace(vram=0)


Answers = Mapping[str, Any]
"""Name of a server -> its `ServerAnswer`."""


@cache
def servers() -> tuple[Neighbour, ...]:
    """One object for each entry of `SERVERS`."""
    found = []
    for entry in SERVERS:
        module, _, name = entry.partition(":")
        found.append(getattr(importlib.import_module(module), name)())
    return tuple(found)


def owner_of(pid: int) -> str:
    """The name of the server whose process this is; empty for every other process."""
    return next((each.name for each in servers() if each.owns(pid)), "")


def lists(device: Device, name: str) -> bool:
    """Whether NVML lists a process of that server on a device."""
    return any(process.neighbour == name for process in device.processes or ())


def ask_all(settings: Settings, environment: Mapping[str, str]) -> Answers:
    """What every server says, all asked at the same time. `environment` is the user's."""
    return _asked({each: partial(each.ask, settings, environment) for each in servers()})


def ask_again(settings: Settings, environment: Mapping[str, str], before: Answers) -> Answers:
    """What those servers hold now of which `before` has the last answers; empty: every server."""
    return _asked(
        {
            each: partial(each.ask_again, settings, environment, before.get(each.name))
            for each in servers()
            if not before or each.name in before
        }
    )


def _asked(questions: Mapping[Neighbour, Callable[[], Any]]) -> Answers:
    began = time.monotonic()
    calls = {
        each: TimedCall(question, each.name.lower())
        for each, question in questions.items()
        if each.limit is not None
    }
    return {
        each.name: questions[each]()
        if each.limit is None
        else _in_time(calls[each], began + each.limit, each.limit)
        for each in questions
    }


def _in_time(call: TimedCall[Any], end: float, limit: float) -> Any:
    if not call.wait_until(end):
        return ServerFacts(asked=True, problem=f"no answer within {limit:g} s")
    try:
        return call.result()
    except Exception as error:
        return ServerFacts(asked=True, problem=f"{type(error).__name__}: {error}")


def shares_of(
    settings: Settings, gpus: GpuFacts, answers: Answers, sizes: KnownSizes
) -> tuple[NeighbourShare, ...]:
    """What is kept for each server, and what it holds."""
    return tuple(
        each.share(settings, gpus, answers[each.name], sizes)
        for each in servers()
        if each.name in answers
    )


Known = Mapping[str, "tuple[Device, ...] | None"]
"""Name of a server -> the devices that it uses; None while they are unknown."""


def devices_of_servers(settings: Settings, gpus: GpuFacts) -> Known:
    """The devices of each server."""
    return {each.name: each.devices(settings, gpus) for each in servers()}


def statements_of(answers: Answers, known: Known) -> tuple[Statement, ...]:
    """What the servers say that they hold on this host."""
    return tuple(
        statement
        for name, answer in answers.items()
        for statement in _statement(name, answer, known.get(name))
    )


def _statement(
    name: str, answer: ServerAnswer, known: tuple[Device, ...] | None
) -> tuple[Statement, ...]:
    """What one says; empty where it says nothing, or is on another host."""
    if not (answer.answered and answer.on_this_host):
        return ()
    devices = None if known is None else tuple(device.uuid for device in known)
    return (Statement(name, answer.vram, devices),)


def resident_bytes(
    name: str, answer: ServerAnswer, known: tuple[Device, ...] | None, gpus: GpuFacts
) -> Mapping[str, int]:
    """UUID -> bytes that a server holds there; no byte is counted on two devices.

    `known` has the devices that it uses. See `gpu.attribution.resident_bytes`. A server on another
    host holds nothing here.
    """
    if not answer.on_this_host:
        return {}
    usage = Attribution(gpus.all_devices, _statement(name, answer, known)).start
    return {uuid: found.of(name) for uuid, found in usage.items()}


def answer_of_ollama(answers: Answers) -> OllamaFacts:
    """What Ollama said, for all that only Ollama has."""
    found: OllamaFacts = answers.get(OLLAMA, OllamaFacts())
    return found


def with_models(answers: Answers, loaded: Sequence[LoadedModel] | None) -> Answers:
    """The answers, with the models that Ollama named later, where it did."""
    if loaded is None:
        return answers
    ollama = answer_of_ollama(answers)._replace(answered=True, models=tuple(loaded))
    return {**answers, OLLAMA: ollama}


def line_of(name: str, answer: ServerAnswer) -> str:
    """`ToyServe 1.2 at 127.0.0.1:9000: 3.0 GB in VRAM`: a server in a line of output."""
    who = f"{name} {answer.version}" if answer.version else name
    where = f"{who} at {answer.address}" if answer.address else who
    if not answer.answered:
        return f"{where}: {answer.problem}"
    away = "" if answer.on_this_host else ", on another machine"
    return f"{where}{away}: {format_gb(answer.vram)} in VRAM"


def other_servers(answers: Answers) -> Answers:
    """The answers of the servers but Ollama, which has lines, options and events of its own;
    without those that were not asked."""
    return {name: each for name, each in answers.items() if name != OLLAMA and each.asked}
