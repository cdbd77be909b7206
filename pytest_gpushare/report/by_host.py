"""The hosts of a run that has several, in its reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from pytest_gpushare.planning.plan import shortage
from pytest_gpushare.report.header import Line
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.units import plural


def add_hosts(document: dict[str, Any], run: ActiveRun) -> dict[str, Any]:
    """The document, with the host of each device, worker and test where there are several."""
    if not run.hosts:
        return document
    # Only a run on several hosts needs it.
    from pytest_gpushare.hosts.live import pid_there

    devices = {each.device.uuid: each.device.host or None for each in run.plan.devices}
    workers = {member.id: run.host_named(member.id) for member in run.workers}
    document["hosts"] = [
        {
            "name": host.name or None,
            "python": host.python or None,
            "gpu_workers": len(host.plan.slots),
            "cpu_workers": host.plan.cpu_workers,
            "shortage": "" if host.plan.slots else shortage(host.plan),
            "lost": host.lost,
        }
        for host in run.hosts
    ]
    for device in document["devices"]:
        device["host"] = devices.get(device["uuid"])
    for worker in document["workers"]:
        worker["host"] = workers.get(worker["id"])
        if worker["pid"] is not None:
            worker["pid"] = pid_there(worker["pid"])
    for test in document.get("tests", ()):
        test["host"] = workers.get(test["worker"])
    return document


def host_rows(run: ActiveRun) -> Iterator[list[str]]:
    """For each host: its name, GPU and CPU workers, tests that ran there, and what went wrong."""
    tests = Counter(run.host_named(test.worker) for test in run.tests)
    for host in run.hosts:
        missing = "" if host.plan.slots else shortage(host.plan)
        yield [
            host.label,
            str(len(host.plan.slots)),
            str(host.plan.cpu_workers),
            str(tests[host.name or None]),
            f"lost: {host.lost}" if host.lost else missing,
        ]


def lost_hosts(run: ActiveRun) -> Iterator[Line]:
    """A line for each host that was lost during the run."""
    for host in run.hosts:
        if host.lost:
            workers = plural(host.plan.workers, "worker")
            yield Line(
                f"gpu-share: host {host.label} was lost: {host.lost}: its {workers} were not "
                "replaced",
                problem=True,
            )
