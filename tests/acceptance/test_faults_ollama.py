"""Ollama answers in every bad way: the tests run, the reservation stands, the line is right."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine
from simulator.ollama import FAULTS, FaultyServer, OllamaServer

from .conftest import Project, clean_environment, closed_port

TWO = (
    "gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB "
    "(limited by max_workers_per_gb; preset conservative)"
)
RESERVED = "  VRAM: Ollama reservation 12.0 GB, safety buffer 1.0 GB, usable for tests 9.0 GB"

PROBE = """
import json, resource, sys, time
from pathlib import Path
from pytest_gpushare.planning.startup import probe
from pytest_gpushare.config.sources import Written, load

here = Path.cwd()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
answers = []
for host, limit in json.loads(sys.argv[1]):
    ini = {"gpu_share_ollama_host": host, "gpu_share_ollama_timeout_s": limit}
    settings = load(Written({}, {}, ini, "", here, here, here))
    began = time.monotonic()
    facts = probe(settings, ("24GB",), {}).ollama
    answers.append({**facts._asdict(), "took": time.monotonic() - began})
# Linux hands a parent's peak down to the child that it starts: only what is added counts.
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"answers": answers, "grown_kb": grown}))
"""

WITHOUT_SIZE_VRAM = Path(__file__).parents[1] / "unit" / "answers" / "ps_without_size_vram.json"
LIMIT = 0.4
NO_HTTP = "/api/version gives no HTTP answer: "
NOTHING_IN_TIME = r"no answer within 0\.4 s"

PROBLEMS = {
    "silent": NOTHING_IN_TIME,
    "drip-header": NOTHING_IN_TIME,
    "drip-body": NOTHING_IN_TIME,
    "garbage": "/api/version gives no JSON",
    "html": "/api/version gives no JSON",
    "huge": "/api/version gives more than 1 MB",
    "redirect": "/api/version gives status 302",
    "status-400": "/api/version gives status 400",
    "status-403": "/api/version gives status 403",
    "status-404": "/api/version gives status 404",
    "status-500": "/api/version gives status 500",
    "status-503": "/api/version gives status 503",
    "wrong-types": "/api/ps gives a model without a name",
    "not-an-object": "/api/version gives no version",
    "null-models": "/api/version gives no version",
    "huge-numbers": "/api/ps gives a model whose size is 9{30}",
    "infinite-numbers": "/api/ps gives a model whose size is Infinity",
    "negative-sizes": "/api/ps gives a model whose size is -1",
    "missing-fields": "/api/ps gives a model without a name",
    "empty-object": "/api/version gives no version",
    "close": NO_HTTP + "(Server disconnected without sending a response.|.*reset by peer)",
    "gzip-bomb": "/api/version gives a compressed answer that was not asked for",
    "short-body": "/api/version gives less than it announced",
    "bad-length": NO_HTTP + "bad Content-Length",
    "deep-json": "/api/version gives no JSON",
    "not-http": NO_HTTP + "(Server disconnected without sending a response.|.*reset by peer)",
}
"""What is said of each bad answer; before it "reachable but answers nonsense: ", if in time."""


def limit_of(mode: str) -> float:
    """Seconds for its answer: those that answer at once do so on a busy machine, too."""
    return LIMIT if PROBLEMS[mode] == NOTHING_IN_TIME else 10.0


@pytest.fixture(scope="module")
def faulty() -> Iterator[dict[str, FaultyServer]]:
    """A server for each bad way."""
    with ExitStack() as stack:
        yield {mode: stack.enter_context(FaultyServer(mode)) for mode in FAULTS}


def ask(project: Project, cases: list[tuple[str, float]], **environment: str) -> Any:
    """What the plugin's own probe makes of servers, in one process."""
    result = project.command([sys.executable, "-c", PROBE, json.dumps(cases)], **environment)
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


# Each worker of xdist would ask all of them anew.
TOGETHER = pytest.mark.xdist_group("ollama-faults")


@pytest.fixture(scope="module")
def answers(
    faulty: dict[str, FaultyServer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What is made of each bad way, and of all of them together the memory that it took."""
    project = Project(tmp_path_factory.mktemp("project"), clean_environment())
    # The first one loads the HTTP client, which is not the server's fault.
    cases = [(f"127.0.0.1:{closed_port()}", LIMIT)]
    cases += [(server.host, limit_of(mode)) for mode, server in faulty.items()]
    found = ask(project, cases)
    answers = dict(zip(["closed", *faulty], found["answers"], strict=True))
    return {**answers, "process": {"grown_kb": found["grown_kb"]}}


def test_every_fault_is_known() -> None:
    """The table below has every bad way that the simulator has."""
    assert set(PROBLEMS) == set(FAULTS)


@TOGETHER
@pytest.mark.parametrize("mode", PROBLEMS)
def test_fault(mode: str, answers: dict[str, Any], faulty: dict[str, FaultyServer]) -> None:
    """Nothing is believed, the reason is told, and it takes no longer than the limit."""
    found = answers[mode]
    in_time = PROBLEMS[mode] != NOTHING_IN_TIME
    start = "reachable but answers nonsense: " if in_time else ""
    assert re.fullmatch(start + PROBLEMS[mode], found["problem"]), found["problem"]
    assert (found["answered"], found["models"], found["reachable"]) == (False, [], in_time)
    assert found["took"] < limit_of(mode) + 2
    assert found["address"] == faulty[mode].host
    assert faulty[mode].connections > 0


@TOGETHER
def test_redirects_are_not_followed(
    answers: dict[str, Any], faulty: dict[str, FaultyServer]
) -> None:
    """The port that a redirect names is never contacted."""
    assert answers["redirect"]["problem"]
    assert faulty["redirect"].redirects == 0


@TOGETHER
def test_nothing_listens(answers: dict[str, Any]) -> None:
    """A closed port is no server, and no mystery."""
    found = answers["closed"]
    assert (found["problem"], found["reachable"]) == ("nothing listens there", False)


@TOGETHER
def test_bounded_memory(answers: dict[str, Any]) -> None:
    """Endless answers and gzip bombs of 512 MB are not taken in."""
    assert answers["process"]["grown_kb"] < 150_000


def test_limit_is_for_everything(project: Project, faulty: dict[str, FaultyServer]) -> None:
    """Version and models share the one limit, be it short or long."""
    with OllamaServer(None, {}) as server:
        server.delays = {"/api/version": 1.2, "/api/ps": 1.2}
        cases = [("127.0.0.1:1", 1.0), (server.host, 2.0), (server.host, 20.0)]
        _, short, long = ask(project, cases)["answers"]
    assert (short["answered"], short["version"]) == (False, "0.33.0")
    assert short["problem"] == "no answer within 2 s"
    assert short["took"] < 4
    assert (long["answered"], long["problem"]) == (True, "")


def test_nothing_of_the_users_is_sent(project: Project) -> None:
    """No proxy of the environment is used, no credential of .netrc or of the address is sent."""
    (project.path / ".netrc").write_text("default login me password secret\n", encoding="utf-8")
    (project.path / ".netrc").chmod(0o600)
    with FaultyServer("garbage") as proxy, OllamaServer(None, {"m": "1GB"}) as server:
        names = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
        environment = {
            **dict.fromkeys(names, proxy.url),
            "HOME": str(project.path),
            "NETRC": str(project.path / ".netrc"),
        }
        cases = [(server.host, 5.0), (f"http://me:secret@{server.host}", 5.0)]
        found = ask(project, cases, **environment)["answers"]
        requests, proxied = server.requests, proxy.connections
    assert [(each["answered"], each["problem"]) for each in found] == [(True, "")] * 2
    assert [each["address"] for each in found] == [server.host] * 2
    assert proxied == 0
    assert [(r.method, r.path) for r in requests] == [
        ("GET", "/api/version"),
        ("GET", "/api/ps"),
    ] * 2
    for request in requests:
        assert set(request.headers) == {
            "host",
            "accept",
            "accept-encoding",
            "user-agent",
        }
        assert "secret" not in str(request)
        assert request.body == b""


# --- whole runs ---


def test_run_beside_nonsense(project: Project, machine: Machine) -> None:
    """The reservation stands, and the line tells what is odd."""
    with FaultyServer("negative-sizes") as server:
        result = project.pytest("--gpu-share", OLLAMA_HOST=server.host)
    assert (result.code, result.passed, result.err) == (0, 4, "")
    assert result.said == [
        TWO,
        "  GPU 0 NVIDIA GeForce RTX 3090 Ti: total 24.0 GB, available 22.0 GB",
        RESERVED,
        f"  Ollama 0.33.0 at {server.host}: reachable but answers nonsense: /api/ps gives a model "
        "whose size is -1; its VRAM reservation stands",
    ]


def test_run_beside_silence(project: Project, machine: Machine) -> None:
    """A server that accepts and says nothing costs its limit; the monitor asks rarely, in vain."""
    with FaultyServer("silent") as server:
        result = project.pytest(
            "--gpu-share", "-o", "gpu_share_ollama_timeout_s=0.3", OLLAMA_HOST=server.host
        )
    assert (result.code, result.passed, result.err) == (0, 4, "")
    assert (result.said[0], result.said[2]) == (TWO, RESERVED)
    assert result.said[3:] == [
        f"  Ollama at {server.host}: no answer within 0.3 s; its VRAM reservation stands"
    ]


def test_run_without_ollama(project: Project, machine: Machine) -> None:
    """Where nothing listens, the room is kept for the time when it does."""
    result = project.pytest("--gpu-share")
    assert (result.code, result.passed, result.said[0]) == (0, 4, TWO)
    assert result.said[2:] == [
        RESERVED,
        f"  Ollama at {project.environment['OLLAMA_HOST']}: nothing listens there; "
        "its VRAM reservation stands",
    ]


def test_run_with_detection_off(
    project: Project, machine: Machine, ollama_with: Callable[..., OllamaServer]
) -> None:
    """Not one request is made, and the reservation stands."""
    server = ollama_with({"m": "1GB"})
    result = project.pytest("--gpu-share", "-o", "gpu_share_enable_ollama_detection=false")
    assert (result.code, result.passed, result.said[0]) == (0, 4, TWO)
    assert result.said[-1] == RESERVED
    assert server.requests == []


def test_run_with_setting_over_environment(
    project: Project, machine: Machine, ollama_with: Callable[..., OllamaServer]
) -> None:
    """`ollama_host` beats OLLAMA_HOST; quotes, spaces and a scheme are as Ollama takes them."""
    server = ollama_with({"m": "1GB"})
    with FaultyServer("garbage") as other:
        result = project.pytest(
            "--gpu-share", "-n1", "-o", f"gpu_share_ollama_host= 'http://{server.host}/' ",
            OLLAMA_HOST=other.host,
        )  # fmt: skip
        assert other.connections == 0
    assert (result.code, result.passed) == (0, 4)
    assert result.said[-1] == f"  Ollama 0.33.0 at {server.host}: no model in VRAM"


def test_run_with_odd_port(project: Project, machine: Machine) -> None:
    """The port that is called in place of an impossible one is told with the reason."""
    result = project.pytest("--gpu-share", OLLAMA_HOST="http://127.0.0.1:x")
    assert (result.code, result.passed, result.said[0], result.said[2]) == (0, 4, TWO, RESERVED)
    assert re.fullmatch(
        r"  Ollama at 127\.0\.0\.1:80: (nothing listens there|reachable but answers nonsense: .*) "
        r"\('x' is no port: 80 is used\); its VRAM reservation stands",
        result.said[3],
    )


def test_what_can_be_understood(project: Project, machine_with: Callable[..., Machine]) -> None:
    """A model without `size_vram`, and one that makes no sense: the others count all the same."""
    machine_with(Device(total="24GB", used="12GB"))
    listed = json.loads(WITHOUT_SIZE_VRAM.read_text(encoding="utf-8"))
    more = {"name": "more", "size": 1 << 30, "size_vram": 1 << 49}
    listed["models"] += [{"name": "odd", "size": "much", "size_vram": 1}, more]
    with OllamaServer(None, {}) as server:
        server.answers["/api/ps"] = json.dumps(listed).encode()
        result = project.pytest("--gpu-share", OLLAMA_HOST=server.host)
    assert (result.code, result.passed, result.workers) == (0, 4, 2)
    assert result.said[2] == (
        "  VRAM: Ollama reservation 12.0 GB (10.06 GB of it resident), safety buffer 1.0 GB, "
        "usable for tests 9.06 GB"
    )
    assert result.said[3] == (
        f"  Ollama 0.33.0 at {server.host}: qwen2.5:14b 10.06 GB, 100 % on GPU, embed:latest 0.56 "
        "GB, how much of it on GPU is unknown, more 1.0 GB, how much of it on GPU is unknown; left "
        'out: /api/ps gives a model whose size is "much"'
    )


def test_a_model_without_size_vram_alone(
    project: Project, machine_with: Callable[..., Machine]
) -> None:
    """Nobody knows what of it is resident: the reservation stands, and the run goes on."""
    machine_with(Device(total="24GB", used="2GB"))
    with OllamaServer(None, {}) as server:
        server.answers["/api/ps"] = b'{"models": [{"name": "m", "size": 1073741824}]}'
        result = project.pytest("--gpu-share", "-n1", OLLAMA_HOST=server.host)
    assert (result.code, result.passed) == (0, 4)
    assert result.said[2] == RESERVED
