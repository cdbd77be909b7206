"""A run under the own scheduler is the run that stock xdist makes of the same project.

Each test runs one project twice, by `pytest -n K` with and without the plugin, on a simulated
device of 24 GB; every test has a need, so that the own scheduler is in charge. `fidelity` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
from fidelity.compare import exactly, within
from fidelity.runs import NEEDS, OURS, STOCK_TWICE, Run, run
from inner_pytest import left_out
from simulator import Machine

from .conftest import Project

Same = Callable[..., Run]

both = pytest.mark.parametrize("workers", [1, 2])


@pytest.fixture
def same(project: Project, machine: Machine, tmp_path: Path) -> Same:
    """Run the project both ways, see that nothing differs, and return our run."""
    (project.path / "test_project.py").unlink()

    def one(place: str, *arguments: str, order: list[str] | None = None) -> Run:
        return run(
            project.path,
            tmp_path / place,
            [*left_out(["rerunfailures"] if "--reruns=2" in arguments else []), *arguments],
            project.environment,
            files=("results.txt",),
            order=order,
        )

    def compare(
        *arguments: str, workers: int, needs: tuple[str, ...] = NEEDS, cut_short: bool = False
    ) -> Run:
        shared = (*arguments, "-n", str(workers))
        ours = one("ours", *shared, *OURS, *needs)
        assert STOCK_TWICE or "gpu-share:" in ours.out
        assert ours.collected

        def replay(order: list[str]) -> Run:
            return one("replay", *arguments, "-n1", order=order)

        if workers == 1:
            found = exactly(one("stock", *shared), ours)
        else:
            found = within(
                lambda: one("stock", *shared),
                ours,
                cut_short=cut_short,
                replay=None if cut_short else replay,
            )
        if found:
            pytest.fail("\n".join(found), pytrace=False)
        return ours

    return compare


def plugins_of(hooks: Mapping[str, str], project: Project) -> list[str]:
    """Write each of the hooks as a plugin; returns the options that load them all in one run."""
    names = {f"hook_of_{name.replace(' ', '_')}": text for name, text in hooks.items()}
    project.write(**names)
    return [part for name in names for part in ("-p", name)]


# Row 1: a worker that is told to stop, by a test, a fixture or the teardown of a module.

EXIT = {
    "test": """
        import pytest

        def test_exits():
            pytest.exit("the device is dead", returncode=7)

        @pytest.mark.parametrize("i", range(4))
        def test_other(i):
            pass
    """,
    "fixture": """
        import pytest

        @pytest.fixture(scope="module")
        def device():
            pytest.exit("no device")

        def test_before():
            pass

        def test_exits(device):
            pass

        @pytest.mark.parametrize("i", range(4))
        def test_other(i):
            pass
    """,
    "teardown": """
        import pytest

        @pytest.fixture(scope="module", autouse=True)
        def device():
            yield
            pytest.exit("cannot give the device back")

        @pytest.mark.parametrize("i", range(3))
        def test_exits(i):
            pass
    """,
}


@both
@pytest.mark.parametrize("where", EXIT)
def test_exit(where: str, workers: int, project: Project, same: Same) -> None:
    """`pytest.exit` ends the run as in stock; the test that called it is named."""
    project.write(
        test_exit=EXIT[where],
        test_later="""
            import pytest

            @pytest.mark.parametrize("i", range(4))
            def test_later(i):
                pass
        """,
    )
    ours = same(workers=workers, cut_short=True)
    assert ours.code in (2, 3)
    assert "test_exits" in ours.out


def test_exit_of_marked_tests(project: Project, same: Same) -> None:
    """The same where needs come from the marker."""
    marked = """
        import pytest

        @pytest.mark.gpu(vram="3GB")
        def test_exits():
            pytest.exit("the CUDA context is dead", returncode=7)

        @pytest.mark.gpu(vram="3GB")
        @pytest.mark.parametrize("i", range(4))
        def test_other(i):
            pass
    """
    project.write(test_exit=marked)
    ours = same(workers=2, needs=(), cut_short=True)
    assert ours.code in (2, 3)


# Row 2: the teardown of a class or module fails, and a hook wraps the making of reports.

FAILING_TEARDOWN = """
    import pytest

    class TestFirst:
        @classmethod
        def teardown_class(cls):
            raise RuntimeError("the class does not let go")

        def test_one(self, tmp_path):
            pass

        def test_two(self):
            pass

    class TestSecond:
        def test_three(self, tmp_path):
            pass

    def teardown_module():
        raise RuntimeError("the module does not let go")
"""

MAKEREPORT = {
    "funcargs": """
        import pytest

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_makereport(item, call):
            outcome = yield
            outcome.get_result().arguments = sorted(item.funcargs)
    """,
    "own state": """
        import pytest

        STARTED = {}

        def pytest_runtest_logstart(nodeid):
            STARTED[nodeid] = []

        def pytest_runtest_logfinish(nodeid):
            del STARTED[nodeid]

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_makereport(item, call):
            STARTED[item.nodeid].append(call.when)
            report = yield
            report.user_properties.append(("phases", STARTED[item.nodeid]))
            return report
    """,
}


# Row 3: hooks that look at the next item, at the session's items, or at the item of a protocol.

HOOKS = {
    "next item": """
        def pytest_runtest_teardown(item, nextitem):
            if item.cls is not None and (nextitem is None or item.cls != nextitem.cls):
                with open("results.txt", "a") as file:
                    print("the pool of a class is closed", file=file)
    """,
    "items of the session": """
        import pytest

        @pytest.fixture(scope="session", autouse=True)
        def needs_server(request):
            return any("server" in item.fixturenames for item in request.session.items)

        def pytest_sessionfinish(session):
            for item in getattr(session, "items", []):
                assert item.function.__name__ and item.fixturenames is not None
    """,
    "protocol": """
        import pytest

        @pytest.hookimpl(hookwrapper=True)
        def pytest_runtest_protocol(item, nextitem):
            item.user_properties.append(("doc", item.function.__doc__))
            yield
    """,
    "protocol and next item": """
        import pytest

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(item, nextitem):
            name = nextitem.function.__name__ if nextitem is not None else None
            assert nextitem is not item
            item.user_properties.append(("next is a function", name is None or bool(name)))
            return (yield)
    """,
}

CLASSES = """
    import pytest

    class TestFirst:
        def test_one(self):
            "First."

        @pytest.mark.parametrize("i", range(3))
        def test_two(self, i):
            "Second."

    class TestSecond:
        def test_three(self):
            "Third."

    def test_function():
        pass
"""


# Row 4: a plugin that writes a result for each protocol.

RESULTS = """
    import pytest

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(item, nextitem):
        written.append([item.nodeid, "skipped"])
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(item, call):
        report = (yield).get_result()
        if report.when == "call":
            written[-1][1] = report.outcome

    written = []

    def pytest_sessionfinish(session):
        with open("results.txt", "a") as file:
            file.write("".join(f"{name} {outcome}\\n" for name, outcome in written))
"""


# Two workers write their parts in any order: sorted at the end.
SORTED = """
    import pytest

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(config):
        if not hasattr(config, "workerinput"):
            lines = sorted(open("results.txt"))
            open("results.txt", "w").writelines(lines)
"""

# Row 5: a conftest that sets the environment of the workers anew.

SETUPNODES = """
    def pytest_xdist_setupnodes(config, specs):
        for spec in specs:
            spec.env = {"OMP_NUM_THREADS": "1"}
"""

ENVIRONMENT = """
    import os
    import pytest

    @pytest.mark.parametrize("i", range(4))
    def test_environment(i):
        assert os.environ["OMP_NUM_THREADS"] == "1"
"""


@both
def test_hooks_of_a_project(workers: int, project: Project, same: Same) -> None:
    """Rows 2 to 5, whose hooks do not meddle with each other, in one run.

    One report a phase, made while the test's own state is there; the error of a teardown is
    reported. Hooks meet collected tests only, and the one that is really next. A plugin that
    writes a result for each protocol has one for each test. `spec.env` may be another mapping.
    """
    # How often a class ends depends on the distribution: of two workers the random suites tell.
    hooks = {name: text for name, text in HOOKS.items() if workers == 1 or name != "next item"}
    plugins = plugins_of({**MAKEREPORT, **hooks, "results": RESULTS, "sorted": SORTED}, project)
    project.write(
        conftest=SETUPNODES,
        test_classes=CLASSES,
        test_environment=ENVIRONMENT,
        test_teardown=FAILING_TEARDOWN,
    )
    ours = same(*plugins, workers=workers)
    assert (ours.code, ours.errors > 0, len(ours.outcomes)) == (1, True, 13)
    assert ours.files["results.txt"].count(" passed\n") == 13


@pytest.mark.skipif(find_spec("allure_pytest") is None, reason="needs allure-pytest")
@both
def test_allure(workers: int, project: Project, same: Same) -> None:
    """allure-pytest writes one result for each test."""
    count = """
        import pathlib, pytest

        def pytest_unconfigure(config):
            if not hasattr(config, "workerinput"):
                count = len(list(pathlib.Path("allure").glob("*-result.json")))
                pathlib.Path("results.txt").write_text(f"{count} results")
    """
    project.write(count_plugin=count, test_classes=CLASSES)
    ours = same("--alluredir=allure", "-p", "count_plugin", workers=workers)
    assert ours.files["results.txt"] == "6 results"


# Row 6: a conftest that ends the process after a test has spoilt it.

DEATH = """
    import os, time

    def pytest_runtest_logfinish(nodeid, location):
        if os.environ.get("PYTEST_XDIST_WORKER") and "poison" in nodeid:
            time.sleep(0.5)  # until the reports are through
            os._exit(70)
"""


@both
def test_death_after_a_test(workers: int, project: Project, same: Same) -> None:
    """A worker that dies after the reports of a test crashes once; nothing is run again."""
    tests = """
        import pytest

        def test_before():
            pass

        @pytest.mark.gpu(vram="3GB")
        def test_poison():
            pass

        @pytest.mark.parametrize("i", range(5))
        def test_after(i):
            pass
    """
    project.write(conftest=DEATH, test_death=tests)
    ours = same("--max-worker-restart=1000", workers=workers)
    assert (ours.code, ours.crashed) == (1, ["test_death.py::test_poison"])


@pytest.mark.parametrize("options", [(), ("--maxschedchunk=1",)], ids=["", "chunk"])
def test_order_after_a_crash(options: tuple[str, ...], project: Project, same: Same) -> None:
    """With one worker the tests go on in stock's order: what had been sent goes to the end."""
    tests = """
        import os, time
        import pytest

        @pytest.fixture(scope="module")
        def shared():
            yield

        @pytest.mark.parametrize("i", range(24))
        def test_each(i, shared):
            if i in (1, 9, 20):
                os._exit(3)
            if i in (4, 5):
                time.sleep(0.12)
    """
    project.write(test_order=tests)
    ours = same("--max-worker-restart=1000", *options, workers=1)
    assert len(ours.crashed) == 3
    assert len(ours.outcomes) == 24


# Row 7: a run that is cut short by a crash that may not be made good, or by an interrupt.

CRASH = """
    import os, time
    import pytest

    def test_crash():
        os._exit(3)

    @pytest.mark.parametrize("i", range(15))
    def test_other(i):
        time.sleep(0.02)
"""


@both
def test_no_restart(workers: int, project: Project, same: Same) -> None:
    """After a crash without a restart, nothing is reported that did not run."""
    project.write(test_crash=CRASH)
    ours = same("--max-worker-restart=0", workers=workers, cut_short=True)
    assert ours.crashed == ["test_crash.py::test_crash"]


@both
@pytest.mark.parametrize("where", ["first", "middle", "fixture"])
def test_interrupt(where: str, workers: int, project: Project, same: Same) -> None:
    """KeyboardInterrupt in a test ends the run; no test that did not run is reported."""
    raises = {"first": "i == 0", "middle": "i == 7", "fixture": "False"}[where]
    broken = where == "fixture"
    tests = f"""
        import pytest

        @pytest.fixture
        def thing(i):
            if {broken} and i == 3:
                raise KeyboardInterrupt

        @pytest.mark.parametrize("i", range(16))
        def test_interrupt(i, thing):
            if {raises}:
                raise KeyboardInterrupt
    """
    project.write(test_interrupt=tests)
    same(workers=workers, cut_short=True)


@both
@pytest.mark.parametrize("attribute", ["shouldstop", "shouldfail"])
def test_stopped_by_the_session(attribute: str, workers: int, project: Project, same: Same) -> None:
    """A conftest that sets `session.shouldstop` or `shouldfail` in a worker stops it."""
    hook = f"""
        def pytest_runtest_teardown(item):
            if item.name == "test_stop[2]":
                item.session.{attribute} = "enough"
    """
    tests = """
        import pytest

        @pytest.mark.parametrize("i", range(8))
        def test_stop(i):
            pass
    """
    project.write(conftest=hook, test_stop=tests)
    same(workers=workers, cut_short=True)


@both
@pytest.mark.parametrize("option", ["-x", "--maxfail=2"])
def test_failures_that_stop(option: str, workers: int, project: Project, same: Same) -> None:
    """`-x` and `--maxfail` stop the run with the same exit code."""
    tests = """
        import pytest

        @pytest.mark.parametrize("i", range(12))
        def test_fails(i):
            assert i % 3
    """
    project.write(test_fails=tests)
    ours = same(option, workers=workers, cut_short=True)
    assert ours.code == 2


# Row 8: workers of one kind that do not collect the same tests.


def test_different_collections(project: Project, same: Same) -> None:
    """Workers that see different tests are an error, as in stock."""
    tests = """
        import os
        import time
        import pytest

        is_last = os.environ["PYTEST_XDIST_WORKER"] == "gw1"
        # The error is of the worker that has collected last.
        time.sleep(is_last)

        @pytest.mark.parametrize("i", range(2 + is_last))
        def test_collected(i):
            pass
    """
    project.write(test_collected=tests)
    ours = same(workers=2)
    assert ours.code == 1
    assert "Different tests were collected" in ours.out
    assert not ours.begun


# Row 9: a protocol of a plugin's own, which runs a test again.

OWN_PROTOCOL = """
    import pytest
    from _pytest.runner import runtestprotocol

    def pytest_runtest_protocol(item, nextitem):
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
        if any(report.failed for report in reports):
            with open(f"again-{item.name}", "w"):
                item.user_properties.append(("again", True))
            item._initrequest()
            reports = runtestprotocol(item, nextitem=nextitem, log=False)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True
"""


@both
def test_own_protocol(workers: int, project: Project, same: Same) -> None:
    """Another plugin's protocol sees the true next item, and runs the last test again."""
    tests = """
        import pathlib
        import pytest

        class TestClass:
            @classmethod
            def teardown_class(cls):
                if not pathlib.Path("again-test_last").exists():
                    raise RuntimeError("at first")

            def test_first(self):
                pass

            def test_last(self):
                pass

        def test_after():
            pass
    """
    project.write(conftest=OWN_PROTOCOL, test_again=tests)
    if workers == 1:
        assert same(workers=1).code == 0
    else:
        # One class on one worker, so that the same test is the last of it.
        project.write(test_again=tests.replace("def test_first", "def first"))
        assert same(workers=2).code == 0


@pytest.mark.skipif(find_spec("pytest_rerunfailures") is None, reason="needs rerunfailures")
def test_rerunfailures(project: Project, same: Same) -> None:
    """The last test of a class whose teardown fails is run again."""
    tests = """
        class TestClass:
            count = 0

            @classmethod
            def teardown_class(cls):
                TestClass.count += 1
                if TestClass.count == 1:
                    raise RuntimeError("at first")

            def test_first(self):
                pass

            def test_last(self):
                pass
    """
    project.write(test_again=tests)
    ours = same("--reruns=2", workers=1)
    assert "1 rerun" in ours.out


# Row 10: a test that runs out of memory, and cannot be run again alone.

OUT_OF_MEMORY = """
    import pathlib, time
    import pytest

    def meet(name, other):
        pathlib.Path(name).touch()
        end = time.monotonic() + 20
        while not pathlib.Path(other).exists() and time.monotonic() < end:
            time.sleep(0.01)

    @pytest.fixture
    def model(tmp_path):
        yield
        if {fails}:
            raise RuntimeError("the model does not let go")

    def test_neighbour():
        meet("neighbour", "large")
        time.sleep({busy})

    def test_large(model, caplog):
        meet("large", "neighbour")
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
"""


@pytest.mark.parametrize("refused", ["busy", "fails"])
def test_retry_refused(refused: str, project: Project, same: Same) -> None:
    """The first attempt stands: one failure, and the error of the user's own teardown."""
    busy, fails = (3, False) if refused == "busy" else (0.3, True)
    project.write(test_memory=OUT_OF_MEMORY.format(busy=busy, fails=fails))
    ours = same("-o", "gpu_share_pressure_timeout_s=1", workers=2)
    assert (ours.code, ours.errors) == (1, int(fails))
    assert "KeyError" not in ours.out
    assert ("the model does not let go" in ours.out) == fails


# An error that pytest keeps for the other tests of its class, module or session.

KEPT = """
    import unittest
    import pytest

    class TestUnit(unittest.TestCase):
        @classmethod
        def setUpClass(cls):
            local = "of the class"
            raise RuntimeError(local)

        def test_a(self):
            pass

        def test_b(self):
            pass

    @pytest.fixture(scope="module")
    def broken():
        local = "of the module"
        raise RuntimeError(local)

    def test_c(broken):
        pass

    def test_d(broken):
        pass
"""


def test_errors_that_are_kept(project: Project, same: Same) -> None:
    """Each report of a failed wider fixture has the same text, with the values of variables."""
    project.write(test_kept=KEPT)
    ours = same("--showlocals", workers=1)
    assert ours.code == 1
    assert ours.out.count("local      = 'of the module'") == 2


def test_an_error_in_the_code_of_pytest(same: Same, project: Project) -> None:
    """It is shown with its traceback, in which no frame is the user's."""
    project.write(
        test_project="""
            class TestOuter:
                def setup_method(self, method):
                    pass

                class TestInner:
                    def test_in(self):
                        pass
        """
    )
    same(workers=1)
