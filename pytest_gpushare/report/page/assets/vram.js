// A device's VRAM over time: Ollama, others and the workers, one on another.

function vramPlot(timeline, device, height) {
  const samples = device.samples;
  const times = sums(samples.at_ms, 1 / 1000);
  const used = sums(samples.used, 1);
  const parts = samples.parts.map((part) => describe(timeline, part, sums(part.held, 1)));
  const mib = (bytes) => (bytes === null ? null : bytes / MB);
  const [total, budget, reservation] = [device.total, device.budget, device.reservation].map(mib);
  const start = mib(device.used_at_start);
  const plot = {};
  const { panel, key } = frame(timeline, device.label, device.name);

  // The top of each part: what stands under it, and itself.
  const tops = [];
  let below = times.map(() => 0);
  for (const part of parts) {
    below = below.map((held, index) => (used[index] === null ? null : held + (part.held[index] ?? 0)));
    tops.push(below);
  }

  const most = Math.max(total ?? 0, reduceMost(used), 1);
  const made = options(timeline, height);
  made.scales.y = { range: [0, most * 1.08] };
  made.axes[1] = {
    ...made.axes[1],
    incrs: MEBIBYTES,
    values: (chart, splits) => splits.map((value) => size(value * MB)),
  };
  made.series = [{}];
  // Painted from the top down: each covers what does not belong to the one above it.
  for (let number = parts.length - 1; number >= 0; number--) {
    const { colour } = parts[number];
    made.series.push({
      paths: uPlot.paths.stepped({ align: 1 }),
      points: { show: false },
      width: 1,
      // A rim between parts; where samples are denser than pixels it would be all that is seen.
      stroke: (chart) => timeline.palette[seen(chart, times) < chart.width / 3 ? "panel" : colour],
      fill: () => timeline.palette[colour],
    });
  }
  if (!parts.length) made.series.push({ points: { show: false }, stroke: () => timeline.palette.rest });
  // As the plan divides it, from the top: the buffer, what Ollama may still take, the budget.
  const edge = total === null ? null : total - (mib(device.safety_buffer) ?? 0);
  const outstanding = Math.max(0, (reservation ?? 0) - (mib(device.resident) ?? 0));
  const resident = device.resident && timeline.width() > 600 ? `, ${size(device.resident)} of it resident` : "";
  const lines = [
    [total, "total", `total ${size(device.total)}`, [], -4],
    [reservation ? edge : null, "ollama-line", `kept for Ollama ${size(device.reservation)}${resident}`, [2, 3], 12],
    [start !== null && budget ? start + budget : null, "budget", `budget of tests ${size(device.budget)}`, [7, 4], 12],
  ].filter(([at]) => at !== null);
  const events = timeline.data.events.filter((event) => event.at !== null && (!event.device || event.device === device.uuid));
  made.hooks.drawAxes = [(chart) => drawKept(timeline, chart, total, edge, outstanding)];
  made.hooks.draw = [
    (chart) => drawLines(timeline, chart, lines),
    (chart) => drawEvents(timeline, chart, events, true),
  ];

  plot.paintKey = () => {};
  plot.click = () => {};
  const figures = fillKey(key, parts);
  const whole = parts.map((part) => reduceMost(part.held));
  plot.tell = (seconds) => {
    const index = seconds === null ? -1 : indexBefore(times, seconds);
    parts.forEach((part, number) => {
      figures[number].textContent =
        index < 0 ? `max ${size(whole[number] * MB)}` : size(held(part.held, index));
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
    for (const part of [...parts].reverse()) lines.push([part.swatch, part.name, size(held(part.held, index))]);
    for (const [worker, test] of timeline.running(seconds, device.uuid)) {
      lines.push([null, `${worker.id}: ${timeline.tests.short(test)}`]);
    }
    for (const happened of events) {
      if (Math.abs(happened.at - seconds) < near) lines.push([`event-${happened.state}`, happened.text]);
    }
    timeline.showTip(event, `${device.label} at ${clock(seconds)}`, lines);
  };
  const shown = parts.length ? [times, ...tops.reverse()] : [times, used];
  follow(timeline, plot, new uPlot(made, shown, panel));
  plot.tell(null);
  return plot;
}

function describe(timeline, part, values) {
  const names = { ollama: "Ollama", others: "others", rest: "not told apart", worker: part.name };
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

function drawKept(timeline, chart, total, edge, outstanding) {
  if (!total) return;
  inside(chart, (ctx, width) => {
    const [top, middle, bottom] = [total, edge, edge - outstanding].map((value) => chart.valToPos(value, "y"));
    ctx.fillStyle = timeline.palette.buffer;
    ctx.fillRect(0, top, width, middle - top);
    ctx.fillStyle = timeline.palette.kept;
    ctx.fillRect(0, middle, width, bottom - middle);
  });
}

function drawLines(timeline, chart, lines) {
  inside(chart, (ctx, width) => {
    ctx.font = "600 11px system-ui, sans-serif";
    ctx.textAlign = "right";
    ctx.textBaseline = "alphabetic";
    const taken = [];
    for (const [value, colour, label, dash, shift] of lines) {
      const y = Math.round(chart.valToPos(value, "y")) + 0.5;
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
