// The table of tests, which sorts and filters.

const FIRST_ROWS = 100;
const MORE_ROWS = 500;
const PRINTED_ROWS = 40;

// Columns: what to sort by, how to write it, and whether the largest comes first.
function columnsOf(tests) {
  const bytes = (values) => (cell, test) => {
    cell.textContent = values[test] === null ? "–" : values[test] ? size(values[test]) : "0";
    if (values[test] !== null) cell.dataset.bytes = values[test];
  };
  return [
    { name: "test", values: null, write: (cell, test) => writeName(cell, tests, test) },
    { name: "worker", values: tests.worker, write: (cell, test) => writeWorker(cell, tests, test) },
    { name: "outcome", values: tests.outcome, write: (cell, test) => writeOutcome(cell, tests, test) },
    { name: "start", values: tests.start, write: (cell, test, jump) => writeStart(cell, tests, test, jump) },
    { name: "took", values: tests.took, down: true, write: (cell, test) => (cell.textContent = span(tests.took[test])) },
    { name: "peak", values: tests.peak, down: true, write: (cell, test) => writePeak(cell, tests, test) },
    { name: "need", values: tests.need, down: true, wide: true, write: bytes(tests.need) },
    { name: "left", values: tests.left, down: true, wide: true, write: bytes(tests.left), title: "VRAM left behind" },
    { name: "waited", values: tests.waited, down: true, wide: true, write: (cell, test) => (cell.textContent = tests.waited[test] ? span(tests.waited[test]) : "–"), title: "waited for VRAM or for its model before it started" },
  ];
}

function writeName(cell, tests, test) {
  const name = element("bdi", undefined, "nodeid");
  name.title = tests.full(test);
  name.append(element("span", tests.files[tests.file[test]], "file"), tests.name[test]);
  cell.append(name);
  const notes = [tests.notes[test], tests.attempts[test] > 1 ? `${tests.attempts[test]} attempts` : ""].filter(Boolean);
  if (notes.length) cell.append(element("small", notes.join("; ")));
}

function writeWorker(cell, tests, test) {
  const worker = tests.workers[tests.worker[test]];
  if (worker) cell.append(element("i", undefined, `swatch ${workerClass(worker)}`));
  cell.append(tests.workerName(test));
}

function writeOutcome(cell, tests, test) {
  const signs = { passed: "✓", xpassed: "✓", skipped: "○", xfailed: "○" };
  cell.className = tests.isWrong(test) ? "bad" : signs[tests.outcome[test]] === "○" ? "dim" : "good";
  cell.append(element("span", tests.isWrong(test) ? "✕" : (signs[tests.outcome[test]] ?? "?")), ` ${tests.outcome[test]}`);
  cell.firstChild.setAttribute("aria-hidden", "true");
}

function writeStart(cell, tests, test, jump) {
  if (tests.start[test] === null) {
    cell.textContent = UNKNOWN;
    return;
  }
  const button = element("button", clock(tests.start[test]));
  button.type = "button";
  button.title = "Show on the timeline";
  button.addEventListener("click", () => jump(test));
  cell.append(button);
}

function writePeak(cell, tests, test) {
  const peak = tests.peak[test];
  cell.append(element("b", peak === null ? (tests.need[test] === null ? "–" : UNKNOWN) : tests.peakText(test)));
  if (peak === null) return;
  cell.dataset.bytes = peak;
  cell.title = `${peak} bytes, measured by ${tests.peakSource[test] ?? UNKNOWN}`;
  const bar = element("span", undefined, `peak-bar ${workerClass(tests.workers[tests.worker[test]])}`);
  bar.style.width = `${tests.mostPeak ? (100 * peak) / tests.mostPeak : 0}%`;
  const track = element("span", undefined, "peak-track");
  track.append(bar);
  cell.append(track);
}

class Table {
  constructor(root, tests, jump) {
    this.tests = tests;
    this.jump = jump;
    this.columns = columnsOf(tests);
    this.limit = FIRST_ROWS;
    this.view = null;
    this.chosen = null;
    // The hungriest first; where no peak is known the longest.
    this.sorted = this.columns[tests.mostPeak ? 5 : 4];
    this.down = true;
    this.body = element("tbody");
    root.append(this.head(), this.body);
    // On small screens its rows are boxes, and browsers would no longer call it a table.
    for (const [part, role] of [[root, "table"], [root.tHead, "rowgroup"], [this.body, "rowgroup"], [root.tHead.rows[0], "row"]]) part.setAttribute("role", role);
    this.controls();
    this.fill();
  }

  head() {
    const head = element("thead");
    const row = element("tr");
    for (const held of this.columns) {
      const cell = element("th", undefined, held.wide ? "wide" : "");
      cell.scope = "col";
      cell.setAttribute("role", "columnheader");
      const button = element("button", held.name);
      button.type = "button";
      if (held.title) button.title = held.title;
      button.addEventListener("click", () => {
        this.down = this.sorted === held ? !this.down : Boolean(held.down);
        this.sorted = held;
        this.fill();
      });
      cell.append(button);
      row.append(cell);
      held.cell = cell;
    }
    head.append(row);
    return head;
  }

  controls() {
    const find = (id) => document.getElementById(id);
    const [text, outcome, worker, inView] = ["find", "outcome", "worker", "in-view"].map(find);
    const choose = (select, values) => {
      for (const value of values) {
        const option = element("option", value);
        option.value = value;
        select.append(option);
      }
    };
    choose(outcome, [...new Set(this.tests.outcome)].sort());
    choose(worker, this.tests.workers.map((held) => held.id));
    this.filters = { text, outcome, worker, inView };
    const anew = () => {
      this.limit = FIRST_ROWS;
      this.fill();
    };
    let later;
    text.addEventListener("input", () => {
      clearTimeout(later);
      later = setTimeout(anew, this.tests.count > 2000 ? 120 : 0);
    });
    for (const control of [outcome, worker, inView]) control.addEventListener("change", anew);
    [this.more, this.every] = ["more", "every"].map(find);
    this.more.addEventListener("click", () => {
      this.limit += MORE_ROWS;
      this.fill();
    });
    this.every.addEventListener("click", () => {
      this.limit = Infinity;
      this.fill();
    });
    this.shown = find("shown");
  }

  matching() {
    const { tests, filters } = this;
    const words = filters.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && !this.lower) this.lower = Array.from({ length: tests.count }, (_, test) => tests.full(test).toLowerCase());
    const view = filters.inView.checked ? this.view : null;
    const found = [];
    for (let test = 0; test < tests.count; test++) {
      if (filters.outcome.value && tests.outcome[test] !== filters.outcome.value) continue;
      if (filters.worker.value && tests.workerName(test) !== filters.worker.value) continue;
      if (view && (tests.start[test] === null || tests.start[test] > view.max || tests.end(test) < view.min)) continue;
      if (words.every((word) => this.lower[test].includes(word))) found.push(test);
    }
    return found;
  }

  order(found) {
    const sign = this.down ? -1 : 1;
    const { values } = this.sorted;
    if (!values) {
      const collator = new Intl.Collator("en", { numeric: true });
      const names = new Map(found.map((test) => [test, this.tests.full(test)]));
      return found.sort((one, other) => sign * collator.compare(names.get(one), names.get(other)));
    }
    return found.sort((one, other) => {
      const [first, second] = [values[one], values[other]];
      // What is unknown stands last, whichever way.
      if (first === null || second === null) return (first === null) - (second === null);
      return first < second ? -sign : first > second ? sign : one - other;
    });
  }

  fill() {
    const found = this.order(this.matching());
    if (this.chosen !== null) {
      const at = found.indexOf(this.chosen);
      if (at >= this.limit) this.limit = at + 1;
    }
    const rows = found.slice(0, this.limit);
    this.body.replaceChildren(...rows.map((test) => this.row(test)));
    for (const held of this.columns) {
      if (held === this.sorted) held.cell.setAttribute("aria-sort", this.down ? "descending" : "ascending");
      else held.cell.removeAttribute("aria-sort");
    }
    const count = (number) => number.toLocaleString("en");
    this.shown.textContent =
      `${count(rows.length)} of ${count(found.length)} tests` +
      (found.length < this.tests.count ? `, filtered from ${count(this.tests.count)}` : "");
    this.more.hidden = this.every.hidden = rows.length === found.length;
  }

  row(test) {
    const row = element("tr", undefined, test === this.chosen ? "chosen" : "");
    row.dataset.test = test;
    row.setAttribute("role", "row");
    for (const held of this.columns) {
      const cell = element("td");
      cell.setAttribute("role", "cell");
      held.write(cell, test, this.jump);
      if (held.wide) cell.classList.add("wide");
      row.append(cell);
    }
    return row;
  }

  choose(test) {
    this.chosen = test;
    const hidden = !this.matching().includes(test);
    if (hidden) {
      const { text, outcome, worker, inView } = this.filters;
      text.value = outcome.value = worker.value = "";
      inView.checked = false;
    }
    this.fill();
    this.body.querySelector(".chosen")?.scrollIntoView({ block: "center" });
  }

  // Paper takes the first rows; all of them are in the JSON report.
  print(begins) {
    if (begins) this.before = this.limit;
    this.limit = begins ? Math.min(this.limit, PRINTED_ROWS) : this.before;
    this.fill();
  }

  setView(view) {
    this.view = view;
    if (this.filters.inView.checked) this.fill();
  }
}
