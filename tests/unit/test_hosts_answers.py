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
from pytest_gpushare.gpu.devices import Device, GpuFacts, GpuProcess, HostFacts
from pytest_gpushare.hosts.agent import settings_as_texts, settings_of, words_of
from pytest_gpushare.hosts.answers import (
    RemoteFacts,
    decode,
    decode_hello,
    decode_sample,
    encode,
)
from pytest_gpushare.hosts.checkout import Checkout
from pytest_gpushare.hosts.live import HostLive, global_pid
from pytest_gpushare.hosts.part import plan_there
from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.models import OLLAMA, LoadedModel, OllamaFacts
from pytest_gpushare.planning.plan import NeighbourShare, Request
from pytest_gpushare.planning.sizing import make_plan
from pytest_gpushare.units import GB

from .damage import ODD, damaged

HERE = Path("/nowhere")
SETTINGS = load(Written({}, {"gpu_share_config": ""}, {}, "", HERE, HERE, HERE))
DEVICE = Device("GPU-1", "a card", "0", 24 * GB, 2 * GB, 22 * GB, (GpuProcess(7, GB, "Ollama"),))


def answer() -> dict[str, Any]:
    gpus = GpuFacts((DEVICE,), (DEVICE,), driver="580")
    model = LoadedModel("m:1b", GB, GB, "sha256:1", 4096)
    server = parse_address("http://127.0.0.1:1")
    facts = RemoteFacts(
        gpus,
        NeighbourShare(OLLAMA, {"GPU-1": 12 * GB}, {"GPU-1": GB}),
        {"GPU-1": 0}, {"GPU-1": 11 * GB}, {"GPU-1": 12 * GB},
        OllamaFacts(server.shown, True, True, "0.33.0", (model,), server=server),
        ("m:1b",), 8, None, {"XLA_FLAGS": "x", "HOME": "/root"}, {"torch": "2.1"},
        False, "/tmp/lease", ("a note",), ("loaded",), (), Checkout("abc", "def"), "",
    )  # fmt: skip
    return dict(json.loads(json.dumps(encode(facts))))


def test_an_answer_comes_back_with_its_host() -> None:
    facts = decode(answer(), "box")
    assert facts.gpus.devices[0].label == "box GPU 0"
    assert facts.gpus.devices[0].processes == DEVICE.processes
    assert facts.share.reservation == {"GPU-1": 12 * GB}
    assert facts.ollama.models == (LoadedModel("m:1b", GB, GB, "sha256:1", 4096),)
    assert facts.ollama.server == parse_address("http://127.0.0.1:1")
    assert (facts.notes, facts.loaded) == (("a note",), ("loaded",))
    assert facts.checkout == Checkout("abc", "def")
    # Nothing of the environment but what caps depend on.
    assert facts.outer == {"XLA_FLAGS": "x"}


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
    full = replace(DEVICE, used=24 * GB, free=0)
    facts = decode(answer(), "box")
    facts = facts._replace(gpus=GpuFacts((full,), (full,)), cpus=6)
    settings = SETTINGS._replace(fallback_to_cpu_when_constrained=allowed)
    found = plan_there(settings, facts)
    alone = make_plan(SETTINGS, facts.gpus, [facts.share], HostFacts(6, None), Request())
    assert (len(found.slots), alone.cpu_workers) == (0, 6)
    assert found.cpu_workers == (6 if allowed else 0)


SAMPLE = {
    "kind": "sample",
    "now": 5.0,
    "wall": 1e9,
    "memory_at": 4.9,
    "memory": {"GPU-1": [24 * GB, 2 * GB, 22 * GB]},
    "answering": True,
    "processes_at": 4.8,
    "processes": {"GPU-1": [[7, GB, "", [3, 2], True]]},
}
HELLO = {
    "kind": "hello",
    "python": "3.12",
    "executable": "/p",
    "directory": "/d",
    "path": ["/x"],
    "versions": {"pytest": "9"},
}


@pytest.mark.parametrize("which", ["answer", "sample", "hello"])
def test_damaged_messages_raise_nothing_but_value_errors(which: str) -> None:
    """Each value is replaced by values of other types: what is accepted makes sense."""
    whole: dict[str, Any] = {"answer": answer(), "sample": SAMPLE, "hello": HELLO}[which]
    read: Any = {
        "answer": lambda message: decode(message, "box"),
        "sample": decode_sample,
        "hello": decode_hello,
    }[which]
    read(copy.deepcopy(whole))
    refused = 0
    for changed, _ in damaged(whole, 600, ODD):
        try:
            read(changed)
        except (ValueError, TypeError):
            refused += 1
    assert refused > 200


def test_readings_are_put_on_this_hosts_clock_and_numbers() -> None:
    asked: list[str] = []
    now = [1000.0]
    live = HostLive(2, asked.append, {"GPU-1": "box:GPU-1"}, clock=lambda: now[0])
    assert not live.is_answering
    assert live.memory(0.1).devices == {}
    assert asked == ["read"]
    live.take(decode_sample(SAMPLE))
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
