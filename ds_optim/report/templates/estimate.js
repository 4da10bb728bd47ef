"use strict";
// The sums of ds_optim/memory/rank.py and passes.py, in whole bytes; what is given comes from ds_optim/memory/grid.py.

const data = JSON.parse(document.getElementById("data").textContent);
const GIB = 2 ** 30;

function memoryAt(at, column) {
  const dtype = column.momenta.includes(at.momentum) ? at.momentum : column.momenta[0];
  const numbers = data.memories[`${at.stage}/${at.ranks}/${column.name}/${dtype}`];
  const m = Object.fromEntries(data.fields.map((field, number) => [field, numbers[number]]));
  const offloaded = m.host || m.files;
  m.gradients_here = offloaded ? 0 : m.before_step;
  m.model_states = m.weights + m.before_step + m.master + m.optimizer_state;
  m.most_model_states = m.model_states + m.accumulating;
  m.steady = m.model_states + m.scalars - m.host - m.files - m.gradients_here;
  m.step_buckets = m.persistent_buckets ? m.early_buckets : 0;
  m.scratch = m.step_gradients + m.exchange + m.chunks;
  m.step = m.steady + m.gradients_here + m.scratch + m.step_buckets;
  return m;
}

// From one sequence to the next each moment grows by as much, from two on: of a single one some kernels make no copy.
function passesOf(sequences) {
  if (!data.passes) return { short: 0, moments: [] };
  if (sequences === 1) return data.passes[1];
  const two = data.passes[2], three = data.passes[3];
  const at = (first, second) => first + (sequences - 2) * (second - first);
  return {
    short: at(two.short, three.short),
    moments: two.moments.map(([held, made, logits], number) => {
      const [more, , wider] = three.moments[number];
      return [at(held, more), made, at(logits, wider)];
    }),
  };
}

function atOnce(m, done, gathered, [held, , logits]) {
  const reduced = m.reduced_last ? done >= 1 : done > 0;
  const own = Math.min(1, Math.max(0, (done - m.first) / (m.last - m.first)));
  return {
    gradients: m.backward_gradients + Math.trunc(own * m.more_gradients),
    buckets: reduced ? m.buckets : m.early_buckets,
    gathered, logits, activations: held - logits,
  };
}

const total = (parts) => Object.values(parts).reduce((sum, bytes) => sum + bytes, 0);

function fullest(m, passes) {
  if (!passes.moments.length) return atOnce(m, 1, m.gathered, [0, 0, 0]);
  const all = Math.max(1, ...passes.moments.map(([, made]) => made));
  let most = null;
  for (const moment of passes.moments) {
    const done = moment[1] / all;
    const left = Math.trunc((1 - done) * m.whole) + m.ahead; // what backward has passed is cut again
    const now = atOnce(m, done, Math.min(m.gathered, left), moment);
    if (!most || total(now) > total(most)) most = now;
  }
  return most;
}

function atPeak(m, passes) {
  const owners = { weights: m.weights, states: m.steady - m.weights };
  const now = fullest(m, passes);
  if (m.step > m.steady + total(now)) {
    return { ...owners, gradients: m.gradients_here, buckets: m.step_buckets, step: m.scratch };
  }
  return { ...owners, ...now };
}

const fits = (m, passes, bytes) => total(atPeak(m, passes)) + passes.short <= bytes * data.usable;

function largestBatch(m, bytes) {
  if (!fits(m, passesOf(1), bytes)) return 0;
  let low = 1, high = 2 ** 20;
  while (low < high) {
    const middle = Math.floor((low + high + 1) / 2);
    if (fits(m, passesOf(middle), bytes)) low = middle; else high = middle - 1;
  }
  return low;
}

function estimates(at) {
  const passes = passesOf(at.batch);
  const found = data.columns.map((column) => {
    const m = memoryAt(at, column), parts = atPeak(m, passes), peak = total(parts);
    const row = { name: column.name, memory: m, parts, peak, fits: fits(m, passes, at.gpu * GIB) };
    return { ...row, largest: data.passes ? largestBatch(m, at.gpu * GIB) : null };
  });
  for (const row of found) {
    row.saved = { peak: found[0].peak - row.peak, states: found[0].memory.most_model_states - row.memory.most_model_states };
  }
  return found;
}

// ---------------------------------------------------------------------------------------------- what is shown

const OWNERS = {{ owners|tojson }};
const COLOURS = {{ colours|tojson }};
const LINES = [
  ["weights", (row) => row.memory.weights],
  ["gradients", (row) => row.memory.before_step + row.memory.accumulating],
  ["master weights", (row) => row.memory.master],
  ["optimizer state", (row) => row.memory.optimizer_state],
  ["model states", (row) => row.memory.most_model_states],
  ...Object.entries(OWNERS).filter(([owner]) => !["weights", "states"].includes(owner)).map(
    ([owner, { label }]) => [`${label} at the peak`, (row) => row.parts[owner] || 0]),
  ["peak", (row) => row.peak],
];
const field = (id) => document.getElementById(id);
function size(bytes) {
  let scaled = bytes, unit = 0;
  while (Math.abs(scaled) >= 1024 && unit < 4) { scaled /= 1024; unit += 1; }
  return `${Number(scaled.toPrecision(3)).toLocaleString("en", { useGrouping: false })} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}
const percent = (saved, base) => {
  const text = Math.abs((100 * saved) / base).toFixed(1);
  return `${text === "0.0" ? "" : saved < 0 ? "+" : "−"}${text} %`;
};

function element(tag, parent, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

function chosen() {
  return {
    stage: Number(document.querySelector("input[name=stage]:checked").value),
    ranks: data.ranks[Number(field("ranks").value)],
    momentum: field("momentum").value,
    batch: data.passes ? Number(field("batch").value) : 1,
    gpu: Number(field("gpu").value) || 1,
  };
}

function choose(at) {
  const radio = document.querySelector(`input[name=stage][value="${at.stage}"]`);
  (radio || document.querySelector("input[name=stage]")).checked = true;
  field("ranks").value = Math.max(0, data.ranks.indexOf(Number(at.ranks)));
  field("momentum").value = data.momenta.includes(at.momentum) ? at.momentum : data.momenta[0];
  if (data.passes) field("batch").value = at.batch;
  field("gpu").value = at.gpu;
}

function show() {
  const at = chosen(), rows = estimates(at), base = rows[0];
  field("ranks-said").textContent = at.ranks.toLocaleString("en");
  if (data.passes) field("batch-said").textContent = at.batch;
  const others = rows.slice(1).map((row) =>
    `${row.name}: model states ${percent(row.saved.states, base.memory.most_model_states)}, ` +
    `peak ${percent(row.saved.peak, base.peak)} (${size(row.peak)}, which ${row.fits ? "fits" : "does not fit"})`);
  const said = `ZeRO-${at.stage}, ${at.ranks} rank${at.ranks > 1 ? "s" : ""}, against ${base.name}'s ` +
    `${size(base.peak)}, which ${base.fits ? "fits" : "does not fit"} in ${at.gpu} GiB: ${others.join("; ")}.`;
  field("said").textContent = said;
  drawBars(at, rows, said);
  field("heads").replaceChildren();
  for (const head of ["", ...rows.map((row) => row.name)]) element("th", field("heads"), head, head ? { class: "number" } : {});
  field("lines").replaceChildren();
  const lines = [...LINES.map(([name, of]) => [name, of, size])];
  if (data.passes) lines.push(["largest micro-batch", (row) => row.largest, String]);
  for (const [name, of, said] of lines) {
    const line = element("tr", field("lines"));
    element("td", line, name);
    for (const row of rows) element("td", line, said(of(row)), { class: "number", "data-title": row.name, "data-value": of(row) });
  }
  history.replaceState(null, "", `#${new URLSearchParams(at)}`);
}

function drawBars(at, rows, said) {
  const bars = field("bars"), limit = at.gpu * GIB;
  const width = Math.max(limit, ...rows.map((row) => row.peak)) * 1.02;
  bars.replaceChildren();
  bars.setAttribute("aria-label", said);
  for (const row of rows) {
    const bar = element("div", bars, "", { class: "bar" });
    element("span", bar, row.name, { style: `border-left: .6rem solid ${COLOURS[row.name]}` });
    const track = element("div", bar, "", { class: "track" });
    for (const [owner, bytes] of Object.entries(row.parts)) {
      const { colour, label } = OWNERS[owner];
      element("i", track, "", { style: `width:${(100 * bytes) / width}%;background:${colour}`, title: `${label}: ${size(bytes)}` });
    }
    element("b", track, "", { style: `left:${(100 * limit) / width}%`, title: `${at.gpu} GiB` });
  }
}

for (const { colour, label } of [...Object.values(OWNERS), { colour: "var(--bad)", label: "limit: the GPU's memory" }]) {
  const mark = element("span", field("legend"));
  element("i", mark, "", { style: `background:${colour}` });
  mark.append(label);
}
choose({ ...{{ start|tojson }}, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) });
document.querySelector("form").addEventListener("input", show);
window.addEventListener("hashchange", () => {
  choose({ ...chosen(), ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) });
  show();
});
show();
