"""`pytest-gpushare plan`: what it tells is what a run does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from simulator import Device, Machine
from simulator.child import child_process

from .conftest import Project, Result

Golden = Callable[[Result, str], None]

COMMAND = [sys.executable, "-m", "pytest_gpushare"]

SEEDS_MACHINES = {
    "24GB:used=2GB:name=RTX 4090": (24, "2 GPU workers × 4.5 GB"),
    "10GB:used=0.5GB:name=RTX 3080": (10, "3 CPU workers"),
    "12GB:used=0.5GB:name=RTX 3080": (12, "3 CPU workers"),
    "16GB:used=1GB:name=RTX 4080": (16, "3 CPU workers"),
}


# Many commands in one process, as starting Python and pytest takes a second.
MANY = """
import contextlib, io, json, sys
from pytest_gpushare.cli.main import main

for arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def plans(project: Project, commands: Iterable[Sequence[str]]) -> list[Result]:
    """What `plan` says for each of these arguments."""
    done = subprocess.run(
        [sys.executable, "-c", MANY],
        input=json.dumps([["plan", *arguments] for arguments in commands]),
        cwd=project.path,
        env=project.environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [Result(*json.loads(line)) for line in done.stdout.splitlines()]


def plan(project: Project, *arguments: str, **environment: str | None) -> Result:
    return project.command([*COMMAND, "plan", *arguments], **environment)


def test_same_words_as_the_run(
    project: Project, machine: Machine, ollama_with: Callable[..., object]
) -> None:
    """Line for line the header of the run, with settings from three places and an Ollama."""
    ollama_with({"qwen2.5:14b": "5GB"}, load="qwen2.5:14b")
    project.file(
        "pytest.ini",
        "[pytest]\naddopts = -n gpu-auto\nfilterwarnings = error\n"
        "gpu_share_safety_buffer_mb = 512\n",
    )
    project.file(
        "performance_config.json",
        '{"gpu_resource_management": {"safety_buffer_mb": 9, "max_workers_per_gb": 0.5}}',
    )
    more = ("-o", "gpu_share_min_vram_per_worker_gb=2")
    told = plan(project, *more, "-vv")
    run = project.pytest(*more, "-vv")
    assert (told.code, told.err, run.code) == (0, "", 0)
    header = run.out.partition("created:")[0]
    assert told.out.splitlines() == Result(0, header, "").said
    assert "from performance_config.json" in told.out


def test_machines_of_the_seed(project: Project) -> None:
    """The founding write-up's GPUs, none of which is here."""
    told = plans(project, [("--simulate", spec, "--cpus", "3") for spec in SEEDS_MACHINES])
    for spec, result in zip(SEEDS_MACHINES, told, strict=True):
        total, wanted = SEEDS_MACHINES[spec]
        assert (result.code, result.err) == (0, "")
        assert f"gpu-share: {wanted}" in result.out
        assert f"{spec.rpartition('=')[2]}: total {total}.0 GB" in result.out


def test_golden(project: Project, golden: Golden) -> None:
    """Presets, several devices, a number and the arithmetic."""
    told = plan(
        project,
        *("--simulate", "24GB:used=2GB", "--simulate", "16GB"),
        *("--preset", "aggressive", "-n3", "--cpus", "64", "-vv"),
    )
    assert (told.code, told.err) == (0, "")
    golden(told, "cli_plan")


def test_json(project: Project, machine: Machine) -> None:
    """The document has the plan, each worker and where each setting came from."""
    secret = "http://me:hunter2@127.0.0.1:9/api?token=hunter3"
    told = plan(project, "--json", "-o", f"gpu_share_ollama_host={secret}", "-n5")
    assert (told.code, told.err) == (0, "")
    document = json.loads(told.out)
    assert document["schema"] == 1
    assert document["plan"]["gpu_workers"] == 2
    assert document["plan"]["limited_by"] == ["max_workers_per_gb"]
    assert [worker["id"] for worker in document["workers"]] == ["gw0", "gw1"]
    assert document["workers"][0]["slot_bytes"] == document["devices"][0]["budget_bytes"] // 2
    assert document["plan"]["settings"]["ollama_host"] == {
        "value": "127.0.0.1:9",
        "origin": "command line, -o",
    }
    assert "hunter" not in told.out
    assert document["ollama"]["answered"] is False
    assert document["lines"][0].startswith("gpu-share: 2 GPU workers")


def test_nothing_is_left_or_run(project: Project, machine: Machine) -> None:
    """No test is collected, no worker started; a conftest is heard, and its prints are not."""
    project.write(
        conftest="""
            from dataclasses import replace
            print("noise")

            def pytest_gpushare_plan(config, plan):
                return replace(plan, slots=plan.slots[:1])

            def pytest_sessionstart(session):
                raise RuntimeError("a session was started")
        """,
        test_project="raise RuntimeError('was imported')",
    )
    told = plan(project)
    assert (told.code, told.err) == (0, "")
    assert told.out.startswith("gpu-share: 1 GPU worker × 4.5 GB")
    assert "noise" not in told.out
    assert machine.snapshot()[0].peak_used == machine.snapshot()[0].used


REFUSED = {
    ("-o", "gpu_share_nothing=1"): "unknown key 'gpu_share_nothing'",
    ("--simulate", "24GB:free=1"): '"free=1" is not understood',
    ("--preset", "agressive"): "the nearest is aggressive",
    ("--config", "none.json"): "none.json: no such file",
    (
        "--simulate=4GB",
        "-o",
        "gpu_share_fallback_to_cpu_when_constrained=false",
    ): "a GPU worker needs 3.0 GB of VRAM",
    ("-o", "gpu_share_ollama_preload=true"): "gpu_share_ollama_models",
    ("--", "--nonsense"): "unrecognized arguments: --nonsense",
    ("--", "--collect-only"): "these arguments run no test under the plugin",
}


def test_what_a_run_refuses(project: Project) -> None:
    """One line, pytest's exit code, no traceback."""
    for arguments, told in zip(REFUSED, plans(project, REFUSED), strict=True):
        lines = told.err.splitlines()
        assert (told.code, told.out, len(lines)) == (4, "", 1), arguments
        assert lines[0].startswith("ERROR: ")
        assert REFUSED[arguments] in lines[0]


def test_in_process(project: Project, machine: Machine) -> None:
    """`-n 0`: the process itself would be placed, and this one is left as it is."""
    told = plan(project, "-n0", "--", "-p", "no:randomly")
    assert told.out.startswith("gpu-share: no workers: this process on GPU 0, 9.0 GB of VRAM")


def test_closed_pipe(project: Project) -> None:
    """A reader that goes away, as `head` does, is no error."""
    with child_process(
        [*COMMAND, "plan", "--simulate", "24GB"],
        cwd=project.path,
        env=project.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


def test_devices_of_a_machine(project: Project, machine_with: Callable[..., Machine]) -> None:
    """Real devices, one of which the environment hides."""
    machine_with(Device(total="24GB", used="2GB"), Device(total="16GB", used="1GB"))
    told = plan(project, CUDA_VISIBLE_DEVICES="1", CUDA_DEVICE_ORDER="PCI_BUS_ID")
    assert "GPU 1 " in told.out
    assert "GPU 0 " not in told.out


def test_a_live_server_holds_nothing_of_simulated_devices(
    project: Project, machine: Machine, ollama_with: Callable[..., Any]
) -> None:
    """What Ollama has loaded is on real devices: plan, its JSON, presets, named models, a run."""
    what_if = ("--simulate", "24GB:used=2GB", "--cpus", "8")
    alone = plan(project, *what_if)
    server = ollama_with({"qwen2.5:14b": "10.8GB"}, load="qwen2.5:14b")
    told = plan(project, *what_if)
    assert (told.code, told.err) == (0, "")
    assert told.out.splitlines()[:4] == alone.out.splitlines()[:4]
    assert f"Ollama 0.33.0 at {server.host}: what it has in VRAM is not counted on" in told.out
    document = json.loads(plan(project, *what_if, "--json").out)
    assert document["plan"]["gpu_workers"] == 2
    assert [d["resident_bytes"] for d in document["devices"]] == [0]
    named = ("-o", "gpu_share_ollama_models=qwen2.5:14b")
    auto = ("-o", "gpu_share_ollama_vram_reservation_mb=auto")
    for more in ((), named, (*named, *auto), ("-o", "gpu_share_ollama_gpu=0")):
        document = json.loads(plan(project, *what_if, "--json", *more).out)
        (device,) = document["devices"]
        assert (device["resident_bytes"], device["free_bytes"]) == (0, 22 << 30), more
        assert device["outstanding_bytes"] == device["reservation_bytes"], more
    run = project.pytest(
        "--gpu-share-simulate=24GB:used=2GB", "--gpu-share", "--gpu-share-report=report.json"
    )
    assert (run.code, run.workers) == (0, 2), run.out
    report = json.loads((project.path / "report.json").read_text())
    assert [d["resident_bytes"] for d in report["devices"]] == [0]
    assert "resident" not in run.out


def test_no_model_is_loaded(
    project: Project, machine: Machine, ollama_with: Callable[..., Any]
) -> None:
    """`ollama_preload` is for runs: neither plan nor doctor nor watch loads anything."""
    server = ollama_with({"qwen2.5:14b": "5GB"})
    project.file(
        "pytest.ini",
        "[pytest]\ngpu_share = true\ngpu_share_ollama_preload = true\n"
        "gpu_share_ollama_models = qwen2.5:14b\n",
    )
    before = machine.snapshot()[0].peak_used
    for command in (["plan"], ["plan", "-n0"], ["doctor"], ["watch", "--once"]):
        result = project.command([*COMMAND, *command])
        assert (result.code, result.err) == (0, ""), command
    assert machine.snapshot()[0].peak_used == before
    assert {r.path for r in server.requests if r.method != "GET"} <= {"/api/show"}
