"""Checks of the other hosts that a run would use: each is asked as the run would ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pytest_gpushare.cli.doctor import Finding, broken, look, ok
from pytest_gpushare.cli.doctor.examine import Examined
from pytest_gpushare.errors import GpuShareError
from pytest_gpushare.report.header import host_line
from pytest_gpushare.session.start_facts import HostOfRun


def other_hosts(found: Examined) -> Iterator[Finding]:
    """One finding for each host: what would run there, or why nothing can."""
    given = found.pytest.named_hosts
    if not (given or found.settings.hosts):
        return
    # Only a user who names hosts needs it.
    from pytest_gpushare.hosts.asking import look_at
    from pytest_gpushare.hosts.part import plan_there
    from pytest_gpushare.hosts.specs import parse_lines, parse_tx

    try:
        specs = parse_tx(given) if given else parse_lines(found.settings.hosts, "configuration")
    except GpuShareError as error:
        yield broken("host-unusable", str(error), "correct the line")
        return
    root = Path(found.pytest.root) if found.pytest.root else Path.cwd()
    for name, facts, problem in look_at(specs, found.settings, root):
        if facts is None:
            yield broken("host-unusable", problem, "pytest-gpushare plan shows it again")
            continue
        host = HostOfRun(name, plan_there(found.settings, facts), facts.ollama)
        yield ok(host_line(host).strip())
        for note in facts.notes:
            yield look("host-doubtful", f"{name}: {note}", "synchronise the host")
