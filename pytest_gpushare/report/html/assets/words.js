// How figures are written; the same words as in words.py.

const UNKNOWN = "unknown";
const MB = 1024 ** 2;
const GB = 1024 ** 3;

// As Python rounds: what lies exactly between two goes to the even one. Only multiples of an
// eighth can lie so; toFixed would round them up.
function fixed(value, digits) {
  if (!Number.isInteger(value * 8)) return value.toFixed(digits);
  const scaled = value * 10 ** digits;
  const floor = Math.floor(scaled);
  const up = scaled - floor > 0.5 || (scaled - floor === 0.5 && floor % 2 !== 0);
  return ((up ? floor + 1 : floor) / 10 ** digits).toFixed(digits);
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return UNKNOWN;
  if (bytes > 0 && bytes < GB / 10) return `${Math.max(1, fixed(bytes / MB, 0))} MB`;
  const text = fixed(bytes / GB, 2);
  return `${text.endsWith("0") ? text.slice(0, -1) : text} GB`;
}

function span(seconds) {
  if (seconds === null || seconds === undefined) return UNKNOWN;
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  if (seconds < 0.1) return `${fixed(seconds * 1000, 0)} ms`;
  if (seconds < 60) return `${fixed(seconds, seconds < 10 ? 2 : 1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${two(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${two((seconds % 3600) / 60)} min`;
}

function clock(seconds) {
  if (seconds === null || seconds === undefined) return UNKNOWN;
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  if (seconds < 3600) {
    const tenths = Math.floor(seconds * 10);
    return `${Math.floor(tenths / 600)}:${two((tenths / 10) % 60)}.${tenths % 10}`;
  }
  return `${Math.floor(seconds / 3600)}:${two((seconds / 60) % 60)}:${two(seconds % 60)}`;
}

// An element with text: never HTML, as names come from elsewhere.
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// --- columns, as data.py writes them ---

function column(held, count) {
  if (Array.isArray(held)) return held;
  if (held && held.words) return held.of.map((index) => held.words[index]);
  return new Array(count).fill(held ? held.all : null);
}

function sums(differences, factor) {
  let before = 0;
  return differences.map((step) => (step === null ? null : (before += step) * factor));
}

// The last index whose value is not above the wanted one, or -1; of ascending values.
function indexBefore(values, wanted) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= wanted) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}
