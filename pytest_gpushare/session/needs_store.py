"""What tests took in earlier runs, by node id and model of device: kept in pytest's cache.

Peaks that the frameworks counted set a test's figure; what NVML saw once a second, or what a
large cache blurred, is a lower bound, which raises a figure and never lowers it. The file is not
trusted: what is no sensible figure is left out.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.compat.pytest_options import options_of
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.ollama.models import LoadedModel, OllamaFacts
from pytest_gpushare.ollama.prediction import (
    NOTHING_KNOWN,
    KnownSizes,
    known_sizes,
    with_sightings,
)
from pytest_gpushare.text import read_regular, write_whole
from pytest_gpushare.units import MB, MOST_VRAM, format_gb

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.events import Record
    from pytest_gpushare.planning.plan import Plan
    from pytest_gpushare.session.tests import RecordedTests
    from pytest_gpushare.session.workers import Workers


FILE = "needs.json"
"""In the folder `gpushare` of pytest's cache."""
MOST_TESTS = 20_000
"""Of one model of device; the tests that ran longest ago go first."""
_MOST_BYTES = 32 * MB
_MOST_NODEID = 1000
_MOST_SECONDS = 1e7
_VERSION = 1
_DATE = r"20[0-9]{2}-[0-9]{2}-[0-9]{2}"
_MARGIN = 115
"""Per cent of what was measured: fragmentation, and what differs from run to run."""
_SAME_SHARE, _SAME_SIZE = 0.10, 64 * MB
"""A peak that differs by more than both was not measured of the same test."""


class Learned(NamedTuple):
    """What a test took when it last ran."""

    peak: int | None
    """Bytes that the frameworks held for it, without the CUDA context; None: not measured."""
    duration: float | None = None
    """Seconds; None: unknown."""
    date: str = ""
    """When, as YYYY-MM-DD."""

    def need(self, context: int) -> int | None:
        """Bytes that a process needs for it, a CUDA context of so many bytes included."""
        if self.peak is None:
            return None
        # Without a peak no context comes up for it.
        return (self.peak + context) * _MARGIN // 100 if self.peak else 0


def recall_needs(config: pytest.Config, device: str) -> dict[str, Learned]:
    """Node id -> what the test took on this model of device; empty where nothing is kept."""
    path = _path(config)
    return _validated(_read(path).get(device)) if path is not None else {}


class NeedsRecorder:
    """Receives what tests take, and keeps it at the end of the run."""

    def __init__(
        self,
        config: pytest.Config,
        plan: Plan,
        workers: Workers,
        tests: RecordedTests,
        record: Record,
        problem: Callable[[str], object],
    ) -> None:
        """`problem` is called with a sentence where nothing can be kept."""
        self._config, self._problem = config, problem
        self._workers, self._tests, self._record = workers, tests, record
        self._found: dict[str, dict[str, Learned]] = {}
        """Device's name -> node id -> what was learned in this run."""
        self._before: dict[str, dict[str, Learned]] = {}
        self._measured: set[str] = set()
        """Tests whose workers have reported how long they took."""
        self._names = {slot.device.uuid: slot.device.name for slot in plan.slots}

    def start(self) -> None:
        """Read what earlier runs kept; nothing is written before the end."""
        for name in {"", *self._names.values()}:
            self._before[name] = recall_needs(self._config, name)

    def stop(self) -> None:
        """Write what was measured, once and atomically; a failure becomes a note."""
        self._take_unmeasured()
        path = _path(self._config)
        if path is None or not any(self._found.values()):
            return
        kept = {name: _validated(tests) for name, tests in _read(path).items()}
        for name, tests in self._found.items():
            merged = {**kept.get(name, {}), **tests}
            newest = sorted(merged.items(), key=lambda entry: entry[1].date, reverse=True)
            kept[name] = dict(newest[:MOST_TESTS])
        try:
            _write(path, kept)
        except OSError as error:
            self._problem(f"what the tests took could not be kept in {path}: {error}")

    def learned(self, device: str) -> Mapping[str, Learned]:
        """What earlier runs kept of this model of device."""
        return self._before.get(device, {})

    def at_least(self, device: str, nodeid: str, size: int) -> None:
        """A lower bound of a test's peak, such as NVML's samples give: it may raise its figure.

        `size` is in bytes, without the CUDA context. A test without a figure gets none from it:
        between two samples the test may have held any amount.
        """
        before = self._last_known(device, nodeid)
        if before is not None and before.peak is not None:
            self._keep(device, nodeid, size, None, exact=False)

    def took(self, nodeid: str, seconds: float, device: str = "") -> None:
        """How long a test took that no framework measured; without a device: on the CPU."""
        self._keep(device, nodeid, None, seconds, exact=False)

    def _last_known(self, device: str, nodeid: str) -> Learned | None:
        return self._found.get(device, {}).get(nodeid) or self.learned(device).get(nodeid)

    def _take_unmeasured(self) -> None:
        """Record the tests that passed and that no framework measured."""
        for test in self._tests:
            member = self._workers.get(test.worker)
            if member is None or test.outcome != "passed" or test.start is None or test.end is None:
                continue
            device = self._names.get(member.device or "", "")
            found = self._found.get(device, {})
            if test.nodeid in found and member.is_undercounted:
                # No need is better than one that leaves out what another library holds.
                found[test.nodeid] = found[test.nodeid]._replace(peak=None)
            if device and test.peak is not None and test.peak.source == "nvml":
                size = test.peak.size - member.context
                self.at_least(device, test.nodeid, max(0, size))
            if test.nodeid not in self._measured:
                self.took(test.nodeid, max(0.0, test.end - test.start), device)

    def measured(self, worker: str, message: Mapping[str, Any]) -> None:
        """Take what a worker counted around a test."""
        member = self._workers.get(worker)
        name = self._names.get(member.device or "") if member is not None else None
        if member is None or name is None:
            return
        self._compare(message, member.context)
        if message["outcome"] != "passed":
            # A test that failed or was skipped may not have reached its peak.
            return
        duration = max(0.0, float(message["end"]) - float(message["start"]))
        if message["attempts"] > 1:
            duration = 0.0
        self._measured.add(str(message["nodeid"]))
        self._keep(
            name, str(message["nodeid"]), message["peak"], duration or None, message["exact"]
        )

    def _compare(self, message: Mapping[str, Any], context: int) -> None:
        """Name a test that took more than the need with which it was admitted."""
        need, peak = message.get("need"), message["peak"]
        if not need or not peak:
            return
        took = peak + context
        if _differ(need, took) and took > need:
            nodeid = str(message["nodeid"])
            self._record.note(
                "need-exceeded",
                f"{nodeid} took {format_gb(took)} of VRAM, its need was {format_gb(need)}",
                nodeid=nodeid,
                need=need,
                took=took,
            )

    def _keep(
        self, device: str, nodeid: str, peak: int | None, duration: float | None, exact: bool
    ) -> None:
        before = self._last_known(device, nodeid)
        old = before.peak if before is not None else None
        new = _merged(old, peak, exact)
        if before is not None and old is not None and new is not None and _differ(old, new):
            self._record.note(
                "need-changed",
                f"{nodeid} took {format_gb(new)} of VRAM, {format_gb(old)} when it last ran"
                f" ({before.date})",
                nodeid=nodeid,
                before=old,
                after=new,
            )
        if duration is None and before is not None:
            duration = before.duration
        today = time.strftime("%Y-%m-%d", time.gmtime())
        self._found.setdefault(device, {})[nodeid] = Learned(new, duration, today)


def _merged(old: int | None, new: int | None, exact: bool) -> int | None:
    """The figure to keep: a counted peak replaces it, a lower bound can only raise it."""
    if new is None or (not exact and old is not None and new <= old):
        return old
    return new


def _differ(old: int, new: int) -> bool:
    return abs(new - old) > max(_SAME_SIZE, _SAME_SHARE * max(old, new))


def _path(config: pytest.Config) -> Path | None:
    """The file; None where pytest keeps no cache."""
    cache = getattr(config, "cache", None)
    if cache is None:
        return None
    try:
        return Path(cache.mkdir("gpushare"), FILE)
    except OSError:
        return None


def _read(path: Path) -> dict[str, Any]:
    """Device's name -> what stands there; empty where the file is none of ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_regular(path, _MOST_BYTES))
        if isinstance(found, dict) and found.get("version") == _VERSION:
            devices = found.get("devices")
            if isinstance(devices, dict):
                return devices
    return {}


def _validated(tests: object) -> dict[str, Learned]:
    if not isinstance(tests, dict):
        return {}
    found: dict[str, Learned] = {}
    for nodeid, entry in tests.items():
        if len(found) == MOST_TESTS:
            break
        if len(nodeid) <= _MOST_NODEID and isinstance(entry, list) and len(entry) == 3:
            peak, duration, date = entry
            good = (peak is None or (type(peak) is int and 0 <= peak <= MOST_VRAM)) and (
                duration is None
                or (type(duration) in (int, float) and 0 <= duration <= _MOST_SECONDS)
            )
            if good and isinstance(date, str) and re.fullmatch(_DATE, date):
                found[nodeid] = Learned(peak, duration, date)
    return found


def _write(path: Path, devices: Mapping[str, Mapping[str, Learned]]) -> None:
    text = json.dumps({"version": _VERSION, "devices": devices}, separators=(",", ":"))
    write_whole(path, text)


HAS_NEEDS_KEY = "gpushare/has_needs"
"""In pytest's cache: whether tests of this suite have needs of their own."""

MODEL_USE_KEY = "gpushare/tests-use-models"
"""In pytest's cache: whether they said in the last run that they use models of Ollama's."""


class LearnedNeeds:
    """Node id -> need and duration, on the devices of this run."""

    def __init__(self, config: pytest.Config, contexts: Mapping[str, int], *, packs: bool) -> None:
        """`contexts`: name of a device with slots -> bytes of a CUDA context there; `packs`:
        whether slots may be smaller than needs, so that needs are worth knowing."""
        # Under no device: how long tests took on CPU workers.
        self._by_context = [
            (context, recall_needs(config, name)) for name, context in {**contexts, "": 0}.items()
        ]
        self._packs = packs

    def __call__(self, nodeid: str) -> tuple[int | None, float | None]:
        """Bytes, of several models of device the most, and seconds."""
        needs, durations = [], []
        for context, tests in self._by_context:
            learned = tests.get(nodeid)
            if learned is None:
                continue
            need = learned.need(context) if self._packs else None
            needs += [] if need is None else [need]
            durations += [] if learned.duration is None else [learned.duration]
        return max(needs, default=None), max(durations, default=None)


def may_have_needs(settings: Settings, config: pytest.Config) -> bool:
    """Whether tests may have needs of their own, which no slot must cap.

    Markers are known only once tests are collected, long after workers have got their caps:
    what an earlier run saw has to do.
    """
    means = {name for alias in settings.markers for name, _ in alias.meanings}
    if settings.vram or "vram" in means or "packed" in settings.presets:
        return True
    return stored(config, HAS_NEEDS_KEY) is True


def remember_suite(config: pytest.Config, *, has_needs: bool, uses_models: bool) -> None:
    """Note for the next run what the tests of this one ask for; needs are not forgotten again."""
    if has_needs and stored(config, HAS_NEEDS_KEY) is not True:
        _store(config, HAS_NEEDS_KEY, True)
    if uses_models != (stored(config, MODEL_USE_KEY) is True):
        _store(config, MODEL_USE_KEY, uses_models)


def stored(config: pytest.Config, key: str) -> object:
    """The value of a key in pytest's cache; None where there is none.

    The plan is made before pytest opens its cache, so the file is read where the cache keeps it.
    """
    if getattr(options_of(config), "cacheclear", False) and not hasattr(config, "cache"):
        return None
    try:
        return json.loads(read_regular(_stored_at(config, key), _MOST_STORED_BYTES))
    except (OSError, ValueError, RecursionError, RuntimeError):
        # Also where the cache is switched off: its setting is unknown then.
        return None


def _store(config: pytest.Config, key: str, value: object) -> None:
    """Set the value of a key in pytest's cache, where there is one.

    Not by the cache itself: it would wait without a limit where the file is a FIFO.
    """
    cache = getattr(config, "cache", None)
    if cache is None:
        return
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        # Writes the files that go into every cache directory, such as .gitignore.
        cache.mkdir("gpushare")
        write_whole(_stored_at(config, key), json.dumps(value))


def _stored_at(config: pytest.Config, key: str) -> Path:
    directory = os.path.expandvars(str(config.getini("cache_dir")))
    # pathlib would have it otherwise where the directory is absolute, as pytest does.
    return Path(config.rootpath, Path(directory).expanduser(), "v", *key.split("/"))


CONTEXTS_KEY = "gpushare/contexts"
"""Device name -> bytes of a CUDA context, in pytest's cache."""

LOWEST_CONTEXT, HIGHEST_CONTEXT = 100 * MB, 1024 * MB
"""Bytes that a context may come to; beyond, something else was held at that moment."""


def recall_contexts(config: pytest.Config) -> dict[str, int]:
    """Device name -> bytes of a CUDA context, from earlier runs; only sensible figures."""
    found = stored(config, CONTEXTS_KEY)
    if not isinstance(found, dict):
        return {}
    return {
        name: size
        for name, size in found.items()
        if type(size) is int and LOWEST_CONTEXT <= size <= HIGHEST_CONTEXT
    }


def keep_context(config: pytest.Config, name: str, size: object) -> None:
    """Keep a measured context for the next run; the last one counts."""
    if type(size) is not int or not LOWEST_CONTEXT <= size <= HIGHEST_CONTEXT:
        return
    before = recall_contexts(config)
    if size != before.get(name):
        _store(config, CONTEXTS_KEY, {**before, name: size})


OLLAMA_KEY = "gpushare/ollama"
"""In pytest's cache: what was measured of Ollama's models and of their processes."""

_MOST_STORED_BYTES = 256 * 1024


def recall_ollama(config: pytest.Config) -> KnownSizes:
    """What earlier runs measured of Ollama; what makes no sense is left out."""
    return known_sizes(stored(config, OLLAMA_KEY))


class EarlierRuns(NamedTuple):
    """What earlier runs measured."""

    model_sizes: KnownSizes = NOTHING_KNOWN
    """Of Ollama's models and their processes."""
    contexts: Mapping[str, int] = {}
    """Device name -> bytes of a CUDA context."""
    has_needs: bool = False
    """Whether tests may have needs of their own."""
    uses_models: bool = False
    """Whether tests said that they use models of Ollama's."""


def earlier_runs(config: pytest.Config, settings: Settings) -> EarlierRuns:
    """All that the start needs of them."""
    return EarlierRuns(
        recall_ollama(config) if settings.enable_ollama_detection else NOTHING_KNOWN,
        recall_contexts(config),
        may_have_needs(settings, config),
        stored(config, MODEL_USE_KEY) is True,
    )


class ModelSizes:
    """What loaded models take, as this run sees it; any thread may add to it."""

    def __init__(self, settings: Settings, gpus: GpuFacts, ollama: OllamaFacts) -> None:
        self._settings, self._gpus, self._ollama = settings, gpus, ollama
        self._seen: dict[tuple[str, int | None], tuple[LoadedModel, int | None]] = {}
        """(digest, context) -> the model, and the bytes of its process."""
        for model in ollama.models:
            self.saw(model)

    def saw(self, model: LoadedModel, used: int | None = None) -> None:
        """A model is loaded; `used`: bytes of its process, where NVML shows them."""
        _, before = self._seen.get((model.digest, model.context), (model, None))
        most = max(before or 0, used or 0) or None
        self._seen[model.digest, model.context] = model, most

    def keep(self, config: pytest.Config) -> None:
        """Write the sizes for later runs; the newest counts, as a new Ollama may differ."""
        if not self._seen:
            return
        before = recall_ollama(config)
        after = with_sightings(
            before,
            list(self._seen.values()),
            self._ollama,
            self._gpus.all_devices,
            self._settings,
        )
        if after != before:
            _store(config, OLLAMA_KEY, after.document())
