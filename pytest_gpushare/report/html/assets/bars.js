// Tests as bars, a row for each worker, on the time axis of the VRAM above.

function testPlot(timeline) {
  const { data, tests } = timeline;
  const rows = data.workers.map((worker, number) => number).filter((number) => tests.of(number).length);
  if (!rows.length) return null;
  const row = rows.length > 24 ? 12 : rows.length > 12 ? 18 : 28;
  const plot = { paintKey: () => {}, tell: () => {} };
  const { panel, key } = frame(timeline, "Tests", "by worker");
  for (const [swatch, text] of [["passed", "passed (colour of its worker)"], ["failed", "failed"], ["skipped", "skipped"]]) {
    const item = element("li");
    item.append(element("i", undefined, `swatch ${swatch}`), text);
    key.append(item);
  }

  const phases = data.phases ?? [];
  const height = rows.length + (phases.length ? 1 : 0);
  const made = options(timeline, height * row + 28 + 8);
  made.scales.y = { range: [0, height], dir: -1 };
  made.axes[1] = {
    ...made.axes[1],
    grid: { show: false },
    splits: () => [...Array(height).keys()].map((at) => at + 0.5),
    values: () => [...rows.map((number) => data.workers[number].id), "Ollama"].slice(0, height),
    space: 1,
  };
  made.series = [{}, { points: { show: false } }];
  made.hooks.draw = [
    (chart) => drawEvents(timeline, chart, data.events, false),
    (chart) => drawBars(timeline, chart, rows, row),
    (chart) => drawPhases(timeline, chart, phases, rows.length * row + 2, row - 4),
  ];

  const under = (event) => {
    const box = plot.chart.over.getBoundingClientRect();
    const number = rows[Math.floor((event.clientY - box.top) / row)];
    if (number === undefined) return null;
    const near = plot.chart.posToVal(3, "x") - plot.chart.posToVal(0, "x");
    return tests.at(number, plot.chart.posToVal(event.clientX - box.left, "x"), near);
  };
  const phaseUnder = (event) => {
    const box = plot.chart.over.getBoundingClientRect();
    if (Math.floor((event.clientY - box.top) / row) !== rows.length) return null;
    const at = plot.chart.posToVal(event.clientX - box.left, "x");
    return phases.find((phase) => phase.start <= at && at < phase.end) ?? null;
  };
  plot.hover = (event) => {
    const test = under(event);
    const phase = test === null ? phaseUnder(event) : null;
    plot.chart.over.style.cursor = test === null ? "" : "pointer";
    if (phase) timeline.showTip(event, phase.model, [["ollama", "loaded for its tests", clock(phase.end - phase.start)]]);
    else if (test === null) timeline.hideTip();
    else timeline.showTip(event, tests.full(test), tests.lines(test));
  };
  plot.click = (event) => {
    const test = under(event);
    if (test === null) return;
    timeline.marked = test;
    plot.chart.redraw(false, false);
    timeline.chosen(test);
  };
  follow(timeline, plot, new uPlot(made, [[0, timeline.length], [null, null]], panel));
  return plot;
}

function drawBars(timeline, chart, rows, row) {
  const { tests, palette } = timeline;
  const { min, max } = timeline.view;
  inside(chart, (ctx, width) => {
    ctx.font = "11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    ctx.textAlign = "left";
    rows.forEach((number, at) => {
      const [top, height] = [at * row + 2, row - 4];
      const colour = palette[workerClass(timeline.data.workers[number])];
      const own = tests.of(number);
      let painted = -1;
      // From the test that may reach into the view.
      for (let index = Math.max(0, tests.before(number, min)); index < own.length; index++) {
        const test = own[index];
        if (tests.start[test] > max) break;
        const left = Math.max(-2, chart.valToPos(tests.start[test], "x"));
        const right = Math.min(width + 2, chart.valToPos(tests.end(test), "x"));
        const wrong = tests.isWrong(test);
        // Thousands of bars in a pixel are one, unless one of them failed.
        if (right < painted + 0.5 && !wrong && test !== timeline.marked) continue;
        painted = right;
        const wide = Math.max(1, right - left - (right - left > 3 ? 1 : 0));
        drawBar(ctx, palette, wrong ? null : colour, tests.outcome[test], left, top, wide, height);
        if (wide > 60) drawName(ctx, palette, tests, test, colour, Math.max(0, left), top + height / 2, left + wide);
        if (test === timeline.marked) {
          ctx.strokeStyle = palette.text;
          ctx.lineWidth = 2;
          ctx.strokeRect(left - 1, top - 1, Math.max(4, wide + 2), height + 2);
        }
      }
    });
  });
}

// Bands while a model is loaded for its tests.
function drawPhases(timeline, chart, phases, top, height) {
  const { palette } = timeline;
  inside(chart, (ctx, width) => {
    ctx.font = "11px system-ui, sans-serif";
    ctx.textAlign = "left";
    ctx.textBaseline = "middle";
    for (const phase of phases) {
      const left = Math.max(0, chart.valToPos(phase.start, "x"));
      const right = Math.min(width, chart.valToPos(phase.end, "x"));
      if (right <= left) continue;
      ctx.fillStyle = palette.ollama;
      ctx.fillRect(left, top, Math.max(1, right - left - 1), height);
      ctx.save();
      ctx.beginPath();
      ctx.rect(left, top, Math.max(0, right - left - 4), height);
      ctx.clip();
      ctx.fillStyle = inkOn(palette.ollama);
      ctx.fillText(phase.model, left + 6, top + height / 2);
      ctx.restore();
    }
  });
}

// A test that went wrong has no colour of its worker.
function drawBar(ctx, palette, colour, outcome, left, top, wide, height) {
  if (outcome === "skipped") {
    ctx.strokeStyle = palette.dim;
    ctx.lineWidth = 1;
    ctx.strokeRect(left + 0.5, top + 0.5, Math.max(0.5, wide - 1), height - 1);
    return;
  }
  ctx.fillStyle = colour ?? palette.bad;
  ctx.fillRect(left, top, wide, height);
  if (colour) return;
  // A cross of the panel's colour, so that it differs by more than its hue.
  const middle = left + wide / 2;
  ctx.strokeStyle = palette.panel;
  ctx.lineWidth = 1.5;
  ctx.beginPath();
  for (const slope of [1, -1]) {
    const half = Math.min(4, wide / 2 - 1);
    if (half < 2 || wide > 60) break;
    ctx.moveTo(middle - half, top + height / 2 - half * slope);
    ctx.lineTo(middle + half, top + height / 2 + half * slope);
  }
  ctx.stroke();
  if (wide < 6) {
    ctx.beginPath();
    ctx.moveTo(middle - 4, top - 2);
    ctx.lineTo(middle + 4, top - 2);
    ctx.lineTo(middle, top + 5);
    ctx.fill();
  }
}

function drawName(ctx, palette, tests, test, colour, left, middle, right) {
  const outcome = tests.outcome[test];
  const fill = tests.isWrong(test) ? palette.bad : colour;
  ctx.save();
  ctx.beginPath();
  ctx.rect(left, middle - 10, right - left - 4, 20);
  ctx.clip();
  ctx.fillStyle = outcome === "skipped" ? palette.dim : inkOn(fill);
  const sign = tests.isWrong(test) ? "✕ " : "";
  ctx.fillText(sign + tests.short(test), left + 6, middle);
  ctx.restore();
}

// Black or white, whichever is easier to read on a colour written as #rrggbb.
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 150 ? "#10151c" : "#ffffff";
}
