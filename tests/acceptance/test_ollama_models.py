"""Runs that keep as much VRAM for Ollama as the models need that they rely on."""

from __future__ import annotations

import json
from collections.abc import Callable

from simulator import Device, Machine
from simulator.ollama import FaultyServer, Model, OllamaServer

from .conftest import Project, Result
from .test_output import check_lines
from .test_plan_table import card

Golden = Callable[[Result, str], None]
OllamaWith = Callable[..., OllamaServer]

QWEN = {"qwen2.5:14b": Model("qwen2.5:14b", size="10.8GB")}
AUTO = (
    "-o", "gpu_share_ollama_vram_reservation_mb=auto",
    "-o", "gpu_share_ollama_context=4096",
    "-o", "gpu_share_ollama_timeout_s=5",
)  # fmt: skip


def models(*names: str) -> tuple[str, str]:
    return "-o", f"gpu_share_ollama_models={' '.join(names)}"


def remembering(project: Project, *arguments: str) -> Result:
    """A run with pytest's cache, which other tests leave out."""
    return project.pytest("--gpu-share", *arguments, beside=["cacheprovider"])


def test_predicted(
    project: Project, machine: Machine, ollama_with: OllamaWith, golden: Golden
) -> None:
    """An idle server: what its model will take, by parts, and no question more than it takes."""
    server = ollama_with(QWEN)
    result = project.pytest("--gpu-share", "-v", *AUTO, *models("qwen2.5:14b"))
    assert (result.code, result.passed, result.err) == (0, 4, "")
    check_lines(result, golden, "models_predicted")
    at_start, during = server.requests[:4], server.requests[4:]
    assert [(r.method, r.path) for r in at_start] == [
        ("GET", "/api/version"),
        ("GET", "/api/ps"),
        ("GET", "/api/tags"),
        ("POST", "/api/show"),
    ]
    assert {(r.method, r.path) for r in during} <= {("GET", "/api/ps")}
    assert server.ps() == []


def test_seen_in_an_earlier_run(
    project: Project, machine: Machine, ollama_with: OllamaWith, golden: Golden
) -> None:
    """A run beside the loaded model learns what it takes; the next one goes by that."""
    server = ollama_with(QWEN, load="qwen2.5:14b", context="600MB")
    loaded = remembering(project, "-v", *AUTO, *models("qwen2.5:14b"))
    assert (loaded.code, loaded.passed, loaded.err) == (0, 4, "")
    check_lines(loaded, golden, "models_loaded")
    kept = json.loads((project.path / ".pytest_cache/v/gpushare/ollama").read_text())
    assert len(kept["models"]) == len(kept["processes"]) == 1
    server.unload("qwen2.5:14b")
    again = remembering(project, "-v", *AUTO, *models("qwen2.5:14b"))
    assert (again.code, again.passed, again.err) == (0, 4, "")
    check_lines(again, golden, "models_seen")


def test_windows_and_lists(
    project: Project, machine: Machine, ollama_with: OllamaWith, golden: Golden
) -> None:
    """Figures that differ by layer, beside a model in the cloud and one that is not there."""
    gemma = Model(
        "gemma3:12b", size="5GB", architecture="gemma3", layers=6, kv_heads=(8, 8, 8, 8, 8, 4),
        key_length=256, value_length=256, window=1024, windowed=(True,) * 5 + (False,),
    )  # fmt: skip
    cloud = Model("glm-5:cloud", size="10GB", remote="https://ollama.com:443")
    server = ollama_with({model.name: model for model in (gemma, cloud)})
    names = models("gemma3:12b", "glm-5:cloud", "llama9:7b")
    result = project.pytest("--gpu-share", "-v", "-n2", *AUTO, *names)
    assert (result.code, result.passed, result.err) == (0, 4, "")
    check_lines(result, golden, "models_odd")
    shown = [r.json() for r in server.requests if r.path == "/api/show"]
    assert shown == [{"model": "gemma3:12b"}, {"model": "gemma3:12b", "verbose": True}]


def test_reservation_that_is_too_small(
    project: Project, machine: Machine, ollama_with: OllamaWith
) -> None:
    """The number that would do is told, and a run with that number says nothing more."""
    ollama_with(QWEN)
    too_small = "gpu_share_ollama_vram_reservation_mb=8192"
    small = project.pytest("--gpu-share", "-n1", *AUTO, "-o", too_small, *models("qwen2.5:14b"))
    assert small.code == 0
    said = "  Ollama needs more VRAM than is reserved: "
    line = next(line for line in small.said if line.startswith(said))
    setting = line.removeprefix(said).partition(" would hold its models")[0]
    number = int(setting.partition(" = ")[2])
    assert 11000 < number < 13500
    enough = project.pytest("--gpu-share", "-n1", *AUTO, "-o", setting.replace(" ", ""),
                            *models("qwen2.5:14b"))  # fmt: skip
    assert (enough.code, [line for line in enough.said if line.startswith(said)]) == (0, [])


def test_without_an_answer(project: Project, machine: Machine) -> None:
    """By the sizes in the names, released, or refused."""
    host = project.environment["OLLAMA_HOST"]
    by_name = project.pytest("--gpu-share", "-n1", *AUTO, *models("qwen2.5:14b"))
    assert (by_name.code, by_name.passed) == (0, 4)
    assert by_name.said[2].startswith("  VRAM: Ollama reservation 12.0 GB, ")
    assert by_name.said[3:] == [
        f"  Ollama at {host}: nothing listens there; its VRAM is reserved by the sizes in its "
        "models' names"
    ]
    released = project.pytest("--gpu-share", "-n1", "-o", "gpu_share_ollama_unreachable=release")
    assert (released.code, released.passed) == (0, 4)
    assert released.said[2].startswith("  VRAM: Ollama reservation 0.0 GB, ")
    assert released.said[3:] == [
        f"  Ollama at {host}: nothing listens there; no VRAM is reserved for it "
        "(gpu_share_ollama_unreachable = release)"
    ]
    refused = project.pytest("--gpu-share", "-n1", "-o", "gpu_share_ollama_unreachable=fail")
    assert (refused.code, refused.out) == (4, "")
    assert refused.err.strip() == (
        f"ERROR: gpu-share: Ollama at {host}: nothing listens there; gpu_share_ollama_unreachable "
        "is fail: start Ollama, correct gpu_share_ollama_host, or set it to reserve or release"
    )


def test_something_is_there(project: Project, machine: Machine) -> None:
    """A server that answers nonsense is not a server that is not there."""
    with FaultyServer("status-503") as server:
        result = project.pytest(
            "--gpu-share",
            "-n1",
            "-o",
            "gpu_share_ollama_unreachable=release",
            OLLAMA_HOST=server.host,
        )
    assert (result.code, result.passed) == (0, 4)
    assert result.said[2].startswith("  VRAM: Ollama reservation 12.0 GB, ")
    assert result.said[3].endswith("; something is there, so its VRAM reservation stands")


def test_found(project: Project, machine: Machine, ollama_with: OllamaWith) -> None:
    """`ollama_host = auto`: the header tells where it is and how it was found."""
    server = ollama_with(QWEN)
    result = project.pytest("--gpu-share", "-n1", "-o", "gpu_share_ollama_host=auto")
    assert (result.code, result.passed) == (0, 4)
    assert result.said[-1] == (
        f"  Ollama 0.33.0 at {server.host}, found as OLLAMA_HOST: no model in VRAM"
    )


def test_on_a_device_that_was_not_named(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """The process list knows better than the setting, and says so."""
    machine_with(card("24GB", "20GB"), card("24GB", "23GB"))
    ollama_with(QWEN, load="qwen2.5:14b")
    result = project.pytest("--gpu-share", "-n1", "-o", "gpu_share_ollama_gpu=0")
    assert (result.code, result.passed) == (0, 4)
    assert result.said[1] == (
        "  gpu_share_ollama_gpu = 0, but NVML lists Ollama on GPU 1: VRAM is reserved for it "
        "there, too"
    )


def test_auto_without_models(project: Project, machine: Machine) -> None:
    result = project.pytest("--gpu-share", "-o", "gpu_share_ollama_vram_reservation_mb=auto")
    assert (result.code, result.out) == (4, "")
    assert result.err.strip() == (
        "ERROR: command line, -o: ollama_vram_reservation_mb = auto: needs the names of models: "
        "set gpu_share_ollama_models, or give a number of MB"
    )


def test_slow_answers_cost_the_limit_alone(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """A server that never tells of its models does not keep the tests waiting."""
    machine_with(Device(total="24GB", used="2GB"))
    server = ollama_with(QWEN)
    server.delays["/api/show"] = 60
    result = project.pytest(
        "--gpu-share", "-n1", *AUTO, *models("qwen2.5:14b"), "-o", "gpu_share_ollama_timeout_s=0.5"
    )
    assert (result.code, result.passed) == (0, 4)
    assert result.said[-1] == (
        "  VRAM for qwen2.5:14b: 12.0 GB by the size in its name: no answer in time: raise "
        "gpu_share_ollama_timeout_s"
    )


def test_arithmetic(project: Project, machine: Machine, ollama_with: OllamaWith) -> None:
    """-vv shows what each part of a prediction is made from."""
    model = Model("qwen2.5:14b", size="10.8GB", embeddings="400MB")
    ollama_with({"qwen2.5:14b": model})
    result = project.pytest("--gpu-share", "-n1", "-vv", *AUTO, *models("qwen2.5:14b"))
    said = [line.strip() for line in result.said if line.startswith("  VRAM of qwen2.5:14b: ")]
    assert said == [
        "VRAM of qwen2.5:14b: weights 10.05 GB: 7 tensors of /api/show; the token embeddings, "
        "0.39 GB, stay in host RAM",
        "VRAM of qwen2.5:14b: KV cache 0.75 GB: 48 layers × 4096 tokens × 2048 elements, 2 bytes "
        "each (f16)",
        "VRAM of qwen2.5:14b: buffers 0.12 GB: 512 tokens at once, feed-forward 13824, embedding "
        "5120 (the formula of Ollama 0.33 and newer)",
        "VRAM of qwen2.5:14b: process 0.5 GB: CUDA context and libraries, assumed; a run "
        "next to one loaded model measures it",
    ]


def test_measured_process(project: Project, machine: Machine, ollama_with: OllamaWith) -> None:
    """What a process takes beyond its model is measured with one model and counts for others."""
    server = ollama_with({**QWEN, "small": "1GB"}, load="qwen2.5:14b", context="700MB")
    assert remembering(project, "-n1", *AUTO, *models("qwen2.5:14b")).code == 0
    server.unload("qwen2.5:14b")
    result = remembering(project, "-n1", "-vv", *AUTO, *models("small"))
    assert result.code == 0
    assert (
        "  VRAM of small: process 0.68 GB: CUDA context and libraries, measured in an earlier run"
    ) in result.said


def test_model_that_nobody_named(
    project: Project, machine: Machine, ollama_with: OllamaWith
) -> None:
    """A model that earlier runs saw, larger than what is reserved for it, is one line."""
    server = ollama_with({"other:14b": "14.7GB"}, load="other:14b", context="500MB")
    first = remembering(project, "-n1")
    assert (first.code, [line for line in first.said if "earlier run" in line]) == (0, [])
    resident = remembering(project, "-n1")
    assert [line for line in resident.said if "earlier run" in line] == []
    server.unload("other:14b")
    second = remembering(project, "-n1")
    assert [line for line in second.said if "earlier run" in line] == [
        "  Ollama's other:14b held 15.19 GB of VRAM in an earlier run, at 4096 tokens, more than "
        "the 12.0 GB reserved for it: gpu_share_ollama_vram_reservation_mb = 17000 would hold it"
    ]
    enough = remembering(project, "-n1", "-o", "gpu_share_ollama_vram_reservation_mb=17000")
    assert [line for line in enough.said if "earlier run" in line] == []


def test_context_is_what_costs(project: Project, machine: Machine, ollama_with: OllamaWith) -> None:
    """14B at the 32,768 tokens that a server of 24 GB chooses: the ways to a smaller need."""
    ollama_with(QWEN, context_length=0)
    limit = ("-o", "gpu_share_ollama_timeout_s=5")
    result = project.pytest("--gpu-share", "-n1", *limit, *models("qwen2.5:14b"))
    assert result.code == 0
    assert (
        "  VRAM of qwen2.5:14b at its 32768 tokens: 16.85 GB; 12.3 GB at 8192 tokens (PARAMETER "
        "num_ctx in the model, or OLLAMA_CONTEXT_LENGTH of the server), 14.04 GB with "
        "OLLAMA_KV_CACHE_TYPE=q8_0"
    ) in result.said


def test_small_model_that_is_missing(
    project: Project, machine: Machine, ollama_with: OllamaWith
) -> None:
    """0.7 GB for each billion and 1 GB; that it is missing is said once."""
    ollama_with(QWEN)
    result = project.pytest("--gpu-share", "-n1", *AUTO, *models("nosuch:1b"))
    assert result.code == 0
    assert result.said[2].startswith("  VRAM: Ollama reservation 2.7 GB, ")
    assert [line for line in result.said if "ollama pull" in line] == [
        "  VRAM for nosuch:1b: 1.7 GB by the size in its name: the server does not have it: "
        "ollama pull nosuch:1b"
    ]


def test_spilled_model_needs_what_is_predicted(
    project: Project, machine_with: Callable[..., Machine], ollama_with: OllamaWith
) -> None:
    """Its size has the embeddings in it, which stay in host RAM: not all of it is missing."""
    machine = machine_with(Device(total="24GB", used="14GB"))
    model = Model("qwen2.5:14b", size="10.8GB", embeddings="1GB", weights="10GB", graph="0.05GB")
    server = ollama_with({"qwen2.5:14b": model}, load="qwen2.5:14b")
    entry = server.ps()[0]
    assert entry["size"] == model.need(4096) + (1 << 30)
    assert 0 < entry["size_vram"] < model.need(4096)
    machine.set_used(0, "2GB")
    result = project.pytest("--gpu-share", "-n1", *AUTO, *models("qwen2.5:14b"))
    need = 10 + 0.75 + 0.125 + 1.0
    kept = float(result.said[2].split("reservation ")[1].split(" GB")[0])
    assert abs(kept - need) < 0.02, result.said
