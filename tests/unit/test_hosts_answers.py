"""What comes from another host is foreign: it is checked, and what is damaged is refused."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.gpu.attribution import Attribution
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, HostFacts, Memory
from pytest_gpushare.hosts.agent import settings_as_texts, settings_of, words_of
from pytest_gpushare.hosts.answers import (
    Hello,
    HostAnswer,
    MemorySample,
    ModelsAnswer,
    ProcessRow,
    ProcessSample,
    Sample,
    answer_message,
    message,
    read,
    read_answer,
    with_devices,
)
from pytest_gpushare.hosts.checkout import Checkout
from pytest_gpushare.hosts.hosted_run import HostLinks
from pytest_gpushare.hosts.live import AllAttribution, HostLive, global_pid
from pytest_gpushare.hosts.part import OtherHost, in_company
from pytest_gpushare.hosts.specs import HostSpec
from pytest_gpushare.neighbours import NeighbourShare, ServerFacts
from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, ModelFacts, OllamaFacts
from pytest_gpushare.planning.placement import PlacementContext
from pytest_gpushare.planning.plan import Plan, Request
from pytest_gpushare.planning.sizing import make_plan
from pytest_gpushare.units import GB

from .damage import ODD, damaged

HERE = Path("/nowhere")
SETTINGS = load(Written({}, {"gpu_share_config": ""}, {}, "", HERE, HERE, HERE))
DEVICE = Device("GPU-1", "a card", "0", 24 * GB, 2 * GB, 22 * GB, (GpuProcess(7, GB, "Ollama"),))


def sent(kind: str, value: object) -> dict[str, Any]:
    """As it arrives."""
    return dict(json.loads(json.dumps(message(kind, value))))


def plan(device: Device) -> Plan:
    shares = (
        NeighbourShare(OLLAMA, {"GPU-1": 12 * GB}, {"GPU-1": GB}),
        NeighbourShare("ToyServe", {"GPU-1": 4 * GB}, {"GPU-1": 3 * GB}),
    )
    return make_plan(SETTINGS, GpuFacts((device,), (device,)), shares, HostFacts(6, None),
                     Request())  # fmt: skip


TOY = ServerFacts("127.0.0.1:9", asked=True, answered=True, version="1.0", vram=3 * GB)


def answer(device: Device = DEVICE) -> HostAnswer:
    gpus = GpuFacts((device,), (device,), driver="580")
    model = LoadedModel("m:1b", GB, GB, "sha256:1", 4096)
    facts = ModelFacts("m:1b", info={"general.architecture": object()})
    server = parse_address("http://127.0.0.1:1")
    ollama = OllamaFacts(server.shown, True, True, "0.33.0", (model,), server=server,
                         relied_on=(facts,))  # fmt: skip
    return HostAnswer(
        gpus, plan(device), ollama, ("m:1b",), {"XLA_FLAGS": "x", "HOME": "/root"},
        {"torch": "2.1"}, False, "/tmp/lease", ("a note",), ("loaded",), (),
        Checkout("abc", "def"), "", {"ToyServe": TOY},
    )  # fmt: skip


def answered(found: HostAnswer) -> dict[str, Any]:
    return dict(json.loads(json.dumps(answer_message(found))))


def test_an_answer_comes_back_with_its_host() -> None:
    there = answer()
    facts = read_answer(answered(there), "box")
    assert facts.gpus.devices[0].label == "box GPU 0"
    assert facts.gpus.devices[0].processes == DEVICE.processes
    assert with_devices(facts.plan, lambda device: replace(device, host="")) == there.plan
    assert facts.plan.slots[0].device == facts.plan.devices[0].device == facts.gpus.devices[0]
    assert facts.ollama.models == (LoadedModel("m:1b", GB, GB, "sha256:1", 4096),)
    assert facts.ollama.server == parse_address("http://127.0.0.1:1")
    assert facts.answers["ToyServe"] == TOY
    assert (facts.notes, facts.loaded) == (("a note",), ("loaded",))
    assert facts.checkout == Checkout("abc", "def")
    # Nothing of the environment but what caps depend on, and what the models need stays there.
    assert facts.outer == {"XLA_FLAGS": "x"}
    assert facts.ollama.relied_on == ()


def place(kind: str) -> tuple[int, ...]:
    """Where an answer has a part, in its message."""
    return {
        "slot": (1, 0, 0, 0, 0),
        "planned": (1, 3, 0, 0, 0),
        "usable": (0, 0, 0, 0),
        "free": (0, 1, 0, 5),
        "request": (1, 5, 0),
        "models": (2, 10),
        "pid": (0, 0, 0, 6, 0, 0),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("slot", "GPU-9"),
        ("planned", "GPU-9"),
        ("usable", "GPU-9"),
        ("free", 25 * GB),
        ("request", 3),
        ("models", [[]]),
        ("models", [None]),
        ("pid", -1),
    ],
)
def test_an_answer_that_does_not_fit_itself_is_refused(kind: str, value: Any) -> None:
    """A worker of no device, more free than there is, another run's plan, what nobody asked for."""
    found = answered(answer())
    at: Any = found["value"]
    *way, last = place(kind)
    for step in way:
        at = at[step]
    assert at[last] != value
    at[last] = value
    with pytest.raises(ValueError):
        read_answer(found, "box")


def test_settings_arrive_as_they_were() -> None:
    written = {"gpu_share_max_workers_per_gb": "0.33", "gpu_share_safety_buffer_mb": "1500",
               "gpu_share_preset": "packed", "gpu_share_ollama_gpu": "0"}  # fmt: skip
    settings = load(Written({}, {**written, "gpu_share_config": ""}, {}, "", HERE, HERE, HERE))
    there = settings_of(json.loads(json.dumps(settings_as_texts(settings))), only_asks=False)
    for name in (
        "max_workers_per_gb",
        "safety_buffer",
        "presets",
        "ollama_gpu",
        "min_vram_per_worker",
        "max_workers_per_gpu",
        "ollama_vram_reservation",
    ):
        assert getattr(there, name) == getattr(settings, name), name


def test_a_host_that_is_only_asked_loads_no_model() -> None:
    written = {"gpu_share_ollama_models": "m:1b", "gpu_share_ollama_preload": "true"}
    settings = load(Written({}, {**written, "gpu_share_config": ""}, {}, "", HERE, HERE, HERE))
    texts = settings_as_texts(settings)
    assert settings_of(texts, only_asks=False).ollama_preload
    assert not settings_of(texts, only_asks=True).ollama_preload


@pytest.mark.parametrize("allowed", [True, False])
def test_a_host_without_room_falls_back_as_a_run_on_it_alone(allowed: bool) -> None:
    """As many CPU workers as `-n gpu-auto` would start there; none where they are not allowed."""
    found = answer(replace(DEVICE, used=24 * GB, free=0))
    assert (len(found.plan.slots), found.plan.cpu_workers) == (0, 6)
    settings = SETTINGS._replace(fallback_to_cpu_when_constrained=allowed)
    assert in_company(settings, found).plan.cpu_workers == (6 if allowed else 0)


SAMPLE = Sample(
    5.0,
    1e9,
    MemorySample(4.9, {"GPU-1": Memory(24 * GB, 2 * GB, 22 * GB)}, True),
    ProcessSample(4.8, {"GPU-1": (ProcessRow(GpuProcess(7, GB, ""), (3, 2), True),)}),
)
HELLO = Hello("3.12", "/p", "/d", ("/x",), {"pytest": "9"})
MODELS = ModelsAnswer(3, (LoadedModel("m:1b", GB, GB, "sha256:1", 4096),), "", False)


@pytest.mark.parametrize("value", [SAMPLE, HELLO, MODELS, Sample(1.0, 2.0)])
def test_a_message_comes_back_as_it_was(value: Any) -> None:
    assert read(type(value), sent("any", value)) == value


@pytest.mark.parametrize("which", ["answer", "sample", "hello", "models"])
def test_damaged_messages_raise_nothing_but_value_errors(which: str) -> None:
    """Each value is replaced by values of other types: what is accepted makes sense."""
    whole, reader = {
        "answer": (answered(answer()), lambda found: read_answer(found, "box")),
        "sample": (sent("sample", SAMPLE), lambda found: read(Sample, found)),
        "hello": (sent("hello", HELLO), lambda found: read(Hello, found)),
        "models": (sent("models", MODELS), lambda found: read(ModelsAnswer, found)),
    }[which]
    reader(copy.deepcopy(whole))
    refused = 0
    for changed, _ in damaged(whole, 600, ODD):
        try:
            reader(changed)
        except ValueError:
            refused += 1
    assert refused > 200


def test_readings_are_put_on_this_hosts_clock_and_numbers() -> None:
    asked: list[str] = []
    now = [1000.0]
    live = HostLive(2, asked.append, {"GPU-1": "box:GPU-1"}, clock=lambda: now[0])
    assert not live.is_answering
    assert live.memory(0.1).devices == {}
    assert asked == ["read"]
    live.take(SAMPLE)
    assert live.is_answering
    assert live.memory(1.0).at == pytest.approx(999.9)
    assert live.memory(1.0).devices["box:GPU-1"].free == 22 * GB
    (process,) = live.processes(1.0).devices["box:GPU-1"] or ()
    assert process.pid == global_pid(2, 7)
    assert live.parent(global_pid(2, 7)) == global_pid(2, 3)
    assert live.alive(global_pid(2, 7))
    # What is asked for is waited for, but not for long.
    began = time.monotonic()
    live.look(0.05)
    assert asked[-1] == "look"
    assert 0.04 < time.monotonic() - began < 5
    now[0] += 10
    assert not live.is_answering
    # Nobody waits: the last reading is what there is.
    assert live.memory(0.0).at == pytest.approx(999.9)


def test_what_wider_fixtures_keep_on_another_host_is_the_workers_own() -> None:
    """It is not left behind by a test, as on this host."""
    worker, server = global_pid(1, 7), global_pid(1, 8)
    own = Attribution(parent={server: worker}.get)
    together = AllAttribution([((), Attribution()), (("GPU-1",), own)])
    spec = HostSpec("box", ("box",))
    nobody: Any = None
    part = OtherHost(
        1, spec, answer(), {"GPU-1": "GPU-1"}, PlacementContext({}), None, own, nobody, HELLO
    )
    links = HostLinks()
    links.places["gw0"] = part, 0
    links.on("kept", together.keep)
    listed = [GpuProcess(server, GB)]
    before = together.split(listed, {worker: "gw0"})
    links.receive("gw0", ("kept", [8]))
    after = together.split(listed, {worker: "gw0"})
    assert before is not None
    assert after is not None
    assert (before.descendants, after.descendants) == ({"gw0": GB}, {})
    assert after.workers == {"gw0": GB}


def test_a_controller_whose_beat_stays_away_is_gone() -> None:
    """Before its first beat it may be silent: it probes, and loads models."""
    gone = threading.Event()

    def lines() -> Iterator[str]:
        yield "enough\n"
        time.sleep(0.2)
        yield "load\n"
        yield "beat\n"
        yield "read\n"
        # The connection hangs.
        gone.wait(30)

    has_enough = threading.Event()
    begun = time.monotonic()
    words = words_of(lines(), has_enough, 0.1)
    # Obeyed at once, whoever waits for what.
    assert has_enough.wait(10)
    assert list(words) == ["load", "read"]
    assert time.monotonic() - begun < 10
    gone.set()
