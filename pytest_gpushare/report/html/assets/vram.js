// A device's VRAM over time. Others and the workers stand on the ground, one on another; Ollama
// and other servers hang from the ceiling. What is left between them is free, so one sees who comes near to whom.

function vramPlot(timeline, device, height) {
  const samples = device.samples;
  const times = sums(samples.at_ms, 1 / 1000);
  const used = sums(samples.used, 1);
  const all = samples.parts.map((part) => describe(timeline, part, sums(part.held, 1)));
  const total = device.total / MB;
  const hanging = all.filter((part) => part.colour === "ollama" || part.colour === "server");
  const standing = all.filter((part) => !hanging.includes(part));
  const parts = [...standing, ...hanging];
  const plot = {};
  const { panel, key } = frame(timeline, device.label, device.name);

  // The top of each standing part: what stands under it, and itself.
  let below = times.map(() => 0);
  const tops = standing.map((part) => {
    below = below.map((held, index) => (used[index] === null ? null : held + (part.held[index] ?? 0)));
    return below;
  });

  const most = Math.max(total, reduceMost(used), 1);
  const made = options(timeline, height);
  made.scales.y = { range: [0, most * 1.08] };
  made.axes[1] = {
    ...made.axes[1],
    incrs: MEBIBYTES,
    values: (chart, splits) => splits.map((value) => size(value * MB)),
  };
  made.series = [{}];
  const paint = (colour, fillTo) => ({
    paths: uPlot.paths.stepped({ align: 1 }),
    points: { show: false },
    width: 1,
    fillTo,
    // A rim between parts; where samples are denser than pixels it would be all that is seen.
    stroke: (chart) => timeline.palette[seen(chart, times) < chart.width / 3 ? "panel" : colour],
    fill: () => timeline.palette[colour],
  });
  // From the top down: each covers what does not belong to the one above it.
  for (const part of [...standing].reverse()) made.series.push(paint(part.colour, 0));
  for (const part of [...hanging].reverse()) made.series.push(paint(part.colour, total));
  if (!parts.length) made.series.push(paint("rest", 0));
  const plan = planned(device, hanging.map((part) => part.name));
  const leases = leasesOf(device);
  const events = timeline.data.events.filter((event) => !event.device || event.device === device.uuid);
  made.hooks.drawAxes = [(chart) => drawKept(timeline, chart, plan)];
  made.hooks.draw = [
    (chart) => drawLines(timeline, chart, plan),
    (chart) => drawLeases(timeline, chart, leases),
    (chart) => drawEvents(timeline, chart, events, true),
  ];

  plot.paintKey = () => {};
  plot.click = () => {};
  const figures = fillKey(key, parts);
  if (plan.buffer) {
    const item = element("li");
    item.append(element("i", undefined, "swatch buffer"), `safety buffer ${size(plan.buffer)}`);
    key.append(item);
  }
  if (leases.length) {
    const item = element("li");
    item.append(element("i", undefined, "swatch leases"), "leased by other sessions");
    key.append(item);
  }
  const whole = parts.map((part) => reduceMost(part.held));
  plot.tell = (seconds) => {
    const index = seconds === null ? -1 : indexBefore(times, seconds);
    parts.forEach((part, number) => {
      const most = part.colour === "rest" ? "" : `max ${size(whole[number] * MB)}`;
      figures[number].textContent = index < 0 ? most : size(held(part.held, index));
    });
  };
  plot.spoken = (seconds) => {
    const index = indexBefore(times, seconds);
    const told = parts.map((part) => `${part.name} ${size(held(part.held, index))}`);
    return `${device.label} ${size(held(used, index))} used: ${told.join(", ")}`;
  };
  plot.hover = (event) => {
    const seconds = timeline.moment;
    const index = indexBefore(times, seconds);
    const near = plot.chart.posToVal(6, "x") - plot.chart.posToVal(0, "x");
    const lines = [[null, "used", size(held(used, index))]];
    for (const part of [...parts].reverse()) {
      const bytes = held(part.held, index);
      if (bytes !== 0) lines.push([part.swatch, part.name, size(bytes)]);
    }
    for (const lease of leases) {
      if (lease.start <= seconds && seconds < lease.end) {
        lines.push(["leases", `leased by ${lease.session}`, size(lease.bytes)]);
      }
    }
    for (const [worker, test] of timeline.running(seconds, device.uuid)) {
      lines.push([null, `${worker.id}: ${timeline.tests.short(test)}`]);
    }
    for (const happened of events) {
      if (Math.abs(happened.at - seconds) < near) lines.push([`event-${happened.state}`, happened.text]);
    }
    timeline.showTip(event, `${device.label} at ${clock(seconds)}`, lines);
  };
  // The lower edge of each hanging part: what hangs above it, and itself.
  let above = times.map(() => 0);
  const ceilings = hanging.map((part) => {
    above = above.map((held, index) => held + (part.held[index] ?? 0));
    return above.map((held, index) => (part.held[index] === null ? null : total - held));
  });
  const shown = parts.length ? [times, ...tops.reverse(), ...ceilings.reverse()] : [times, used];
  follow(timeline, plot, new uPlot(made, shown, panel));
  plot.tell(null);
  return plot;
}

// Other sessions are looked at twice a second: what was seen once lasts until the next look.
function leasesOf(device) {
  return device.leases.map((lease) => ({ ...lease, end: Math.max(lease.end, lease.start + 0.5) }));
}

// What all other sessions had leased, as a line over the ground.
function drawLeases(timeline, chart, leases) {
  if (!leases.length) return;
  const moments = [...new Set(leases.flatMap((lease) => [lease.start, lease.end]))].sort((a, b) => a - b);
  inside(chart, (ctx) => {
    ctx.strokeStyle = timeline.palette.leases;
    ctx.lineWidth = 1.5;
    ctx.setLineDash([3, 3]);
    ctx.beginPath();
    let height = 0;
    for (const moment of moments) {
      const x = chart.valToPos(moment, "x");
      ctx.lineTo(x, chart.valToPos(height / MB, "y"));
      const now = leases.filter((lease) => lease.start <= moment && moment < lease.end);
      height = now.reduce((sum, lease) => sum + lease.bytes, 0);
      ctx.lineTo(x, chart.valToPos(height / MB, "y"));
    }
    ctx.stroke();
    ctx.setLineDash([]);
  });
}

function describe(timeline, part, values) {
  const names = { ollama: "Ollama", others: "others", rest: "unattributed", server: part.name, worker: part.name };
  const worker = timeline.data.workers.find((other) => other.id === part.name);
  const colour = part.kind === "worker" ? workerClass(worker) : part.kind;
  return { name: names[part.kind], colour, swatch: colour, held: values };
}

function held(values, index) {
  return index < 0 || values[index] === null ? null : values[index] * MB;
}

function reduceMost(values) {
  return values.reduce((most, value) => (value > most ? value : most), 0);
}

function fillKey(key, parts) {
  return parts.map((part) => {
    const item = element("li");
    const figure = element("b", "");
    item.append(element("i", undefined, `swatch ${part.swatch}`), `${part.name} `, figure);
    key.append(item);
    return figure;
  });
}

function seen(chart, times) {
  return indexBefore(times, chart.scales.x.max) - indexBefore(times, chart.scales.x.min);
}

// How the plan divides the device, from the ground: what others had, the budget of tests, the
// safety buffer, and what is kept for Ollama and other servers. Where nobody knows which part is a
// server's, only what it does not hold yet hangs from the ceiling.
function planned(device, toldApart) {
  const { total, budget, reservation, resident, used_at_start: start } = device;
  const told = device.kept.filter((each) => toldApart.includes(each.name));
  const known = told.reduce((sum, each) => sum + each.resident, 0);
  const kept = Math.max(0, reservation - Math.max(0, resident - known));
  const ground = start - Math.min(known, reservation);
  const servers = device.kept.filter((each) => each.reservation > 0);
  const whose = servers.map((each) => `kept for ${each.name}: ${size(each.reservation)}`).join(", ");
  const lines = [[total, "total", `total ${size(total)}`, [], -4]];
  if (kept) lines.push([total - kept, "ollama-line", whose, [2, 3], -4]);
  if (budget) lines.push([ground + budget, "budget", `budget of tests: ${size(budget)}`, [7, 4], 12]);
  return { total, kept, buffer: device.safety_buffer, lines };
}

function drawKept(timeline, chart, plan) {
  if (!plan.total) return;
  inside(chart, (ctx, width) => {
    const edges = [plan.total, plan.total - plan.kept, plan.total - plan.kept - plan.buffer];
    const [top, middle, bottom] = edges.map((bytes) => chart.valToPos(bytes / MB, "y"));
    ctx.fillStyle = timeline.palette.kept;
    ctx.fillRect(0, top, width, middle - top);
    ctx.fillStyle = timeline.palette.buffer;
    ctx.fillRect(0, middle, width, bottom - middle);
  });
}

function drawLines(timeline, chart, plan) {
  inside(chart, (ctx, width) => {
    ctx.font = "600 11px system-ui, sans-serif";
    ctx.textAlign = "right";
    ctx.textBaseline = "alphabetic";
    const taken = [];
    for (const [value, colour, label, dash, shift] of plan.lines) {
      const y = Math.round(chart.valToPos(value / MB, "y")) + 0.5;
      ctx.strokeStyle = timeline.palette[colour];
      ctx.lineWidth = 1.5;
      ctx.setLineDash(dash);
      ctx.beginPath();
      ctx.moveTo(0, y);
      ctx.lineTo(width, y);
      ctx.stroke();
      ctx.setLineDash([]);
      let at = y + shift;
      while (taken.some((other) => Math.abs(other - at) < 13)) at += 14;
      taken.push(at);
      // A rim, so that it is legible on whatever lies under it.
      ctx.lineWidth = 4;
      ctx.lineJoin = "round";
      ctx.strokeStyle = timeline.palette.panel;
      ctx.strokeText(label, width - 6, at);
      ctx.fillStyle = timeline.palette[colour];
      ctx.fillText(label, width - 6, at);
    }
  });
}
