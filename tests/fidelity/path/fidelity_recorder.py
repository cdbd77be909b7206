"""A pytest plugin that writes down what happens in a run (`-p fidelity_recorder`).

The controller's record stands in `RECORD.controller`, each worker's in `RECORD.<pid>`, where
`FIDELITY_RECORD` names RECORD. Each row is written at once, so that nothing is lost when a process
dies. It implements no
`pytest_runtest_protocol`, which a scheduler may look for.
"""

from __future__ import annotations

import json
import os

import pytest


def _note(config, *row):
    name = os.environ["FIDELITY_RECORD"]
    worker = getattr(config, "workerinput", None)
    path = f"{name}.{os.getpid()}" if worker else f"{name}.controller"
    who = worker["workerid"] if worker else "controller"
    line = json.dumps([who, *row], default=repr) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode("utf-8", "backslashreplace"))
    finally:
        os.close(descriptor)


def pytest_configure(config):
    role = Worker if hasattr(config, "workerinput") else Controller
    config.pluginmanager.register(role(config), "fidelity-recorder-role")


def _message(report):
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return crash.message
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return str(report.longrepr) if report.longrepr else ""


class Controller:
    """What the controller's plugins are told."""

    def __init__(self, config):
        self.config = config

    def note(self, *row):
        _note(self.config, *row)

    @pytest.hookimpl(optionalhook=True, tryfirst=True)
    def pytest_xdist_make_scheduler(self, config, log):
        """The tests that `FIDELITY_ORDER` names run in that order, whatever `--dist` says."""
        if "FIDELITY_ORDER" in os.environ:
            from xdist.scheduler import LoadScheduling

            return LoadScheduling(config, log)
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report):
        node = getattr(report, "node", None)
        context = getattr(report, "context", None)
        self.note(
            "report",
            {
                "nodeid": report.nodeid,
                "when": report.when,
                "outcome": report.outcome,
                "wasxfail": getattr(report, "wasxfail", None),
                "message": _message(report),
                "sections": [list(section) for section in report.sections],
                "properties": [list(pair) for pair in report.user_properties],
                "keywords": sorted(report.keywords),
                "location": list(report.location),
                "kind": type(report).__name__,
                "context": repr(context) if context is not None else None,
                "worker": node.gateway.id if node is not None else "",
            },
        )

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid):
        self.note("logstart", nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logfinish(self, nodeid):
        self.note("logfinish", nodeid)

    def pytest_collectreport(self, report):
        if report.outcome != "passed":
            self.note("collect", report.nodeid, report.outcome)

    def pytest_warning_recorded(self, warning_message, when, nodeid):
        self.note("warning", when, nodeid, str(warning_message.message))

    def pytest_internalerror(self, excrepr):
        self.note("internal error", str(excrepr)[-2000:])

    def pytest_sessionfinish(self, exitstatus):
        scheduler = getattr(self.config.pluginmanager.getplugin("dsession"), "sched", None)
        # The plugin's stands in for xdist's also where that one hands the tests out.
        self.note("scheduler", bool(getattr(scheduler, "_executor", None)))
        self.note("end", int(exitstatus))


class Worker:
    """What happens in a worker."""

    def __init__(self, config):
        self.config = config

    def note(self, *row):
        _note(self.config, *row)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        """Keep the tests that `FIDELITY_ORDER` names, in that order."""
        if path := os.environ.get("FIDELITY_ORDER"):
            with open(path, encoding="utf-8") as file:
                wanted = json.load(file)
            found = {item.nodeid: item for item in items}
            items[:] = [found[nodeid] for nodeid in wanted]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        self.note("collected", [item.nodeid for item in session.items])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid):
        self.note("begun", nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logfinish(self, nodeid):
        self.note("ended", nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self.note("phase", "setup", item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item):
        self.note("phase", "call", item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item, nextitem):
        self.note("phase", "teardown", item.nodeid)
        self.note("next", item.nodeid, nextitem.nodeid if nextitem is not None else None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        self.note("makereport", call.when, item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef, request):
        param = repr(getattr(request, "param", None))
        self.note("up", fixturedef.argname, fixturedef.scope, request.node.nodeid, param)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_post_finalizer(self, fixturedef):
        if fixturedef.cached_result is not None:
            self.note("down", fixturedef.argname, fixturedef.scope)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        self.note("items", [item.nodeid for item in session.items])
        self.note("end", int(exitstatus))
