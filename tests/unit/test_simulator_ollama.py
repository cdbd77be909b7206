"""The simulated Ollama: its API, its rules for VRAM, its processes; and its bad copies."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from simulator import Device, Machine
from simulator.child import child_process, wait_for
from simulator.ollama import FAULTS, FaultyServer, Model, OllamaError, OllamaServer
from simulator.ollama.durations import FOREVER, moment, seconds
from simulator.ollama.placement import Room, forced, place_alone, place_beside
from simulator.ollama.reloads import REQUESTS
from simulator.running import environment, run
from simulator.store import start_time

GIB = 1 << 30
MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine.create(tmp_path / "state", [Device()])


# --- the API ---


def test_plain_answers(machine: Machine) -> None:
    """Version, list and root, as the real one words them."""
    with OllamaServer(machine, {"m": "5GB"}, version="0.31.2") as server:
        with urllib.request.urlopen(server.url, timeout=30) as answer:
            assert answer.read() == b"Ollama is running"
        assert server.request("/api/version") == {"version": "0.31.2"}
        assert server.request("/api/ps") == {"models": []}
        (tag,) = server.request("/api/tags")["models"]
        assert list(tag) == ["name", "model", "modified_at", "size", "digest", "details"]
        assert [request.path for request in server.requests] == [
            "/",
            "/api/version",
            "/api/ps",
            "/api/tags",
        ]
        assert server.requests[1].headers["host"] == server.host


def test_ps_has_exactly_the_fields_of_the_real_one(machine: Machine) -> None:
    """Names, types, nanoseconds; older versions had no context length."""
    with OllamaServer(machine, {"qwen2.5:14b": "10.8GB"}) as server:
        entry = server.load("qwen2.5:14b", num_ctx=8192)
    fields = "name model size digest details expires_at size_vram context_length"
    assert list(entry) == fields.split()
    details = "parent_model format family families parameter_size quantization_level"
    assert list(entry["details"]) == details.split()
    assert re.fullmatch(r"[0-9a-f]{64}", entry["digest"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{1,9}Z", entry["expires_at"])
    assert entry["size"] == entry["size_vram"] == int(10.8 * GIB) + 768 * MIB
    assert entry["context_length"] == 8192
    with OllamaServer(machine, {"m": "1GB"}, version="0.9.6") as server:
        assert "context_length" not in server.load("m")


def test_show_tells_what_the_need_follows_from(machine: Machine) -> None:
    """Weights as in /api/tags, plus the KV cache of the shape in /api/show, is the need."""
    model = Model("m", "9GB", graph="300MB")
    with OllamaServer(machine, [model]) as server:
        info = server.request("/api/show", {"model": "m", "verbose": True})["model_info"]
        weights = server.request("/api/tags")["models"][0]["size"]
        entry = server.load("m", num_ctx=16384)
        brief = server.request("/api/show", {"model": "m"})["model_info"]
        assert brief["tokenizer.ggml.tokens"] is None  # arrays are null unless asked for
    a = info["general.architecture"]
    lengths = info[f"{a}.attention.key_length"] + info[f"{a}.attention.value_length"]
    kv = info[f"{a}.block_count"] * info[f"{a}.attention.head_count_kv"] * lengths * 2 * 16384
    assert entry["size"] == weights + kv + 300 * MIB


def test_generate(machine: Machine) -> None:
    """Load, answer, unload, each with its done_reason; a stream unless told otherwise."""
    with OllamaServer(machine, {"m": "5GB"}) as server:

        def generate(**body: Any) -> Any:
            return server.request("/api/generate", {"model": "m", "stream": False, **body})

        assert generate()["done_reason"] == "load"
        answer = generate(prompt="Hello")
        assert (answer["done"], answer["done_reason"]) == (True, "stop")
        assert answer["response"] == "Simulated answer."
        request = urllib.request.Request(
            server.url + "/api/generate", json.dumps({"model": "m", "prompt": "Hello"}).encode()
        )
        with urllib.request.urlopen(request, timeout=30) as stream:
            lines = [json.loads(line) for line in stream]
        assert [line["done"] for line in lines] == [False, False, False, True]
        assert generate(keep_alive=0)["done_reason"] == "unload"
        assert server.ps() == []


@pytest.mark.parametrize(
    ("path", "body", "status", "text"),
    [
        ("/api/generate", {"model": "x"}, 404, "model 'x' not found"),
        ("/api/show", {"model": "x"}, 404, "model 'x:latest' not found"),
        ("/api/show", {}, 400, "model is required"),
        ("/api/generate", {}, 404, "model '' not found"),
        ("/api/generate", {"model": "m", "options": {"num_ctx": "x"}}, 500, "of type integer"),
        ("/api/embed", {"model": "x"}, 404, "not found, try pulling it first"),
        ("/api/embed", {"model": "m", "input": "a"}, 501, "does not support embeddings"),
        ("/api/generate", {"model": "m", "keep_alive": "5x"}, 400, 'invalid duration \\"5x\\"'),
        ("/api/generate", [], 400, "cannot unmarshal"),
    ],
)
def test_errors(machine: Machine, path: str, body: object, status: int, text: str) -> None:
    """An error is a status and an object with one field."""
    with (
        OllamaServer(machine, {"m": "5GB"}) as server,
        pytest.raises(OllamaError, match=re.escape(text)) as caught,
    ):
        server.request(path, body)
    assert caught.value.status == status


def test_foreign_host_headers_are_refused(machine: Machine) -> None:
    """With an empty 403, as a server on loopback does."""
    with OllamaServer(machine, {}) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("GET", "/api/ps", headers={"Host": "example.com"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (403, b"")
        connection.close()


def test_a_server_can_be_slow_or_busy(machine: Machine) -> None:
    """Per path, while it runs."""
    with OllamaServer(machine, {"m": "5GB"}) as server:
        server.errors["/api/generate"] = (503, "server busy, please try again")
        with pytest.raises(OllamaError, match="503.*server busy"):
            server.load("m")
        server.delays["/api/ps"] = 0.5
        with pytest.raises(TimeoutError):
            server.request("/api/ps", timeout=0.1)


# --- VRAM ---


def test_a_model_takes_what_it_needs_and_gives_it_back(machine: Machine) -> None:
    """The design's own figures: 10.8 GB resident beside 2 GB leave 11.2 GB."""
    with OllamaServer(machine, {"qwen2.5:14b": "10.8GB"}) as server:
        server.load("qwen2.5:14b")
        state = machine.snapshot()[0]
        assert round(state.free / GIB, 3) == 11.2
        assert [pid for pid, _ in state.processes] == server.runner_pids()
        assert server.spilled() == []
        server.unload("qwen2.5:14b")
        assert machine.snapshot()[0].used == 2 * GIB
        server.load("qwen2.5:14b")
    assert machine.snapshot()[0].used == 2 * GIB


@pytest.mark.parametrize(("above", "spills"), [(0, False), (1, True)])
def test_1024_mib_must_stay_free(machine: Machine, above: int, spills: bool) -> None:
    """One byte decides whether a layer goes to the CPU; nothing says so but ps."""
    with OllamaServer(machine, {"m": "10GB"}) as server:
        machine.set_used(0, 13 * GIB + above)
        entry = server.load("m")
        assert (entry["size_vram"] < entry["size"]) is spills
        assert server.spilled() == (["m:latest"] if spills else [])
        # Decided at load only: VRAM that comes back moves nothing.
        machine.set_used(0, 0)
        assert server.load("m")["size_vram"] == entry["size_vram"]
        assert machine.snapshot()[0].used == entry["size_vram"]


def test_reload_after_pressure_is_what_hurts(machine: Machine) -> None:
    """Loaded first it stays; loaded again, with other options, it finds less VRAM."""
    with OllamaServer(machine, {"m": "10GB"}) as server:
        server.load("m")
        first = server.runner_pids()
        taken = machine.allocate(0, "10GB", context=0)
        assert server.spilled() == []
        server.load("m")
        assert server.runner_pids() == first
        server.load("m", num_ctx=8192)
        assert server.runner_pids() != first
        assert server.spilled() == []  # 10.75 and 1 of the 12 GB that others leave
        machine.release(taken)
        machine.allocate(0, "11.1GB", context=0)
        server.load("m")
        assert server.spilled() == ["m:latest"]


def test_no_room_at_all_means_cpu(machine: Machine) -> None:
    """`size_vram` 0, and a runner that NVML does not list."""
    machine.set_used(0, "24GB")
    with OllamaServer(machine, {"m": "10GB"}) as server:
        assert server.load("m")["size_vram"] == 0
        assert machine.snapshot()[0].processes == ()
        assert len(server.runner_pids()) == 1
    with OllamaServer(None, {"m": "10GB"}) as server:
        assert server.load("m")["size_vram"] == 0


@pytest.mark.parametrize(("body", "reloads", "back"), REQUESTS)
def test_what_reloads_a_model(
    machine: Machine, body: dict[str, object], reloads: bool, back: bool
) -> None:
    """As measured on a real server, which `tests/real_ollama` asks the same."""
    with OllamaServer(machine, {"m": Model("m", "1GB", trained_context=2048)}) as server:
        server.load("m")
        processes = [server.runner_pids()]
        for sent in (body, {}):
            server.request("/api/generate", {"model": "m", "prompt": "a", "stream": False, **sent})
            processes.append(server.runner_pids())
    assert (processes[1] != processes[0], processes[2] != processes[1]) == (reloads, back)


def test_num_gpu(machine: Machine) -> None:
    """A number of layers is obeyed: none, some, or more than fit, which fails."""
    with OllamaServer(machine, {"m": "10GB", "big": "30GB"}) as server:
        assert server.load("m", num_gpu=0)["size_vram"] == 0
        assert server.load("m", num_gpu=24)["size_vram"] == 10 * GIB * 24 // 49
        assert server.load("m", num_gpu=99)["size_vram"] == 10 * GIB
        with pytest.raises(OllamaError, match="500.*out of memory"):
            server.load("big", num_gpu=99)
        assert [entry["name"] for entry in server.ps()] == ["m:latest"]


def test_idle_models_leave_for_a_new_one(machine: Machine) -> None:
    """Beside others a model may take 80 % of the free VRAM, else the next to expire goes."""
    models = {"a": "4GB", "b": "4GB", "c": "11.2GB", "d": "11.3GB"}
    with OllamaServer(machine, models) as server:
        for name in ("a", "b", "c"):  # 22 - 4 - 4 = 14 free, of which 80 % are 11.2
            server.load(name)
        assert len(server.ps()) == 3
        server.unload("c")
        server.load("d")
        assert {entry["name"] for entry in server.ps()} == {"b:latest", "d:latest"}
        assert server.spilled() == []


def test_busy_models_are_waited_for(machine: Machine) -> None:
    """Only idle ones are evicted."""
    with OllamaServer(machine, {"a": "15GB", "b": "15GB"}, generate_delay=0.3) as server:
        body = {"model": "a", "prompt": "Hello", "stream": False}
        client = threading.Thread(target=server.request, args=("/api/generate", body))
        client.start()
        wait_for(server.runner_pids)
        began = time.monotonic()
        server.load("b")
        assert time.monotonic() - began > 0.15
        assert [entry["name"] for entry in server.ps()] == ["b:latest"]
        client.join(30)


def test_several_gpus(tmp_path: Path) -> None:
    """The freest that a model fits in with 80 %, else spread over all."""
    gpus = [Device("24GB", used="4GB"), Device("24GB", used="2GB")]
    machine = Machine.create(tmp_path / "state", gpus)
    with OllamaServer(machine, {"one": "17.6GB", "both": "17.7GB", "more": "42GB"}) as server:
        server.load("one")  # 80 % of 22
        assert [state.used / GIB for state in machine.snapshot()] == [4.0, pytest.approx(19.6)]
        server.unload("one")
        server.load("both")
        assert all(state.processes for state in machine.snapshot())
        assert server.spilled() == []
        server.load("more")
        assert server.spilled() == ["more:latest"]
        assert all(state.free >= 1024 * MIB for state in machine.snapshot())
    with OllamaServer(machine, {"one": "10GB"}, visible="0") as server:
        server.load("one")
        assert [bool(state.processes) for state in machine.snapshot()] == [True, False]


def test_placement_is_exact() -> None:
    """The rules, without a server."""
    rooms = [Room("a", 10 * GIB), Room("b", 20 * GIB)]
    assert place_alone(16 * GIB, 48, rooms).shares == (("b", 16 * GIB),)
    spread = place_alone(28 * GIB, 48, rooms)
    assert spread.shares == (("a", 9 * GIB), ("b", 19 * GIB))
    partly = place_alone(49 * GIB, 48, rooms)  # layers of 1 GiB
    assert partly.shares == spread.shares
    assert place_alone(GIB, 48, []).vram == 0
    assert place_beside(24 * GIB + 1, rooms) is None
    assert place_beside(24 * GIB, rooms) is not None
    assert forced(49 * GIB, 48, rooms, 3).shares == (("b", 3 * GIB),)


def test_keep_alive(machine: Machine) -> None:
    """It expires; each request starts it anew; a later one replaces it; negative is for ever."""
    with OllamaServer(machine, {"m": "5GB"}, keep_alive=0.15) as server:
        server.load("m")
        wait_for(lambda: not server.ps())
        # A model leaves the list first and VRAM afterwards.
        wait_for(lambda: machine.snapshot()[0].used == 2 * GIB)
        server.load("m", keep_alive=-1)
        assert server.load("m")["expires_at"] > "2300"
        server.load("m", keep_alive="100ms")
        wait_for(lambda: not server.ps())


def test_durations() -> None:
    """Go's, with its errors and its moments."""
    assert seconds("1h30m") == 5400
    assert (seconds(300), seconds("1.5s"), seconds("0"), seconds("-1m")) == (300, 1.5, 0, FOREVER)
    wrongs: list[object] = ["5", "5 m", "", True, [], None]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="invalid"):
            seconds(wrong)
    assert moment(1_500_000_000_120_000_000) == "2017-07-14T02:40:00.12Z"
    assert moment(1_500_000_000_000_000_001, 60.0) == "2017-07-14T02:41:00.000000001Z"


def test_vram_may_come_back_late(tmp_path: Path) -> None:
    """After an unload, and after the death of the runner; a new load waits for it."""
    machine = Machine.create(tmp_path / "state", [Device()], late_free=0.2)
    with OllamaServer(machine, {"a": "15GB", "b": "15GB"}, unload_delay=0.1) as server:
        server.load("a")
        server.unload("a")
        assert server.ps() == []
        assert machine.snapshot()[0].used == 17 * GIB
        wait_for(lambda: machine.snapshot()[0].used == 2 * GIB)
        server.load("a")
        server.load("b")
        assert server.spilled() == []


def test_a_model_that_is_loading_is_not_listed(machine: Machine) -> None:
    """Its VRAM is taken already; a client that goes away aborts the load."""
    with OllamaServer(machine, {"m": "5GB"}, load_delay=5) as server:
        body = json.dumps({"model": "m"}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
            head = f"POST /api/generate HTTP/1.1\r\nHost: x.local\r\nContent-Length: {len(body)}"
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_for(lambda: machine.snapshot()[0].used == 7 * GIB)
            assert server.ps() == []
        wait_for(lambda: machine.snapshot()[0].used == 2 * GIB)


def test_the_context_of_the_server_and_its_cost(tmp_path: Path) -> None:
    """By total VRAM where told so; parallel requests multiply the KV cache."""
    machine = Machine.create(tmp_path / "state", [Device()])
    options: dict[str, Any] = {"context_length": 0, "context": "300MB", "parallel": 2}
    with OllamaServer(machine, {"m": "5GB"}, **options) as server:
        entry = server.load("m")
        assert entry["context_length"] == 32768
        assert entry["size"] == 5 * GIB - 768 * MIB + 2 * 8 * 768 * MIB
        assert machine.snapshot()[0].used == 2 * GIB + entry["size_vram"] + 300 * MIB


# --- processes ---


@pytest.mark.parametrize(
    ("version", "program"),
    [("0.33.0", ["/usr/lib/ollama/llama-server"]), ("0.24.0", ["/usr/local/bin/ollama", "runner"])],
)
def test_processes_look_like_ollamas(machine: Machine, version: str, program: list[str]) -> None:
    """NVML lists a runner whose command line and parent tell whose it is."""
    with OllamaServer(machine, {"m": "5GB"}, version=version) as server:
        server.load("m")
        code = """
import json, pynvml as n
n.nvmlInit()
d = n.nvmlDeviceGetHandleByIndex(0)
print(json.dumps([[p.pid, p.usedGpuMemory] for p in n.nvmlDeviceGetComputeRunningProcesses(d)]))"""
        ((pid, used),) = run(machine, code)
        arguments = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        parent = re.search(r"PPid:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        assert parent is not None
        served = Path(f"/proc/{parent[1]}/cmdline").read_text()
    assert used == 5 * GIB
    assert arguments[: len(program)] == program
    rest = " ".join(arguments[len(program) :])
    blob = "/usr/share/ollama/.ollama/models/blobs/sha256-[0-9a-f]{64}"
    assert re.fullmatch(rf"--model {blob} --port \d+", rest)
    assert served == "/usr/local/bin/ollama\0serve\0"


def test_a_killed_runner_is_gone_from_ps(machine: Machine) -> None:
    """As after the out-of-memory killer; the next request loads anew."""
    with OllamaServer(machine, {"m": "5GB"}) as server:
        server.load("m")
        (pid,) = server.runner_pids()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: start_time(pid) is None)
        assert server.ps() == []
        assert machine.snapshot()[0].used == 2 * GIB
        assert server.load("m")["size_vram"] == 5 * GIB


def test_as_a_program(machine: Machine) -> None:
    """It prints its address, and nothing outlives it, not even when it is killed."""
    command = [sys.executable, "-m", "simulator.ollama", "--models", '{"m": "5GB"}', "--load", "m"]
    for how in (signal.SIGTERM, signal.SIGKILL):
        with child_process(
            [*command, "--keep-alive", "1h"],
            env=environment(machine),
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            with urllib.request.urlopen(f"{url}/api/ps", timeout=30) as answer:
                assert json.load(answer)["models"][0]["name"] == "m:latest"
            ((runner, used),) = machine.snapshot()[0].processes
            assert used == 5 * GIB
            process.send_signal(how)
            process.wait(30)
        assert process.returncode == (0 if how == signal.SIGTERM else -signal.SIGKILL)
        wait_for(lambda pid=runner: start_time(pid) is None)  # type: ignore[misc]
        assert machine.snapshot()[0].used == 2 * GIB


# --- bad copies ---


def fetch(url: str, timeout: float = 0.3, limit: int = 1 << 20) -> Any:
    """Ask as a careless client does; return the body's beginning."""
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read(limit)


@pytest.mark.parametrize("mode", FAULTS)
def test_every_fault_can_be_asked_and_closed(mode: str) -> None:
    """Each answers something, or nothing, and leaves no thread behind."""
    before = threading.active_count()
    with FaultyServer(mode) as server:
        # A drip defeats the timeout of a single read: only hanging up ends it.
        end = threading.Timer(0.3, server.close)
        end.start()
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            fetch(server.url + "/api/ps", limit=1 << 16)
        end.cancel()
        assert server.connections == 1
    wait_for(lambda: threading.active_count() <= before)


def test_faults_are_what_they_are_called() -> None:
    """A few of them looked at closely."""
    with FaultyServer("silent") as server, pytest.raises(TimeoutError):
        fetch(server.url)
    with FaultyServer("status-503") as server:
        with pytest.raises(urllib.error.HTTPError) as caught:
            fetch(server.url)
        assert json.load(caught.value) == {"error": "service unavailable"}
        caught.value.close()
    with FaultyServer("redirect") as server:
        assert server.redirects == 0
        assert json.loads(fetch(server.url)) == {"version": "0.33.0", "models": []}
        assert server.redirects == 1
    with FaultyServer("huge") as server:
        assert len(fetch(server.url, limit=8 << 20)) == 8 << 20
    with FaultyServer("gzip-bomb") as server:
        packed = fetch(server.url, timeout=5, limit=1 << 30)
        assert len(packed) < 1 << 20
        with gzip.open(io.BytesIO(packed)) as stream:
            assert len(stream.read(16 << 20)) == 16 << 20
    with FaultyServer("negative-sizes") as server:
        assert json.loads(fetch(server.url + "/api/ps"))["models"][0]["size"] == -1
        assert server.paths == ["/api/ps"]
    with FaultyServer("deep-json") as server, pytest.raises((RecursionError, ValueError)):
        json.loads(fetch(server.url))
    with FaultyServer("close") as server, pytest.raises(OSError, match="closed|reset"):
        fetch(server.url)
    with pytest.raises(ValueError, match="unknown fault 'slow'"):
        FaultyServer("slow")
