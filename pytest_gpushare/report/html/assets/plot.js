// What all plots of the timeline have in common.

const AXIS = 62;
const SECONDS = [
  0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200,
  10800, 21600, 43200, 86400, 172800, 604800,
];
const MEBIBYTES = [16, 64, 128, 256, 512, 1024, 2048, 4096, 6144, 8192, 16384, 20480, 40960, 81920];

// Options that all plots share: one time axis, one pointer, one zoom.
function options(timeline, height) {
  const axis = {
    stroke: () => timeline.palette.dim,
    grid: { stroke: () => timeline.palette.grid, width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
  };
  return {
    width: timeline.width(),
    height,
    padding: [8, 12, 0, 0],
    legend: { show: false },
    axes: [
      {
        ...axis,
        incrs: SECONDS,
        space: 80,
        size: 28,
        values: (chart, splits, index, space, step) => splits.map((at) => tick(at, step)),
      },
      { ...axis, size: AXIS },
    ],
    scales: { x: { time: false, range: () => [timeline.view.min, timeline.view.max] } },
    cursor: {
      y: false,
      points: { show: false },
      drag: { x: true, y: false, setScale: false, dist: 4 },
      bind: { dblclick: () => () => timeline.zoom("all") },
    },
    hooks: {
      setSelect: [
        (chart) => {
          const { left, width } = chart.select;
          if (width < 4) return;
          const [from, to] = [chart.posToVal(left, "x"), chart.posToVal(left + width, "x")];
          chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
          timeline.setView(from, to);
        },
      ],
    },
  };
}

function tick(seconds, step) {
  if (step < 1) return clock(seconds).includes(":") && step < 0.1 ? `${seconds.toFixed(2)} s` : clock(seconds);
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const whole = Math.round(seconds);
  if (step >= 60 && whole >= 3600) return `${Math.floor(whole / 3600)}:${two((whole / 60) % 60)} h`;
  if (whole >= 3600) return `${Math.floor(whole / 3600)}:${two((whole / 60) % 60)}:${two(whole % 60)}`;
  return `${Math.floor(whole / 60)}:${two(whole % 60)}`;
}

// The pointer over one plot moves the line in all.
function follow(timeline, plot, chart) {
  plot.chart = chart;
  chart.over.addEventListener("mousemove", (event) => {
    const left = event.clientX - chart.over.getBoundingClientRect().left;
    timeline.point(Math.min(Math.max(chart.posToVal(left, "x"), 0), timeline.length), plot);
    plot.hover(event);
  });
  chart.over.addEventListener("mouseleave", () => {
    timeline.point(null, plot);
    timeline.hideTip();
  });
  chart.over.addEventListener("click", (event) => plot.click(event));
}

// The frame of a plot: its caption with a key that also tells the figures.
function frame(timeline, title, name) {
  const panel = element("div", undefined, "panel");
  const caption = element("div", undefined, "caption");
  const head = element("h3");
  head.append(element("b", title), ` ${name}`);
  const key = element("ul", undefined, "key");
  caption.append(head, key);
  panel.append(caption);
  timeline.root.append(panel);
  return { panel, key };
}

// Inside the plot's own field, in CSS pixels from its corner.
function inside(chart, draw) {
  const { ctx, bbox } = chart;
  const ratio = uPlot.pxRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.translate(bbox.left, bbox.top);
  ctx.scale(ratio, ratio);
  draw(ctx, bbox.width / ratio, bbox.height / ratio);
  ctx.restore();
}

// Moments of events, as lines through the plot.
function drawEvents(timeline, chart, events, signs) {
  inside(chart, (ctx, width, height) => {
    for (const event of events) {
      const x = chart.valToPos(event.at, "x");
      if (x < -8 || x > width + 8) continue;
      ctx.strokeStyle = ctx.fillStyle = timeline.palette[event.state];
      ctx.setLineDash([2, 3]);
      ctx.lineWidth = event.state === "bad" ? 1.5 : 1;
      ctx.beginPath();
      ctx.moveTo(x, 0);
      ctx.lineTo(x, height);
      ctx.stroke();
      ctx.setLineDash([]);
      if (signs) drawSign(ctx, event.state, x);
    }
  });
}

// Each kind has a shape too, as colour alone does not tell everybody.
function drawSign(ctx, state, x) {
  ctx.beginPath();
  if (state === "bad") {
    ctx.moveTo(x - 6, 0);
    ctx.lineTo(x + 6, 0);
    ctx.lineTo(x, 10);
  } else if (state === "warning") {
    ctx.moveTo(x, 0);
    ctx.lineTo(x + 5, 6);
    ctx.lineTo(x, 12);
    ctx.lineTo(x - 5, 6);
  } else ctx.arc(x, 6, 4.5, 0, 2 * Math.PI);
  ctx.fill();
}
