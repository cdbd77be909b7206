"""Several hosts: their start, the probe of slow ones, and tests a second; sshd on loopback.

    python -m tests.benchmarks.hosts [--pairs 5] [--seed 0] [start] [probe] [tests] [losses]

Start: ten tests on two hosts with a GPU worker each, against two GPU workers here. Probe: eight
hosts, each behind a ProxyCommand that sleeps 1 to 3 s, against the slowest of them alone. Tests:
3,000 that do nothing on two hosts that share /tmp, against xdist alone with the same --px and --tx.
Losses: as many runs in which one of two hosts is cut off or killed at a random moment; the first
that loses or repeats a test ends the benchmark.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from textwrap import dedent

from pytest_gpushare.config.sources import Written, load
from pytest_gpushare.hosts.asking import look_at
from pytest_gpushare.hosts.specs import HostSpec, parse_tx, proxy, workers

from .pairs import seconds
from .pool import METER, NOTHING, interleaved, ratio
from .scene import PYTEST, TRIVIAL, Scene, scene

from simulator import Device  # isort: skip

from ..acceptance.conftest import Project  # isort: skip
from ..acceptance.other_hosts import (  # isort: skip
    LONG,
    REPORTS,
    Link,
    OtherHost,
    clone,
    commit,
    lose,
    missing,
    other_host,
)

DELAYS = [1 + 2 * number / 7 for number in range(8)]
"""Seconds before the connection to each host is there."""
ONE_EACH = ("--gpu-share", "-o", "gpu_share_max_workers_per_gpu=1", "-p", "no:rerunfailures")
SLOW = (
    "import socket, sys, time; time.sleep(float(sys.argv[1])); "
    "s = socket.create_connection(sys.argv[2:4]); "
    "socket.send_fds(socket.socket(fileno=1), [b'x'], [s.fileno()])"
)
"""Passes a connection on, so that nothing is copied from one process to another."""


@contextmanager
def hosts(where: Scene, count: int, *, is_apart: bool) -> Iterator[list[OtherHost]]:
    """So many hosts with a device of 24 GB each."""
    library = Path(where.environment["LD_LIBRARY_PATH"])
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        yield [
            stack.enter_context(
                other_host(Path(directory), f"h{number}", library, Device(total="24GB"),
                           is_apart=is_apart)
            )
            for number in range(count)
        ]  # fmt: skip


def start(pairs: int) -> None:
    """How much longer a run on two hosts takes than one here."""
    with scene(TRIVIAL, devices=2) as where, hosts(where, 2, is_apart=True) as found:
        project = Project(where.path, where.environment)
        commit(project)
        for host in found:
            clone(project, host)
        there = [*PYTEST, *ONE_EACH, *(part for host in found for part in ("--tx", host.tx))]
        here = [*PYTEST, *ONE_EACH, "-n", "gpu-auto"]
        more = []
        for number in range(pairs + 1):
            one, other = (seconds(c, where.path, where.environment) for c in (there, here))
            if number:
                more.append((one, other))
    print(
        f"start: two hosts {statistics.median(one for one, _ in more):.2f} s, here "
        f"{statistics.median(other for _, other in more):.2f} s, {pairs} pairs: "
        f"{statistics.median(one - other for one, other in more):.2f} s more "
        f"({min(a - b for a, b in more):.2f} to {max(a - b for a, b in more):.2f}; goal 2.50)"
    )


def probe(pairs: int) -> None:
    """How long eight slow hosts take, by the slowest and the CPU time of the probes."""
    with scene(TRIVIAL) as where, hosts(where, 1, is_apart=False) as (host,):
        specs = [_slow(host, where.path, delay) for delay in DELAYS]
        over = []
        for _ in range(pairs):
            alone = _probed(specs[-1:], where.path)
            before = _spent(host)
            took = _probed(specs, where.path)
            # Until sshd has seen their ends.
            time.sleep(1)
            share = (_spent(host) - before) / (os.cpu_count() or 1)
            over.append(took - alone - share)
            print(f"probe: eight {took:.2f} s, slowest {alone:.2f} s, CPU over cores {share:.2f} s")
    print(f"probe: beyond both {statistics.median(over):.2f} s, {pairs} times (goal 0.30)")


def _slow(host: OtherHost, root: Path, delay: float) -> HostSpec:
    text = host.config.read_text()
    port = next(line.split()[1] for line in text.splitlines() if line.split()[:1] == ["Port"])
    config = host.config.with_name(f"{host.name}-{delay:.2f}")
    config.write_text(
        f"{text}    ProxyUseFdpass yes\n"
        f'    ProxyCommand {sys.executable} -IS -c "{SLOW}" {delay:.3f} 127.0.0.1 {port}\n'
    )
    spec = f"gpu-auto*ssh=-F {config} {host.name}//chdir={root}//python={sys.executable}"
    return parse_tx([spec])[0]._replace(name=config.name)


def _probed(specs: list[HostSpec], root: Path) -> float:
    """Seconds until all have answered."""
    settings = load(Written({}, {"gpu_share_config": ""}, {}, "", root, root, root))
    begun = time.perf_counter()
    for name, facts, problem in look_at(specs, settings, root):
        if facts is None:
            sys.exit(f"{name}: {problem}")
    return time.perf_counter() - begun


def _spent(host: OtherHost) -> float:
    """Seconds of CPU time of all logins that are over: of ssh here, and of what ran there."""
    here = resource.getrusage(resource.RUSAGE_CHILDREN)
    there = Path(f"/proc/{host.first_pid}/stat").read_text().rpartition(")")[2].split()[13:15]
    return here.ru_utime + here.ru_stime + sum(map(int, there)) / os.sysconf("SC_CLK_TCK")


def tests(pairs: int) -> None:
    """Tests a second, by those of xdist alone."""
    with scene(NOTHING) as where, hosts(where, 2, is_apart=False) as found:
        (where.path / "conftest.py").write_text(METER)
        spec = "gpu-auto*ssh=-F {0.config} {0.name}//chdir={1}//python={2}"
        given = [spec.format(host, where.path, sys.executable) for host in found]
        ours = [*ONE_EACH, *(part for each in given for part in ("--tx", each))]
        theirs = ["-p", "no:gpu-share", "-p", "no:rerunfailures", "--dist", "load"]
        for number, each in enumerate(parse_tx(given), 1):
            theirs += ["--px", proxy(each, number, sys.executable, str(where.path))]
            theirs += ["--tx", workers(number, 1)]
        done = interleaved(where, ours, theirs, pairs)
    rate = ratio([(other.wall, one.wall) for one, other in done])
    cpu = ratio([(one.cpu, other.cpu) for one, other in done])
    slowest, quickest = (f(other.wall / one.wall for one, other in done) for f in (min, max))
    print(
        f"tests: {3000 / statistics.median(one.wall for one, _ in done):.0f} a second, xdist "
        f"{3000 / statistics.median(other.wall for _, other in done):.0f}, {pairs} pairs: "
        f"{rate:.3f} ({slowest:.3f} to {quickest:.3f}; goal 0.95); controller's CPU {cpu:.3f}"
    )


def losses(runs: int, seed: int) -> None:
    """Hosts that are lost at random moments."""
    chance = random.Random(seed)
    for number in range(runs):
        begun, after, is_cut = time.perf_counter(), chance.randrange(1, 34), chance.random() < 0.5
        with scene(dedent(LONG)) as where, _linked(where) as (link, found):
            project = Project(where.path, {**where.environment})
            (where.path / "test_project.py").write_text(dedent(LONG))
            project.file("conftest.py", REPORTS)
            commit(project)
            for host in found:
                clone(project, host)
            process = found[0].process
            assert process is not None
            moment = chance.random() * 0.25
            lose(project, found, after, _later(moment, link.cut if is_cut else process.kill))
        print(
            f"losses: {number + 1} of {runs}: {'cut' if is_cut else 'killed'} {moment:.3f} s after "
            f"{after} tests: {time.perf_counter() - begun:.0f} s",
            flush=True,
        )


def _later(moment: float, end: Callable[[], object]) -> Callable[[], object]:
    def wait_and_end() -> None:
        time.sleep(moment)
        end()

    return wait_and_end


@contextmanager
def _linked(where: Scene) -> Iterator[tuple[Link, list[OtherHost]]]:
    library = Path(where.environment["LD_LIBRARY_PATH"])
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        link = stack.enter_context(Link(1))
        found = [
            stack.enter_context(
                other_host(Path(directory), name, library, Device(total="24GB"), link=each)
            )
            for name, each in (("far", link), ("near", None))
        ]
        yield link, found


PARTS: dict[str, Callable[[int], None]] = {"start": start, "probe": probe, "tests": tests}


def main() -> None:
    """Print the figures of each part."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs, or runs of losses")
    parser.add_argument("--seed", type=int, default=0, help="of the losses")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS, "losses"])
    options = parser.parse_args()
    if reason := missing():
        print(f"no other hosts here: {reason}")
        return
    for name in options.parts or [*PARTS, "losses"]:
        if name == "losses":
            losses(options.pairs, options.seed)
        else:
            PARTS[name](options.pairs)


if __name__ == "__main__":
    main()
