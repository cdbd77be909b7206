"""Candidates of advice: changes with which a plan has more GPU workers, or larger ones.

Each suggestion is planned again before it is offered, and offered only where the plan gives what
the suggestion promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from pytest_gpushare.config.kinds import kind_of
from pytest_gpushare.config.options import INI_PREFIX, OPTIONS
from pytest_gpushare.config.settings import Settings
from pytest_gpushare.gpu.devices import GpuFacts
from pytest_gpushare.ollama.models import OllamaFacts
from pytest_gpushare.ollama.prediction import MARGIN, OVERHEAD
from pytest_gpushare.ollama.reservation import devices_of_ollama
from pytest_gpushare.planning.leasing import kept_for_other_servers
from pytest_gpushare.planning.plan import DevicePlan, Limit, Plan, shortage
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.units import GB, MB, format_gb, plural

STEP = GB // 2
LEAST_RESERVATION = 2 * GB
"""Bytes below which no model of use and its CUDA context fit."""

_OPTIONS = {option.attribute: option for option in OPTIONS}


class Advice(NamedTuple):
    """One suggestion: why, what to change, and what that gives."""

    why: str
    gives: str
    changes: Mapping[str, object] = {}
    """Attribute of `Settings` -> its value; empty where the change is no setting."""
    action: str = ""
    """What to do instead of changing a setting, or the words before the settings."""
    workers: int = 0
    """GPU workers that the plan has with the changes, at least."""
    slot: int = 0
    """Bytes of VRAM that each of them has, at least."""

    @property
    def settings(self) -> str:
        """`gpu_share_min_vram_per_worker_gb=5.5`, several with blanks between."""
        return " ".join(f"{INI_PREFIX}{key}={value}" for key, value in _written(self.changes))

    @property
    def change(self) -> str:
        """What to change, its settings as options of pytest, and what that gives."""
        options = " ".join(f"-o {setting}" for setting in self.settings.split(" ") if setting)
        return " ".join(filter(None, [self.action, options, self.gives]))

    @property
    def text(self) -> str:
        """The suggestion as one sentence."""
        return f"{self.why}: {self.change}".strip()


class Case(NamedTuple):
    """A plan, and what is known of those who share the devices."""

    settings: Settings
    gpus: GpuFacts
    ollama: OllamaFacts
    plan: Plan
    replan: Callable[[Settings], Plan]
    models: int = 0
    """Bytes that Ollama needs at least for the models that are named or were seen."""
    need: int = 0
    """Bytes of the largest need of a test that is known; 0: none is."""

    def planned(self, changes: Mapping[str, object]) -> Plan:
        """The plan with these changes."""
        changed: Settings = self.settings._replace(**changes)  # type: ignore[arg-type]
        return self.replan(changed)

    @property
    def least_slot(self) -> int:
        """Bytes that a GPU worker needs for the tests of this case."""
        return max(self.plan.needed, self.need)


def case_of(run: ActiveRun) -> Case | None:
    """The case of a run, with what its tests have shown so far; None where nothing can be planned
    again, as on several hosts."""
    if run.replan is None:
        return None
    plan, server = run.plan, run.monitor.server if run.monitor is not None else None
    seen = [life.model for life in server.history.lives.values()] if server is not None else []
    sizes = [model.size + OVERHEAD + MARGIN for model in (*run.ollama.models, *seen)]
    named = 0
    if plan.demand is not None:
        named = sum(each.vram for each in plan.demand.needs) + plan.demand.margin
    held = (device.resident - kept_for_other_servers(device).resident for device in plan.devices)
    models = max([named, *held, *sizes])
    need = run.tests.largest_own_need
    return Case(run.settings, run.gpus, run.ollama, plan, run.replan, models, need)


def more_room(case: Case) -> list[Advice]:
    """Ways to a GPU worker where a device is there and none fits; the best first."""
    plan = case.plan
    if plan.slots or not plan.devices or plan.limited_by == (Limit.HOOK,):
        return []
    if all(device.limited_by is Limit.BY_MODE for device in plan.devices):
        return []
    why = shortage(plan).partition(";")[0]
    need = case.least_slot
    found: list[Advice] = idle_devices(case)
    kept = max(map(_kept_for_ollama, plan.devices), default=0)
    fitting = reservation_for(case, need)
    if fitting is not None and fitting < kept and fitting >= max(case.models, LEAST_RESERVATION):
        found += checked(case, why, {"ollama_vram_reservation": Fraction(fitting)}, need)
    smaller = plan.usable // STEP * STEP
    if case.need <= smaller < plan.needed and smaller:
        changes = {"min_vram_per_worker": Fraction(smaller)}
        found += checked(case, why, changes, smaller, "would be enough for small tests, in")
    if not found or not case.ollama.answered:
        found += _no_reservation(case, why, need)
    return found


def _no_reservation(case: Case, why: str, need: int) -> list[Advice]:
    """No reservation for an Ollama that is absent, or that runs its models on the CPU."""
    if not any(device.outstanding and _kept_for_ollama(device) for device in case.plan.devices):
        return []
    action = "if no Ollama is to run here,"
    if case.ollama.answered:
        action = "if Ollama takes a smaller model, a smaller context or the CPU,"
    changes: dict[str, object] = {"ollama_gpu": ("none",)}
    found = checked(case, why, changes, need, action=action)
    free = max(map(_free_without_ollama, case.plan.devices))
    smaller = free // STEP * STEP
    if not found and smaller >= max(case.need, STEP):
        changes["min_vram_per_worker"] = Fraction(smaller)
        found = checked(case, why, changes, smaller, action=action)
    return found


def idle_devices(case: Case) -> list[Advice]:
    """VRAM is reserved on every device, since the one that Ollama uses is unknown."""
    devices, ollama = case.gpus.all_devices, case.settings.ollama_gpu
    if len(devices) < 2 or devices_of_ollama(ollama, case.gpus) is not None:
        return []
    if not any(device.outstanding and _kept_for_ollama(device) for device in case.plan.devices):
        return []
    indices = [device.index for device in devices if device.index.isdigit()]
    if not indices:
        return []
    best = max(indices, key=lambda index: len(case.planned({"ollama_gpu": (index,)}).slots))
    return checked(
        case,
        "Ollama's device is unknown, so VRAM is reserved for it on every GPU",
        {"ollama_gpu": (best,)},
        case.plan.needed,
        "(the GPU that it uses) would allow",
    )


def reservation_for(case: Case, need: int) -> int | None:
    """The largest reservation for Ollama, in whole MB, beside which a worker of so many bytes
    fits."""
    found = [
        device.device.free
        + device.resident
        - kept_for_other_servers(device).reservation
        - device.safety_buffer
        - need
        for device in case.plan.devices
        if _free_without_ollama(device) >= need and device.most is None
    ]
    return max(found) // MB * MB if found else None


def _kept_for_ollama(planned: DevicePlan) -> int:
    return planned.reservation - kept_for_other_servers(planned).reservation


def _free_without_ollama(planned: DevicePlan) -> int:
    """Bytes that would be there for tests were nothing kept for Ollama."""
    beside = kept_for_other_servers(planned)
    outstanding = max(0, beside.reservation - beside.resident)
    return planned.device.free - outstanding - planned.safety_buffer


def checked(
    case: Case,
    why: str,
    changes: Mapping[str, object],
    slot: int,
    gives: str = "would allow",
    *,
    action: str = "",
) -> list[Advice]:
    """The suggestion, if the plan with it has more GPU workers, each with so many bytes."""
    plan = case.planned(changes)
    sizes = [each.vram for each in plan.slots]
    if len(sizes) <= len(case.plan.slots) or min(sizes) < slot:
        return []
    least = "" if len(set(sizes)) == 1 else "at least "
    gives += f" {plural(len(sizes), 'GPU worker')} of {least}{format_gb(min(sizes))}"
    return [Advice(why, gives, changes, action, len(sizes), slot)]


def _written(changes: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, value) as a user writes them, without blanks."""
    for attribute, value in changes.items():
        option = _OPTIONS[attribute]
        yield option.key, kind_of(option).write(value).replace(", ", ",")
