"""The one table of options: the command line, the ini keys and the JSON keys come from it.

Idle runs import it for the names and the help alone, so it names the types of options, which
`config.kinds` makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

JSON_SECTION = "gpu_resource_management"
JSON_FILE = "performance_config.json"
INI_PREFIX = "gpu_share_"


class Option:
    """One option: how a user writes it, what it accepts, and its value when unset."""

    def __init__(
        self,
        key: str,
        type_: str,
        default: str,
        meaning: str,
        *,
        field: str = "",
        flag: str = "",
        metavar: str = "",
        repeatable: bool = False,
        in_json: bool = True,
        accepts: Mapping[str, Any] | None = None,
    ) -> None:
        self.key = key
        """The name in JSON; `gpu_share_<key>` in ini files and after `-o`."""
        self.ini = INI_PREFIX + key
        self.type, self.accepts = type_, accepts or {}
        """A name in `kinds.TYPES`, and what makes this option's type of it."""
        self.default = default
        """The default as a user would write it."""
        self.meaning = meaning
        """The help text."""
        self.attribute = field or key.removesuffix(f"_{self.accepts.get('unit', '').lower()}")
        """The name in `Settings`, which has no unit in it."""
        self.flag = flag
        """The option of the command line, where there is one; what follows describes it."""
        self.metavar = metavar
        self.repeatable = repeatable
        self.in_json = in_json


SWITCHES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    (
        "--gpu-share",
        "store_true",
        "size the xdist workers by the VRAM that Ollama and others leave (also: -n gpu-auto)",
        {"dest": "gpu_share"},
    ),
    (
        "--no-gpu-share",
        "store_false",
        "do not, whatever the ini file says; -n gpu-auto then means -n auto",
        {"dest": "gpu_share"},
    ),
    (
        "--gpu-share-strict",
        "store_true",
        "fail the run (exit code 1) where a worker's placement was changed after planning, "
        "the tests pushed part of an Ollama model off the GPU, or a model was missing",
        {},
    ),
    (
        "--gpu-share-simulate",
        "append",
        "a what-if device in place of the real ones, such as 24GB:used=2GB (repeatable)",
        {"metavar": "SPEC"},
    ),
    (
        "--gpu-share-report",
        "append",
        "write what happened to FILE.json or FILE.html after the tests; {host} and {job} in its "
        "name make it unique among shards (repeatable)",
        {"metavar": "FILE"},
    ),
)
"""Flag, action, help and the rest: the options of the command line that are no settings."""

PRESET_NAMES = ("conservative", "aggressive", "ultra-conservative", "no-ollama", "packed")

_MOST_MB = str(1024**3)
_MOST_GB = str(1024**2)

OPTIONS: tuple[Option, ...] = (
    Option(
        "ollama_vram_reservation_mb",
        "size",
        "12288",
        "VRAM kept for Ollama, in MB; what it holds already counts towards it; auto: as much as "
        "gpu_share_ollama_models will need",
        accepts={"high": _MOST_MB, "unit": "MB", "auto": True},
    ),
    Option(
        "safety_buffer_mb",
        "size",
        "1024",
        "VRAM left free on each device, in MB",
        accepts={"high": _MOST_MB, "unit": "MB"},
    ),
    Option(
        "max_workers_per_gb",
        "number",
        "0.25",
        "GPU workers per GB of a device's budget; 0: no limit",
        accepts={"high": "1000"},
    ),
    Option(
        "min_vram_per_worker_gb",
        "size",
        "3.0",
        "the least VRAM of a GPU worker, in GB",
        accepts={"low": "0.001", "high": _MOST_GB, "unit": "GB"},
    ),
    Option(
        "max_workers_per_gpu",
        "integer",
        "2",
        "the most GPU workers on one device; 0: no limit",
        accepts={"high": "1024"},
    ),
    Option(
        "ram_per_worker_gb",
        "size",
        "0",
        "host RAM that a worker needs, in GB; 0: no limit by RAM",
        accepts={"high": _MOST_GB, "unit": "GB"},
    ),
    Option(
        "preset",
        "presets",
        "conservative",
        "named sets of values, one or several; of several, later ones win",
        field="presets",
        flag="--gpu-share-preset",
        metavar="NAME",
        repeatable=True,
        accepts={"choices": PRESET_NAMES},
    ),
    Option(
        "enable_ollama_detection",
        "boolean",
        "true",
        "ask Ollama what it holds; false: no request is made, the reservation stands",
    ),
    Option(
        "fallback_to_cpu_when_constrained",
        "boolean",
        "true",
        "run CPU workers where no GPU worker fits; false: an error instead",
    ),
    Option(
        "ollama_host",
        "text",
        "",
        "where Ollama listens, written as for OLLAMA_HOST; unset: OLLAMA_HOST, "
        "else 127.0.0.1:11434; auto: also host.docker.internal and, under WSL, the gateway",
    ),
    Option(
        "ollama_unreachable",
        "choice",
        "reserve",
        "where Ollama does not answer: reserve (keep its VRAM all the same), release (keep "
        "nothing if no server is reached), fail (an error)",
        accepts={"choices": ("reserve", "release", "fail")},
    ),
    Option(
        "ollama_models",
        "names",
        "",
        "the models that the run relies on: Ollama is asked what they need",
        accepts={"noun": "names of models", "most": 16},
    ),
    Option(
        "ollama_preload",
        "boolean",
        "false",
        "load gpu_share_ollama_models before the workers start, and keep them loaded",
    ),
    Option(
        "ollama_preload_failed",
        "choice",
        "warn",
        "what to do where one of them cannot be loaded, or only in part",
        accepts={"choices": ("warn", "fail")},
    ),
    Option(
        "ollama_tests",
        "model rules",
        "",
        "tests that use a model of Ollama's, by node id, one a line, such as "
        "`tests/rag/* = qwen2.5:14b`; the first that matches",
    ),
    Option(
        "ollama_param",
        "parameter name",
        "",
        "the parameter of parametrised tests that names the model which they use",
    ),
    Option(
        "ollama_phase",
        "choice",
        "auto",
        "when tests that use a model run: `beside` the GPU tests, before or after them, or "
        "whichever is estimated to be shortest (auto)",
        accepts={"choices": ("auto", "beside", "before", "after")},
    ),
    Option(
        "without_ollama",
        "choice",
        "skip",
        "what a test that uses a model does without the server or the model: skip, run, fail, "
        "or pull (the missing model, before the tests)",
        accepts={"choices": ("skip", "run", "fail", "pull")},
    ),
    Option(
        "ollama_load_timeout_s",
        "number",
        "600",
        "how long the tests of a model wait until it is loaded, in seconds",
        accepts={"low": "0.1", "high": "86400", "unit": "s"},
    ),
    Option(
        "ollama_pull_timeout_s",
        "number",
        "1800",
        "how long pulling one model may take, in seconds",
        accepts={"low": "0.1", "high": "86400", "unit": "s"},
    ),
    Option(
        "ollama_context",
        "integer",
        "auto",
        "the server's OLLAMA_CONTEXT_LENGTH, in tokens; auto: by its total VRAM, as Ollama does",
        accepts={"low": "1", "high": "16777216", "auto": True},
    ),
    Option(
        "ollama_parallel",
        "integer",
        "1",
        "the server's OLLAMA_NUM_PARALLEL",
        accepts={"low": "1", "high": "256"},
    ),
    Option(
        "ollama_kv_cache_type",
        "choice",
        "f16",
        "the server's OLLAMA_KV_CACHE_TYPE",
        accepts={"choices": ("f16", "q8_0", "q4_0")},
    ),
    Option(
        "ollama_gpu",
        "devices",
        "auto",
        "the device or devices that Ollama uses: index or UUID, auto (find out), none",
    ),
    Option(
        "ollama_timeout_s",
        "number",
        "0.5",
        "seconds for all requests to Ollama at the start",
        accepts={"low": "0.01", "high": "60", "unit": "s"},
    ),
    Option(
        "marker",
        "marker name",
        "gpu",
        "the marker of GPU tests",
    ),
    Option(
        "markers",
        "aliases",
        "",
        "what other markers mean, one a line, so that no test need be edited: "
        "`multi_gpu = devices=2`, `profiled_vram_gib(n) = vram={n}GB`, `serial = exclusive`, "
        "`not_device_test = cpu`",
    ),
    Option(
        "vram",
        "rules",
        "",
        "needs by node id, one a line, such as `tests/test_llm.py = 8GB`; the first that matches",
    ),
    Option(
        "cpu_workers",
        "integer",
        "0",
        "CPU workers next to the GPU workers; auto: the CPUs that GPU workers leave",
        accepts={"high": "1024", "auto": True},
    ),
    Option(
        "without_gpu",
        "choice",
        "run",
        "what a GPU test does without a GPU: run (on the CPU), skip, fail",
        accepts={"choices": ("run", "skip", "fail")},
    ),
    Option(
        "empty_caches",
        "choice",
        "when-needed",
        "when GPU workers collect garbage and empty the caches of their frameworks: when a test "
        "waits for the VRAM, after each GPU test, or not at all",
        accepts={"choices": ("when-needed", "always", "never")},
    ),
    Option(
        "pressure_timeout_s",
        "number",
        "300",
        "how long GPU tests wait for VRAM that Ollama or other programs took, in seconds",
        accepts={"high": "86400", "unit": "s"},
    ),
    Option(
        "leases",
        "text",
        "auto",
        "the directory in which the sessions of this host publish the VRAM that they lease; auto: "
        "one that all users share; off: lease nothing, and ignore the leases of others",
    ),
    Option(
        "wait",
        "number",
        "auto",
        "seconds that the start waits for VRAM; auto: 300 for VRAM that other sessions lease, "
        "again while they make progress, and 0 for VRAM that other programs hold",
        flag="--gpu-share-wait",
        metavar="SECONDS",
        accepts={"high": "604800", "unit": "s", "auto": True},
    ),
    Option(
        "report_names",
        "boolean",
        "false",
        "name the sessions of other users in reports",
    ),
    Option(
        "cap_vram",
        "boolean",
        "true",
        "cap the frameworks of each GPU worker at its slot, less a CUDA context",
    ),
    Option(
        "visible_devices",
        "choice",
        "own",
        "what a GPU worker sees: its own device, or all, its own first (for tests on several "
        "devices)",
        accepts={"choices": ("own", "all")},
    ),
    Option(
        "device_names",
        "choice",
        "uuid",
        "how a device is written to CUDA_VISIBLE_DEVICES: by full UUID, or by index for tools "
        "that break on UUIDs",
        accepts={"choices": ("uuid", "index")},
    ),
    Option(
        "hosts",
        "hosts",
        "",
        "hosts whose devices the run uses over ssh, one a line: `user@box:/srv/project`, then "
        "options of ssh and `python=PATH`; `popen` is this host",
        in_json=False,
    ),
    Option(
        "live",
        "choice",
        "auto",
        "a line with the VRAM in use below the tests' output: auto (in a terminal), on (on CI and "
        "with pytest's own progress too), off",
        accepts={"choices": ("auto", "on", "off")},
    ),
    Option(
        "config",
        "text",
        "",
        f"JSON file with a {JSON_SECTION} section; unset: {JSON_FILE} in the root directory, "
        "if it has one",
        flag="--gpu-share-config",
        metavar="FILE",
        in_json=False,
    ),
)

BY_KEY = {option.key: option for option in OPTIONS}


PRESETS: Mapping[str, Mapping[str, str]] = {
    "conservative": {
        "ollama_vram_reservation_mb": "12288",
        "max_workers_per_gb": "0.25",
        "min_vram_per_worker_gb": "3.0",
        "max_workers_per_gpu": "2",
    },
    "aggressive": {
        "ollama_vram_reservation_mb": "11264",
        "max_workers_per_gb": "0.33",
        "min_vram_per_worker_gb": "2.5",
        "max_workers_per_gpu": "0",
    },
    "ultra-conservative": {
        "ollama_vram_reservation_mb": "14336",
        "max_workers_per_gb": "0.2",
        "min_vram_per_worker_gb": "4.0",
        "max_workers_per_gpu": "2",
    },
    "no-ollama": {
        "ollama_vram_reservation_mb": "0",
        "enable_ollama_detection": "false",
        "max_workers_per_gb": "0",
        "max_workers_per_gpu": "0",
    },
    "packed": {
        "min_vram_per_worker_gb": "1.0",
        "max_workers_per_gb": "0",
        "max_workers_per_gpu": "0",
    },
}


def merged(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What the named presets set together: key -> (value, name of the preset that set it)."""
    return {key: (value, name) for name in names for key, value in PRESETS[name].items()}
