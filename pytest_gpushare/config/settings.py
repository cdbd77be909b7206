"""The values of the settings, in bytes and seconds: `Settings`, and the lines that it contains."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from pytest_gpushare.errors import LineError
from pytest_gpushare.units import GB, MOST_VRAM, format_gb, parse_size

MOST_LINES = 1000
MOST_LENGTH = 500
MOST_DEVICES = 64


class Alias(NamedTuple):
    """A line of `markers`, such as `profiled_vram_gib(n) = vram={n}GB`."""

    marker: str
    parameters: tuple[str, ...]
    """Names for the marker's arguments, by position or by keyword."""
    meanings: tuple[tuple[str, str], ...]
    """(`vram`, `{n}GB`), (`exclusive`, ``): names, and texts that may contain parameters."""
    line: str
    """The line as the user wrote it."""

    def __str__(self) -> str:
        return self.line


class VramRule(NamedTuple):
    """A line of `vram`, such as `tests/test_llm.py = 8GB`: a need by node id."""

    pattern: str
    vram: int
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.pattern} = {format_gb(self.vram).replace(' ', '')}"


class ModelRule(NamedTuple):
    """A line of `ollama_tests`, such as `tests/rag/* = qwen2.5:14b`: a model by node id."""

    pattern: str
    model: str

    def __str__(self) -> str:
        return f"{self.pattern} = {self.model}"


class Settings(NamedTuple):
    """What the user asked for, after precedence; sizes in bytes, times in seconds.

    What each field means is said once, in `config.options.OPTIONS`.
    """

    ollama_vram_reservation: Fraction | None
    """In bytes, on each device that Ollama may use; None: as much as `ollama_models` need."""
    safety_buffer: Fraction
    max_workers_per_gb: Fraction
    min_vram_per_worker: Fraction
    """Exact, so perhaps a fraction of a byte."""
    max_workers_per_gpu: int
    ram_per_worker: Fraction
    presets: tuple[str, ...]
    enable_ollama_detection: bool
    fallback_to_cpu_when_constrained: bool
    ollama_host: str
    ollama_unreachable: str
    ollama_models: tuple[str, ...]
    ollama_preload: bool
    ollama_preload_failed: str
    ollama_tests: tuple[ModelRule, ...]
    ollama_param: str
    ollama_phase: str
    without_ollama: str
    ollama_load_timeout: Fraction
    ollama_pull_timeout: Fraction
    ollama_context: int | None
    """None: by the VRAM of the server."""
    ollama_parallel: int
    ollama_kv_cache_type: str
    ollama_gpu: tuple[str, ...]
    """Indices or UUIDs, or ("auto",) or ("none",)."""
    ollama_timeout: Fraction
    marker: str
    markers: tuple[Alias, ...]
    vram: tuple[VramRule, ...]
    cpu_workers: int | None
    """None: the CPUs that GPU workers leave."""
    without_gpu: str
    empty_caches: str
    pressure_timeout: Fraction
    leases: str
    wait: Fraction | None
    """Seconds; None: it depends on who holds the VRAM."""
    report_names: bool
    cap_vram: bool
    visible_devices: str
    device_names: str
    hosts: tuple[str, ...]
    live: str
    config: str
    """The JSON file that was read; empty: none."""
    origins: Mapping[str, str] = {}
    """Key -> where its value came from, as a user would say it."""


_IDENTIFIER = r"[A-Za-z_][A-Za-z0-9_]*"
_HEAD = rf"({_IDENTIFIER})\s*(?:\(\s*((?:{_IDENTIFIER}\s*,?\s*)*)\))?"
_PARAMETER = rf"\{{({_IDENTIFIER})\}}"


def parse_aliases(raw: object) -> tuple[Alias, ...]:
    """The meanings of markers. Raises `LineError` for a line, `ValueError` for no lines at all."""
    aliases = tuple(_alias(line) for line in _lines(raw))
    seen: set[str] = set()
    for alias in aliases:
        if alias.marker in seen:
            raise LineError(alias.line, "the marker occurs twice; keep one line")
        seen.add(alias.marker)
    return aliases


def parse_rules(raw: object) -> tuple[VramRule, ...]:
    """The needs by node id, in their order."""
    return tuple(_rule(line) for line in _lines(raw))


def parse_model_rules(raw: object) -> tuple[ModelRule, ...]:
    """The models by node id, in their order."""
    return tuple(_model_rule(line) for line in _lines(raw))


def parse_model(text: str) -> str:
    """The name of a model. Raises `ValueError`."""
    text = text.strip()
    if not text or len(text) > 256 or not text.isprintable() or re.search(r"\s", text):
        raise ValueError(f"{text!r} is not the name of a model")
    return text


def parse_context(text: str) -> int:
    """Tokens of context. Raises `ValueError`."""
    if not re.fullmatch("[0-9]{1,8}", text) or not int(text):
        raise ValueError(f"{text} is not a number of tokens")
    return int(text)


def parse_vram(text: str) -> int:
    """Bytes of a size that names its unit. Raises `ValueError`; the unit is never guessed."""
    size = parse_size(text, "B")
    if text.strip()[-1:].isdigit() or text.strip()[-1:] == ".":
        raise ValueError(f"{text} has no unit")
    if not 0 < size <= MOST_VRAM:
        raise ValueError(f"{text} is not between 0 and {MOST_VRAM // GB} GB")
    return -(-size // 1)


def parse_devices(text: str) -> int:
    """A number of devices. Raises `ValueError`."""
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MOST_DEVICES:
        raise ValueError(f"{text} is not a number from 1 to {MOST_DEVICES}")
    return int(text)


READERS: Mapping[str, Callable[[str], int | str]] = {
    "vram": parse_vram,
    "devices": parse_devices,
    "ollama": parse_model,
    "context": parse_context,
}
"""The meanings of a marker that have a value."""

FLAGS = ("exclusive", "required", "gpu", "cpu", "ollama")
"""The meanings of a marker that have none; `ollama` may have one."""


def filled(text: str, values: Mapping[str, str]) -> str:
    """The text of a meaning with the values of its parameters."""
    return re.sub(_PARAMETER, lambda match: values[match[1]], text)


def parse_lines(raw: object) -> tuple[str, ...]:
    """The lines of a setting that has several, comments and empty ones left out."""
    return tuple(_lines(raw))


def _lines(raw: object) -> Sequence[str]:
    """A text of several lines, a list of lines, or in JSON an object of them."""
    if isinstance(raw, Mapping):
        raw = [f"{name} = {value}" for name, value in raw.items()]
    if isinstance(raw, str):
        raw = raw.splitlines()
    if not isinstance(raw, (list, tuple)) or not all(isinstance(line, str) for line in raw):
        raise ValueError(raw)
    lines = [line.strip() for line in raw]
    lines = [line for line in lines if line and not line.startswith("#")]
    if len(lines) > MOST_LINES:
        raise LineError(lines[MOST_LINES], f"there are more than {MOST_LINES} lines")
    for line in lines:
        if len(line) > MOST_LENGTH:
            raise LineError(line, f"has more than {MOST_LENGTH} characters")
    return lines


def _alias(line: str) -> Alias:
    head, equals, meaning = line.partition("=")
    match = re.fullmatch(_HEAD, head.strip())
    if match is None or not equals:
        raise LineError(line, "is not MARKER = meaning")
    parameters = tuple(re.findall(_IDENTIFIER, match[2] or ""))
    if len(set(parameters)) < len(parameters):
        raise LineError(line, "names a parameter twice")
    parts = re.split(r"[\s,]+", meaning.strip())
    meanings = tuple(_meaning(line, part, parameters) for part in parts)
    names = [name for name, _ in meanings]
    if len(set(names)) < len(names):
        raise LineError(line, "names a meaning twice")
    if "cpu" in names and len(names) > 1:
        raise LineError(line, "means a CPU test and a need of the GPU")
    for name, text in meanings:
        _check(line, name, text, parameters)
    return Alias(match[1], parameters, meanings, line)


def _meaning(line: str, part: str, parameters: Sequence[str]) -> tuple[str, str]:
    name, equals, text = part.partition("=")
    if name not in (READERS if equals else FLAGS):
        raise LineError(line, f"{part or 'nothing'} is not a meaning")
    if name in ("ollama", "context") and text in parameters:
        # A model may have any name, so its parameter needs no braces.
        text = f"{{{text}}}"
    return name, text


def _check(line: str, name: str, text: str, parameters: Sequence[str]) -> None:
    if name not in READERS or not text:
        return
    for used in re.findall(_PARAMETER, text):
        if used not in parameters:
            raise LineError(line, f"{{{used}}} is not a parameter of the marker")
    try:
        # Any number will do to see whether the rest of the text makes sense.
        READERS[name](re.sub(_PARAMETER, "1", text))
    except ValueError:
        raise LineError(line, f"{name}={text} cannot be read") from None


def _model_rule(line: str) -> ModelRule:
    pattern, equals, model = line.rpartition("=")
    if not equals or not pattern.strip():
        raise LineError(line, "is not PATTERN = MODEL")
    try:
        return ModelRule(pattern.strip(), parse_model(model))
    except ValueError:
        raise LineError(line, f"{model.strip() or 'nothing'} is not the name of a model") from None


def _rule(line: str) -> VramRule:
    # Parameters of tests may have an equals sign in their ids: the last one counts.
    pattern, equals, size = line.rpartition("=")
    if not equals or not pattern.strip():
        raise LineError(line, "is not PATTERN = SIZE")
    try:
        return VramRule(pattern.strip(), parse_vram(size.strip()))
    except ValueError:
        raise LineError(line, f"{size.strip() or 'nothing'} is not a size with a unit") from None
