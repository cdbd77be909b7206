"""The hooks of a run on several hosts, and the watch over each host."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import pytest

from pytest_gpushare.compat.xdist_hosts import Replacements, change_start
from pytest_gpushare.hosts.answers import decode_sample
from pytest_gpushare.hosts.connection import SILENCE, HostConnection
from pytest_gpushare.hosts.hosted_run import HostedRun
from pytest_gpushare.hosts.live import HostLive
from pytest_gpushare.hosts.part import HostPart
from pytest_gpushare.hosts.specs import proxy_id
from pytest_gpushare.text import one_line

_MOST_TEXTS = 100


class HostHooks:
    """The hooks of a run on several hosts, beside those of every run."""

    def __init__(self, run: HostedRun, config: pytest.Config) -> None:
        self._run, self._config = run, config
        self._plugins = config.pluginmanager
        self._collected: set[str] = set()
        self._replacements: Replacements | None = None
        self._problems: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionstart(self) -> Generator[None, Any, Any]:
        """Follow the hosts from before xdist starts the workers; one may be lost meanwhile."""
        self._begin()
        try:
            return (yield)
        except Exception:
            lost = [part.name for part in self._run.parts if self._is_lost(part)]
            if not lost or self._replacements is None:
                raise
            self._replacements.end_all()
            hosts = ", ".join(lost)
            raise pytest.UsageError(
                f"gpu-share: host {hosts}: lost while its workers were started: start the run again"
            ) from None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Before xdist ends its workers: those of lost hosts are gone."""
        for part in self._run.parts:
            if part.ollama_there is not None:
                part.ollama_there.model_sizes.keep(self._config)
            if self._is_lost(part) and self._replacements is not None:
                self._replacements.forget(proxy_id(part.number))

    def _is_lost(self, part: HostPart) -> bool:
        if not part.number or not part.plan.workers or self._replacements is None:
            return False
        return bool(part.lost) or not self._is_connected(part)

    def _begin(self) -> None:
        self._replacements = Replacements(self._plugins)
        self._replacements.ask(self._refusal)
        for part in self._run.parts:
            if part.connection is not None:
                ConnectionWatch(self._run, part, self._cut).begin()

    def _cut(self, part: HostPart) -> None:
        if self._replacements is not None:
            self._replacements.cut(proxy_id(part.number))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """A worker is about to be started."""
        part = self._run.host_of(node.gateway.spec)
        if part is not None and part.number:
            worker = node.gateway.id
            change_start(node, lambda start: self._run.start_of(worker, part, start))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """A worker has collected."""
        self._collected.add(node.gateway.id)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker has ended; is it the only one of its host?"""
        part = self._run.host_of(node.gateway.spec)
        if error is None or part is None or not part.number or self._replacements is None:
            return
        if not hasattr(node, "workerinfo") or not self._is_connected(part):
            self._cannot_start(part, node, str(error))

    def _cannot_start(self, part: HostPart, node: Any, error: str) -> None:
        """A worker of a host is gone and no other can come in its place."""
        if not self._is_connected(part):
            self._run.lose(part, "its connection has ended")
            return
        lines = [line for line in error.splitlines() if line.strip()]
        why = one_line(lines[-1], 200) if lines else "no reason is known"
        self._run.lose(part, f"{node.gateway.id} cannot start there: {why}")

    def _is_connected(self, part: HostPart) -> bool:
        replacements = self._replacements
        return replacements is not None and replacements.is_connected(proxy_id(part.number))

    def _refusal(self, node: Any, problem: str) -> str:
        part = self._run.host_of(node.gateway.spec)
        if part is not None and problem:
            self._cannot_start(part, node, problem)
        if part is None or not part.lost or self._replacements is None:
            return ""
        if node.gateway.id not in self._collected:
            self._replacements.wait_for_one_less()
        others = [each for each in self._run.parts if each.plan.workers and not each.lost]
        if not others:
            self._replacements.stop(f"no host is left: {part.name}: {part.lost}")
        return f"worker {node.gateway.id} is not replaced: host {part.name}: {part.lost}"


class ConnectionWatch:
    """Follows the connection to a host, and its silence."""

    def __init__(self, run: HostedRun, part: HostPart, cut: Callable[[HostPart], object]) -> None:
        self._run, self._part, self._cut = run, part, cut

    def begin(self) -> None:
        """Take its samples from now on."""
        connection = self._part.connection
        assert connection is not None
        connection.listen(self._take)
        threading.Thread(
            target=self._follow, args=(connection,), name="gpu-share-host", daemon=True
        ).start()

    def _take(self, message: Mapping[str, Any]) -> None:
        live, there = self._part.live, self._part.ollama_there
        # What makes no sense is no reading: the host is as one that says nothing.
        with contextlib.suppress(ValueError, TypeError):
            if message.get("kind") == "sample":
                sample = decode_sample(message)
                self._part.shift = min(self._part.shift, time.time() - sample.wall)
                if isinstance(live, HostLive):
                    live.take(sample)
            elif message.get("kind") in ("leased", "others") and self._part.shared is not None:
                self._part.shared.take(message)
            elif message.get("kind") == "not-kept" and len(self._part.not_kept) < _MOST_TEXTS:
                self._part.not_kept.append(one_line(str(message.get("text")), 500))
            elif message.get("kind") == "models" and there is not None and there.monitor:
                there.monitor.take(message)

    def _follow(self, connection: HostConnection) -> None:
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


def notes_of(parts: Iterable[HostPart]) -> tuple[str, ...]:
    """The problems of all hosts, by host."""
    return tuple(f"{part.name}: {note}" for part in parts if part.number for note in part.notes)
