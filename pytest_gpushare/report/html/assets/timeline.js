// The timeline: VRAM of each device, stacked, and under it the tests of each worker.

class Timeline {
  constructor(root, data, tests) {
    this.root = root;
    this.data = data;
    this.tests = tests;
    this.length = Math.max(data.duration, 0.1);
    this.view = { min: 0, max: this.length };
    this.marked = null;
    this.moment = null;
    this.watchers = [];
    this.chosen = () => {};
    this.tip = element("div", undefined, "tip");
    this.tip.hidden = true;
    document.body.append(this.tip);
    this.palette = readPalette();
    this.plots = [];
    const shown = data.devices.filter((device) => device.samples);
    const height = shown.length > 3 ? 150 : shown.length > 1 ? 200 : 280;
    for (const device of data.devices) {
      if (device.samples) this.plots.push(vramPlot(this, device, height));
      else root.append(element("p", `${device.label}: no samples, its VRAM over time is unknown.`));
    }
    const bars = testPlot(this);
    if (bars) this.plots.push(bars);
    this.listen();
  }

  width() {
    return Math.max(280, this.root.clientWidth);
  }

  resize(width) {
    for (const plot of this.plots) plot.chart.setSize({ width, height: plot.chart.height });
  }

  repaint() {
    this.palette = readPalette();
    for (const plot of this.plots) {
      plot.paintKey();
      plot.chart.redraw(false, true);
    }
  }

  setView(min, max) {
    const least = Math.max(0.05, this.length * 1e-5);
    const wide = Math.min(this.length, Math.max(least, max - min));
    const from = Math.min(Math.max(0, (min + max - wide) / 2), this.length - wide);
    this.view = { min: from, max: from + wide };
    for (const plot of this.plots) plot.chart.setScale("x", this.view);
    this.root.dataset.from = this.view.min;
    this.root.dataset.to = this.view.max;
    for (const watcher of this.watchers) watcher(this.view);
  }

  zoom(how, around) {
    const { min, max } = this.view;
    const wide = max - min;
    const middle = around ?? this.moment ?? (min + max) / 2;
    const at = middle < min || middle > max ? 0.5 : (middle - min) / wide;
    const to = (wanted) => {
      const next = Math.min(this.length, wanted);
      const from = min + at * (wide - next);
      this.setView(from, from + next);
    };
    if (how === "all") this.setView(0, this.length);
    else if (how === "in") to(wide / 2);
    else if (how === "out") to(wide * 2);
    else {
      const step = (how === "on" ? 1 : -1) * Math.min(wide / 2, how === "on" ? this.length - max : min);
      this.setView(min + step, max + step);
    }
  }

  // Zoom so that a span of time is seen with its surroundings.
  show(from, to, test) {
    this.marked = test ?? null;
    const around = Math.max((to - from) * 1.5, Math.min(5, this.length / 20));
    this.setView(from - around, to + around);
    this.point(from);
    this.root.scrollIntoView({ block: "nearest" });
  }

  point(seconds, source) {
    this.moment = seconds;
    for (const plot of this.plots) {
      const left = seconds === null ? -10 : plot.chart.valToPos(seconds, "x");
      if (plot !== source) plot.chart.setCursor({ left, top: seconds === null ? -10 : 0 }, false);
      plot.tell(seconds);
    }
  }

  // The tests that run at a moment, on one device or anywhere.
  running(seconds, uuid) {
    const found = [];
    this.data.workers.forEach((worker, number) => {
      if (uuid && worker.device !== uuid) return;
      const test = this.tests.at(number, seconds, 0);
      if (test !== null) found.push([worker, test]);
    });
    return found;
  }

  listen() {
    this.root.tabIndex = 0;
    this.root.setAttribute("role", "group");
    this.root.setAttribute(
      "aria-label",
      "Timeline. Arrows move through time, plus and minus zoom, 0 shows the whole run.",
    );
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener(
      "wheel",
      (event) => {
        // Without the key the wheel scrolls the page; pinching on a touchpad comes with it.
        if (!event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        this.zoom(event.deltaY < 0 ? "in" : "out");
      },
      { passive: false },
    );
    document.querySelectorAll("[data-zoom]").forEach((button) => {
      button.addEventListener("click", () => this.zoom(button.dataset.zoom));
    });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { min, max } = this.view;
    const step = ((max - min) / 100) * (event.shiftKey ? 10 : 1);
    const moves = { ArrowLeft: -step, ArrowRight: step };
    const zooms = { "+": "in", "=": "in", "-": "out", 0: "all", Escape: "all" };
    if (event.key in moves) {
      const from = this.moment ?? (moves[event.key] > 0 ? min : max);
      const next = Math.min(Math.max(from + moves[event.key], 0), this.length);
      if (next < min || next > max) this.setView(min + next - from, max + next - from);
      this.point(next);
      this.say(next);
    } else if (event.key in zooms) {
      if (event.key === "Escape") this.marked = null;
      this.zoom(zooms[event.key]);
    } else return;
    event.preventDefault();
  }

  // For those who cannot see the pointer.
  say(seconds) {
    const parts = [clock(seconds)];
    for (const plot of this.plots) if (plot.spoken) parts.push(plot.spoken(seconds));
    for (const [worker, test] of this.running(seconds)) {
      parts.push(`${worker.id} runs ${this.tests.full(test)}`);
    }
    document.getElementById("moment").textContent = parts.join("; ");
  }

  // The box beside the pointer: lines of [swatch class or null, name, figure].
  showTip(event, head, lines) {
    const box = this.tip;
    box.replaceChildren(element("b", head));
    for (const [swatch, name, figure] of lines) {
      const line = element("div");
      if (swatch) line.append(element("i", undefined, `swatch ${swatch}`));
      line.append(element("span", name));
      if (figure) line.append(element("b", figure));
      box.append(line);
    }
    box.hidden = false;
    const { clientWidth: width, clientHeight: height } = document.documentElement;
    const left = event.clientX + 16 + box.offsetWidth > width ? event.clientX - 16 - box.offsetWidth : event.clientX + 16;
    const top = Math.min(event.clientY + 16, height - box.offsetHeight - 8);
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${Math.max(4, top)}px`;
  }

  hideTip() {
    this.tip.hidden = true;
  }
}

// Canvas knows no stylesheet: its colours are read from there, anew for each theme.
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  return new Proxy({}, { get: (held, name) => (held[name] ??= style.getPropertyValue(`--${String(name)}`).trim()) });
}

function workerClass(worker) {
  return worker && worker.colour !== null ? `worker-${worker.colour}` : "cpu";
}
