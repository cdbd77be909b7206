"""xdist and execnet with workers on other hosts.

Names of xdist and execnet that are used:

- The option `px` (xdist 3.7) and `maxworkerrestart` (since 1.0): the gateways through which workers
  run, and how many that die are replaced. Without `px` there are no other hosts.
- `xdist.plugin.pytest_xdist_auto_num_workers` (since 2.0): the number of `-n auto`, on a host where
  no pytest runs. Without it the CPUs are counted here.
- `WorkerController.workerinput` and the message (workerinput, args, options, sys.path) that xdist
  sends to a worker (since 1.0): another host gets arguments, base temporary directory and
  `sys.path` of its own. Where the message has another form it is sent as it is.
- `DSession._clone_node`, `report_line`, `triggershutdown`, `_active_nodes`, `nodemanager` (since
  1.0): a worker of a host that is gone is not replaced. Without them xdist replaces it, and the
  run ends with its error.
- `Gateway._channelfactory.finished` of execnet (since 1.0): whether its connection is over. Without
  it a host that is lost may be noticed too late, when xdist cannot replace a worker of it.
- `Gateway._io` of execnet and its `kill` and `wait` (since 1.0), `Group._gateways_to_join`: end the
  login of a host that is silent, and ask nothing of one that is gone. Without them ssh's own limit
  ends it, and execnet reports the lost gateways as an error at the end of the run.
- The schedulers' `numnodes` (since 1.0): a host that is lost before it has collected is not waited
  for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_gpushare.compat.xdist_options import distribute

if TYPE_CHECKING:
    import pytest

_END = 2.0
_DEATHS_FOR_EACH = 4
"""xdist replaces so many workers for each that it starts, where -n gives their number."""


def count_of_cpus() -> int:
    """The number of workers that `-n auto` would start on this host."""
    config = SimpleNamespace(option=SimpleNamespace(numprocesses="auto"))
    count = 0
    with contextlib.suppress(Exception):
        count = int(import_module("xdist.plugin").pytest_xdist_auto_num_workers(config))
    if count < 1:
        import os

        count = os.cpu_count() or 1
    return count


def given_specs(options: Any) -> list[str]:
    """The specs of `--tx` as they were given."""
    return list(getattr(options, "tx", None) or ())


def takes_proxies(options: Any) -> bool:
    """Whether this xdist knows `--px`."""
    return hasattr(options, "px")


def write_workers(options: Any, proxies: Sequence[str], specs: Sequence[str], count: int) -> None:
    """Have xdist start these workers, through these gateways."""
    options.numprocesses = None
    options.px = [*(getattr(options, "px", None) or ()), *proxies]
    options.tx = list(specs)
    distribute(options)
    if options.maxworkerrestart is None:
        # Without -n it would replace them without a limit.
        options.maxworkerrestart = str(_DEATHS_FOR_EACH * count)


def _nothing() -> None:
    """In place of a question to a host that is gone."""


class WorkerStart(NamedTuple):
    """What xdist sends to a worker at its start."""

    arguments: list[str]
    basetemp: str | None
    path: list[str] | None
    """`sys.path`; None: the worker's own, with its working directory first."""


def change_start(node: Any, change: Callable[[WorkerStart], WorkerStart]) -> None:
    """Change what xdist is about to send to this worker; called in `pytest_configure_node`."""
    gateway = node.gateway
    remote_exec = gateway.remote_exec

    def watched(*arguments: Any, **keywords: Any) -> Any:
        channel = remote_exec(*arguments, **keywords)
        send = channel.send

        def changed(message: Any) -> None:
            if (
                isinstance(message, tuple)
                and len(message) == 4
                and message[0] is node.workerinput
                and isinstance(message[2], dict)
            ):
                # Only this one: from now on nothing stands in between.
                del channel.send
                del gateway.remote_exec
                workerinput, given, options, path = message
                start = change(WorkerStart(given, options.get("basetemp"), path))
                message = (
                    workerinput,
                    start.arguments,
                    {**options, "basetemp": start.basetemp},
                    start.path,
                )
            send(message)

        channel.send = changed
        return channel

    gateway.remote_exec = watched


class Replacements:
    """Decides which workers xdist replaces when they die."""

    def __init__(self, plugins: pytest.PytestPluginManager) -> None:
        self._plugins = plugins

    @property
    def _session(self) -> Any:
        """xdist's session; None before it is there."""
        return self._plugins.get_plugin("dsession")

    def ask(self, refusal: Callable[[Any, str], str]) -> None:
        """`refusal` gets a worker that has died, and why no other could be started in its place,
        empty where that was not tried. It gives the line to print in place of replacing it, or
        an empty text where it may be replaced."""
        session = self._session
        clone = getattr(session, "_clone_node", None)
        report = getattr(session, "report_line", None)
        if session is None or clone is None or report is None:
            return
        replacing = "\nreplacing crashed worker "

        def report_line(line: str) -> None:
            if not line.startswith(replacing):
                report(line)

        def clone_node(node: Any) -> Any:
            text = refusal(node, "")
            if not text:
                report(f"{replacing}{node.gateway.id}")
                try:
                    return clone(node)
                except Exception as error:
                    # Of any kind: a host may go away at each step of the start.
                    if not node.gateway.spec.via:
                        raise
                    text = refusal(node, f"{type(error).__name__}: {error}")
            report(f"\n{text}")
            if len(session._active_nodes) <= 1:
                # What nobody can run any more is reported by this question, and not afterwards.
                getattr(getattr(session, "sched", None), "tests_finished", None)
                # xdist takes a run without workers for an error of its own.
                session.triggershutdown()
            return node

        session.report_line = report_line
        session._clone_node = clone_node

    def stop(self, reason: str) -> None:
        """End the run: there is nobody left to run the tests."""
        if self._session is not None and not getattr(self._session, "shouldstop", None):
            self._session.shouldstop = reason

    def wait_for_one_less(self) -> None:
        """A worker will never have collected, and no other comes in its place."""
        scheduler = getattr(self._session, "sched", None)
        number = getattr(scheduler, "numnodes", None)
        if isinstance(number, int) and number > 0:
            scheduler.numnodes = number - 1  # type: ignore[union-attr]

    def gateway(self, name: str) -> Any | None:
        """execnet's gateway of this name; None where there is none any more."""
        with contextlib.suppress(Exception):
            return self._session.nodemanager.group[name]
        return None

    def is_connected(self, name: str) -> bool:
        """Whether the gateway of this name still receives."""
        gateway = self.gateway(name)
        if gateway is None or not gateway.hasreceiver():
            return False
        # Set before the channels of the gateway are closed, and so before a worker is missed.
        return not getattr(getattr(gateway, "_channelfactory", None), "finished", False)

    def cut(self, name: str) -> None:
        """End the login behind the gateway of this name, and with it all its workers."""
        gateway = self.gateway(name)
        if gateway is not None:
            with contextlib.suppress(Exception):
                gateway._io.kill()

    def forget(self, name: str) -> None:
        """Do not fail at the end for what ran through the gateway of this name: it is gone."""
        group = getattr(getattr(self._session, "nodemanager", None), "group", ())
        waiting = getattr(group, "_gateways_to_join", ())
        for gateway in (*group, *waiting):
            io = getattr(gateway, "_io", None)
            if io is not None and gateway.spec.via == name:
                io.wait = _nothing
                io.kill = _nothing

    def end_all(self) -> None:
        """End all gateways: xdist does not where it could not start its workers."""
        group = getattr(getattr(self._session, "nodemanager", None), "group", None)
        if group is not None:
            with contextlib.suppress(Exception):
                group.terminate(_END)
