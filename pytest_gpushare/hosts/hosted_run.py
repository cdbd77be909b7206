"""A run on several hosts: one plan, for each host what its workers need, and the watch over it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_gpushare.compat.xdist_hosts import WorkerStart
from pytest_gpushare.gpu.attribution import Attribution
from pytest_gpushare.gpu.readings import Live
from pytest_gpushare.hosts.answers import ModelsAnswer, Sample, read, with_devices
from pytest_gpushare.hosts.connection import SILENCE
from pytest_gpushare.hosts.host_lease import HostLease, LeasesElsewhere
from pytest_gpushare.hosts.live import AllAttribution, HostLive, HostMonitor, global_pid
from pytest_gpushare.hosts.part import HostPart, OtherHost
from pytest_gpushare.hosts.specs import proxy_id
from pytest_gpushare.planning.placement import (
    NUMBER,
    seen,
    worker_environment,
    worker_message,
)
from pytest_gpushare.planning.plan import Slot, shortage
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.session.sampler import ServersOnHost
from pytest_gpushare.session.start_facts import (
    HostOfRun,
    ReadingSource,
    Resident,
    RunOptions,
    StartFacts,
)
from pytest_gpushare.session.workers import WorkerRecord
from pytest_gpushare.text import one_line
from pytest_gpushare.wire import Links

if TYPE_CHECKING:
    from pytest_gpushare.ollama.monitor import Monitor
    from pytest_gpushare.scheduler.needs import ModelUse


class HostLinks(Links):
    """The channels to workers of all hosts: PIDs of other hosts get numbers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, tuple[HostPart, int]] = {}
        """Worker -> its host, and its number in the plan of the host."""

    def host_of(self, worker: str) -> HostPart | None:
        """The host of a worker; None where it is unknown."""
        part, _ = self.places.get(worker, (None, 0))
        return part

    def receive(self, worker: str, message: Any) -> None:
        """See `Links`."""
        part, number = self.places.get(worker, (None, 0))
        if isinstance(part, OtherHost) and isinstance(message, tuple) and len(message) == 2:
            kind, payload = message
            if kind == "here" and type(payload) is int:
                message = kind, global_pid(part.number, payload)
                # Sessions there do not count what it holds beside what is leased for it.
                part.connection.say(f"worker {number} {worker} {payload}")
            elif kind == "kept" and isinstance(payload, list):
                pids = (pid for pid in payload if type(pid) is int)
                message = kind, [global_pid(part.number, pid) for pid in pids]
            elif isinstance(payload, dict) and type(payload.get("pid")) is int:
                message = kind, {**payload, "pid": global_pid(part.number, payload["pid"])}
        super().receive(worker, message)


class HostedRun(ActiveRun):
    """A run with workers on other hosts."""

    def __init__(
        self,
        facts: StartFacts,
        here: HostPart,
        others: Sequence[OtherHost],
        options: RunOptions,
        config: pytest.Config,
    ) -> None:
        self.here, self.others = here, others
        self.parts = parts = (here, *others)
        self._hosts_of_numbers = {number: part for part in parts for number in part.numbers()}
        self._root = config.rootpath
        self._basetemp = getattr(config.option, "basetemp", None)
        self._host_links = HostLinks()
        super().__init__(facts, options, config=config)
        for other in others:
            for text in other.answer.loaded:
                self._note_of(other, "ollama-preloaded", text)
            if other.live is not None:
                other.ollama_there = self._ollama_on(other)
                if other.monitor is not None:
                    self.services.include(other.monitor)

    def _ollama_on(self, part: OtherHost) -> ServersOnHost:
        devices = tuple(map(part.named, part.answer.gpus.all_devices))
        return ServersOnHost(
            self.settings,
            part.answer.gpus._replace(devices=devices, all_devices=devices),
            part.answer.answers,
            with_devices(part.plan, part.named),
            part.live,
            part.attribution,
            self.workers,
            self.record,
            partial(HostMonitor, part.connection),
        )

    def _make_links(self) -> Links:
        return self._host_links

    def _make_attribution(self) -> Attribution:
        return AllAttribution([(part.devices, part.attribution) for part in self.parts])

    @property
    def hosts(self) -> tuple[HostOfRun, ...]:
        """See `ActiveRun`; this host only where it has workers."""
        return tuple(
            HostOfRun(
                part.name,
                part.plan,
                part.answer.ollama,
                part.hello.python if isinstance(part, OtherHost) else "",
                part.lost,
            )
            for part in self.parts
            if part is not self.here or part.plan.workers
        )

    def not_kept(self) -> list[str]:
        """See `ActiveRun`."""
        there = [f"{part.name}: {text}" for part in self.others for text in part.not_kept]
        return [*super().not_kept(), *there]

    def host_named(self, worker: str) -> str | None:
        """See `ActiveRun`."""
        part = self._host_links.host_of(worker)
        return None if part is None else part.name or None

    def shift_of(self, worker: str) -> float:
        """See `ActiveRun`."""
        part = self._host_links.host_of(worker)
        return part.on_this_clock() if isinstance(part, OtherHost) else 0.0

    def barred(self, spec: Any, uses: Mapping[int, ModelUse]) -> frozenset[int]:
        """See `ActiveRun`."""
        here = self.host_of(spec)
        others = [part for part in self.parts if part.plan.workers and not part.lost]
        if here is None:
            return frozenset()
        return frozenset(
            test
            for test, use in uses.items()
            if not here.has_model(use.model) and any(part.has_model(use.model) for part in others)
        )

    def readings(self) -> list[ReadingSource]:
        """See `ActiveRun`."""
        here, own = self.here, self.ollama_here
        return [
            ReadingSource(
                here.live,
                here.devices,
                own.resident,
                here.attribution,
                own.statements,
                here.shares(),
            ),
            *(
                ReadingSource(
                    part.live,
                    part.devices,
                    part.resident,
                    part.attribution,
                    part.statements,
                    part.shares(),
                )
                for part in self.others
            ),
        ]

    def _read_now(self, uuid: str) -> tuple[Live | None, Resident]:
        """See `ActiveRun`."""
        part = self._part_with(uuid)
        if isinstance(part.live, HostLive):
            part.live.look()
        return part.live, (part if isinstance(part, OtherHost) else self.ollama_here).resident()

    def leases_elsewhere(self, wake: Callable[[], object]) -> LeasesElsewhere | None:
        """See `ActiveRun`."""
        leases = []
        for part in self.others:
            if part.answer.lease and part.plan.slots:
                note = partial(self._note_of, part, "leases-unknown")
                part.shared = HostLease(part.keys, part.plan, part.connection.say, note)
                leases.append(part.shared)
        return LeasesElsewhere(leases, wake) if leases else None

    def _note_of(self, part: OtherHost, kind: str, text: str) -> None:
        self.record.note(kind, f"{part.name}: {text}", host=part.name)

    def monitors(self) -> list[tuple[str, Monitor]]:
        """See `ActiveRun`."""
        there = [(part.name, part.monitor) for part in self.others if part.monitor is not None]
        return [*super().monitors(), *there]

    def host_of(self, spec: Any) -> HostPart | None:
        """The host of the worker with this execnet spec."""
        number = (spec.env or {}).get(NUMBER, "")
        return self._hosts_of_numbers.get(int(number)) if number.isdigit() else None

    def _numbers_for(self, spec: Any) -> Iterable[int]:
        """See `ActiveRun`; workers of another host run through its proxy."""
        if not spec.via:
            return self.here.numbers()
        parts = (part for part in self.others if proxy_id(part.number) == spec.via)
        return chain.from_iterable(part.numbers() for part in parts)

    def _environment(self, number: int) -> dict[str, str]:
        """See `ActiveRun`; with what the user wrote for the host."""
        part = self._hosts_of_numbers[number]
        own = part.own_number(number, len(self.plan.slots))
        environment = worker_environment(part.plan, own, part.placement)
        if isinstance(part, OtherHost):
            for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
                if text := os.environ.get(name):
                    environment[name] = self._there(part, text)
        return {**environment, NUMBER: str(number), **part.spec.environment}

    def _worker_message(self, number: int) -> dict[str, Any]:
        """By the plan of the worker's host; the tests are the whole run's."""
        part = self._hosts_of_numbers[number]
        is_here = part is self.here
        server = None if is_here else part.answer.ollama.server
        message = worker_message(
            self.settings,
            part.plan,
            part.own_number(number, len(self.plan.slots)),
            part.placement,
            ollama_url=self._ollama_url if server is None else server.url,
            lease=self._lease_path if is_here else part.answer.lease,
        )
        tests = message["tests"]
        tests["absence"] = "" if self.plan.slots else shortage(self.plan)
        tests["budget"] = self.plan.usable
        tests["devices"] = self._most_devices
        # Each test asks for its model itself: what this host's server has says nothing there.
        tests["ollama"]["dispatched"] = False
        return {**message, "number": number}

    @cached_property
    def _most_devices(self) -> int:
        """How many devices a GPU worker sees, at most."""
        return max((len(self.seen_by(slot)) for slot in self.plan.slots), default=0)

    def joined(self, worker: str, message: Mapping[str, Any]) -> None:
        """See `ActiveRun`."""
        number = message["number"]
        part = self._hosts_of_numbers[number]
        own = part.own_number(number, len(self.plan.slots))
        self._host_links.places[worker] = part, own
        super().joined(worker, message)

    def _part_with(self, key: str) -> HostPart:
        """The host that has this device."""
        return next(part for part in self.parts if key in part.devices)

    def seen_by(self, slot: Slot) -> tuple[str, ...]:
        """See `ActiveRun`; by their names in the run."""
        part = self._part_with(slot.device.uuid)
        own = next(each.device for each in part.plan.devices
                   if part.keys[each.device.uuid] == slot.device.uuid)  # fmt: skip
        return tuple(part.keys[each.uuid] for each in seen(part.plan, own, part.placement))

    # --- what xdist sends to a worker ---

    def start_of(self, worker: str, part: OtherHost, start: WorkerStart) -> WorkerStart:
        """What a worker of another host is sent at its start."""
        arguments = [self._there(part, text) for text in start.arguments]
        if not any(text.startswith("--rootdir") for text in arguments):
            arguments = [f"--rootdir={part.root}", *arguments]
        if part.answer.cache:
            arguments = ["-o", f"cache_dir={part.answer.cache}", *arguments]
        basetemp = None
        if self._basetemp is not None:
            # Each worker empties its own when it starts.
            basetemp = f"{self._there(part, str(self._basetemp))}-{worker}"
        own = [entry for entry in start.path or () if self._is_of_project(entry)]
        path = [self._there(part, entry) for entry in own]
        return WorkerStart(arguments, basetemp, [*path, *part.hello.path])

    def _is_of_project(self, entry: str) -> bool:
        """Whether a directory of `sys.path` is one of the checkout, and of no environment in it."""
        path = Path(entry).absolute()
        prefixes = [Path(prefix) for prefix in {sys.prefix, sys.base_prefix}]
        inside = path == self._root or self._root in path.parents
        return inside and not any(
            prefix == path or prefix in path.parents for prefix in prefixes if prefix != self._root
        )

    def _there(self, part: OtherHost, text: str) -> str:
        """A text with the project's paths as they are on a host."""
        roots = sorted({str(self._root), os.path.realpath(self._root)}, key=len, reverse=True)
        here = "|".join(re.escape(root) for root in roots if len(root) > 1)
        return re.sub(rf"(?<![\w./-])(?:{here})(?![\w.-])", lambda _: part.root, text)

    def _workers_here(self) -> list[WorkerRecord]:
        return [member for member in self.workers if self.host_named(member.id) is None]

    # --- hosts that are lost ---

    def lose(self, part: OtherHost, why: str) -> bool:
        """A host takes no part any more; whether that is news."""
        if part.lost:
            return False
        part.lost = why
        self.notes.append(f"host {part.name} was lost: {why}")
        self._note_of(part, "host-lost", why)
        return True

    def may_replace(self, node: Any) -> bool:
        """Whether another worker may come in the place of one that has died."""
        part = self.host_of(node.gateway.spec)
        return part is None or not part.lost


_MOST_TEXTS = 100


class ConnectionWatch:
    """Follows the connection to a host, and its silence."""

    def __init__(self, run: HostedRun, part: OtherHost, cut: Callable[[OtherHost], object]) -> None:
        self._run, self._part, self._cut = run, part, cut

    def begin(self) -> None:
        """Take its samples from now on."""
        self._part.connection.listen(self._take)
        threading.Thread(target=self._follow, name="gpu-share-host", daemon=True).start()

    def _take(self, message: Mapping[str, Any]) -> None:
        live, monitor = self._part.live, self._part.monitor
        # What makes no sense is no reading: the host is as one that says nothing.
        with contextlib.suppress(ValueError, TypeError):
            if message.get("kind") == "sample":
                sample = read(Sample, message)
                self._part.shift = min(self._part.shift, time.time() - sample.wall)
                if isinstance(live, HostLive):
                    live.take(sample)
            elif message.get("kind") in ("leased", "others") and self._part.shared is not None:
                self._part.shared.take(message)
            elif message.get("kind") == "not-kept" and len(self._part.not_kept) < _MOST_TEXTS:
                self._part.not_kept.append(one_line(read(str, message), 500))
            elif message.get("kind") == "models" and isinstance(monitor, HostMonitor):
                monitor.take(read(ModelsAnswer, message))

    def _follow(self) -> None:
        connection = self._part.connection
        while not connection.is_over:
            connection.say("beat")
            silent = time.monotonic() - connection.last_message_at
            if silent >= SILENCE:
                self._lost(f"silent for {SILENCE:g} s")
                return
            connection.wait(min(1.0, SILENCE - silent))
        if not connection.is_closed:
            self._lost(connection.problem)

    def _lost(self, why: str) -> None:
        if self._run.lose(self._part, why):
            self._cut(self._part)
