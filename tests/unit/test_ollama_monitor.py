"""The monitor's thread beside real servers, sound and faulty."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from simulator import Device, Machine
from simulator.child import wait_for
from simulator.ollama import FAULTS, FaultyServer, OllamaServer

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import DeviceUsage
from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.keep_alive import KeepAlive, PreloadedModel
from pytest_gpushare.ollama.models import LoadedModel
from pytest_gpushare.ollama.monitor import Monitor, MonitoredServer, Pace
from pytest_gpushare.ollama.spill import Promise
from pytest_gpushare.units import GB

QUICK = Pace(every=0.05, longest=0.2, patience=30, last_patience=30, sample=0.02)
"""Asks often, and waits for a sound server on a busy machine, too."""
HASTY = QUICK._replace(patience=0.4, last_patience=0.5)
"""For servers that do not answer."""
MODEL = LoadedModel("m:latest", GB, GB, "0" * 64, 4096)
IDLE = {"GPU-0": DeviceUsage(24 * GB, 3 * GB, 21 * GB, {"Ollama": GB}, {})}


def idle_book(models: Sequence[LoadedModel] | None = (MODEL,)) -> MonitoredServer:
    """A book on a device on which nothing happens."""
    promise = Promise(IDLE, {"GPU-0": 9 * GB}, 12 * GB, GB, 3 * GB)
    return MonitoredServer(models, promise, lambda _models, _by_worker: IDLE, Record())


def monitor_of(host: str, book: MonitoredServer, pace: Pace = QUICK) -> Monitor:
    return Monitor(parse_address(host), lambda: book, pace)


class Scene:
    """A machine, an Ollama on it that may be restarted, and this process as the only worker."""

    def __init__(self, path: Path, pace: Pace = QUICK) -> None:
        self.machine = Machine.create(path, [Device(total="24GB", used="2GB")], context="0MB")
        self.record = Record()
        self.server = self.serve()
        start = self.held()
        promise = Promise(start, {"GPU-0": 17 * GB}, 4 * GB, GB, 3 * GB)
        self._gate = threading.Lock()
        self._begun = self._looks = 0
        """How often the monitor's thread was about to look at what is held, and has looked."""
        self.book = MonitoredServer((), promise, self._look, self.record)
        self.monitor = monitor_of(self.server.host, self.book, pace)

    def serve(self, port: int = 0) -> OllamaServer:
        return OllamaServer(self.machine, {"qwen2.5:14b": "10.8GB"}, port=port)

    def held(self) -> Mapping[str, DeviceUsage]:
        (device,) = self.machine.snapshot()
        own = dict(device.processes).get(os.getpid(), 0)
        ollama = sum(size for pid, size in device.processes if pid != os.getpid())
        return {
            "GPU-0": DeviceUsage(
                device.total,
                device.used,
                device.free,
                {"Ollama": ollama},
                {"gw0": own},
                0,
                {"Ollama": ollama} if ollama else {},
            )
        }

    def _look(self, _models: object, _by_worker: object) -> Mapping[str, DeviceUsage]:
        self._begun += 1
        with self._gate:
            held = self.held()
            self._looks += 1
        return held

    def wait_for_look(self) -> None:
        """Wait until the monitor has seen what is held now."""
        # One look may have begun before.
        seen = self._looks + 2
        wait_for(lambda: self._looks >= seen)

    @contextmanager
    def between_questions(self) -> Iterator[None]:
        """Keep the monitor from asking within this block, which begins when no question is open."""
        with self._gate:
            wait_for(lambda: self._begun > self._looks)
            wait_for(lambda: all(t.name != "gpu-share-ollama" for t in threading.enumerate()))
            yield

    def stop_server(self) -> None:
        """As seen by the monitor: no question meets a server that is about to end."""
        with self.between_questions():
            self.server.close()

    def events(self) -> list[str]:
        return [f"{event.kind}: {event.text}" for event in self.record.events()]

    def after(self, event: str, action: Callable[[], object]) -> None:
        """Do something, and wait until the monitor has reported this event once more."""
        before = len(self.record.events(f"ollama-{event}"))
        action()
        wait_for(lambda: len(self.record.events(f"ollama-{event}")) > before)


@pytest.fixture
def pace() -> Pace:
    return QUICK


@pytest.fixture
def scene(tmp_path: Path, pace: Pace) -> Iterator[Scene]:
    scene = Scene(tmp_path / "vram", pace)
    scene.monitor.start()
    try:
        yield scene
    finally:
        scene.monitor.stop()
        scene.server.close()


def test_every_event(scene: Scene) -> None:
    """All that can happen to a model, as it is told."""
    name, port = "qwen2.5:14b", scene.server.port
    scene.after("loaded", lambda: scene.server.load(name))
    scene.after("reloaded", lambda: scene.server.load(name, num_ctx=8192))
    scene.after("unloaded", lambda: scene.server.unload(name))
    handle = scene.machine.allocate(0, "14GB")
    scene.wait_for_look()
    scene.after("spilled", lambda: scene.server.load(name))
    scene.machine.release(handle)
    scene.after("unloaded", lambda: scene.server.unload(name))
    scene.after("recovered", lambda: scene.server.load(name))
    scene.after("unreachable", scene.stop_server)
    scene.server = scene.serve(port)
    wait_for(lambda: bool(scene.record.events("ollama-back")))
    wait_for(lambda: len(scene.record.events("ollama-unloaded")) == 3)
    assert scene.events() == [
        "ollama-loaded: Ollama loaded qwen2.5:14b 10.8 GB, 100 % on GPU",
        "ollama-reloaded: Ollama reloaded qwen2.5:14b 11.55 GB, 100 % on GPU; "
        "context 4096, now 8192, size 10.8 GB, now 11.55 GB",
        "ollama-unloaded: Ollama unloaded qwen2.5:14b (11.55 GB)",
        "ollama-loaded: Ollama loaded qwen2.5:14b 10.8 GB, 63 % on GPU",
        "ollama-spilled: Ollama put 3.97 GB of qwen2.5:14b (10.8 GB) on the CPU; VRAM then: "
        "tests 14.0 GB (gw0), others 2.0 GB, 1.17 GB free",
        "ollama-unloaded: Ollama unloaded qwen2.5:14b (10.8 GB)",
        "ollama-loaded: Ollama loaded qwen2.5:14b 10.8 GB, 100 % on GPU",
        "ollama-recovered: Ollama has all of qwen2.5:14b on the GPU again (10.8 GB)",
        "ollama-unreachable: Ollama does not answer any more: nothing listens",
        "ollama-back: Ollama answers again",
        "ollama-unloaded: Ollama unloaded qwen2.5:14b (10.8 GB)",
    ]
    spilled = scene.record.events("ollama-spilled")[0]
    assert spilled.facts["cause"] == "reservation"
    assert spilled.facts["under_tests"] is True
    assert spilled.facts["setting"] == {"ollama_vram_reservation_mb": "13000"}
    assert spilled.facts["held"]["GPU-0"]["workers_bytes"] == {"gw0": 14 * GB}
    assert scene.monitor.has_failed()
    assert scene.monitor.resident() == {"GPU-0": 0}


def test_gone_by_itself_and_evicted(scene: Scene) -> None:
    """A keep-alive that ran out, and a runner that was killed: gone is gone."""
    scene.after("loaded", lambda: scene.server.load("qwen2.5:14b"))
    scene.server.load("qwen2.5:14b", keep_alive="0.1s")
    wait_for(lambda: bool(scene.record.events("ollama-unloaded")))
    assert not scene.monitor.has_failed()
    assert all(
        request.path == "/api/ps" for request in scene.server.requests if request.method == "GET"
    )


def test_a_model_being_loaded_is_absent(scene: Scene) -> None:
    """While it loads nothing is told; once it is there, it was loaded."""
    scene.server.scheduler.settings = type(scene.server.scheduler.settings)(load_delay=0.5)
    began = scene.record.now()
    scene.after("loaded", lambda: scene.server.load("qwen2.5:14b"))
    (loaded,) = scene.record.events()
    assert loaded.at - began >= 0.5


def test_faulty_servers() -> None:
    """None of them ends the monitor, overlaps its questions, or holds up the end of the run."""
    with ExitStack() as stack:
        servers = {mode: stack.enter_context(FaultyServer(mode)) for mode in FAULTS}
        books = {mode: idle_book() for mode in servers}
        monitors = {mode: monitor_of(servers[mode].host, books[mode], HASTY) for mode in servers}
        for monitor in monitors.values():
            monitor.start()
        wait_for(lambda: all(book.history.failures > 1 for book in books.values()))
        for mode, monitor in monitors.items():
            began = time.monotonic()
            monitor.stop()
            assert time.monotonic() - began < 10, mode
            assert not monitor.has_failed()
        wait_for(lambda: all(book.is_over for book in books.values()))
        # Nobody has believed a word.
        for mode, book in books.items():
            assert book.history.models == (MODEL,), mode
            assert len(book.history.silences) == 1, mode
            assert servers[mode].connections <= monitors[mode].asked, mode
        assert all(path == "/api/ps" for server in servers.values() for path in server.paths)
        assert servers["redirect"].redirects == 0


@pytest.mark.parametrize("pace", [HASTY])
def test_server_that_hangs_in_the_middle(scene: Scene) -> None:
    """It was sound at the start; the end of the run does not wait for it."""
    scene.after("loaded", lambda: scene.server.load("qwen2.5:14b"))
    scene.server.delays["/api/ps"] = 30.0
    wait_for(lambda: bool(scene.record.events("ollama-unreachable")))
    began = time.monotonic()
    scene.monitor.stop()
    assert time.monotonic() - began < 10
    assert scene.events()[-1] == (
        "ollama-unreachable: Ollama does not answer any more: no answer within 0.4 s"
    )


@pytest.mark.parametrize("status", [403, 500, 503])
def test_errors_in_the_middle(status: int, scene: Scene) -> None:
    """Told once, and over when it is over."""
    scene.after("loaded", lambda: scene.server.load("qwen2.5:14b"))
    scene.server.errors["/api/ps"] = (status, "no")
    wait_for(lambda: bool(scene.record.events("ollama-unreachable")))
    del scene.server.errors["/api/ps"]
    wait_for(lambda: bool(scene.record.events("ollama-back")))
    assert [text.partition(":")[0] for text in scene.events()] == [
        "ollama-loaded",
        "ollama-unreachable",
        "ollama-back",
    ]


def test_questions_are_bounded() -> None:
    """The last one is asked, and no other, not even at the end."""
    with OllamaServer(None, {"m": "1GB"}) as server:
        monitor = monitor_of(server.host, idle_book(()), QUICK._replace(most=3))
        monitor.start()
        wait_for(lambda: monitor.asked == 3)
        time.sleep(0.3)
        monitor.stop()
        assert len(server.requests) == 3


def test_last_question() -> None:
    """A run that is shorter than the pause has a verdict all the same."""
    with OllamaServer(None, {"m": "1GB"}) as server:
        server.load("m")
        book = idle_book(())
        monitor = monitor_of(server.host, book, Pace(last_patience=30))
        monitor.start()
        monitor.stop()
        assert [model.name for model in book.history.models] == ["m:latest"]
        assert monitor.asked == 1


def test_the_end_does_not_wait_for_a_server_that_was_never_heard() -> None:
    """One that was silent at the start has cost its limit already."""
    with FaultyServer("silent") as server:
        pace = QUICK._replace(patience=60)
        monitor = monitor_of(server.host, idle_book(None), pace)
        monitor.start()
        wait_for(lambda: monitor.asked > 0)
        began = time.monotonic()
        monitor.stop()
        assert time.monotonic() - began < 10


def test_a_fault_of_its_own_hurts_nobody() -> None:
    """An exception in the thread would be a warning of some test; it is told at the end."""

    def fail() -> MonitoredServer:
        raise RuntimeError("no such device")

    monitor = Monitor(parse_address("127.0.0.1:9"), fail, QUICK)
    monitor.start()
    monitor.stop()
    assert (monitor.problem, monitor.server) == ("RuntimeError: no such device", None)
    assert (monitor.resident(), monitor.has_failed()) == ({}, False)


def test_pace() -> None:
    """Every 2 seconds, later 10; in vain 4, 8, 16 and at most 30."""
    pace = Pace()
    assert [pace.pause(1, failures) for failures in range(6)] == [2, 4, 8, 16, 30, 30]
    assert [pace.pause(1800, failures) for failures in (0, 1, 2, 99)] == [10, 20, 30, 30]


def test_keep_alive_is_given_back_to_ours_alone() -> None:
    """One that somebody loaded with other options is theirs; another session's is left alone."""
    models = {"ours": "1GB", "changed": "1GB", "gone": "1GB", "shared": "1GB"}
    with OllamaServer(None, models) as server:
        for name in models:
            server.load(name, keep_alive="1h")
        ours = [
            LoadedModel(m["name"], m["size"], m["size_vram"], m["digest"], m["context_length"])
            for m in server.ps()
        ]
        server.load("changed", keep_alive="1h", num_ctx=8192)
        server.unload("gone")
        before = {entry["name"]: entry["expires_at"] for entry in server.ps()}
        owned = [PreloadedModel(model, keep_alive=300.0, is_prolonged=True) for model in ours]
        kept = KeepAlive(parse_address(server.host), owned)
        kept.used_by_others = lambda: {"shared:latest"}
        kept.start()
        kept.stop()
        kept.stop()
        after = {entry["name"]: entry["expires_at"] for entry in server.ps()}
    assert after.keys() == before.keys() == {"ours:latest", "changed:latest", "shared:latest"}
    assert after["shared:latest"] == before["shared:latest"]
    assert after["changed:latest"] == before["changed:latest"]
    assert after["ours:latest"] < before["ours:latest"]


def test_keep_alive_is_renewed() -> None:
    """A run that lasts longer than the server keeps models keeps its own all the same; also while
    it loads others."""
    ours: list[PreloadedModel] = []
    with OllamaServer(None, {"m": "1GB"}) as server:
        kept = KeepAlive(parse_address(server.host), ours, every=1.0)
        kept.start()
        server.load("m", keep_alive="3s")
        (entry,) = server.ps()
        model = LoadedModel(entry["name"], entry["size"], entry["size_vram"], entry["digest"], 4096)
        ours.append(PreloadedModel(model, keep_alive=3.0))
        time.sleep(4.5)
        assert [entry["name"] for entry in server.ps()] == ["m:latest"]
        kept.stop()
        bodies = [r.json() for r in server.requests if r.path == "/api/generate"][1:]
        assert {body["keep_alive"] for body in bodies} == {"3s"}
        assert kept.given_up == []


def test_keep_alive_beside_a_server_that_hangs() -> None:
    """The end of the run waits for 3 seconds, and no longer."""
    with FaultyServer("silent") as server:
        kept = KeepAlive(parse_address(server.host), [PreloadedModel(MODEL, is_prolonged=True)])
        began = time.monotonic()
        kept.stop()
        assert time.monotonic() - began < 5
