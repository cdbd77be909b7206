"""A device for one test alone: who waits, who rests, and what happens when somebody dies."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_gpushare.events import Record
from pytest_gpushare.gpu.attribution import Attribution, Holding, holding
from pytest_gpushare.gpu.devices import GpuProcess, Memory
from pytest_gpushare.session.exclusive import ExclusiveAccess
from pytest_gpushare.units import GB
from pytest_gpushare.wire import Links
from pytest_gpushare.worker.oom_retry import StartBarrier


class Run:
    """A controller whose workers' mail is kept; each worker is what the test makes it say."""

    def __init__(self, **workers: tuple[str, ...]) -> None:
        self.links, self.record = Links(), Record()
        devices = sorted({uuid for seen in workers.values() for uuid in seen})
        self.plan: Any = SimpleNamespace(
            devices=[
                SimpleNamespace(device=SimpleNamespace(uuid=uuid, label=uuid), budget=9 * GB)
                for uuid in devices
            ],
            slots=[SimpleNamespace(device=SimpleNamespace(uuid=uuid)) for uuid in devices],
        )
        self.mail: list[tuple[str, str, Any]] = []
        self.exclusive = ExclusiveAccess(self.plan, None, self.links, self.record, patience=7.0)
        for worker, seen in workers.items():
            self.come(worker, *seen)

    def come(self, worker: str, *devices: str) -> None:
        self.links.attach(worker, lambda message: self.mail.append((worker, *message)))
        self.exclusive.joined(worker, devices)

    def go(self, worker: str) -> None:
        self.links.close(worker)
        self.exclusive.gone(worker)

    def say(self, worker: str, kind: str, payload: Any) -> None:
        self.links.receive(worker, (kind, payload))

    def ran_out(self, worker: str, **more: Any) -> None:
        self.say(worker, "oom", {"nodeid": f"test_{worker}", "said": "x", **more})

    def over(self, worker: str, *, ran: bool = True) -> None:
        told = {"nodeid": f"test_{worker}", "outcome": "passed", "ran": ran}
        self.say(worker, "alone-over", told)

    def quiet(self, worker: str) -> None:
        """Obey the last request to rest."""
        numbers = [p for w, kind, p in self.mail if (w, kind) == (worker, "pause")]
        self.say(worker, "quiet", {"number": numbers[-1], "held": None})

    def read(self) -> list[str]:
        """The mail since the last look, in short."""
        found = [
            f"{worker} {payload['verdict'] if kind == 'alone' else kind}"
            for worker, kind, payload in self.mail
        ]
        self.mail_kept = [*getattr(self, "mail_kept", []), *self.mail]
        return found


def test_the_neighbours_rest_then_the_device_is_granted() -> None:
    run = Run(gw0=("A",), gw1=("A",), gw2=("A",), gw3=("B",))
    run.ran_out("gw0")
    assert run.read() == ["gw0 wait", "gw1 pause", "gw2 pause"]
    assert run.exclusive.busy("A")
    assert not run.exclusive.busy("B")
    run.quiet("gw1")
    run.quiet("gw1")
    assert len(run.mail) == 3
    run.quiet("gw2")
    assert run.read()[3:] == ["gw0 go"]
    assert run.mail[-1][2]["budget"] == 9 * GB
    run.over("gw0")
    assert sorted(run.read()[4:]) == ["gw1 resume", "gw2 resume"]
    assert not run.exclusive.busy("A")
    assert [event.kind for event in run.record.events()] == ["oom", "oom-retried"]
    assert run.record.events("oom")[0].facts["shared"] is True


def test_a_worker_that_is_alone_already_does_not_run_again() -> None:
    run = Run(gw0=("A",), gw1=("B",))
    run.ran_out("gw0")
    assert run.read() == ["gw0 no"]
    assert run.record.events("oom")[0].facts["shared"] is False
    assert not run.exclusive.busy("A")


def test_a_test_whose_subtests_are_reported_does_not_run_again() -> None:
    run = Run(gw0=("A",), gw1=("A",))
    run.ran_out("gw0", again=False)
    assert run.read() == ["gw0 no"]


def test_two_at_once_go_one_after_the_other() -> None:
    """Each waits for the other; one that waits is at rest."""
    run = Run(gw0=("A",), gw1=("A",))
    run.ran_out("gw0")
    run.ran_out("gw1")
    assert run.read() == ["gw0 wait", "gw1 pause", "gw1 wait", "gw0 go", "gw1 resume"]
    run.over("gw0")
    assert run.read()[5:] == ["gw0 pause"]
    run.quiet("gw0")
    assert run.read()[6:] == ["gw1 go"]
    run.over("gw1")
    assert run.read()[7:] == ["gw0 resume"]


@pytest.mark.parametrize("dies", ["the one that rests", "the one that waits", "the one alone"])
def test_who_dies_is_waited_for_no_longer(dies: str) -> None:
    run = Run(gw0=("A",), gw1=("A",), gw2=("A",))
    run.ran_out("gw0")
    run.quiet("gw1")
    if dies == "the one that rests":
        run.go("gw2")
        assert run.read()[3:] == ["gw0 go"]
    else:
        if dies == "the one alone":
            run.quiet("gw2")
        run.go("gw0")
        assert sorted(run.read()[-2:]) == ["gw1 resume", "gw2 resume"]
        assert not run.exclusive.busy("A")


@pytest.mark.parametrize(("in_order", "ago", "verdict"), [
    (False, 20.0, "wait"), (True, 0.0, "wait"), (True, 3.0, "no"),
])  # fmt: skip
def test_who_ended_in_order_keeps_its_vram(
    monkeypatch: pytest.MonkeyPatch, in_order: bool, ago: float, verdict: str
) -> None:
    """That of a worker that died comes back late; the process of the other stays to the end."""
    run = Run(gw0=("a",), gw1=("a",))
    held = Holding("GPU 0", Memory(24 * GB, 2 * GB, 22 * GB), {"gw1": 2 * GB})
    monkeypatch.setattr(run.exclusive, "_holding", lambda *_: held)
    run.say("gw1", "here", 11)
    now = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: now - ago)
        run.links.close("gw1")
        run.exclusive.gone("gw1", in_order=in_order)
    run.ran_out("gw0")
    assert [answer["verdict"] for to, kind, answer in run.mail if kind == "alone"][:1] == [verdict]


def test_a_replacement_rests_before_its_first_test() -> None:
    run = Run(gw0=("A",), gw1=("A",))
    run.ran_out("gw0")
    run.go("gw1")
    assert run.read()[-1] == "gw0 go"
    run.come("gw2", "A")
    assert run.read()[-1] == "gw2 pause"
    run.over("gw0")
    assert run.read()[-1] == "gw2 resume"


def test_an_old_answer_counts_for_nothing() -> None:
    """Who rested for an earlier request may be in the middle of a test again."""
    run = Run(gw0=("A",), gw1=("A",))
    run.ran_out("gw0")
    old = run.mail[-1][2]
    run.over("gw0", ran=False)
    run.ran_out("gw0")
    run.say("gw1", "quiet", {"number": old, "held": None})
    assert run.read()[-1] == "gw1 pause"
    run.quiet("gw1")
    assert run.read()[-1] == "gw0 go"


def test_several_devices_are_had_together() -> None:
    run = Run(gw0=("A", "B"), gw1=("A",), gw2=("B",), gw3=("C",))
    run.ran_out("gw0")
    run.quiet("gw1")
    assert "gw0 go" not in run.read()
    run.quiet("gw2")
    assert run.read()[-1] == "gw0 go"
    assert not [worker for worker, _, _ in run.mail if worker == "gw3"]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60))
def test_never_two_alone_and_never_stuck(steps: list[tuple[int, int]]) -> None:
    """Whatever happens in whatever order: one alone on a device, and all go on in the end."""
    seen = {0: ("A",), 1: ("A",), 2: ("A", "B"), 3: ("B",), 4: ("B",)}
    run = Run(**{f"gw{n}": devices for n, devices in seen.items()})
    asked: set[str] = set()
    for number, what in steps:
        worker = f"gw{number}"
        if what == 0 and worker not in asked:
            run.ran_out(worker)
            asked.add(worker)
        elif what == 1 and worker in asked:
            run.over(worker)
            asked.discard(worker)
        elif what == 2:
            run.go(worker)
            asked.discard(worker)
        elif what == 3:
            run.come(worker, *seen[number])
        elif any((w, kind) == (worker, "pause") for w, kind, _ in run.mail):
            run.quiet(worker)
        granted = [request for request in run.exclusive._queue if request.granted]
        taken = [device for request in granted for device in request.devices]
        assert len(taken) == len(set(taken))
    while run.exclusive._queue:
        before = len(run.mail)
        for request in list(run.exclusive._queue):
            if request.granted:
                run.over(request.worker)
        for worker, (_, rests) in list(run.exclusive._resting.items()):
            if not rests:
                run.quiet(worker)
        assert len(run.mail) > before or not run.exclusive._queue
    assert run.exclusive._resting == {}


def test_the_barrier_keeps_tests_back() -> None:
    said: list[tuple[str, Any]] = []
    barrier = StartBarrier(lambda kind, payload: said.append((kind, payload)), lambda: 5)
    barrier.enter()
    barrier.pause(1)
    assert said == []
    barrier.leave()
    assert said == [("quiet", {"number": 1, "held": 5})]
    barrier.resume(9)
    barrier.pause(2)
    assert said[-1] == ("quiet", {"number": 2, "held": 5})
    barrier.resume(2)
    barrier.enter()
    barrier.leave()
    assert len(said) == 2
    barrier.pause(3)
    barrier.open()
    barrier.enter()


def test_who_held_what() -> None:
    """Children count as their worker; what nobody knows is reported as unknown."""
    memory = Memory(24 * GB, 20 * GB, 4 * GB)
    split = Attribution().split(
        [
            GpuProcess(1, 4 * GB, neighbour="Ollama"),
            GpuProcess(10, 2 * GB),
            GpuProcess(99, 1 * GB),
            GpuProcess(98, None),
        ],
        {10: "gw0"},
    )
    here = holding("GPU 0", memory, split)
    found = here.by
    assert found == {"Ollama": 4 * GB, "gw0": 2 * GB, "other processes": 1 * GB}
    assert here.text("gw0") == (
        "GPU 0 had 4.0 GB of 24.0 GB free: held by Ollama 4.0 GB, gw0 (its own worker) 2.0 GB, "
        "other processes 1.0 GB"
    )
    assert here._replace(by={}).text() == (
        "GPU 0 had 4.0 GB of 24.0 GB free; the driver does not attribute the rest to processes"
    )
    assert Holding("GPU 0", None).text() == "what GPU 0 had free is unknown"


def test_no_more_than_the_session_has_leased() -> None:
    """What workers that have ended gave back may be another session's by now."""
    run = Run(gw0=("A",), gw1=("A",))
    run.exclusive._leased = {"A": 5 * GB}.get
    run.ran_out("gw0")
    run.quiet("gw1")
    assert run.mail[-1] == ("gw0", "alone", {"verdict": "go", "budget": 5 * GB})
