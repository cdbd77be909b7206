"""The active run: what was found and planned at the start, and the parts that follow the tests."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import Attribution, Holding, holding
from pytest_gpushare.gpu.vendors import variables
from pytest_gpushare.leases.claims import Naming
from pytest_gpushare.neighbours import devices_of_servers, statements_of
from pytest_gpushare.ollama.address import candidates
from pytest_gpushare.ollama.monitor import Monitor
from pytest_gpushare.planning.leasing import shares_of_other_servers
from pytest_gpushare.planning.placement import (
    NUMBER,
    PlacementContext,
    seen,
    worker_environment,
    worker_message,
)
from pytest_gpushare.planning.plan import Slot
from pytest_gpushare.service import Services
from pytest_gpushare.session.exclusive import ExclusiveAccess
from pytest_gpushare.session.needs_store import NeedsRecorder
from pytest_gpushare.session.sampler import Sampler, ServersOnHost
from pytest_gpushare.session.session_record import OtherLeases, SessionRecord
from pytest_gpushare.session.start_facts import (
    CollectionDifferences,
    HostOfRun,
    LeasesElsewhereProtocol,
    ReadingSource,
    Resident,
    RunOptions,
    StartFacts,
    placement_context,
)
from pytest_gpushare.session.tests import RecordedTests
from pytest_gpushare.session.workers import WorkerRecord, Workers
from pytest_gpushare.wire import Links

if TYPE_CHECKING:
    import pytest

    from pytest_gpushare.gpu.readings import DeviceSamples, Live
    from pytest_gpushare.scheduler.needs import ModelUse
    from pytest_gpushare.service import Service
    from pytest_gpushare.session.llm import LlmTests


class ActiveRun:
    """One run of pytest that has a plan; every part is there once it is constructed."""

    def __init__(
        self,
        facts: StartFacts,
        options: RunOptions | None = None,
        *,
        config: pytest.Config | None = None,
        record: Record | None = None,
    ) -> None:
        """Without `config` nothing is kept for later runs; `record` is for tests."""
        self.facts = facts
        self.settings, self.gpus, self.ollama = facts.settings, facts.gpus, facts.ollama
        self.plan, self.replan, self.live, self.close = (
            facts.plan,
            facts.replan,
            facts.live,
            facts.close,
        )
        self.has_needs = facts.has_needs
        self.reports, self.strict, self.unplaced = options or RunOptions()
        self.notes = list(facts.problems)
        """Problems that the user should know of, one sentence each."""
        self.unwritten: list[str] = []
        """Why a report could not be written, one sentence each."""
        self.written: list[Path] = []
        """The reports that were written."""
        self.overwritten: dict[str, str] = {}
        """Worker -> how its placement was changed behind the plan, and by which file."""
        self.has_placed_all = False
        """Whether every worker was placed by the plan."""
        self._placed: dict[int, tuple[Any, dict[str, str]]] = {}
        """Number -> the execnet spec that has this place, and the environment that it got."""

        self.record = record or Record()
        self.links = self._make_links()
        self.attribution = self._make_attribution()
        """Who holds the VRAM of the devices: the source of every such figure."""
        self.workers = Workers(self.plan, self.context_on)
        self.tests = RecordedTests(self.workers)
        self.ollama_here = ServersOnHost(
            self.settings,
            self.gpus,
            facts.answers,
            self.plan,
            self.live,
            self.attribution,
            self.workers,
            self.record,
        )
        self.monitor, self.model_sizes = self.ollama_here.monitor, self.ollama_here.model_sizes
        self.exclusive: ExclusiveAccess | None = None
        self.samplers = [
            Sampler(
                each.live,
                each.attribution,
                each.devices,
                self.workers,
                self.record,
                each.statements,
            )
            for each in self.readings()
            if each.live is not None and each.devices
        ]
        """One for each host whose devices are read."""
        services: list[Service] = list(self.samplers)
        if facts.loading is not None and facts.loading.kept is not None:
            services.append(facts.loading.kept)
        if self.plan.slots and not self.gpus.simulated:
            self.exclusive = ExclusiveAccess(
                self.plan,
                self.holding if self.live is not None else None,
                self.links,
                self.record,
                patience=float(self.settings.pressure_timeout),
                leased=self._leased,
            )
            if config is not None:
                needs = NeedsRecorder(
                    config, self.plan, self.workers, self.tests, self.record, self.notes.append
                )
                services.append(needs)
                self.links.on("test", needs.measured)
        self.leases = facts.leases
        """One sentence for each device and session that has leased VRAM there."""
        self._alone = facts.alone
        self.lessee = facts.lessee
        """What this session leases; None where it takes no part in the ledger."""
        self.shares_models = facts.shares_models
        self.other_leases = OtherLeases(Naming(self.settings.report_names), self.record.now)
        """What other sessions had leased during the run."""
        self._lease: SessionRecord | None = None
        if facts.lessee is not None:
            self._lease = SessionRecord(
                facts.lessee,
                self.plan,
                self._workers_here,
                self.tests,
                self.links,
                self.other_leases,
            )
            services.append(self._lease)
            if "packed" in self.settings.presets:
                self._lease.admits_by_needs()
        self.llm: LlmTests | None = None
        """The tests that use models of Ollama's; None where none does."""
        self.differences: CollectionDifferences | None = None
        """None where xdist's scheduler distributes the tests."""
        if self.monitor is not None:
            services.append(self.monitor)
        if self.live is not None:
            follower = self.ollama_here.follow_others(self.live)
            services += [follower] if follower is not None else []
        self.services = Services(services, self.notes.append)

        for text in facts.loading.sentences if facts.loading is not None else ():
            self.record.note("ollama-preloaded", text)
        self.links.on("overwritten", self._note_overwritten)
        self.links.on("here", self.workers.came_up)
        self.links.on("test", self.tests.measured)
        self.links.on("own", self._note_own)
        self.links.on("kept", self._note_kept)
        self.links.on("ran-others", lambda worker, _: self.workers.ran_others(worker))

    def _workers_here(self) -> list[WorkerRecord]:
        """The workers on this host: other sessions of it see them."""
        return list(self.workers)

    def _make_links(self) -> Links:
        return Links()

    def _make_attribution(self) -> Attribution:
        stated = statements_of(self.facts.answers, devices_of_servers(self.settings, self.gpus))
        return Attribution(self.gpus.all_devices, stated)

    @property
    def samples(self) -> Mapping[str, DeviceSamples]:
        """UUID -> the samples of a device; empty where none are taken."""
        return {uuid: found for each in self.samplers for uuid, found in each.devices.items()}

    @property
    def hosts(self) -> tuple[HostOfRun, ...]:
        """The hosts of a run that has several; none where it has this one alone."""
        return ()

    def monitors(self) -> list[tuple[str, Monitor]]:
        """What follows Ollama, with the name of the host; empty for this one."""
        return [] if self.monitor is None else [("", self.monitor)]

    def not_kept(self) -> list[str]:
        """A sentence on each preloaded model that was not kept loaded until the end."""
        loading = self.facts.loading
        return [] if loading is None or loading.kept is None else loading.kept.service.given_up

    def host_named(self, _worker: str) -> str | None:
        """The name of a worker's host; None where the run has this host alone."""
        return None

    def shift_of(self, _worker: str) -> float:
        """Seconds to add to times by a worker's clock: that of its host."""
        return 0.0

    def barred(self, _spec: Any, _uses: Mapping[int, ModelUse]) -> frozenset[int]:
        """Tests that the worker of this spec must not run, as only other hosts have their model."""
        return frozenset()

    def readings(self) -> list[ReadingSource]:
        """What admission and samplers read, by host: a slow one holds no other back."""
        devices = tuple(planned.device.uuid for planned in self.plan.devices)
        here = self.ollama_here
        shares = {d.device.uuid: shares_of_other_servers(d) for d in self.plan.devices}
        return [
            ReadingSource(
                self.live, devices, here.resident, self.attribution, here.statements, shares
            )
        ]

    def leases_elsewhere(self, _wake: Callable[[], object]) -> LeasesElsewhereProtocol | None:
        """What the run leases on other hosts while its tests are dispatched; None: nothing."""
        return None

    def may_replace(self, _node: Any) -> bool:
        """Whether another worker may come in the place of one that has died."""
        return True

    @property
    def shares_devices(self) -> bool:
        """Whether other sessions of the host may use the devices, by agreement."""
        lessee = self.lessee
        return lessee is not None and lessee.claims_devices and not self.plan.request.in_process

    def _leased(self, uuid: str) -> int | None:
        """Bytes leased for the whole session; None where each test leases what it needs."""
        if self.lessee is None or self._lease is None or not self.shares_devices:
            return None
        return None if self._lease.is_by_the_test else self.lessee.record.lease(uuid).lease

    def allow_vram_of_others(self) -> None:
        """The dispatch leases what each test needs: no other session's lease limits the run.

        What others had leased when the plan was made, the tests of this one may have once it is
        given back. The devices of other hosts have it in their plans.
        """
        self.plan = replace(
            self.plan,
            devices=tuple(
                replace(planned, alone=self._alone.get(planned.device.uuid, planned.alone))
                for planned in self.plan.devices
            ),
        )

    def dispatches(self, differences: CollectionDifferences, *, has_needs: bool) -> None:
        """The plugin's own scheduler distributes the tests; `has_needs`: by needs of their own."""
        self.differences = differences
        if has_needs and self._lease is not None:
            self._lease.admits_by_needs()

    def look_with(self, look: Callable[[], object]) -> None:
        """Call this function now and then, from the thread that keeps the record up to date."""
        if self._lease is not None:
            self._lease.look_with(look)

    def read_workers_now(self, worker: str = "") -> None:
        """Read what the workers hold, or one of them: their fixtures are torn down, their
        processes alive."""
        for sampler in self.samplers:
            # An error of NVML must not change the result of the run.
            with contextlib.suppress(Exception):
                if self.services.runs(sampler):
                    sampler.read_workers_now(worker)

    def end(self) -> None:
        """Stop the services; harmless when called twice."""
        self.services.stop()
        self.tests.finish()

    def message_to_itself(self) -> dict[str, Any] | None:
        """The placement of this process where it runs the tests itself."""
        if not self.plan.request.in_process or self.unplaced:
            return None
        return self._worker_message(0)

    def message_to(self, spec: Any) -> dict[str, Any] | None:
        """The placement for the worker of this spec; None where the plan does not place it."""
        number = (spec.env or {}).get(NUMBER, "")
        return self._worker_message(int(number)) if number.isdigit() else None

    def place(self, specs: Sequence[Any]) -> None:
        """Write each worker's place into the environment of its execnet spec: its
        `CUDA_VISIBLE_DEVICES`, its caps and its number.

        Workers of other hosts, and those to which the user gave devices, are left alone. The
        spec lives on when its worker crashes, so a replacement gets the same place. Called
        again after hooks that may have changed the specs: what they set wins, what they dropped
        is written again, and a spec that they added is placed too.
        """
        placed = {id(spec): number for number, (spec, _) in self._placed.items()}
        taken = {placed[id(spec)] for spec in specs if id(spec) in placed}
        shown_by = variables()
        self.has_placed_all = True
        for spec in specs:
            theirs = spec.env or {}
            number = placed.get(id(spec))
            if number is not None:
                spec.env = {**self._placed[number][1], **theirs}
                continue
            if theirs.keys().isdisjoint(shown_by):
                number = next((n for n in self._numbers_for(spec) if n not in taken), None)
            if number is None:
                self.has_placed_all = False
                continue
            taken.add(number)
            environment = self._environment(number)
            self._placed[number] = spec, environment
            spec.env = {**theirs, **environment}
            # xdist makes a new spec, without the environment, of one that has another model.
            spec.execmodel = spec.execmodel or "main_thread_only"

    def _numbers_for(self, spec: Any) -> Iterable[int]:
        """The numbers in the plan that a worker of this spec may have."""
        return count() if spec.popen and not spec.via else ()

    def _environment(self, number: int) -> dict[str, str]:
        """The variables for the worker of this number."""
        return {**worker_environment(self.plan, number, self.placement), NUMBER: str(number)}

    def joined(self, worker: str, message: Mapping[str, Any]) -> None:
        """A worker with this placement is starting; its device is known from now on."""
        number = message["number"]
        slot = self.plan.slots[number] if number < len(self.plan.slots) else None
        if self.exclusive is not None and slot is not None:
            # A worker that sees several devices may use them all.
            self.exclusive.joined(worker, self.seen_by(slot))

    def gone(self, worker: str, *, in_order: bool = False) -> None:
        """A worker has ended, in order or not."""
        if self.exclusive is not None:
            self.exclusive.gone(worker, in_order=in_order)

    def seen_by(self, slot: Slot) -> tuple[str, ...]:
        """UUIDs of the devices that the worker in this slot sees, its own first."""
        return tuple(device.uuid for device in seen(self.plan, slot.device, self.placement))

    def context_of(self, name: str | None) -> int:
        """Bytes of a CUDA context on devices of that name."""
        return self.placement.context_on(name)

    def context_on(self, uuid: str | None) -> int:
        """Bytes of a CUDA context on a device."""
        names = [d.device.name for d in self.plan.devices if d.device.uuid == uuid]
        return self.context_of(names[0] if names else None)

    def _read_now(self, _uuid: str) -> tuple[Live | None, Resident]:
        """What reads this device as of now, and what the servers of its host hold."""
        return self.live, self.ollama_here.resident()

    def holding(self, uuid: str, label: str, workers: Mapping[int, str]) -> Holding:
        """Who holds the VRAM of a device at this moment; `workers`: PID -> id."""
        live, resident = self._read_now(uuid)
        if live is None:
            return Holding(label, None)
        processes = live.processes(0.0).devices.get(uuid)
        memory = live.memory(0.0).devices.get(uuid)
        if not live.is_answering:
            return Holding(label, None)
        split = self.attribution.split(processes, workers)
        by_server = {name: held[uuid] for name, held in resident.items() if held.get(uuid)}
        return holding(label, memory, split, by_server)

    def has_failed(self) -> bool:
        """Whether `--gpu-share-strict` fails the run, whatever its tests say."""
        lost = self.differences is not None and bool(self.differences.lost())
        spilled = any(monitor.has_failed() for _, monitor in self.monitors())
        refused = self.llm is not None and bool(self.llm.refused)
        return self.strict and (bool(self.overwritten) or lost or spilled or refused)

    @cached_property
    def placement(self) -> PlacementContext:
        """What beside the plan decides on the environments of workers."""
        return placement_context(self.facts, self.plan)

    @cached_property
    def _ollama_url(self) -> str:
        """Where tests find the server: where it was found, else where the settings say it is."""
        server = self.ollama.server
        return (server or candidates(self.settings.ollama_host, os.environ)[0].address).url

    def _worker_message(self, number: int) -> dict[str, Any]:
        """What the worker of this number is sent when it starts."""
        message = worker_message(
            self.settings,
            self.plan,
            number,
            self.placement,
            ollama_url=self._ollama_url,
            lease=self._lease_path,
        )
        return {**message, "number": number}

    @property
    def _lease_path(self) -> str:
        """The record that workers keep alive; empty where nothing is leased."""
        return self._lease.path if self._lease is not None else ""

    def _note_own(self, worker: str, message: Any) -> None:
        began_at = self.record.began_at - self.shift_of(worker)
        self.tests.looked_at(worker, message, began_at)

    def _note_kept(self, worker: str, pids: Any) -> None:
        """Processes that the wider fixtures of a worker keep are not left behind by its tests."""
        self.attribution.keep(worker, [pid for pid in pids if type(pid) is int])

    def _note_overwritten(self, worker: str, how: str) -> None:
        self.overwritten[worker] = how
        self.record.note("placement-overwritten", f"{worker}: {how}", worker=worker)
