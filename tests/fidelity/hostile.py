"""Conftests that look closely at what pytest hands to their hooks.

Each is a whole plugin. What it sees goes into the reports' `user_properties`, where a comparison
finds it; what must not be makes it fail.
"""

from __future__ import annotations

from typing import NamedTuple


class Hostile(NamedTuple):
    """A conftest, and what it makes of a run."""

    text: str
    cuts_short: bool = False
    """Whether it may end the run early."""
    another_scheduler: bool = False
    """Whether it brings a scheduler: ours takes its place where tests have needs."""
    distribution: bool = False
    """Whether it sees the distribution of tests between workers."""


_LOOK = '''
import os
import pytest

def look(node):
    """Touch all that a collected item has."""
    if node is None:
        return None
    assert node in node.session.items, node
    assert node.session.items.index(node) >= 0 and node.config and node.ihook
    assert [each.name for each in node.listchain()] and node.parent in node.listchain()
    seen = [node.nodeid, list(node.location), sorted(mark.name for mark in node.iter_markers())]
    seen += [str(node.reportinfo()[1:]), len(vars(node)) > 0, node.path.name]
    assert node.keywords and node.stash is not None and node.own_markers is not None
    if isinstance(node, pytest.Function):
        seen += [node.originalname, sorted(node.fixturenames), node.function.__name__]
        seen += [node.cls and node.cls.__name__, node.module.__name__, node.obj.__doc__]
        if hasattr(node, "callspec"):
            seen += [node.callspec.id, sorted(node.callspec.params)]
    return seen
'''

_PHASES = """
class State:
    def __init__(self):
        self.items = {}

state = State()

def pytest_runtest_logstart(nodeid, location):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        assert nodeid not in state.items, f"{nodeid} began twice"
        state.items[nodeid] = []

def pytest_runtest_logfinish(nodeid, location):
    if os.environ.get("PYTEST_XDIST_WORKER"):
        phases = state.items.pop(nodeid)
        assert phases in (["setup", "call", "teardown"], ["setup", "teardown"]), phases
"""

HOSTILE = {
    "looks at each hook's item": Hostile(
        _LOOK
        + """
def pytest_runtest_setup(item):
    item.user_properties.append(("setup", look(item)))

def pytest_runtest_call(item):
    look(item)

def pytest_pyfunc_call(pyfuncitem):
    look(pyfuncitem)

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item, nextitem):
    look(item)
    look(nextitem)

def pytest_fixture_setup(fixturedef, request):
    assert request.session.items and request.node.session is request.session

def pytest_exception_interact(node, call, report):
    if isinstance(node, pytest.Item):
        look(node)
        assert call.excinfo is not None
"""
    ),
    "writes down the next item": Hostile(
        _LOOK
        + """
@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    item.user_properties.append(("next", look(nextitem)))
    return (yield)
""",
        distribution=True,
    ),
    "wraps the protocol": Hostile(
        _LOOK
        + """
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    item.user_properties.append(("protocol", look(item)))
    outcome = yield
    assert item.funcargs is None or not isinstance(item, pytest.Function)
    outcome.get_result()
"""
    ),
    "wraps the protocol and takes the next item": Hostile(
        _LOOK
        + """
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    assert nextitem is not item
    item.user_properties.append(("next at the start", look(nextitem)))
    return (yield)
""",
        distribution=True,
    ),
    "has a protocol of its own": Hostile(
        _LOOK
        + """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    look(nextitem)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in runtestprotocol(item, nextitem=nextitem, log=False):
        report.user_properties.append(("own", report.when))
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
"""
    ),
    "runs failed tests again": Hostile(
        _LOOK
        + """
from _pytest.runner import runtestprotocol

def pytest_runtest_protocol(item, nextitem):
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if any(report.failed for report in reports) and hasattr(item, "_initrequest"):
        item._initrequest()
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
"""
    ),
    "reads funcargs for a report": Hostile(
        """
import pytest

@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if isinstance(item, pytest.Function):
        report.user_properties.append(("arguments", sorted(item.funcargs)))
"""
    ),
    "keeps a state of phases": Hostile(
        _LOOK
        + _PHASES
        + """
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    phases = state.items[item.nodeid]
    # Each subtest makes a report of the call, too.
    assert call.when == "call" or call.when not in phases, f"a second report of {call.when}"
    if call.when not in phases:
        phases.append(call.when)
    report.user_properties.append(("phases", list(phases)))
    return report
"""
    ),
    "keeps its state on the item": Hostile(
        """
import pytest

KEY = pytest.StashKey()

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    assert KEY not in item.stash
    item.stash[KEY] = ["setup"]

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    item.stash.setdefault(KEY, []).append(report.outcome)
    report.sections.append(("so far", " ".join(item.stash[KEY])))
    return report

@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    assert item.stash[KEY][0] == "setup"
"""
    ),
    "assigns the environment of workers": Hostile(
        """
def pytest_xdist_setupnodes(config, specs):
    for spec in specs:
        spec.env = {"OMP_NUM_THREADS": "1"}
"""
    ),
    "changes the environment of workers": Hostile(
        """
import os

def pytest_xdist_setupnodes(config, specs):
    for number, spec in enumerate(specs):
        spec.env = dict(spec.env or {}, NUMBER=str(number))

def pytest_runtest_setup(item):
    item.user_properties.append(("number", os.environ.get("NUMBER")))
""",
        distribution=True,
    ),
    "talks to its workers": Hostile(
        """
import pytest

def pytest_configure_node(node):
    node.workerinput["told"] = node.gateway.id

def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):
        assert session.config.workerinput["told"]
        session.config.workeroutput["heard"] = session.testscollected

@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    if error is None and hasattr(node, "workeroutput"):
        with open("results.txt", "w") as file:
            print(node.workeroutput.get("heard"), file=file)
"""
    ),
    "brings a scheduler": Hostile(
        """
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    return LoadScopeScheduling(config, log)
""",
        another_scheduler=True,
    ),
    "brings a scheduler of its own": Hostile(
        """
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScheduling

    class Reporting(LoadScheduling):
        def mark_test_complete(self, node, item_index, duration=0):
            assert 0 <= item_index < len(self.collection)
            super().mark_test_complete(node, item_index, duration)

    return Reporting(config, log)
""",
        another_scheduler=True,
    ),
    "runs a crashed test again": Hostile(
        """
import os, pytest

@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem, report, sched):
    if not os.path.exists("again"):
        open("again", "w").close()
        sched.mark_test_pending(crashitem)
        report.outcome = "rerun"
"""
    ),
    "reverses the order": Hostile(
        """
def pytest_collection_modifyitems(items):
    items.reverse()
"""
    ),
    "deselects": Hostile(
        """
def pytest_collection_modifyitems(config, items):
    gone = items[1::5]
    items[:] = [item for item in items if item not in gone]
    config.hook.pytest_deselected(items=gone)
"""
    ),
    "skips and expects failures by name": Hostile(
        """
import pytest

def pytest_itemcollected(item):
    if "2" in item.name:
        item.add_marker(pytest.mark.skip(reason="by name"))
    elif "1" in item.name:
        item.add_marker(pytest.mark.xfail(reason="by name", strict=False))
"""
    ),
    "wraps the loop": Hostile(
        """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session):
    before = [item.nodeid for item in getattr(session, "items", [])]
    result = yield
    assert before == [item.nodeid for item in getattr(session, "items", [])]
    assert session.config.stash is not None
    return result
"""
    ),
    "looks at the session at its end": Hostile(
        """
import pytest

@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    if hasattr(session.config, "workerinput"):
        assert session.testscollected == len(session.items)
        for item in session.items:
            assert item.nodeid and item.parent is not None and item.location

@pytest.fixture(scope="session", autouse=True)
def items(request):
    yield [item.fixturenames for item in request.session.items if hasattr(item, "function")]
    assert all(item.nodeid for item in request.session.items)
"""
    ),
    "adds finalizers": Hostile(
        """
def pytest_runtest_setup(item):
    if item.name.endswith("0"):
        item.addfinalizer(lambda: item.user_properties.append(("down", item.name)))

def pytest_runtest_call(item):
    item.parent.addfinalizer(lambda: None)
    item.session.addfinalizer(lambda: None)
"""
    ),
    "stops the session in a worker": Hostile(
        """
import os

def pytest_runtest_logreport(report):
    pass

def pytest_runtest_teardown(item):
    if item.session.items.index(item) == 4:
        item.session.shouldstop = "seen enough"
""",
        cuts_short=True,
    ),
    "stops the session in the controller": Hostile(
        """
import os

class Stop:
    def __init__(self, session):
        self.session, self.count = session, 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call"
        if self.count == 3:
            self.session.shouldstop = "three calls are enough"

def pytest_sessionstart(session):
    if not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Stop(session))
""",
        cuts_short=True,
    ),
    "changes the outcome": Hostile(
        """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and item.name.endswith("1"):
        report.outcome = "skipped"
        report.wasxfail = "known"
    return report

def pytest_report_teststatus(report):
    if report.when == "call" and report.passed and "[" in report.nodeid:
        return "passed", ",", "FINE"
"""
    ),
    "dies after a test": Hostile(
        """
import os, time

def pytest_runtest_logfinish(nodeid, location):
    if os.environ.get("PYTEST_XDIST_WORKER") and nodeid.rpartition("::")[2] == "test_1":
        time.sleep(0.3)
        os._exit(70)
"""
    ),
}
