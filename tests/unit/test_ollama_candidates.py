"""Where Ollama may be, and which of several addresses is taken."""

from __future__ import annotations

import threading
import time

import pytest
from simulator.child import wait_for
from simulator.ollama import FaultyServer, OllamaServer

from pytest_gpushare.gpu import host
from pytest_gpushare.neighbours import ollama as together
from pytest_gpushare.ollama import address
from pytest_gpushare.ollama.address import Candidate, candidates, parse_address
from pytest_gpushare.planning.startup import probe

from ..acceptance.conftest import closed_port
from .test_planning_sizing import DEFAULTS

DOCKER = ("host.docker.internal:11434", "host.docker.internal")


def places(setting: str, written: str | None) -> list[tuple[str, str]]:
    environment = {} if written is None else {"OLLAMA_HOST": written}
    return [(c.address.shown, c.found_by) for c in candidates(setting, environment)]


@pytest.mark.parametrize(
    ("setting", "written", "expected"),
    [
        ("", None, [("127.0.0.1:11434", "default")]),
        ("", " ", [("127.0.0.1:11434", "default")]),
        ("", "gpu-box", [("gpu-box:11434", "OLLAMA_HOST")]),
        ("gpu-box:80", "other", [("gpu-box:80", "gpu_share_ollama_host")]),
        (
            " Auto ", None,
            [("127.0.0.1:11434", "loopback"), DOCKER],
        ),
        (
            "auto", "0.0.0.0",
            [("127.0.0.1:11434", "OLLAMA_HOST"), DOCKER],
        ),
        (
            "auto", "gpu-box:80",
            [("gpu-box:80", "OLLAMA_HOST"), ("127.0.0.1:11434", "loopback"),
             DOCKER],
        ),
    ],
)  # fmt: skip
def test_places(setting: str, written: str | None, expected: list[tuple[str, str]]) -> None:
    """What the user wrote comes first, and no place is asked twice."""
    assert places(setting, written) == expected


def test_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under WSL Windows is the default gateway; elsewhere a gateway is anybody's machine."""
    monkeypatch.setattr(host, "_read", FILES.get)
    assert places("auto", None)[-1] == ("172.28.16.1:11434", "the WSL gateway")
    monkeypatch.setitem(FILES, host.Path("/proc/sys/kernel/osrelease"), "6.8.0-45-generic")
    assert host.wsl_gateway() is None


FILES = {
    host.Path("/proc/sys/kernel/osrelease"): "5.15.153.1-microsoft-standard-WSL2",
    host.Path("/proc/net/route"): "Iface\tDestination\tGateway\n"
    "eth0\t00101CAC\t00000000\neth0\t00000000\t01101CAC\n",
}


def ask(monkeypatch: pytest.MonkeyPatch, *hosts: str, limit: float = 0.5, **settings: object):  # type: ignore[no-untyped-def]
    """What the probe makes of these addresses in this order, and how long it took."""
    found = tuple(Candidate(parse_address(h), f"place {n}") for n, h in enumerate(hosts))
    monkeypatch.setattr(together, "candidates", lambda *_: found)
    began = time.monotonic()
    given = DEFAULTS._replace(ollama_timeout=limit, **settings)  # type: ignore[arg-type]
    facts = probe(given, ("24GB",), {}).ollama
    return facts, time.monotonic() - began


def test_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are silent and one that answers cost one limit, not three."""
    before = _ours()
    with (
        FaultyServer("silent") as one,
        FaultyServer("drip-body") as two,
        OllamaServer(None, {}) as third,
    ):
        facts, took = ask(monkeypatch, one.host, two.host, third.host, limit=2)
        assert (facts.answered, facts.found_by) == (True, "place 2")
        assert facts.server == parse_address(third.host)
        assert 1.9 < took < 6
        wait_for(lambda: _ours() <= before)


def test_the_first_that_answers_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the best of them has answered nobody waits for the others."""
    with FaultyServer("silent") as silent, OllamaServer(None, {}) as server:
        facts, took = ask(
            monkeypatch, f"127.0.0.1:{closed_port()}", server.host, silent.host, limit=3
        )
    assert (facts.found_by, facts.answered) == ("place 1", True)
    assert took < 2


def test_the_best_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the fastest: what the user wrote, where it answers, and it alone is asked for more."""
    with OllamaServer(None, {"m": "1GB"}) as slow, OllamaServer(None, {"m": "1GB"}) as fast:
        slow.delays["/api/version"] = 0.3
        facts, _ = ask(monkeypatch, slow.host, fast.host, limit=3, ollama_models=("m",))
        assert facts.found_by == "place 0"
        assert facts.relied_on[0].file_bytes
        assert [r.path for r in fast.requests] == ["/api/version", "/api/ps"]


def test_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that were tried are named; one that is there, though it answers nonsense, before them."""
    nothing = [f"127.0.0.1:{closed_port()}" for _ in range(2)]
    facts, _ = ask(monkeypatch, *nothing)
    assert (facts.answered, facts.reachable) == (False, False)
    assert (facts.address, facts.problem) == (", ".join(nothing), "nothing listens there")
    with FaultyServer("status-503") as busy:
        facts, _ = ask(monkeypatch, nothing[0], busy.host)
        assert (facts.address, facts.reachable) == (busy.host, True)


def test_time_for_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their questions have what is left of the one limit."""
    with OllamaServer(None, {"m": "1GB"}) as server:
        server.delays["/api/show"] = 5
        facts, took = ask(monkeypatch, server.host, limit=0.5, ollama_models=("m",))
    assert facts.answered
    assert facts.relied_on[0].problem == "no answer in time: raise gpu_share_ollama_timeout_s"
    assert took < 1.5


def test_the_variable_is_ollamas() -> None:
    assert address.VARIABLE == "OLLAMA_HOST"


def _ours() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name.startswith("gpu-share")}
