"""The lines of the header: the VRAM analysis, the plan, and the reason for each figure.

Each line has a word that `grep "VRAM\\|GPU\\|workers"` finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from pytest_gpushare.config.options import OPTIONS
from pytest_gpushare.neighbours import line_of, other_servers
from pytest_gpushare.ollama.address import AUTO
from pytest_gpushare.ollama.models import OLLAMA, OllamaFacts, described
from pytest_gpushare.planning.leasing import shares_of_other_servers
from pytest_gpushare.planning.placement import caps_of
from pytest_gpushare.planning.plan import DevicePlan, Limit, Plan, shortage
from pytest_gpushare.report.output import Line
from pytest_gpushare.session.run import ActiveRun
from pytest_gpushare.units import MB, format_gb, format_number, plural

if TYPE_CHECKING:
    from pytest_gpushare.ollama.reservation import Demand, ModelNeed
    from pytest_gpushare.session.start_facts import HostOfRun


def ollama_lines(run: ActiveRun, verbosity: int) -> Iterator[Line]:
    """The server and its models; what the models need, where some are named."""
    # Without a device nobody expects a server.
    if run.ollama.asked and (run.plan.devices or run.ollama.reachable):
        yield _server(run)
    if run.plan.demand is not None and run.plan.devices:
        yield from _demand(run, run.plan.demand, verbosity)


def _server(run: ActiveRun) -> Line:
    ollama = run.ollama
    who = f"Ollama {ollama.version}" if ollama.version else "Ollama"
    if not ollama.answered:
        text = f"  {who} at {ollama.address}: {ollama.problem}; {what_stands(run)}"
        return Line(text, problem=ollama.reachable)
    models = ", ".join(described(model) for model in ollama.models) or "no model in VRAM"
    if run.gpus.simulated:
        models = "what it has in VRAM is not counted on simulated devices"
    spilled = any(model.is_spilled for model in ollama.models)
    where = _found(run, ollama) + _elsewhere(run)
    odd = f"; left out: {'; '.join(ollama.odd)}" if ollama.odd else ""
    return Line(
        f"  {who} at {ollama.address}{where}: {models}{odd}",
        problem=spilled or bool(odd),
    )


def server_lines(run: ActiveRun) -> Iterator[Line]:
    """A line for each other server, as far as there is a device to share with it."""
    for name, answer in other_servers(run.facts.answers).items() if run.plan.devices else ():
        nothing = "" if answer.answered else "; no VRAM is reserved for it"
        yield Line(f"  {line_of(name, answer)}{nothing}", problem=not answer.answered)


def what_stands(run: ActiveRun) -> str:
    """What happens to the reservation where the server does not answer."""
    if not run.plan.devices:
        return "no GPU to share with it"
    if run.plan.is_released:
        return "no VRAM is reserved for it (gpu_share_ollama_unreachable = release)"
    if run.settings.ollama_vram_reservation is None:
        return "its VRAM is reserved by the sizes in its models' names"
    if run.settings.ollama_unreachable == "release":
        return "something is there, so its VRAM reservation stands"
    return "its VRAM reservation stands"


def _found(run: ActiveRun, ollama: OllamaFacts) -> str:
    """How an address was found that nobody wrote down."""
    tried = run.settings.ollama_host.strip().lower() == AUTO
    return f", found as {ollama.found_by}" if tried and ollama.found_by else ""


def _elsewhere(run: ActiveRun) -> str:
    if run.ollama.on_this_host:
        return ""
    if run.settings.ollama_gpu == ("none",):
        return ", on another machine (no VRAM is reserved for it here)"
    return (
        ", on another machine (VRAM is reserved here all the same, unless "
        "gpu_share_ollama_gpu = none)"
    )


def _demand(run: ActiveRun, demand: Demand, verbosity: int) -> Iterator[Line]:
    follows = run.settings.ollama_vram_reservation is None
    if demand.asked and (follows or verbosity >= 1):
        each = ", ".join(f"{n.name} {format_gb(n.vram)} ({n.source.value})" for n in demand.needs)
        margin = format_gb(demand.margin)
        while_used = " (kept while tests use it: gpu_share_ollama_phase)"
        kept = while_used if run.facts.is_phased else ""
        yield Line(f"  VRAM that Ollama needs: {each}; {margin} to stay free when it loads{kept}")
    for need in demand.needs:
        # Without an answer all are taken by name, as the line above has said.
        name, size = need.name, format_gb(need.vram)
        is_said = f"{name} was not preloaded: {need.reason}" in run.notes
        if need.reason and demand.asked and not is_said:
            text = f"  VRAM for {name}: {size} by the size in its name: {need.reason}"
            yield Line(text, problem=True)
    short = 0 if follows else _shortage(run, demand)
    if short:
        yield Line(
            "  Ollama needs more VRAM than is reserved: "
            f"gpu_share_ollama_vram_reservation_mb = {short // MB} would hold its models",
            problem=True,
        )
    yield from _smaller(run, demand, bool(short))
    if verbosity >= 1:
        yield from (Line(f"  {text}") for need in demand.needs for text in _parts(need, verbosity))


def _smaller(run: ActiveRun, demand: Demand, short: bool) -> Iterator[Line]:
    """The way to a smaller need where the reservation, or the devices, do not hold it."""
    if not demand.asked or not (short or not run.plan.slots):
        return
    for need in demand.needs:
        if need.smaller and need.prediction is not None:
            yield Line(
                f"  VRAM of {need.name} at its {need.prediction.context} tokens: "
                f"{format_gb(need.vram)}; {', '.join(need.smaller)}",
                problem=True,
            )


def _shortage(run: ActiveRun, demand: Demand) -> int:
    """The reservation, in bytes and whole MB, that would have held the models; 0 where it does."""
    kept = [device for device in run.plan.devices if device.reservation]
    if not demand.asked or not kept:
        return 0
    least = min(device.reservation for device in kept)
    wanted = sum(need.vram for need in demand.needs) + demand.margin
    return -(-wanted // MB) * MB if least < wanted else 0


def _parts(need: ModelNeed, verbosity: int) -> Iterator[str]:
    prediction = need.prediction
    if prediction is None:
        return
    if verbosity >= 2:
        yield from (f"VRAM of {need.name}: {line}" for line in need.arithmetic)
    else:
        yield (
            f"VRAM of {need.name} as predicted: weights {format_gb(prediction.weights)}, KV cache "
            f"{format_gb(prediction.kv_cache)} for {prediction.context} tokens, buffers "
            f"{format_gb(prediction.graph)}, its process {format_gb(prediction.overhead)}"
        )
    if need.difference is not None:
        more = "more" if need.difference >= 0 else "less"
        yield (
            f"VRAM of {need.name} {need.source.value}: {format_gb(need.vram)}, "
            f"{format_gb(abs(need.difference))} {more} than predicted"
        )


def left_out(reason: str, _verbosity: int = 0) -> list[Line]:
    """The header of a run that the plugin leaves as it is."""
    return [Line(f"gpu-share: {reason}", problem=True)]


def header(run: ActiveRun, verbosity: int) -> list[Line]:
    """The lines at this verbosity: below 0 problems only, from 1 the workers, from 2 the sums."""
    lines = list(_lines(run, verbosity))
    if verbosity >= 0:
        return lines
    return [_with_prefix(line) for line in lines if line.problem]


def _lines(run: ActiveRun, verbosity: int) -> Iterator[Line]:
    plan = run.plan
    if run.gpus.simulated:
        yield Line("gpu-share: simulated devices: workers are counted for them, no GPU is assigned")
    yield _headline(run)
    for note in run.notes:
        yield Line(f"  {note}", problem=True)
    yield from (Line(host_line(host)) for host in run.hosts)
    is_short = bool(run.hosts) and verbosity < 1
    for device in () if is_short else plan.devices:
        yield Line(_device(device))
        yield Line(_vram(device, several=len(plan.devices) > 1))
    yield from (Line(f"  {text}") for text in run.leases)
    if is_short:
        return
    if _may_not_wait(run, verbosity):
        yield Line(
            "  VRAM that other processes take during the run: only tests with a need of their own "
            "wait for it (gpu_share_vram)"
        )
    yield from ollama_lines(run, verbosity)
    yield from server_lines(run)
    if verbosity >= 1:
        yield from (Line(text) for text in _workers(run))
    if verbosity >= 2:
        yield from (Line(text) for text in _arithmetic(run))


def _may_not_wait(run: ActiveRun, verbosity: int) -> bool:
    """Whether xdist may schedule the tests, and it matters: others hold as much as a worker's
    slot, or details are wanted."""
    plan = run.plan
    if run.has_needs or plan.cpu_workers or run.hosts or run.settings.ollama_tests:
        return False
    if plan.request.in_process or run.gpus.simulated:
        return False
    used = [device for device in plan.devices if device.workers]
    held = [device.device.used - device.resident >= device.slot_vram for device in used]
    return any(held) or (bool(used) and verbosity >= 1)


def _with_prefix(line: Line) -> Line:
    """The line with the name of the plugin, where it stands without the others."""
    text = line.text.strip()
    return line if text.startswith("gpu-share:") else Line(f"gpu-share: {text}", line.problem)


def _headline(run: ActiveRun) -> Line:
    plan, preset = run.plan, f"preset {', '.join(run.settings.presets)}"
    if not plan.slots:
        why = shortage(plan)
        what = (
            "no workers: this process sees no GPU"
            if plan.request.in_process
            else plural(plan.cpu_workers, "CPU worker")
        )
        # A selection without GPU tests lacks nothing.
        return Line(f"gpu-share: {what} ({why})", problem=not plan.absence.startswith("-m "))
    if plan.request.in_process:
        if run.unplaced:
            return Line(
                f"gpu-share: no workers: {run.unplaced}, so it keeps the GPU that it has",
                problem=True,
            )
        slot = plan.slots[0]
        return Line(
            f"gpu-share: no workers: this process on {slot.device.label}, "
            f"{format_gb(slot.vram)} of VRAM ({preset})"
        )
    limit = ", ".join(_limit(name, plan) for name in plan.limited_by)
    beside = f", {plural(plan.cpu_workers, 'CPU worker')}" if plan.cpu_workers else ""
    total = format_gb(sum(slot.vram for slot in plan.slots))
    return Line(
        f"gpu-share: {plural(len(plan.slots), 'GPU worker')} {_slots(plan)} = {total}{beside} "
        f"(limited by {limit}; {preset})"
    )


def host_line(host: HostOfRun) -> str:
    """`  box: 2 GPU workers × 4.5 GB on GPU 0 RTX 3090 (22.0 of 24.0 GB of VRAM available)`."""
    plan = host.plan
    if not plan.slots:
        return f"  {host.label}: {plural(plan.cpu_workers, 'CPU worker')} ({shortage(plan)})"
    used = [each.device for each in plan.devices if each.workers]
    devices = ", ".join(
        f"GPU {device.index} {device.name} ({format_gb(device.free).removesuffix(' GB')} of "
        f"{format_gb(device.total)} of VRAM available)"
        for device in used
    )
    beside = f", {plural(plan.cpu_workers, 'CPU worker')}" if plan.cpu_workers else ""
    models = ", ".join(described(model) for model in host.ollama.models)
    ollama = f"; Ollama: {models}" if models else ""
    kept: Counter[str] = Counter()
    for share in (share for each in plan.devices for share in shares_of_other_servers(each)):
        kept[share.name] += share.reservation
    others = "".join(f"; {name}: {format_gb(size)} reserved" for name, size in kept.items() if size)
    workers = plural(len(plan.slots), "GPU worker")
    return f"  {host.label}: {workers} {_slots(plan)}{beside} on {devices}{ollama}{others}"


def _slots(plan: Plan) -> str:
    """`× 4.5 GB`, or `(2 × 5.0 GB, 2 × 11.0 GB)` where slots differ."""
    sizes = [format_gb(slot.vram) for slot in plan.slots]
    different = list(dict.fromkeys(sizes))
    if len(different) == 1:
        return f"× {different[0]}"
    return f"({', '.join(f'{sizes.count(size)} × {size}' for size in different)})"


def _limit(name: Limit, plan: Plan) -> str:
    value = dict(plan.limits).get(name)
    return f"{name.value} {value}" if name in (Limit.NUMBER, Limit.MAXPROCESSES) else name.value


def _device(plan: DevicePlan) -> str:
    device = plan.device
    shared = ", shared with the CPU" if device.unified else ""
    return (
        f"  {device.label} {device.name}: total {format_gb(device.total)}, "
        f"available {format_gb(device.free)}{shared}"
    )


def _vram(plan: DevicePlan, *, several: bool) -> str:
    kept = [
        f"{share.name} reservation {format_gb(share.reservation)}"
        + (f" ({format_gb(share.resident)} of it resident)" if share.resident else "")
        for share in plan.shares
        if share.name == OLLAMA or share.reservation
    ]
    return (
        f"  VRAM{f' of {plan.device.label}' if several else ''}: {', '.join(kept)}, "
        f"safety buffer {format_gb(plan.safety_buffer)}, "
        f"usable for tests {format_gb(plan.budget)}"
    )


def _workers(run: ActiveRun) -> Iterator[str]:
    plan = run.plan
    # Workers that the user listed may have other numbers in their names.
    name = "worker " if plan.request.fixed else "gw"
    for number, slot in enumerate(plan.slots):
        who = "this process" if plan.request.in_process else f"{name}{number}"
        caps = ", ".join(caps_of(slot, run.placement).descriptions)
        yield (
            f"  {who}: {slot.device.label} ({slot.device.uuid}), "
            f"VRAM {format_gb(slot.vram)}{f', capped: {caps}' if caps else ''}"
        )
    if plan.cpu_workers:
        first, last = len(plan.slots), plan.workers - 1
        yield f"  {name}{first}{f' to {name}{last}' if last > first else ''}: CPU, no GPU visible"


def _arithmetic(run: ActiveRun) -> Iterator[str]:
    settings, plan = run.settings, run.plan
    for device in plan.devices:
        label = device.device.label
        bound = "" if device.most is None else f", at most this run's slot {format_gb(device.most)}"
        leases = f" - leases of others {format_gb(device.leases)}" if device.leases else ""
        yield (
            f"  {label} budget: available VRAM {format_gb(device.device.free)} "
            f"- outstanding reservation {format_gb(device.outstanding)} "
            f"- safety buffer {format_gb(device.safety_buffer)}{leases}{bound} "
            f"= {format_gb(device.budget)}"
        )
        budget = _plain(device.budget)
        need = _plain(settings.min_vram_per_worker)
        scale = format_number(settings.max_workers_per_gb)
        steps = [f"by need {budget} / {need} = {device.by_need}"]
        if device.by_scale is not None:
            steps.append(f"by scale {budget} × {scale} = {device.by_scale}")
        if device.by_cap is not None:
            steps.append(f"at most {device.by_cap}")
        if device.by_mode is not None:
            steps.append(f"by compute mode {device.by_mode}")
        yield f"  {label} workers: {', '.join(steps)}: {device.fitting}"
    for name, most in plan.limits:
        yield f"  workers of the run: limit by {name.value}: {most}"
    for option in OPTIONS:
        origin = settings.origins.get(option.key, "default")
        if origin != "default":
            yield f"  GPU setting {option.ini}: from {origin}"


def _plain(size: int | Fraction) -> str:
    return format_gb(size).removesuffix(" GB")
