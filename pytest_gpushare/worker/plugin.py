"""What a process does of its place: a worker, or a run without workers."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_gpushare.wire import CONTEXT, Link

TESTS: pytest.StashKey[tuple[Mapping[str, Any], Link]] = pytest.StashKey()
"""What the controller says of the tests, and the link to it; absent where the plugin is idle."""


class PlacementPlugin:
    """The plugin of a process that was placed: its fixture, and a watch over its placement."""

    def __init__(self, message: Mapping[str, Any], link: Link) -> None:
        self._place: Mapping[str, Any] = message["place"]
        self._wanted: Mapping[str, str] = message["visible"]
        self._link = link
        self._has_reported = False

    def pytest_configure(self, config: pytest.Config) -> None:
        """The initial conftests are loaded: did one change what this process sees?"""
        plugins = config.pluginmanager.get_plugins()
        self._compare(getattr(plugin, "__file__", None) for plugin in plugins)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All modules are imported: did one of them?"""
        plugins = session.config.pluginmanager.get_plugins()
        files = [getattr(plugin, "__file__", None) for plugin in plugins]
        self._compare([*files, *(str(item.path) for item in session.items)])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """The tests are done: what did this process's CUDA context cost?"""
        place = self._place
        if place["role"] == "gpu" and "torch" in sys.modules:
            from pytest_gpushare.worker.counters import measured_context

            size = measured_context(place["device"])
            if size is not None:
                self._learned(session.config, place["name"], size)

    def _learned(self, config: pytest.Config, name: str, size: int) -> None:
        """A worker sends the figure with its last message; else it is kept at once."""
        output = getattr(config, "workeroutput", None)
        if output is None:
            from pytest_gpushare.session.needs_store import keep_context

            keep_context(config, name, size)
        else:
            output[CONTEXT] = [name, size]

    def _compare(self, files: Iterable[str | None]) -> None:
        if self._has_reported or all(os.environ.get(n) == text for n, text in self._wanted.items()):
            return
        from pytest_gpushare.place import culprit, difference

        self._has_reported = True
        where = culprit(self._wanted, files)
        changed = difference(self._wanted, os.environ)
        how = f"{changed}: {f'changed by {where}' if where else 'by whom is unknown'}"
        self._link.send("overwritten", how)


def begin(config: pytest.Config, message: Mapping[str, Any]) -> None:
    """In an xdist worker, before pytest's own plugins are configured."""
    # Every worker pays for what is imported here: no more than the place itself.
    from pytest_gpushare.leases import AcquireTerms, set_terms
    from pytest_gpushare.place import Place, entered

    config.add_cleanup(entered(Place(**message["place"])))
    config.add_cleanup(set_terms(AcquireTerms(*message["acquire"])))
    keep_log_file(config)
    channel = message["channel"]
    link = Link(channel.send)
    if message["lease"]:
        live_with(config, message["lease"], link)
    channel.setcallback(link.receive, endmarker=("closed", None))
    register_plugins(config, message, link)


def register_plugins(config: pytest.Config, message: Mapping[str, Any], link: Link) -> None:
    """Register all that a process does in its place: it reads markers, refuses, runs what the
    controller sends, and measures."""
    from pytest_gpushare.worker.collection import (
        LocalRefusals,
        MarkerErrors,
        MarkerReader,
    )

    plugins, tests = config.pluginmanager, message["tests"]
    config.stash[TESTS] = tests, link
    plugins.register(PlacementPlugin(message, link), "gpu-share-placement")
    plugins.register(MarkerErrors(MarkerReader(tests)), "gpu-share-marker-errors")
    is_worker = hasattr(config, "workerinput")
    if tests["absence"] or not is_worker:
        plugins.register(LocalRefusals(tests), "gpu-share-refusals")
    if is_worker:
        from pytest_gpushare.worker.runner import RunLoop

        plugins.register(RunLoop(config, tests, link), "gpu-share-run-loop")
    # A CPU worker holds no VRAM, and a what-if shows no device.
    if message["place"]["role"] == "gpu" and message["visible"]:
        from pytest_gpushare.worker.memory import watch

        watch(config, message["place"], message["memory"], link)


GRACE = 0.4
"""Seconds between the end of the controller and that of a worker which would go on."""

_POLL = 0.05


def live_with(config: pytest.Config, record: str, link: Link) -> None:
    """Keep the session's record alive, and end when the controller was killed.

    Without this, workers go on for up to 15 s after their controller was killed, and nobody
    could say how much of the VRAM that they may still take is free.
    """
    member = _RecordMembership()
    member.join(record)
    config.add_cleanup(member.leave)
    link.on("lease", member.join)
    parent = os.getppid()
    link.on("closed", lambda _: _end_if_orphaned(parent))


class _RecordMembership:
    """This process's part in the record."""

    def __init__(self) -> None:
        self._give_up: Callable[[], None] | None = None

    def join(self, record: str) -> None:
        """Keep this record alive, and no earlier one."""
        self.leave()
        # A record that was removed meanwhile is replaced by another one, which is announced.
        from pytest_gpushare.leases.locks import keep_alive

        with contextlib.suppress(OSError):
            self._give_up = keep_alive(Path(record))

    def leave(self) -> None:
        give_up, self._give_up = self._give_up, None
        if give_up is not None:
            give_up()


def _end_if_orphaned(parent: int) -> None:
    """The channel is closed: at the end of a run, or as the controller has died."""
    if hasattr(os, "getuid"):
        threading.Thread(target=_end, args=(parent,), name="gpu-share-orphan", daemon=True).start()


def _end(parent: int) -> None:
    until = time.monotonic() + GRACE
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(_POLL)
    if os.getppid() == parent:
        return
    time.sleep(max(0.0, until - time.monotonic()))
    # No time for fixtures: execnet, too, ends such a worker by a signal, only later.
    os._exit(1)


def keep_log_file(config: pytest.Config) -> None:
    """Append to `log_file`, where pytest's default is to empty it.

    Every worker opens the controller's file again: the VRAM analysis was gone from it before
    the first test. Must run before pytest's logging plugin opens the file.
    """
    if getattr(config.option, "log_file_mode", "") is None:
        config.option.log_file_mode = "a"
