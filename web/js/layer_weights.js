// HyDiTLayerWeights: the text in `weights` as bars to drag, one for each of `layers`. The text is the value: what
// is dragged is written there, what is typed there is drawn.

import { app } from "../../../scripts/app.js";
import { AXIS_HEIGHT, Bars, PLOT_HEIGHT } from "./layer_bars.js";
import { PRESETS, clamped, readWeights, rounded, writeWeights } from "./layer_curves.js";
import { text } from "./locale.js";
import { after, idOf, isLinked, widgetOf } from "./nodes.js";
import { addRow, addStyle } from "./rows.js";

const NODE = "HyDiTLayerWeights";
const MOST = 64;
const NEUTRAL = 1;
const WIDTH = 360;
const LINE = 16;
const BUTTON = 20;
const SPACE = 3;
const HEIGHT = LINE + PLOT_HEIGHT + AXIS_HEIGHT + 2 * BUTTON + 3 * SPACE;

const CSS = `
.hydit-weights { display: flex; flex-direction: column; gap: ${SPACE}px; min-height: ${HEIGHT}px; }
.hydit-weights-said { height: ${LINE}px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.hydit-weights-said.hydit-wrong { color: var(--error-text, #ff4444); }
.hydit-weights-presets { display: grid; grid-template: repeat(2, ${BUTTON}px) / repeat(4, 1fr); gap: ${SPACE}px; }
.hydit-weights-presets button:last-child { grid-column: 4; grid-row: 2; }
.hydit-weights-presets button {
  min-width: 0; padding: 0 2px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px;
  background: var(--comfy-input-bg, #222); color: inherit; font: inherit; line-height: 1; white-space: nowrap;
  overflow: hidden; cursor: pointer;
}
.hydit-weights-presets button:hover:not(:disabled) { border-color: var(--input-text, #ddd); }
.hydit-weights-presets button:focus-visible {
  outline: 2px solid var(--hydit-accent); outline-offset: -1px;
}
.hydit-weights-presets button[aria-pressed="true"] {
  background: var(--hydit-accent); border-color: transparent; font-weight: 600;
  color: var(--hydit-on-accent);
}
.hydit-weights-presets button:disabled { opacity: 0.5; cursor: default; }
`;

app.registerExtension({
  name: "hydit.layerWeights",
  nodeCreated(node) {
    if (idOf(node) !== NODE || !widgetOf(node, "weights") || !widgetOf(node, "layers")) return;
    addStyle("hydit-weights-style", CSS);
    const frame = document.createElement("div");
    const said = document.createElement("div");
    frame.className = "hydit-weights";
    said.className = "hydit-weights-said";
    said.setAttribute("role", "status");

    const edit = makeEdit(node);
    const bars = new Bars({ ...edit, set: (changes) => edit.write(withChanges(readNode(node), changes)) });
    const choose = (value) => {
      bars.stop();
      edit.begin();
      edit.write(value);
      edit.end(true);
    };
    const { element: presets, buttons } = makeButtons(choose);
    frame.append(said, bars.element, presets);

    let shown;
    const show = () => {
      const read = readNode(node);
      const state = JSON.stringify([read.text, read.count, read.linked]);
      if (state === shown) return;
      shown = state;
      bars.show(read.values, read.found, read.linked);
      say(said, read);
      for (const [name, button] of buttons) {
        if (name) button.setAttribute("aria-pressed", String(!read.linked && read.curve === name));
        button.disabled = read.linked;
      }
      node.setDirtyCanvas?.(true, true);
    };

    addRow(node, "hydit_weights", frame, () => HEIGHT, show);
    if (node.size && node.size[0] < WIDTH) node.setSize?.([WIDTH, node.size[1]]);
    for (const name of ["weights", "layers"]) after(widgetOf(node, name), "callback", show);
    after(node, "onConfigure", show);
    after(node, "onConnectionsChange", show);
    after(node, "onRemoved", () => bars.stop());
    frame.addEventListener("pointerenter", show); // for those who set widgets without a callback
    show();
  },
});

/** What the node's widgets say: readWeights() with as many `values` as layers, and how it came about. */
function readNode(node) {
  const written = String(widgetOf(node, "weights")?.value ?? "");
  const layers = Math.round(Number(widgetOf(node, "layers")?.value)) || 1;
  const count = clamped(layers, 1, MOST);
  const read = readWeights(written, count);
  const missing = Array(Math.max(0, count - read.values.length)).fill(NEUTRAL);
  const values = [...read.values, ...missing].slice(0, count);
  return { ...read, values, text: written, count, linked: isLinked(node, "weights") };
}

/** The list that it becomes when bars move. What was typed keeps its digits. */
function withChanges({ curve, values }, changes) {
  const list = curve ? values.map((value) => rounded(value)) : [...values];
  for (const [index, value] of changes) list[index] = value;
  return writeWeights(list);
}

/** Changes of the text as steps of the undo history. */
function makeEdit(node) {
  let before;
  const write = (value) => {
    const widget = widgetOf(node, "weights");
    if (!widget || widget.value === value) return;
    widget.value = value;
    widget.callback?.(value, app.canvas, node);
  };
  return {
    begin() {
      before = widgetOf(node, "weights")?.value;
      app.canvas?.emitBeforeChange?.();
    },
    write,
    end(keep) {
      if (!keep) write(before);
      app.canvas?.emitAfterChange?.();
    },
  };
}

function say(element, { linked, problem, found, count }) {
  const words = linked ? "linked" : problem || "hint";
  element.textContent = text(`weights.${words}`, { found, count });
  element.title = element.textContent;
  element.classList.toggle("hydit-wrong", !linked && Boolean(problem));
}

/** A button for each curve, which is pressed while it is in use, and one without a name that begins anew. */
function makeButtons(choose) {
  const element = document.createElement("div");
  element.className = "hydit-weights-presets";
  element.setAttribute("role", "group");
  element.setAttribute("aria-label", text("weights.presets"));
  const add = (words, value) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text(`weights.${words}.name`);
    button.title = text(`weights.${words}.tip`);
    button.addEventListener("click", () => choose(value));
    element.append(button);
    return button;
  };
  const buttons = PRESETS.map(([name, value]) => [name, add(name, value)]);
  buttons.push(["", add("reset", PRESETS[0][1])]);
  return { element, buttons };
}
