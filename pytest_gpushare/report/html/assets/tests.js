// The tests, in columns, and by worker and time.

const WRONG = new Set(["failed", "error", "crashed"]);

class Tests {
  constructor(data) {
    const held = data.tests;
    this.count = held.count;
    this.workers = data.workers;
    this.files = held.files;
    for (const name of ["file", "name", "worker", "start", "took", "notes", "outcome"]) {
      this[name] = column(held[name], held.count);
    }
    for (const name of ["need", "peak", "left"]) this[name] = column(held[`${name}_bytes`], held.count);
    this.needSource = column(held.need_source, held.count);
    this.peakSource = column(held.peak_source, held.count);
    this.least = column(held.least, held.count);
    this.waited = column(held.waited_s, held.count);
    this.attempts = column(held.attempts, held.count);
    this.mostPeak = reduceMost(this.peak);
    // By worker and start, to find the one at a moment.
    this.rows = data.workers.map(() => []);
    for (let test = 0; test < this.count; test++) {
      if (this.start[test] !== null && this.worker[test] !== null) this.rows[this.worker[test]].push(test);
    }
    for (const row of this.rows) row.sort((one, other) => this.start[one] - this.start[other]);
    this.starts = this.rows.map((row) => row.map((test) => this.start[test]));
  }

  full(test) {
    return this.files[this.file[test]] + this.name[test];
  }

  short(test) {
    return this.name[test].slice(this.name[test].lastIndexOf("::", this.name[test].indexOf("[") >>> 0) + 2) || this.full(test);
  }

  end(test) {
    return this.start[test] + (this.took[test] ?? 0);
  }

  isWrong(test) {
    return WRONG.has(this.outcome[test]);
  }

  of(worker) {
    return this.rows[worker];
  }

  before(worker, seconds) {
    return indexBefore(this.starts[worker], seconds);
  }

  at(worker, seconds, near) {
    const own = this.rows[worker];
    const index = this.before(worker, seconds);
    for (const test of [own[index], own[index + 1]]) {
      if (test === undefined) continue;
      if (this.start[test] - near <= seconds && seconds <= this.end(test) + near) return test;
    }
    return null;
  }

  workerName(test) {
    return this.workers[this.worker[test]]?.id ?? UNKNOWN;
  }

  // A lower bound is shown as one.
  peakText(test) {
    return `${this.least[test] ? "at least " : ""}${size(this.peak[test])}`;
  }

  // For the box beside the pointer.
  lines(test) {
    const lines = [
      [WRONG.has(this.outcome[test]) ? "failed" : null, `${this.outcome[test]} on ${this.workerName(test)}`, span(this.took[test])],
      [null, "started", clock(this.start[test])],
    ];
    const from = (source) => (source ? ` (${source})` : "");
    if (this.need[test] !== null) lines.push([null, `need${from(this.needSource[test])}`, size(this.need[test])]);
    lines.push([null, `peak${from(this.peakSource[test])}`, this.peakText(test)]);
    if (this.left[test]) lines.push([null, "left behind", size(this.left[test])]);
    if (this.waited[test]) lines.push([null, "waited for VRAM or its model", span(this.waited[test])]);
    if (this.attempts[test] > 1) lines.push([null, "attempts", String(this.attempts[test])]);
    if (this.notes[test]) lines.push([null, this.notes[test]]);
    return lines;
  }
}
