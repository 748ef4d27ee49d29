// HyDiTEmptyLatent: the sizes that the published models were trained for, one click each.

import { app } from "../../../scripts/app.js";
import { text } from "./locale.js";
import { after, idOf, isLinked, widgetOf } from "./nodes.js";
import { addRow, addStyle } from "./rows.js";

const NODE = "HyDiTEmptyLatent";

/** Rows of [ratio, sizes...]; the last of the first row is for the small model that comes with the pack. */
const ROWS = [
  [["1:1", [1024, 1024], [1280, 1280], [128, 128]]],
  [["4:3", [1024, 768], [1152, 864], [1280, 960]]],
  [["3:4", [768, 1024], [864, 1152], [960, 1280]]],
  [["5:3", [1280, 768]], ["3:5", [768, 1280]]],
];
const SMALL = 128;
const LINE = 20;
const SPACE = 3;

const CSS = `
.hydit-sizes { display: flex; flex-direction: column; gap: ${SPACE}px; }
.hydit-sizes > div { display: flex; gap: ${SPACE}px; height: ${LINE}px; }
.hydit-sizes span { flex: 0 0 24px; line-height: ${LINE}px; text-align: right; padding-right: 3px; }
.hydit-sizes button {
  flex: 1 1 0; min-width: 0; padding: 0 2px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px;
  background: var(--comfy-input-bg, #222); color: inherit; font: inherit; line-height: 1; white-space: nowrap;
  overflow: hidden; cursor: pointer;
}
.hydit-sizes button:hover:not(:disabled) { border-color: var(--input-text, #ddd); }
.hydit-sizes button:focus-visible { outline: 2px solid var(--hydit-accent); outline-offset: -1px; }
.hydit-sizes button[aria-pressed="true"] {
  background: var(--hydit-accent); border-color: transparent; font-weight: 600;
  color: var(--hydit-on-accent);
}
.hydit-sizes button:disabled { opacity: 0.5; cursor: default; }
`;

app.registerExtension({
  name: "hydit.sizeButtons",
  nodeCreated(node) {
    if (idOf(node) !== NODE || !widgetOf(node, "width") || !widgetOf(node, "height")) return;
    addStyle("hydit-sizes-style", CSS);
    const buttons = [];
    const frame = document.createElement("div");
    frame.className = "hydit-sizes";
    frame.setAttribute("role", "group");
    frame.setAttribute("aria-label", text("sizes.label"));
    for (const groups of ROWS) {
      const row = document.createElement("div");
      for (const [ratio, ...sizes] of groups) {
        const label = document.createElement("span");
        label.className = "hydit-muted";
        label.textContent = ratio;
        label.setAttribute("aria-hidden", "true");
        row.append(label);
        for (const size of sizes) {
          const element = makeButton(ratio, size, () => choose(node, size));
          buttons.push({ element, size, title: element.title });
          row.append(element);
        }
      }
      frame.append(row);
    }

    let shown;
    const show = () => {
      const [width, height] = sizeOf(node);
      const linked = isLinked(node, "width") || isLinked(node, "height");
      const state = `${width} ${height} ${linked}`;
      if (state === shown) return;
      shown = state;
      for (const { element, size, title } of buttons) {
        element.setAttribute("aria-pressed", String(!linked && size[0] === width && size[1] === height));
        element.disabled = linked;
        element.title = linked ? text("sizes.linked") : title;
      }
    };

    const height = ROWS.length * LINE + (ROWS.length - 1) * SPACE;
    addRow(node, "hydit_sizes", frame, () => height, show);
    for (const name of ["width", "height"]) after(widgetOf(node, name), "callback", show);
    after(node, "onConfigure", show);
    after(node, "onConnectionsChange", show);
    show();
  },
});

function makeButton(ratio, [width, height], onClick) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = `${width}×${height}`;
  const label = text(width === SMALL ? "sizes.small" : "sizes.choose", { width, height, ratio });
  button.setAttribute("aria-label", label);
  button.title = label;
  button.addEventListener("click", onClick);
  return button;
}

function sizeOf(node) {
  return ["width", "height"].map((name) => widgetOf(node, name)?.value);
}

/** Set both numbers as one step of the undo history. */
function choose(node, size) {
  app.canvas?.emitBeforeChange?.();
  try {
    for (const [i, name] of ["width", "height"].entries()) {
      const widget = widgetOf(node, name);
      if (!widget) continue;
      widget.value = size[i];
      widget.callback?.(size[i], app.canvas, node);
    }
  } finally {
    app.canvas?.emitAfterChange?.();
  }
  node.setDirtyCanvas?.(true, true);
}
