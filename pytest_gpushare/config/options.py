"""The one table of options: the command line, the ini keys and the JSON keys come from it.

Imported even when the plugin is idle, so it holds plain data alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

JSON_SECTION = "gpu_resource_management"
JSON_FILE = "performance_config.json"
INI_PREFIX = "gpu_share_"


class Option(NamedTuple):
    """One option: how a user writes it, what it accepts, what it is when unset."""

    key: str
    """Its name in JSON; `gpu_share_<key>` in ini files and after `-o`."""
    kind: str
    """How a value is read: size, number, integer, boolean, choice, words, names, text, marker, or
    by lines: aliases, rules."""
    default: str
    """The default as a user would write it."""
    meaning: str
    field: str = ""
    """The name in `Settings`, where it differs from the key because units end at the edge."""
    unit: str = ""
    """The unit of a number without one: MB, GB or s."""
    low: str = "0"
    high: str = ""
    """Bounds for numbers, in `unit`."""
    choices: tuple[str, ...] = ()
    flag: str = ""
    """The option of the command line, where it has one of its own."""
    metavar: str = ""
    in_json: bool = True
    auto: bool = False
    """Whether `auto` is accepted in place of a number."""
    noun: str = ""
    """What the words name, where they are not choices."""

    @property
    def ini(self) -> str:
        """The ini key."""
        return INI_PREFIX + self.key

    @property
    def attribute(self) -> str:
        """The name of the value in `Settings`."""
        return self.field or self.key


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
        field="ollama_vram_reservation",
        unit="MB",
        high=_MOST_MB,
        auto=True,
    ),
    Option(
        "safety_buffer_mb",
        "size",
        "1024",
        "VRAM left free on each device, whatever happens, in MB",
        field="safety_buffer",
        unit="MB",
        high=_MOST_MB,
    ),
    Option(
        "max_workers_per_gb",
        "number",
        "0.25",
        "GPU workers per GB of a device's budget; 0: no limit",
        high="1000",
    ),
    Option(
        "min_vram_per_worker_gb",
        "size",
        "3.0",
        "VRAM below which a GPU worker makes no sense, in GB",
        field="min_vram_per_worker",
        unit="GB",
        low="0.001",
        high=_MOST_GB,
    ),
    Option(
        "max_workers_per_gpu",
        "integer",
        "2",
        "the most GPU workers on one device; 0: no limit",
        high="1024",
    ),
    Option(
        "ram_per_worker_gb",
        "size",
        "0",
        "host RAM that a worker needs, in GB; 0: no limit by RAM",
        field="ram_per_worker",
        unit="GB",
        high=_MOST_GB,
    ),
    Option(
        "preset",
        "words",
        "conservative",
        "named sets of values, one or several; of several, later ones win",
        field="presets",
        choices=PRESET_NAMES,
        flag="--gpu-share-preset",
        metavar="NAME",
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
        "where Ollama gives no answer: reserve (keep its VRAM all the same), release (keep "
        "nothing if no server is reached), fail (an error)",
        choices=("reserve", "release", "fail"),
    ),
    Option(
        "ollama_models",
        "names",
        "",
        "the models that the run relies on: Ollama is asked what they need",
        noun="names of models",
        high="16",
    ),
    Option(
        "ollama_preload",
        "boolean",
        "false",
        "load gpu_share_ollama_models before the workers start, and keep them till the end",
    ),
    Option(
        "ollama_preload_failed",
        "choice",
        "warn",
        "what to do where one of them cannot be loaded, or only in part",
        choices=("warn", "fail"),
    ),
    Option(
        "ollama_context",
        "integer",
        "auto",
        "the server's OLLAMA_CONTEXT_LENGTH, in tokens; auto: by its total VRAM, as Ollama does",
        low="1",
        high="16777216",
        auto=True,
    ),
    Option(
        "ollama_parallel",
        "integer",
        "1",
        "the server's OLLAMA_NUM_PARALLEL",
        low="1",
        high="256",
    ),
    Option(
        "ollama_kv_cache_type",
        "choice",
        "f16",
        "the server's OLLAMA_KV_CACHE_TYPE",
        choices=("f16", "q8_0", "q4_0"),
    ),
    Option(
        "ollama_gpu",
        "words",
        "auto",
        "the device or devices that Ollama uses: index or UUID, auto (find out), none",
    ),
    Option(
        "ollama_timeout_s",
        "number",
        "0.5",
        "seconds for the whole of the questions that are asked of Ollama at the start",
        field="ollama_timeout",
        unit="s",
        low="0.01",
        high="60",
    ),
    Option(
        "marker",
        "marker",
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
        "CPU workers beside the GPU workers; auto: the CPUs that GPU workers leave",
        high="1024",
        auto=True,
    ),
    Option(
        "without_gpu",
        "choice",
        "run",
        "what a GPU test does when no GPU can be had: run (on the CPU), skip, fail",
        choices=("run", "skip", "fail"),
    ),
    Option(
        "empty_caches",
        "choice",
        "when-needed",
        "when GPU workers collect garbage and empty the caches of their frameworks: when a test "
        "waits for the VRAM, after each GPU test, or not at all",
        choices=("when-needed", "always", "never"),
    ),
    Option(
        "pressure_timeout_s",
        "number",
        "300",
        "how long GPU tests wait for VRAM that Ollama or other programs took, in seconds",
        field="pressure_timeout",
        unit="s",
        high="86400",
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
        choices=("own", "all"),
    ),
    Option(
        "device_names",
        "choice",
        "uuid",
        "how a device is written to CUDA_VISIBLE_DEVICES: by full UUID, or by index for tools "
        "that break on UUIDs",
        choices=("uuid", "index"),
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
