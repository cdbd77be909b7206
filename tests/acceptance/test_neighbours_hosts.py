"""The second server on another host of a run: it is kept for there, and named by the controller."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from simulator import Device
from simulator.child import child_process

from pytest_gpushare.report.reading import read_report

from .conftest import Project, closed_port
from .other_hosts import OtherHost, commit, on, skip_where_missing
from .test_neighbours import FOUR_TESTS, SETTINGS, TOYSERVE, await_answer, with_toyserve

skip_where_missing()

GB = 1024**3


def test_it_is_known_on_another_host(
    project: Project, hosts: Callable[..., OtherHost], tmp_path: Path
) -> None:
    """Two workers fit beside it there; its processes are its own in the samples."""
    project.write(test_project=FOUR_TESTS)
    commit(project)
    box = hosts("box", Device(total="24GB", used="2GB"))
    address = f"127.0.0.1:{closed_port()}"
    with_toyserve(box.tmp / "clock")
    (box.tmp / "clock/sitecustomize.py").write_text(
        f"import os\nos.environ['TOYSERVE'] = {address!r}\n"
    )
    package = with_toyserve(tmp_path / "package")
    path = (str(package), project.environment.get("PYTHONPATH", ""))
    project.environment["PYTHONPATH"] = os.pathsep.join(path)
    serve = f"{box.python} {TOYSERVE / 'server.py'} {address.rpartition(':')[2]} 3GB 6GB"
    with child_process(
        ["ssh", "-F", str(box.config), box.name, serve], stdin=subprocess.DEVNULL
    ) as process:
        await_answer(address)
        report = tmp_path / "r.json"
        done = project.pytest(*on(box), *SETTINGS, f"--gpu-share-report={report}")
        process.kill()
    assert (done.code, done.passed, done.workers) == (0, 4, 2), done.out + done.err
    assert done.said[0].startswith("gpu-share: 2 GPU workers × 4.5 GB = 9.0 GB")
    assert done.said[1].startswith("  box: 2 GPU workers × 4.5 GB on GPU 0")
    assert done.said[1].endswith("; ToyServe: 6.0 GB reserved")
    document = read_report(report)
    (device,) = document["devices"]
    assert device["host"] == "box"
    assert device["servers"]["ToyServe"] == {
        "reservation_bytes": 6 * GB,
        "resident_bytes": 4 * GB,
    }
    (samples,) = document["samples"]["devices"].values()
    held = samples["servers_bytes"]["ToyServe"]
    # Without workers no list of processes is read: then its own word counts.
    assert {*held} <= {3 * GB, 4 * GB}
    assert 4 * GB in held
    assert max(filter(None, samples["others_bytes"])) == 2 * GB
