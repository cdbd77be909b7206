"""Loading models beside a server that answers the start's questions and then goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest
from simulator import Device, Machine
from simulator.ollama import Model, OllamaServer

from pytest_gpushare.ollama import preload as module
from pytest_gpushare.ollama.address import parse_address
from pytest_gpushare.ollama.keep_alive import KeepAlive, PreloadedModel, seconds_left
from pytest_gpushare.ollama.models import LoadedModel, ModelFacts, OllamaFacts
from pytest_gpushare.ollama.preload import Preloaded, VramFacts, preload
from pytest_gpushare.units import GB


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OllamaServer]:
    models = [Model("m:1b", "1GB"), Model("n:1b", "1GB"), Model("e:1b", "1GB", embeds=True)]
    with OllamaServer(machine(tmp_path), models) as server:
        yield server


def machine(path: Path) -> Machine:
    return Machine.create(path / "vram", [Device(total="8GB")])


def facts(server: OllamaServer, *models: LoadedModel, **changes: object) -> OllamaFacts:
    given = {"address": server.host, "asked": True, "answered": True, "models": models}
    return OllamaFacts(**{**given, "server": parse_address(server.host), **changes})  # type: ignore[arg-type]


def load(server: OllamaServer, *names: str, told: OllamaFacts | None = None) -> Preloaded:
    ours: list[PreloadedModel] = []
    vram = VramFacts(free=lambda: 3 * GB)
    done = preload(names, told or facts(server), vram, lambda _: None, ours)
    assert tuple(ours) == done.ours
    return done


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "it cannot be loaded (status 400)"),
        (403, "the server refuses (status 403)"),
        (404, "the server has no such model: ollama pull it (status 404)"),
        (418, "the server refuses (status 418)"),
        (500, "the server failed to load it (status 500); 3.0 GB of VRAM were free"),
        (503, "the server is busy (status 503); 3.0 GB of VRAM were free"),
    ],
)
def test_refused(status: int, words: str, server: OllamaServer) -> None:
    """What the status means, and where it may be for want of VRAM, how much was free."""
    server.errors = dict.fromkeys(("/api/generate", "/api/embed"), (status, "no"))
    done = load(server, "m:1b", "n:1b")
    assert [tuple(problem) for problem in done.problems] == [("m:1b", words), ("n:1b", words)]
    assert done.ours == ()


def test_too_slow(server: OllamaServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that takes longer than the limit is given up; hanging up ends it."""
    monkeypatch.setattr(module, "LOAD_LIMIT", 0.4)
    server.scheduler.settings = type(server.scheduler.settings)(load_delay=30.0)
    began = time.monotonic()
    done = load(server, "m:1b")
    assert time.monotonic() - began < 5
    assert done.problems[0].text == "it was not loaded within 0.4 s; 3.0 GB of VRAM were free"
    assert server.ps() == []


def test_server_that_stops(server: OllamaServer) -> None:
    told = facts(server)
    server.close()
    done = load(server, "m:1b", told=told)
    assert done.problems[0].text.startswith("nothing listens there any more")


def test_one_after_another(server: OllamaServer) -> None:
    """Each once, by whatever name; what is there, and what runs elsewhere, not at all."""
    server.load("n:1b")
    server.requests.clear()
    there = LoadedModel("n:1b", GB, GB)
    cloud = ModelFacts("big-cloud", is_remote=True)
    told = facts(server, there, relied_on=(cloud,))
    done = load(server, "m:1b", "M:1B", "library/m:1b", "n:1b", "big-cloud", "e:1b", told=told)
    assert [ours.model.name for ours in done.ours] == ["m:1b", "e:1b"]
    assert [round(ours.keep_alive or 0) for ours in done.ours] == [300, 300]
    sent = [(r.path, r.json()["model"]) for r in server.requests if r.method == "POST"]
    assert sent == [
        ("/api/generate", "m:1b"),
        ("/api/generate", "e:1b"),
        ("/api/embed", "e:1b"),
    ]


def test_no_answer_at_the_start(server: OllamaServer) -> None:
    """Nothing is sent to a server of which nothing is known."""
    told = facts(server, answered=False, problem="no answer within 0.5 s")
    done = load(server, "m:1b", told=told)
    assert (
        done.problems[0].text == f"Ollama at {server.host} cannot load it: no answer within 0.5 s"
    )
    assert server.requests == []


# --- kept loaded ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-08-21T10:00:30Z", 30.0),
        ("2026-08-21T12:00:30.5+02:00", 30.5),
        ("2026-08-21T10:00:30.123456789Z", 30.123456789),
        ("2026-08-21T09:59:00Z", -60.0),
        ("2318-04-11T23:47:16.854775807Z", float("inf")),
        ("12026-08-21T10:00:30Z", float("inf")),
        ("", None),
        ("tomorrow", None),
        ("2026-13-41T10:00:00Z", None),
    ],
)
def test_seconds_left(text: str, expected: float | None) -> None:
    """As Go writes a moment, whatever the zone; 292 years are for ever."""
    now = datetime(2026, 8, 21, 10, tzinfo=timezone.utc).timestamp()
    found = seconds_left(LoadedModel("m", GB, GB, expires_at=text), now)
    assert found == pytest.approx(expected) if expected is not None else found is None


class Kept:
    """Models that were preloaded on a server, and what keeps them, looking when told to."""

    def __init__(self, server: OllamaServer, *, pids: bool = True) -> None:
        self.server = server
        self.done = load(server, "m:1b")
        (own,) = self.done.ours
        self.pid = server.runner_pids()[0]
        own = own._replace(pid=self.pid if pids else None)
        shown = (lambda: frozenset(server.runner_pids())) if pids else (lambda: None)
        self.service = KeepAlive(parse_address(server.host), [own], shown)
        server.requests.clear()

    def look(self, every: float = 60.0) -> list[tuple[str, object]]:
        """The requests of one look that may change something."""
        self.service._look(every, lambda _: None)
        return [
            (r.path, r.json().get("keep_alive")) for r in self.server.requests if r.method == "POST"
        ]


def test_renewed_only_before_it_runs_out(server: OllamaServer) -> None:
    """With the server's own keep-alive, so that nothing has to be restored."""
    kept = Kept(server)
    assert kept.look(60.0) == []
    assert kept.look(200.0) == [("/api/generate", "300s")]
    kept.service.stop()
    assert len(kept.server.requests) == 4  # two looks, the renewal and what came of it


def test_requests_of_tests_do_not_end_it(server: OllamaServer) -> None:
    """A test's request moves the end; the process is the same, so that it is still ours."""
    kept = Kept(server)
    server.load("m:1b", keep_alive="20s")
    server.requests.clear()
    assert kept.look(60.0) == [("/api/generate", "300s")]
    assert kept.service.given_up == []


@pytest.mark.parametrize("option", ["num_thread", "main_gpu", "num_batch"])
def test_reloaded_by_a_test(option: str, server: OllamaServer) -> None:
    """A request of ours would reload it a third time: another process, so nothing is sent."""
    kept = Kept(server)
    server.load("m:1b", keep_alive="20s", **{option: 1})
    pids = server.runner_pids()
    server.requests.clear()
    assert kept.look(60.0) == []
    assert kept.service.given_up == [
        "m:1b was not kept loaded any more: another client reloaded it"
    ]
    assert server.runner_pids() == pids != [kept.pid]


def test_hidden_processes(server: OllamaServer) -> None:
    """Where a request moved the end and nobody can see whether it reloaded: nothing is sent."""
    kept = Kept(server, pids=False)
    assert kept.look(200.0) == [("/api/generate", "300s")]
    server.load("m:1b", keep_alive="20s")
    server.requests.clear()
    assert kept.look(60.0) == []
    assert kept.service.given_up == [
        "m:1b was not kept loaded any more: another client used it, and whether it was reloaded "
        "cannot be seen here"
    ]


def test_other_settings_and_gone(server: OllamaServer) -> None:
    """Another context, or no model any more."""
    kept = Kept(server)
    server.load("m:1b", num_ctx=8192)
    assert kept.look(400.0)[-1:] == [("/api/generate", None)]  # the load above
    assert kept.service.given_up == [
        "m:1b was not kept loaded any more: another client loaded it with other settings"
    ]
    server.unload("m:1b")
    kept = Kept(server)
    server.unload("m:1b")
    server.requests.clear()
    assert kept.look(400.0) == []
    assert kept.service.given_up == ["m:1b was not kept loaded any more: it was unloaded"]


@pytest.mark.parametrize(("own", "back"), [("0", 0), (7, "7s")])
def test_server_that_unloads_at_once(own: str | int, back: object, tmp_path: Path) -> None:
    """It gets a keep-alive of ours, and its own back at the end."""
    with OllamaServer(machine(tmp_path), {"m:1b": "1GB"}, keep_alive=own) as server:
        kept = Kept(server)
        assert 590 < (seconds_left(kept.done.ours[0].model, time.time()) or 0) <= 600
        kept.service.stop()
        sent = [(r.path, r.json()["keep_alive"]) for r in server.requests if r.method == "POST"]
        assert sent == [("/api/generate", back)]
