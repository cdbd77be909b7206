"""Report documents as runs would write them, made by a small simulation; schema version 1."""

from __future__ import annotations

import heapq
import math
import random
from typing import Any, NamedTuple

GB = 1024**3
MB = 1024**2
CONTEXT = 600 * MB

Document = dict[str, Any]


class Shape(NamedTuple):
    """What kind of run."""

    tests: int = 24
    devices: int = 1
    workers: int = 2
    """On each device."""
    cpu_workers: int = 0
    mean_s: float = 2.0
    sample_s: float = 0.2
    ollama: str = "resident"
    """`resident`, `loads` in the middle, `spills` in the middle, `silent`, or `none`."""
    leak: bool = False
    seed: int = 1


def small() -> Document:
    """A run of a minute on one device beside an Ollama that keeps its model."""
    return made(Shape())


def eventful() -> Document:
    """Two devices and CPU workers; a model that spills, a test that runs out of memory, a leak."""
    return made(
        Shape(tests=90, devices=2, cpu_workers=2, mean_s=4.0, ollama="spills", leak=True, seed=7)
    )


def large(tests: int = 10_000, hours: float = 24) -> Document:
    """Ten thousand tests over a day, as the sampler thins it: one sample in ten seconds."""
    return made(
        Shape(
            tests=tests,
            devices=2,
            workers=3,
            cpu_workers=2,
            mean_s=hours * 3600 * 8 / tests,
            sample_s=10.0,
            ollama="loads",
            leak=True,
            seed=3,
        )
    )


def cpu_only() -> Document:
    """No NVML: CPU workers."""
    document = made(Shape(devices=0, workers=0, cpu_workers=2, ollama="none"))
    document["plan"].update(absence="NVML library not found: is the NVIDIA driver installed?")
    document["hints"] = []
    return document


def empty() -> Document:
    """A run that selected no test and was asked nothing."""
    document = made(Shape(tests=0, devices=0, workers=0, ollama="none"))
    document["run"].update(duration_s=0.4, exit_status=5, driver=None)
    return document


def simulated() -> Document:
    """Under --gpu-share-simulate: workers are counted, nothing is measured."""
    document = made(Shape(ollama="none"))
    document["run"]["simulated"] = True
    document["samples"]["devices"] = {}
    for device in document["devices"]:
        device.update(peak_used_bytes=None, peak_workers_bytes=None, peak_tests_bytes=None)
    for worker in document["workers"]:
        worker.update(device=None, peak_bytes=None, peak_source=None)
    for test in document["tests"]:
        test.update(peak_bytes=None, peak_source=None, left_bytes=None, device=None)
    document["hints"] = []
    return document


def cut_off() -> Document:
    """A run that was interrupted: tests without an end, a worker that crashed."""
    document = made(Shape(ollama="silent", tests=9))
    document["run"].update(finished=False, exit_status=2)
    document["tests"][-1].update(end_s=None, outcome="crashed")
    document["tests"][-2].update(start_s=None, end_s=None, worker="gw9")
    document["workers"][1].update(crashed=True, ended_s=None)
    for key in ("leaks", "hints", "summary", "problems"):
        document[key] = []
    return document


def second_server() -> Document:
    """ToyServe beside Ollama: 2 GB of the 3 that are kept for it are taken."""
    document = made(Shape())
    (device,) = document["devices"]
    (samples,) = document["samples"]["devices"].values()
    samples["servers_bytes"] = {"ToyServe": [2 * GB for _ in samples["at_s"]]}
    samples["used_bytes"] = [used + 2 * GB for used in samples["used_bytes"]]
    for name in ("used_at_start_bytes", "resident_bytes", "peak_used_bytes"):
        device[name] += 2 * GB
    device["free_at_start_bytes"] -= 2 * GB
    device["reservation_bytes"] += 3 * GB
    device["servers"] = {"ToyServe": {"reservation_bytes": 3 * GB, "resident_bytes": 2 * GB}}
    document["servers"] = [
        {
            "name": "ToyServe",
            "address": "127.0.0.1:9000",
            "version": "1.2",
            "answered": True,
            "on_this_host": True,
            "problem": "",
            "vram_bytes": GB,
        }
    ]
    return document


def untold() -> Document:
    """A machine that tells nothing by process: peaks, Ollama and others are unknown."""
    document = made(Shape(ollama="silent"))
    for device, samples in zip(
        document["devices"], document["samples"]["devices"].values(), strict=True
    ):
        device["resident_bytes"] = 0
        samples["ollama_bytes"] = [None for _ in samples["at_s"]]
        samples["others_bytes"] = [None for _ in samples["at_s"]]
        samples["workers_bytes"] = {
            worker: [None for _ in samples["at_s"]] for worker in samples["workers_bytes"]
        }
    for device in document["devices"]:
        device["peak_workers_bytes"] = device["peak_tests_bytes"] = None
    for worker in document["workers"]:
        worker.update(peak_bytes=None, peak_source=None)
    for test in document["tests"]:
        test.update(peak_bytes=None, peak_source=None, left_bytes=None)
    document["hints"] = []
    return document


def several_hosts() -> Document:
    """Two hosts with a device each, one of them lost on the way; this host runs CPU tests."""
    document = made(Shape(devices=2, workers=2, cpu_workers=1, tests=40))
    names = ("<b>box", "rack")
    for device, name in zip(document["devices"], names, strict=True):
        device["host"] = name
    places = {device["uuid"]: device["host"] for device in document["devices"]}
    of = {worker["id"]: places.get(worker["device"]) for worker in document["workers"]}
    for worker in document["workers"]:
        worker["host"] = of[worker["id"]]
    for test in document["tests"]:
        test["host"] = of[test["worker"]]
    document["hosts"] = [
        {
            "name": name,
            "python": "3.11.2" if name else None,
            "gpu_workers": 2 if name else 0,
            "cpu_workers": 0 if name else 1,
            "shortage": "" if name else "no GPU",
            "lost": "silent for <i>20 s" if name == "rack" else "",
        }
        for name in (None, *names)
    ]
    return document


HOSTILE = "test_x.py::test_a[</script><script>alert(1)</script><img src=x onerror=alert(2)>]"


def hostile() -> Document:
    """Names that want to be markup, and text beyond ASCII."""
    document = made(Shape(tests=6))
    names = (
        HOSTILE,
        "test_x.py::test_b[<!--]",
        "test_x.py::test_c[\u202egnp.exe]",
        "test_x.py::test_d[\udc80\x00\u2028]",
        "täst_ü.py::test_e['\"&amp;]",
        "test_long.py::test_f[" + "x" * 2000 + "]",
    )
    for test, name in zip(document["tests"], names, strict=True):
        test["nodeid"] = name
    document["tests"][0]["notes"] = ["<b>note</b>"]
    document["devices"][0]["name"] = "<i>card</i>"
    document["ollama"]["models"][0]["name"] = "<script>alert(3)</script>"
    document["events"].append(
        {"at_s": 1.0, "kind": "<svg onload=alert(4)>", "text": "<svg onload=alert(5)>", "facts": {}}
    )
    document["hints"].append("</style><script>alert(6)</script>")
    document["problems"].append("</title><script>alert(7)</script>")
    document["plan"]["settings"]["vram"] = {"value": "<u>x</u>", "origin": "pytest.ini"}
    leak = {"nodeid": HOSTILE, "bytes": 5 * MB, "worker": "gw0", "source": "nvml", "suspects": []}
    leak["suspects_count"] = 0
    document["leaks"].append(leak)
    suspects = {"nodeid": None, "suspects": [HOSTILE], "suspects_count": 9, "bytes": 500 * MB}
    document["leaks"].append({**leak, **suspects})
    document["tests"][1]["outcome"], document["tests"][2]["outcome"] = "xfailed", "xpassed"
    return document


def made(shape: Shape) -> Document:
    """The document of a simulated run of this shape; the same for the same shape."""
    return _Run(shape).document()


class _Run:
    """Workers that take tests from one queue, and what their devices hold meanwhile."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.random = random.Random(shape.seed)
        self.devices = [f"GPU-{n:08x}-52c7-4c1e-9f6a-0123456789ab" for n in range(shape.devices)]
        self.budget = int(9.0 * GB)
        self.slot = self.budget // max(1, shape.workers)
        self.workers = self._workers()
        self.tests = self._tests()
        self.duration = max([1.5, *(test["end_s"] + 0.4 for test in self.tests)])
        self.spill = (self.duration * 0.45, self.duration * 0.6)

    def _workers(self) -> list[dict[str, Any]]:
        places = [device for device in self.devices for _ in range(self.shape.workers)]
        places += [None] * self.shape.cpu_workers  # type: ignore[list-item]
        return [
            {
                "id": f"gw{number}",
                "role": "gpu" if device else "cpu",
                "device": device,
                "slot_bytes": self.slot if device else 0,
                "pid": 4000 + number,
                "started_s": round(0.4 + 0.05 * number, 3),
                "ended_s": None,
                "crashed": False,
                "need_bytes": None,
                "peak_bytes": None,
                "peak_source": None,
                "peak_exact": None,
            }
            for number, device in enumerate(places)
        ]

    def _tests(self) -> list[dict[str, Any]]:
        free = [(worker["started_s"] + 0.5, n) for n, worker in enumerate(self.workers)]
        heapq.heapify(free)
        tests = []
        for number in range(self.shape.tests if free else 0):
            at, worker = heapq.heappop(free)
            took = self.random.lognormvariate(math.log(self.shape.mean_s) - 0.3, 0.8)
            test = self._test(number, self.workers[worker], at, at + took)
            tests.append(test)
            heapq.heappush(free, (at + took + 0.02, worker))
        return tests

    def _test(
        self, number: int, worker: dict[str, Any], start: float, end: float
    ) -> dict[str, Any]:
        gpu = worker["role"] == "gpu"
        chance = self.random.random()
        outcome = "failed" if chance > 0.97 else "skipped" if chance > 0.93 else "passed"
        share = self.random.betavariate(2, 2.4)
        peak = (
            CONTEXT + int((self.slot - CONTEXT) * share) if gpu and outcome != "skipped" else None
        )
        if outcome == "skipped":
            end = start + 0.01
        kind = self.random.choice(("attention", "embedding", "conv2d", "sampler", "quantise"))
        dtype = self.random.choice(("float32", "float16", "bfloat16"))
        name = f"tests/gpu/test_{kind}_{number % 40:02d}.py::TestKernels::test_{kind}"
        marked = gpu and self.random.random() < 0.3
        return {
            "nodeid": f"{name}[{dtype}-batch{2 ** (number % 7)}-{number}]",
            "worker": worker["id"],
            "device": worker["device"],
            "start_s": round(start, 3),
            "end_s": round(end, 3),
            "outcome": outcome,
            "need_bytes": 4 * GB if marked else self.slot if gpu else None,
            "need_source": "marker" if marked else "slot" if gpu else None,
            "peak_bytes": peak,
            "peak_source": "frameworks" if peak else None,
            "peak_exact": True if peak else None,
            "left_bytes": 0 if peak else None,
            "waited_s": round(self.random.random(), 3) if self.random.random() < 0.1 else 0.0,
            "attempts": 1,
            "notes": [],
        }

    def document(self) -> Document:
        events = self._events()
        samples = {device: self._samples(n, device) for n, device in enumerate(self.devices)}
        devices = [self._device(n, uuid, samples[uuid]) for n, uuid in enumerate(self.devices)]
        for worker in self.workers:
            own = [t["peak_bytes"] or 0 for t in self.tests if t["worker"] == worker["id"]]
            worker["ended_s"] = round(self.duration - 0.2, 3)
            if worker["role"] == "gpu" and any(own):
                worker.update(peak_bytes=max(own), peak_source="frameworks", peak_exact=True)
        failed = any(test["outcome"] in ("failed", "error") for test in self.tests)
        leaks = [test for test in self.tests if (test["left_bytes"] or 0) > 200 * MB]
        return {
            "schema": 1,
            "generator": {"name": "pytest-gpushare", "version": "0.1.0"},
            "run": {
                "started": "2026-11-24T13:31:00.123+00:00",
                "duration_s": round(self.duration, 3),
                "exit_status": 1 if failed else 0,
                "finished": True,
                "python": "3.12.1",
                "pytest": "9.2.0",
                "xdist": "3.8.0",
                "platform": "Linux-6.8.0-x86_64-with-glibc2.36",
                "driver": "580.95.05",
                "simulated": False,
            },
            "plan": {
                "gpu_workers": self.shape.devices * self.shape.workers,
                "cpu_workers": self.shape.cpu_workers,
                "limited_by": ["max_workers_per_gb"],
                "presets": ["conservative"],
                "in_process": False,
                "absence": "",
                "shortage": "",
                "needed_bytes": 3 * GB,
                "settings": {
                    "ollama_vram_reservation_mb": {"value": "12288", "origin": "default"},
                    "safety_buffer_mb": {"value": "1024", "origin": "default"},
                    "max_workers_per_gb": {"value": "0.25", "origin": "default"},
                    "min_vram_per_worker_gb": {"value": "3.0", "origin": "pytest.ini"},
                    "max_workers_per_gpu": {"value": "2", "origin": "preset conservative"},
                },
            },
            "devices": devices,
            "workers": self.workers,
            "tests": self.tests,
            "ollama": self._ollama(),
            "events": events,
            "samples": {"devices": samples, "leases": []},
            "summary": ["gpu-share: this is what the terminal said"],
            "hints": self._hints(),
            "leaks": [
                {
                    "nodeid": t["nodeid"],
                    "bytes": t["left_bytes"],
                    "worker": t["worker"],
                    "source": "frameworks",
                    "suspects": [],
                    "suspects_count": 0,
                }
                for t in leaks
            ],
            "problems": [],
            "shortages": [],
        }

    def _hints(self) -> list[str]:
        if not self.devices:
            return []
        return [
            "peak per worker was 2.4 GB: `-o gpu_share_min_vram_per_worker_gb=2.5` would allow "
            "3 workers"
        ]

    def _events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []

        def note(at: float, kind: str, text: str, **facts: object) -> None:
            events.append({"at_s": round(at, 3), "kind": kind, "text": text, "facts": facts})

        if self.shape.ollama == "loads":
            note(self.duration * 0.3, "ollama-loaded", "Ollama loaded qwen2.5:14b (10.8 GB)")
        if self.shape.ollama == "spills":
            first, last = self.spill
            note(
                first,
                "ollama-spilled",
                "Ollama moved 38 % of qwen2.5:14b to the CPU while tests held 8.1 GB",
                model="qwen2.5:14b",
            )
            note(last, "ollama-recovered", "qwen2.5:14b is back on the GPU, whole")
        on_gpu = [test for test in self.tests if test["peak_bytes"]]
        if self.shape.leak and len(on_gpu) > 10:
            leaky, starved = on_gpu[len(on_gpu) // 4], on_gpu[len(on_gpu) // 2]
            leaky["left_bytes"] = 612 * MB
            note(leaky["end_s"], "leak", f"{leaky['nodeid']} left 612 MB behind")
            starved.update(
                attempts=2, notes=["ran out of memory under sharing; passed alone"], waited_s=3.2
            )
            note(
                (starved["start_s"] + starved["end_s"]) / 2,
                "oom",
                f"{starved['nodeid']} ran out of memory: gw1 held 4.2 GB beside it",
                worker=starved["worker"],
            )
            note(starved["end_s"], "oom-retried", f"{starved['nodeid']} passed alone")
        return sorted(events, key=lambda event: event["at_s"])

    def _ollama_bytes(self, at: float, number: int) -> int | None:
        whole = int(10.8 * GB)
        if number or self.shape.ollama in ("none", "silent"):
            return 0
        if self.shape.ollama == "loads":
            return whole if at > self.duration * 0.3 else 0
        if self.shape.ollama == "spills" and self.spill[0] < at < self.spill[1]:
            return int(whole * 0.62)
        return whole

    def _samples(self, number: int, device: str) -> dict[str, Any]:
        count = int(self.duration / self.shape.sample_s) + 1
        times = [round(n * self.shape.sample_s, 3) for n in range(count)]
        held = {
            worker["id"]: self._held(worker, times)
            for worker in self.workers
            if worker["device"] == device
        }
        others = [int((1.2 + 0.05 * math.sin(at / 40)) * GB) for at in times]
        ollama = [self._ollama_bytes(at, number) for at in times]
        used = [
            others[n] + (ollama[n] or 0) + sum(values[n] for values in held.values())
            for n in range(count)
        ]
        return {
            "at_s": times,
            "used_bytes": used,
            "ollama_bytes": ollama,
            "others_bytes": others,
            "workers_bytes": held,
        }

    def _held(self, worker: dict[str, Any], times: list[float]) -> list[int]:
        own = [t for t in self.tests if t["worker"] == worker["id"] and t["peak_bytes"]]
        values, at_test, kept = [], 0, 0
        for at in times:
            while at_test < len(own) and own[at_test]["end_s"] < at:
                kept += own[at_test]["left_bytes"] or 0
                at_test += 1
            base = 0 if not own or at < own[0]["start_s"] else CONTEXT + min(kept, 300 * MB)
            value = base
            if at_test < len(own) and own[at_test]["start_s"] <= at:
                test = own[at_test]
                span = max(1e-9, test["end_s"] - test["start_s"])
                rise = min(1.0, (at - test["start_s"]) / span / 0.35)
                value = max(base, int(CONTEXT + (test["peak_bytes"] - CONTEXT) * rise))
            values.append(value)
        return values

    def _device(self, number: int, uuid: str, samples: dict[str, Any]) -> dict[str, Any]:
        total, resident = 24 * GB, self._ollama_bytes(0.0, number) or 0
        start = samples["used_bytes"][0]
        held = max(map(sum, zip(*samples["workers_bytes"].values(), strict=True)), default=None)
        return {
            "uuid": uuid,
            "name": "NVIDIA GeForce RTX 3090 Ti",
            "index": str(number),
            "total_bytes": total,
            "used_at_start_bytes": start,
            "free_at_start_bytes": total - start,
            "reservation_bytes": 12 * GB,
            "resident_bytes": resident,
            "safety_buffer_bytes": GB,
            "budget_bytes": self.budget,
            "workers": self.shape.workers,
            "peak_used_bytes": max(samples["used_bytes"]),
            "peak_used_exact": True,
            "peak_workers_bytes": held,
            "peak_tests_bytes": held,
            "peak_tests_exact": None if held is None else True,
            "peak_unattributed_bytes": None if held is None else 0,
        }

    def _ollama(self) -> dict[str, Any] | None:
        kind = self.shape.ollama
        if kind == "none":
            return None
        answered, spilled = kind != "silent", kind == "spills"
        size = int(10.8 * GB)
        model = {
            "name": "qwen2.5:14b",
            "size_bytes": size,
            "size_vram_bytes": int(size * 0.62) if spilled else size,
            "spilled": spilled,
        }
        kept = "Ollama kept qwen2.5:14b on the GPU (10.8 GB, 100 %) throughout"
        spilled_text = (
            "Ollama had 38 % of qwen2.5:14b on the CPU for 15 % of the run, while tests held VRAM: "
            "raise gpu_share_ollama_vram_reservation_mb to 13312"
        )
        return {
            "address": "127.0.0.1:11434",
            "version": "0.33.0" if answered else None,
            "answered": answered,
            "on_this_host": True,
            "found_by": "OLLAMA_HOST",
            "problem": "" if answered else "no answer in 0.5 s",
            "models": [model] if answered else [],
            "verdict": [] if not answered else [spilled_text if spilled else kept],
            "spilled_under_tests": spilled,
        }
