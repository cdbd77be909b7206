"""From the command line to the browser: the page that a run wrote says what its JSON says."""

from __future__ import annotations

import json
from collections.abc import Callable

from simulator import Machine

from pytest_gpushare.report.html.markup import size

# The whole scene of an acceptance test: a project on a simulated machine.
from ..acceptance.conftest import (  # noqa: F401 - fixtures
    Project,
    machine,
    machine_with,
    nvml_library,
    project,
)
from .conftest import TOGETHER, Opened

pytestmark = TOGETHER

SUITE = """
    import time
    import gpusim
    import pytest

    @pytest.mark.parametrize("size", ["1GB", "2GB", "3GB</script>"])
    def test_model(size):
        with gpusim.alloc(size[:3]):
            time.sleep(1.2)

    def test_fails():
        assert False
"""


def test_page_of_a_run(
    project: Project,  # noqa: F811
    machine: Machine,  # noqa: F811
    opened: Callable[..., Opened],
) -> None:
    """Three tests, two peaks, and the outcome."""
    project.write(test_project=SUITE)
    result = project.pytest(
        "--gpu-share", "--gpu-share-report=run.html", "--gpu-share-report=run.json"
    )
    assert result.code == 1, result.out
    document = json.loads((project.path / "run.json").read_text(encoding="utf-8"))
    here = opened(project.path / "run.html")
    assert here.text("h1").endswith("1 failed, 3 passed")
    (device,) = document["devices"]
    peak = here.tab.locator("#devices .figure b")
    assert peak.get_attribute("data-bytes") == str(device["peak_used_bytes"])
    workers = here.tab.locator("#workers tbody tr")
    for number, worker in enumerate(document["workers"]):
        cell = workers.nth(number).locator("td").nth(3)
        least = "at least " if worker["peak_exact"] is False else ""
        assert cell.inner_text().strip() == least + size(worker["peak_bytes"])
    names = here.names()
    tests = [test for test in document["tests"] if test["peak_bytes"]]
    assert len(tests) >= 3
    for test in tests:
        row = here.tab.locator("#test-table tbody tr").nth(names.index(test["nodeid"]))
        assert row.locator("td").nth(5).get_attribute("data-bytes") == str(test["peak_bytes"])
    assert here.tab.locator("#charts canvas").count() == 2
