"""From a run's plan to its guard: where there is something to guard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_gpushare.plan.ollama_share import devices_of_ollama
from pytest_gpushare.run.guard import Guard

if TYPE_CHECKING:
    from pytest_gpushare.plan.holding import Held
    from pytest_gpushare.probe.facts import Device, LoadedModel
    from pytest_gpushare.run.live import LiveVram
    from pytest_gpushare.run.neighbour import Neighbour
    from pytest_gpushare.run.started import Started


def guard_of(started: Started) -> Guard | None:
    """The guard of a run; None where no server is asked, or none that holds VRAM here."""
    ollama, live = started.ollama, started.live
    if not (ollama.asked and ollama.on_this_host) or ollama.server is None or live is None:
        return None
    known = devices_of_ollama(started.settings.ollama_gpu, started.gpus)
    if known == ():
        return None
    return Guard(ollama.server, lambda: _open_book(started, live, known))


def _open_book(started: Started, live: LiveVram, known: Sequence[Device] | None) -> Neighbour:
    # Imported in the guard's thread, as the workers start meanwhile.
    from pytest_gpushare.plan.promise import Promise
    from pytest_gpushare.run.neighbour import Neighbour
    from pytest_gpushare.run.who_holds import Holders

    holders = Holders(started.gpus, known, live, started.crew.at_work)
    may_use = {d.uuid for d in (started.gpus.all_devices if known is None else known)}
    models = started.ollama.models if started.ollama.answered else None
    budgets = dict.fromkeys(may_use, 0)
    for slot in started.plan.slots:
        if slot.device.uuid in may_use:
            budgets[slot.device.uuid] += slot.vram

    def look(loaded: Sequence[LoadedModel], by_worker: bool) -> Mapping[str, Held]:
        return _only(may_use, holders.now(loaded, by_worker=by_worker))

    promise = Promise(
        start=_only(may_use, holders.at_start(models or ())),
        budgets=budgets,
        reservation=max((d.reservation for d in started.plan.devices), default=0),
        safety_buffer=int(started.settings.safety_buffer),
        needed=started.plan.needed,
    )
    return Neighbour(models, promise, look, started.record, started.saw)


def _only(uuids: set[str], devices: Mapping[str, Held]) -> Mapping[str, Held]:
    return {uuid: held for uuid, held in devices.items() if uuid in uuids}
