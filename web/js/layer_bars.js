// A row of bars, one for each layer, moved with the mouse or by keys. Knows nothing of nodes.

import { MAX, MIN, clamped, rounded } from "./layer_curves.js";
import { text } from "./locale.js";
import { addStyle } from "./rows.js";

const STEP = 0.05;
const LARGE_STEP = 0.25;
export const PLOT_HEIGHT = 96;
export const AXIS_HEIGHT = 14;

const CSS = `
.hydit-bars { position: relative; display: grid; grid-template: ${PLOT_HEIGHT}px ${AXIS_HEIGHT}px / 14px 1fr; }
.hydit-bars-scale, .hydit-bars-axis {
  display: flex; justify-content: space-between; font-size: 10px; line-height: 12px; pointer-events: none;
}
.hydit-bars-scale { flex-direction: column; margin: -1px 0; }
.hydit-bars-axis { grid-column: 2; padding-top: 2px; }
.hydit-bars-plot {
  position: relative; display: flex; box-sizing: border-box; border: 1px solid var(--border-color, #4e4e4e);
  border-radius: 4px; cursor: ns-resize; touch-action: none; user-select: none;
}
.hydit-bars-plot::before {
  content: ""; position: absolute; inset: 50% 0 auto; border-top: 1px dashed var(--descrip-text, #999);
  opacity: 0.5; pointer-events: none;
}
.hydit-bars-bar { position: relative; flex: 1 1 0; min-width: 0; outline: none; }
.hydit-bars-bar > i {
  position: absolute; inset: auto max(0.5px, 12%) 0; min-height: 2px; border-radius: 2px 2px 0 0;
  background: var(--hydit-accent); pointer-events: none;
}
.hydit-bars-bar:hover > i, .hydit-bars-bar.hydit-bars-now > i { filter: brightness(1.25); }
.hydit-bars-bar:focus > i { background: var(--input-text, #ddd); }
.hydit-bars-bar:focus-visible { box-shadow: inset 0 0 0 1px var(--input-text, #ddd); border-radius: 3px; }
.hydit-bars-bar.hydit-bars-beyond > i { border-radius: 0; border-top: 3px dotted var(--input-text, #ddd); }
.hydit-bars-bar.hydit-bars-below > i { border-bottom: 3px dotted var(--input-text, #ddd); }
.hydit-bars-bar.hydit-bars-missing > i { opacity: 0.3; }
.hydit-bars-tip {
  position: absolute; top: -18px; padding: 0 5px; border-radius: 3px; white-space: nowrap; pointer-events: none;
  background: var(--input-text, #ddd); color: var(--comfy-input-bg, #222); transform: translateX(-50%);
}
.hydit-bars[aria-disabled="true"] { opacity: 0.4; }
.hydit-bars[aria-disabled="true"] .hydit-bars-plot { cursor: not-allowed; }
`;

/** What the keys of a slider do; left and right go to other bars. */
const BY = { ArrowUp: STEP, ArrowDown: -STEP, PageUp: LARGE_STEP, PageDown: -LARGE_STEP };
const TO = { Home: MIN, End: MAX, Delete: 1, Backspace: 1 };
const SIDE = { ArrowLeft: -1, ArrowRight: 1 };

export class Bars {
  element = box("hydit-bars");
  #plot = box("hydit-bars-plot");
  #axis = box("hydit-bars-axis hydit-muted");
  #tip = box("hydit-bars-tip");
  #bars = [];
  #values = [];
  #disabled = false;
  #chosen = 0; // the bar that Tab goes to
  #pointed; // the bar under the mouse
  #moved; // what moves bars now: "pointer" or "key"
  #last; // {index, value} where the pointer was
  #edit;

  /**
   * @param edit what to do when bars move: `begin()` and `end(keep)` are around what is one step for the user,
   *   without `keep` it is to be taken back; `set([[layer from 0, weight], ...])` is for each movement in it.
   */
  constructor(edit) {
    addStyle("hydit-bars-style", CSS);
    this.#edit = edit;
    this.element.setAttribute("role", "group");
    this.element.setAttribute("aria-label", text("weights.label"));
    const scale = box("hydit-bars-scale hydit-muted");
    scale.append(...[MAX, (MAX + MIN) / 2, MIN].map(span));
    for (const part of [this.#axis, scale, this.#tip]) part.setAttribute("aria-hidden", "true");
    this.#tip.hidden = true;
    this.element.append(scale, this.#plot, this.#axis, this.#tip);
    this.#listen();
  }

  /** Show weights: `values`, of which the first `found` were written. */
  show(values, found, disabled) {
    this.#values = values;
    this.#disabled = disabled;
    if (disabled) this.stop();
    if (this.#bars.length !== values.length) this.#build(values.length);
    this.element.setAttribute("aria-disabled", String(disabled));
    values.forEach((value, i) => {
      const bar = this.#bars[i];
      const now = rounded(value);
      const range = { now, text: shown(value), min: Math.min(now, MIN), max: Math.max(now, MAX) };
      for (const [name, part] of Object.entries(range)) bar.setAttribute(`aria-value${name}`, part);
      bar.setAttribute("aria-disabled", String(disabled));
      bar.firstElementChild.style.height = `${(100 * (clamped(value) - MIN)) / (MAX - MIN)}%`;
      bar.classList.toggle("hydit-bars-beyond", value > MAX);
      bar.classList.toggle("hydit-bars-below", value < MIN);
      bar.classList.toggle("hydit-bars-missing", i >= found);
    });
    this.#choose(this.#chosen, false);
    this.#showTip();
  }

  /** End what moves bars now, also where its end is never heard of: the window lost the focus, the node goes. */
  stop(keep = true) {
    if (!this.#moved) return;
    this.#moved = this.#last = undefined;
    window.removeEventListener("blur", this.#blurred);
    this.#edit.end(keep);
    this.#showTip();
  }

  #blurred = () => this.stop();

  #start(by) {
    if (this.#moved) return;
    this.#moved = by;
    window.addEventListener("blur", this.#blurred);
    this.#edit.begin();
  }

  #build(count) {
    const focused = this.#bars.includes(document.activeElement);
    this.#bars = Array.from({ length: count }, (_, i) => {
      const bar = box("hydit-bars-bar");
      bar.setAttribute("role", "slider");
      bar.setAttribute("aria-orientation", "vertical");
      bar.setAttribute("aria-label", text("weights.layer", { layer: i + 1 }));
      bar.append(document.createElement("i"));
      return bar;
    });
    this.#plot.replaceChildren(...this.#bars);
    const marks = new Set(count < 3 ? [1, count] : [1, Math.ceil(count / 2), count]);
    this.#axis.replaceChildren(...[...marks].map(span));
    if (focused) this.#choose(this.#chosen);
  }

  #listen() {
    const plot = this.#plot;
    plot.addEventListener("pointerdown", (event) => this.#down(event));
    plot.addEventListener("pointermove", (event) => this.#move(event));
    plot.addEventListener("pointerleave", () => this.#point(undefined));
    for (const kind of ["pointerup", "pointercancel", "lostpointercapture"]) {
      plot.addEventListener(kind, () => this.#moved === "pointer" && this.stop());
    }
    plot.addEventListener("keydown", (event) => {
      if (this.#disabled || event.ctrlKey || event.altKey || event.metaKey || !this.#press(event)) return;
      event.preventDefault();
      event.stopPropagation();
    });
    for (const kind of ["keyup", "focusout"]) {
      plot.addEventListener(kind, () => this.#moved === "key" && this.stop());
    }
    for (const kind of ["focusin", "focusout"]) plot.addEventListener(kind, () => this.#showTip());
  }

  #down(event) {
    if (event.button !== 0 || this.#disabled) return;
    event.stopPropagation();
    event.preventDefault(); // nothing is selected, and the node is not dragged
    this.stop(); // of a key that is still held
    this.#start("pointer");
    this.#plot.setPointerCapture(event.pointerId);
    this.#last = this.#at(event);
    this.#choose(this.#last.index);
    this.#edit.set([[this.#last.index, this.#last.value]]);
    this.#point(this.#last.index);
  }

  #move(event) {
    const now = this.#at(event);
    if (this.#moved === "pointer") {
      event.stopPropagation();
      if (!event.shiftKey) now.index = this.#last.index;
      this.#edit.set(between(this.#last, now));
      if (now.index !== this.#last?.index) this.#choose(now.index);
      this.#last = now;
    } else if (this.#disabled || event.buttons) {
      return;
    }
    this.#point(now.index);
  }

  /** The bar under the pointer, and the weight at its height. */
  #at(event) {
    const area = this.#plot.getBoundingClientRect();
    const x = (event.clientX - area.left) / area.width;
    const y = (event.clientY - area.top) / area.height;
    const last = this.#bars.length - 1;
    return {
      index: clamped(Math.floor(x * this.#bars.length), 0, last),
      value: rounded(clamped(MAX - y * (MAX - MIN)), 2),
    };
  }

  /** Whether the key is one of ours. */
  #press({ key, shiftKey }) {
    const index = this.#bars.indexOf(document.activeElement);
    if (index < 0) return false;
    if (this.#moved === "pointer") {
      if (key === "Escape") this.stop(false);
      return key === "Escape";
    }
    const value = this.#values[index];
    if (SIDE[key]) {
      const next = clamped(index + SIDE[key], 0, this.#bars.length - 1);
      if (shiftKey && next !== index) this.#set(next, value);
      this.#choose(next);
    } else if (BY[key]) {
      // What was typed beyond the range comes back step by step.
      this.#set(index, rounded(clamped(value + BY[key], Math.min(value, MIN), Math.max(value, MAX))));
    } else if (key in TO) {
      this.#set(index, TO[key]);
    }
    return key in SIDE || key in BY || key in TO;
  }

  #set(index, value) {
    this.#start("key");
    this.#edit.set([[index, value]]);
  }

  #choose(index, focus = true) {
    this.#chosen = clamped(index, 0, this.#bars.length - 1);
    this.#bars.forEach((bar, i) => (bar.tabIndex = i === this.#chosen && !this.#disabled ? 0 : -1));
    if (focus) this.#bars[this.#chosen].focus({ preventScroll: true });
  }

  #point(index) {
    this.#pointed = index;
    this.#showTip();
  }

  /** The number of the bar that is dragged, under the mouse, or chosen by keys. */
  #showTip() {
    const focused = this.#bars.indexOf(document.activeElement);
    const index = this.#last?.index ?? this.#pointed ?? focused;
    this.#bars.forEach((bar, i) => bar.classList.toggle("hydit-bars-now", i === index));
    this.#tip.hidden = !(index in this.#bars);
    if (this.#tip.hidden) return;
    this.#tip.textContent = text("weights.value", { layer: index + 1, value: shown(this.#values[index]) });
    const { offsetLeft, offsetWidth } = this.#plot;
    const half = this.#tip.offsetWidth / 2;
    const middle = offsetLeft + ((index + 0.5) / this.#bars.length) * offsetWidth;
    this.#tip.style.left = `${clamped(middle, half, this.element.offsetWidth - half)}px`;
  }
}

/** [index, value] of every bar on the straight line from one point to another. */
function between(from, to) {
  const steps = Math.abs(to.index - from.index);
  if (!steps) return [[to.index, to.value]];
  const side = Math.sign(to.index - from.index);
  return Array.from({ length: steps }, (_, i) => {
    const part = (i + 1) / steps;
    return [from.index + side * (i + 1), rounded(from.value + part * (to.value - from.value), 2)];
  });
}

function shown(value) {
  return Number.isInteger(value) ? String(value) : String(rounded(value, 3));
}

function box(className) {
  const element = document.createElement("div");
  element.className = className;
  return element;
}

function span(content) {
  const element = document.createElement("span");
  element.textContent = content;
  return element;
}
