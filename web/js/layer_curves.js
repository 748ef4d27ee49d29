// Texts of layer weights, read as hydit_core/layer_weights.py reads them. Knows nothing of the page.

/** The bars' range. Text may hold any number. */
export const MIN = 0;
export const MAX = 2;

const fill = (count, weight) => Array.from({ length: count }, (_, i) => weight(i));
const smooth = (x) => x * x * (3 - 2 * x);

/** By name: the number's default, and what makes `n` weights of a number. */
const CURVES = {
  uniform: [1, (w, n) => fill(n, () => w)],
  decay: [0.825, (w, n) => fill(n, (i) => w ** (n - i))],
  linear: [1, (w, n) => fill(n, (i) => (w * (i + 1)) / n)],
  ease: [1, (w, n) => fill(n, (i) => w * smooth((i + 1) / n))],
  "only-early": [1, (w, n) => fill(n, (i) => (2 * i < n ? w : 0))],
  "only-late": [1, (w, n) => fill(n, (i) => (2 * i < n ? 0 : w))],
};

/** [name, text] of each curve as it is when it is chosen: ["decay", "decay(0.825)"]. */
export const PRESETS = Object.entries(CURVES).map(([name, [number]]) => [name, `${name}(${number})`]);

const CURVE = /^([a-z-]+)\s*(?:\(\s*([^()\s]+)\s*\))?$/;
const DIGITS = "\\d(?:_?\\d)*";
const NUMBER = new RegExp(`^[+-]?(?:${DIGITS}\\.?(?:${DIGITS})?|\\.${DIGITS})(?:e[+-]?${DIGITS})?$`, "i");

/** What Python's float() makes of a text, NaN where it gives no finite number. */
function toNumber(text) {
  const number = NUMBER.test(text) ? Number(text.replaceAll("_", "")) : NaN;
  return Number.isFinite(number) ? number : NaN;
}

/**
 * What a text means for `count` layers.
 *
 * @returns {{curve: string, values: number[], found: number, problem: string}} the curve's name ("" for a list),
 *   the weights that there are (as many as were written of a list), how many those are, and what is wrong: "",
 *   "unreadable", "large" (beyond all numbers) or "count" (a list for another number of layers).
 */
export function readWeights(text, count) {
  const curve = readCurve(text);
  if (curve) {
    const [name, number] = curve;
    const values = CURVES[name][1](number, count);
    if (Number.isNaN(number)) return failed("unreadable");
    return values.every(Number.isFinite) ? { curve: name, values, found: count, problem: "" } : failed("large");
  }
  const parts = text.replace(/^[[\]() \n]+|[[\]() \n]+$/g, "").split(/[,;\s]+/);
  const values = parts.filter(Boolean).map(toNumber);
  if (!values.length || values.some(Number.isNaN)) return failed("unreadable");
  const found = values.length;
  if (found === 1) return { curve: "uniform", values: fill(count, () => values[0]), found: count, problem: "" };
  return { curve: "", values, found, problem: found === count ? "" : "count" };
}

function readCurve(text) {
  const match = CURVE.exec(text.trim().toLowerCase());
  if (!match || !Object.hasOwn(CURVES, match[1])) return undefined;
  const [, name, number] = match;
  return [name, number === undefined ? CURVES[name][0] : toNumber(number)];
}

function failed(problem) {
  return { curve: "", values: [], found: 0, problem };
}

/** Weights as text that is read back, with no more digits than a bar can show. */
export function writeWeights(values) {
  return values.map(String).join(", ");
}

/** A number as it is written: what was typed keeps its digits, what a curve gave is cut to four. */
export function rounded(value, digits = 4) {
  return Number(value.toFixed(digits)) + 0; // no -0
}

export function clamped(value, low = MIN, high = MAX) {
  return Math.min(Math.max(value, low), high);
}
