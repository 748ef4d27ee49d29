"use strict";
const COLORS = ["#2f6fde", "#d6702a", "#2c9a62", "#a14fc0", "#b5892a", "#c23b5b"];
const words = JSON.parse(document.getElementById("words").textContent);
let runs = JSON.parse(document.getElementById("data").textContent);
let language = navigator.language.startsWith("zh") ? "zh" : "en";
const chosen = { log: false, smooth: 0.8, all: false, left: 0, right: -1, run: 0 };
const plots = [];

const say = (key, values = {}) =>
  words[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);

function made(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function filled(id, ...children) {
  document.getElementById(id).replaceChildren(...children);
}

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (minutes < 1) return `${Math.round(seconds)} s`;
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

const short = (value) => Number(value.toPrecision(4)).toString();

function tellRun(run, number) {
  const box = made("div", "", { class: "run" });
  box.style.setProperty("--color", COLORS[number % COLORS.length]);
  const ended = run.total !== null && run.step >= run.total;
  const facts = [say(ended ? "finished" : run.total === null ? "unknown" : "running", run)];
  if (run.seconds !== null) facts.push(say("took", { time: duration(run.seconds) }));
  const speed = run.curves.speed;
  if (!ended && run.total !== null && speed)
    facts.push(say("left", { time: duration((run.total - run.step) * speed.mean.at(-1)) }));
  if (run.best) facts.push(say("best", { loss: short(run.best.loss), step: run.best.step }));
  box.append(made("h2", run.name), made("p", facts.join(" · ")));
  const line = made("p", `${say("go_on")} `);
  line.append(made("code", run.command));
  box.append(line, ...run.warnings.map((one) => made("p", say(one.say, one), { class: "warning" })));
  return box;
}

// Exponential, without the bias of its start.
function smoothed(values) {
  let mean = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean * chosen.smooth + value * (1 - chosen.smooth);
    weight = weight * chosen.smooth + 1 - chosen.smooth;
    return mean / weight;
  });
}

// A pause of the machine is one step of hours: the axis is for the others.
function usual(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return Math.min(sorted.at(-1), 4 * sorted[Math.floor(sorted.length / 2)]);
}

const faint = (color) => `${color}38`;

// One curve of one run: its own steps, joined with the others' below.
function seriesOf(run, number, name) {
  const curve = run.curves[name];
  if (!curve) return [];
  const color = COLORS[number % COLORS.length];
  const label = runs.length > 1 ? `${run.name}: ` : "";
  const steps = curve.step;
  if (name === "loss")
    return [
      { steps, values: curve.low, show: { label: "", stroke: faint(color), width: 1, points: { show: false } } },
      { steps, values: curve.high, show: { label: "", stroke: faint(color), width: 1, points: { show: false } } },
      { steps, values: smoothed(curve.mean), show: { label: label + say("train_loss"), stroke: color, width: 2, points: { show: false } } },
    ];
  if (name.startsWith("val_mse_t")) {
    const [first, last] = name.match(/\d+/g), place = bands().indexOf(name);
    const stroke = runs.length > 1 ? color : COLORS[place % COLORS.length];
    const dash = runs.length > 1 && place ? [2 + 2 * place, 3] : [];
    return [{ steps, values: curve.mean, show: { label: `${label}t ${first}–${last}`, stroke, width: 1.5, dash, points: { show: true, size: 5, fill: stroke } } }];
  }
  if (name.startsWith("val_"))
    return [{ steps, values: curve.mean, show: { label: label + say(name), stroke: color, width: 1.5, dash: name.endsWith("_ema") ? [8, 4] : [3, 4], points: { show: true, size: 6, fill: color } } }];
  return [{ steps, values: curve.mean, show: { label: runs.length > 1 ? run.name : say(name), stroke: color, width: 1.5, points: { show: false } } }];
}

function bands() {
  const named = runs.flatMap((run) => Object.keys(run.curves)).filter((name) => name.startsWith("val_mse_t"));
  return [...new Set(named)];
}

function joined(series) {
  return uPlot.join(series.map((one) => [one.steps, one.values]), series.map(() => [2]));
}

// A line at the best step of each run.
function bestLines(plot) {
  runs.forEach((run, number) => {
    if (!run.best) return;
    const x = Math.round(plot.valToPos(run.best.step, "x", true));
    const { left, top, width, height } = plot.bbox;
    if (x < left || x > left + width) return;
    plot.ctx.save();
    plot.ctx.strokeStyle = COLORS[number % COLORS.length];
    plot.ctx.setLineDash([2, 4]);
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, top);
    plot.ctx.lineTo(x, top + height);
    plot.ctx.stroke();
    plot.ctx.restore();
  });
}

function chart(title, names, height, loss) {
  const box = made("div", "", { class: "chart", "data-chart": title });
  const series = runs.flatMap((run, number) => names.flatMap((name) => seriesOf(run, number, name)));
  if (!series.length) return null;
  const top = title === "speed" ? Math.max(...series.map((one) => usual(one.values))) * 1.1 : 0;
  box.append(made("h2", say(title)));
  if (loss) box.append(lossTools());
  const style = getComputedStyle(document.body);
  const axis = { stroke: style.color, grid: { stroke: "#8883", width: 1 }, ticks: { stroke: "#8883" } };
  const options = {
    width: 400,
    height,
    scales: { x: { time: false }, y: loss && chosen.log ? { distr: 3 } : top ? { range: [0, top] } : {} },
    axes: [axis, { ...axis, size: 70, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) }],
    series: [{ label: say("step") }, ...series.map((one) => ({ spanGaps: true, value: (_, v) => (v === null || v === undefined ? "–" : short(v)), ...one.show }))],
    hooks: loss ? { draw: [bestLines] } : {},
    cursor: { drag: { x: true, y: false } },
  };
  const place = box.appendChild(made("div"));
  const plot = new uPlot(options, joined(series), place);
  // The band of a curve belongs to it and needs no line of its own in the legend.
  plot.root.querySelectorAll(".u-legend .u-series").forEach((row, i) => {
    if (i && !series[i - 1].show.label) row.hidden = true;
  });
  plots.push({ plot, box });
  if (loss) box.append(made("p", `${say("loss_note")} ${say("zoom")}`, { class: "note" }));
  return box;
}

function lossTools() {
  const tools = made("div", "", { class: "tools" });
  const log = made("input", "", { type: "checkbox", id: "log" });
  log.checked = chosen.log;
  log.onchange = () => { chosen.log = log.checked; drawCharts(); };
  const smooth = made("input", "", { type: "range", min: 0, max: 0.99, step: 0.01, id: "smooth" });
  smooth.value = chosen.smooth;
  smooth.onchange = () => { chosen.smooth = Number(smooth.value); drawCharts(); };
  const first = made("label", ""), second = made("label", `${say("smooth")} `);
  first.append(log, ` ${say("log")}`);
  second.append(smooth);
  tools.append(first, second);
  return tools;
}

function drawCharts() {
  plots.splice(0).forEach(({ plot }) => plot.destroy());
  filled("charts", ...[
    chart("loss", ["loss", "val_loss", "val_loss_ema"], 380, true),
    chart("bands", bands(), 260),
    chart("forgotten", ["val_prior_loss", "val_prior_loss_ema"], 200),
    chart("lr", ["lr", "lr_b"], 200),
    chart("grad_norm", ["grad_norm"], 200),
    chart("speed", ["speed"], 200),
    chart("data_share", ["data_share"], 200),
    chart("save_stall", ["save_stall"], 200),
    chart("rss_mib", ["rss_mib"], 200),
    chart("device_peak_mib", ["device_peak_mib"], 200),
  ].filter(Boolean));
  fit();
}

function fit() {
  for (const { plot, box } of plots)
    plot.setSize({ width: Math.max(200, box.clientWidth), height: plot.height });
}

function steps(sheets, id, label, value) {
  const box = made("label", `${say(label)} `);
  const select = made("select", "", { id });
  sheets.forEach((sheet, i) => select.append(made("option", `${say("step")} ${sheet.step}`, { value: i })));
  select.value = (value + sheets.length) % sheets.length;
  box.append(select);
  return [box, select];
}

function drawSamples() {
  const some = runs.filter((run) => run.sheets.length);
  if (!some.length) return filled("samples");
  const run = some[Math.min(chosen.run, some.length - 1)];
  const box = made("div", "", { class: "samples" });
  const tools = made("div", "", { class: "tools" });
  if (some.length > 1) {
    const select = made("select", "", { id: "of" });
    some.forEach((one, i) => select.append(made("option", one.name, { value: i })));
    select.value = some.indexOf(run);
    select.onchange = () => { chosen.run = Number(select.value); chosen.left = 0; chosen.right = -1; drawSamples(); };
    tools.append(select);
  }
  const [left, from] = steps(run.sheets, "left", "against", chosen.left);
  const [right, to] = steps(run.sheets, "right", "shown", chosen.right);
  const pair = made("div", "", { class: "sheets" });
  const under = made("img"), over = made("img", "", { class: "over" });
  const split = made("input", "", { type: "range", min: 0, max: 100, value: 50, "aria-label": say("samples") });
  split.oninput = () => pair.style.setProperty("--split", `${split.value}%`);
  const show = () => {
    for (const [image, sheet] of [[under, run.sheets[from.value]], [over, run.sheets[to.value]]]) {
      image.src = sheet.url;
      image.alt = `${say("step")} ${sheet.step}`;
    }
  };
  from.onchange = () => { chosen.left = Number(from.value); show(); };
  to.onchange = () => { chosen.right = Number(to.value) === run.sheets.length - 1 ? -1 : Number(to.value); show(); };
  show();
  tools.append(left, right);
  pair.append(under, over, split);
  box.append(made("h2", say("samples")), tools, pair);
  filled("samples", box);
}

function drawConfig() {
  const values = runs.map((run) => new Map(run.config.map((one) => [one.key, one])));
  const keys = [...new Set(runs.flatMap((run) => run.config.map((one) => one.key)))];
  if (!keys.length) return filled("config", made("p", say("no_config"), { class: "note" }));
  const all = made("input", "", { type: "checkbox", id: "all" });
  all.checked = chosen.all;
  all.onchange = () => { chosen.all = all.checked; drawConfig(); };
  const label = made("label", "");
  label.append(all, ` ${say("all_keys")}`);
  const tools = made("div", "", { class: "tools" });
  tools.append(label);
  const table = made("table"), head = made("thead"), row = made("tr"), body = made("tbody");
  row.append(made("th", ""), ...runs.map((run) => made("th", run.name)));
  head.append(row);
  for (const key of keys) {
    const own = values.some((map) => map.get(key)?.own);
    if (!own && !chosen.all) continue;
    const line = made("tr", "", own ? {} : { class: "default" });
    line.append(made("th", key), ...values.map((map) => made("td", map.get(key)?.value ?? "–")));
    body.append(line);
  }
  table.append(head, body);
  const scroll = made("div", "", { class: "scroll" });
  scroll.append(table);
  filled("config", made("h2", say("config")), tools, scroll);
}

function draw() {
  document.documentElement.lang = language;
  document.getElementById("title").textContent = say("title");
  document.getElementById("language").textContent = say("other");
  document.getElementById("lost").textContent = say("lost");
  filled("runs", ...runs.map(tellRun));
  drawCharts();
  drawSamples();
  drawConfig();
}

async function refresh() {
  const lost = document.getElementById("lost");
  try {
    const answer = await fetch("data.json", { cache: "no-store" });
    const found = await answer.json();
    lost.hidden = true;
    if (JSON.stringify(found) !== JSON.stringify(runs)) {
      runs = found;
      draw();
    }
  } catch {
    lost.hidden = false;
  }
}

document.getElementById("language").onclick = () => { language = language === "en" ? "zh" : "en"; draw(); };
addEventListener("resize", fit);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
draw();
if (document.body.dataset.live) setInterval(refresh, 5000);
