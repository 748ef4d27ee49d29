// A row of HTML at the foot of a node. It is shown, never saved and never sent.

import { app } from "../../../scripts/app.js";
import { after } from "./nodes.js";

const MARGIN = 6; // above, below and beside a row, where the page draws nodes on its canvas
const GAP = 4; // what the page adds below every widget of fixed height
const STYLE_ID = "hydit-style";

// Pages from 1.58 on have no --p-primary-color; their own accent is too pale on a light node, so it is mixed with
// the color of texts, which makes it darker there and lighter on a dark one. So is what is muted.
const CSS = `
.hydit-row {
  --hydit-accent:
    var(--p-primary-color, color-mix(in srgb, var(--primary-background, #60a5fa) 70%, var(--input-text, #ddd)));
  --hydit-on-accent: var(--p-primary-contrast-color, #000);
  box-sizing: border-box; min-width: 0; color: var(--input-text, #ddd);
  font: 11px/16px Inter, "Noto Sans SC", "Microsoft YaHei", "WenQuanYi Micro Hei", Arial, sans-serif;
}
.hydit-muted { color: color-mix(in srgb, var(--descrip-text, #999) 75%, var(--input-text, #ddd)); }
`;

const styles = new Set();

/** Add rules to the page's own, once for each `id`. Every selector begins with .hydit- */
export function addStyle(id, css) {
  if (styles.has(id)) return;
  styles.add(id);
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(css);
  document.adoptedStyleSheets.push(sheet);
}

/**
 * Add `element` as the last row of a node.
 *
 * @param {() => number} height of the element in pixels; asked again at every drawing. 0: no row now.
 * @param {() => void} [onDraw] called at every drawing.
 * @returns the widget, or undefined where the page has no such widgets.
 */
export function addRow(node, name, element, height, onDraw) {
  if (typeof node.addDOMWidget !== "function") return undefined;
  addStyle(STYLE_ID, CSS);
  element.classList.add("hydit-row");
  const widget = node.addDOMWidget(name, "hydit-row", element, {
    serialize: false, // not in the prompt
    hideInPanel: true, // the side panel would draw an empty box
    margin: MARGIN,
    getValue: () => "",
    setValue: () => {},
    onDraw,
  });
  widget.serialize = false; // not in the workflow
  // A fixed height: free space belongs to the prompts. Nodes 2.0 takes the height from the element itself.
  widget.computeSize = (width) => [width ?? 0, height() && height() + 2 * MARGIN - GAP];
  widget.computeLayoutSize = undefined;
  grow(node);
  passOn(element);
  takePlace(node, name, element);
  // The height is known once the browser has laid the text out, which may be after the node was drawn.
  new ResizeObserver(() => node.setDirtyCanvas?.(true, true)).observe(element.firstElementChild ?? element);
  return widget;
}

/** Make room for the rows of a node, which has its first size before extensions see it. */
export function grow(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, node.size[0]), Math.max(height, node.size[1])]);
}

/**
 * Replace the row of a node that this node comes after, as at each undo. Nodes 2.0 goes on showing the old one,
 * which belongs to a node that is gone, because both nodes have one number.
 */
function takePlace(node, name, element) {
  const look = () => {
    element.dataset.of = `${node.graph?.id} ${node.id} ${name}`;
    requestAnimationFrame(() => {
      if (element.isConnected || !node.graph) return;
      const others = [...document.querySelectorAll(".hydit-row")];
      others.find((other) => other.dataset.of === element.dataset.of)?.replaceWith(element);
    });
  };
  after(node, "onAdded", look);
  after(node, "onConfigure", look);
}

/** On the canvas, let the wheel zoom and the middle button pan over the row as they do beside it. */
function passOn(element) {
  const onCanvas = () => element.closest(".dom-widget") && app.canvas;
  element.addEventListener("wheel", (event) => {
    const scrolls = element.scrollHeight > element.clientHeight + 1 && !event.ctrlKey;
    if (!onCanvas() || scrolls) return;
    event.preventDefault();
    app.canvas.processMouseWheel(event);
  });
  const forward = { pointerdown: "processMouseDown", pointermove: "processMouseMove", pointerup: "processMouseUp" };
  for (const [kind, method] of Object.entries(forward)) {
    element.addEventListener(kind, (event) => {
      const middle = kind === "pointermove" ? event.buttons & 4 : event.button === 1;
      if (middle && onCanvas()) app.canvas[method](event);
    });
  }
}
