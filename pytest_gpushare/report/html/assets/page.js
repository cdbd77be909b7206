// Reads the data and puts the parts together.

// Of the timeline on a page of A4 or Letter, in CSS pixels.
const PAPER = 660;

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tests = new Tests(data);
  const charts = document.getElementById("charts");
  const timeline = charts ? new Timeline(charts, data, tests) : null;
  const jump = (test) => timeline?.show(tests.start[test], tests.end(test), test);
  const root = document.getElementById("test-table");
  const table = root ? new Table(root, tests, jump) : null;
  if (timeline) {
    timeline.chosen = (test) => table?.choose(test);
    if (table) timeline.watchers.push((view) => table.setView(view));
    timeline.setView(0, timeline.length);
    for (const button of document.querySelectorAll("#events [data-at]")) {
      button.addEventListener("click", () => timeline.show(Number(button.dataset.at), Number(button.dataset.at)));
    }
    fit(timeline, charts);
  }
  print(timeline, table);
  document.documentElement.dataset.ready = "true";
}

// The width of the window, and its theme.
function fit(timeline, charts) {
  new ResizeObserver(() => {
    if (!document.documentElement.classList.contains("printing")) timeline.resize(timeline.width());
  }).observe(charts);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => timeline.repaint());
}

// Paper is light, narrow and short.
function print(timeline, table) {
  const change = (begins) => {
    document.documentElement.classList.toggle("printing", begins);
    table?.print(begins);
    if (!timeline) return;
    timeline.hideTip();
    timeline.repaint();
    timeline.resize(begins ? PAPER : timeline.width());
  };
  addEventListener("beforeprint", () => change(true));
  addEventListener("afterprint", () => change(false));
}

start();
