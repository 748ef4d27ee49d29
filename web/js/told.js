// A row of text on a node: what its last run said, in the run's message, under one name.

import { text } from "./locale.js";
import { fingerprint, forget, recall, remember } from "./memory.js";
import { after, widgetOf } from "./nodes.js";
import { addRow, addStyle } from "./rows.js";

const LINE = 16;

const CSS = `
.hydit-told { overflow: auto; padding: 0 4px; user-select: text; cursor: text; }
.hydit-told > div { white-space: pre-wrap; overflow-wrap: anywhere; }
.hydit-old > div { opacity: 0.5; }
`;

/**
 * Show on `node` what its runs say under `name`.
 *
 * @param {string} name in the run's message, in the node's properties, and of the row.
 * @param {string} words where the row's texts are in the translations: label, none, old.
 * @param {string[]} inputs the widgets that it depends on. When one of them changes, the text is grayed; with
 *   `drop` it goes.
 * @param {number} lines beyond which the row scrolls.
 * @param {(said: string) => string} translate to the page's language.
 */
export function showTold(node, { name, words, inputs, drop = false, lines, translate = (said) => said }) {
  addStyle("hydit-told-style", CSS);
  const frame = document.createElement("div");
  const body = document.createElement("div");
  frame.className = `hydit-told ${name}`;
  frame.setAttribute("role", "status");
  frame.setAttribute("aria-label", text(`${words}.label`));
  frame.style.maxHeight = `${lines * LINE}px`;
  frame.append(body);

  const now = () => fingerprint(JSON.stringify(inputs.map((input) => widgetOf(node, input)?.value ?? null)));
  const show = () => {
    const told = recall(node, name);
    const old = told !== undefined && told.of !== now();
    body.textContent = told ? translate(told.text) : text(`${words}.none`);
    body.classList.toggle("hydit-muted", !told);
    frame.classList.toggle("hydit-old", old);
    frame.title = old ? text(`${words}.old`) : "";
    node.setDirtyCanvas?.(true, true);
  };
  const check = () => {
    if (drop && recall(node, name) && recall(node, name).of !== now()) forget(node, name);
    show();
  };

  addRow(node, name, frame, () => Math.min(Math.max(body.offsetHeight, LINE), lines * LINE));
  after(node, "onExecuted", (output) => {
    if (!output?.[name]) return;
    remember(node, name, [].concat(output[name]).join("\n"), now());
    show();
  });
  after(node, "onConfigure", check);
  for (const input of inputs) {
    const widget = widgetOf(node, input);
    if (widget) after(widget, "callback", check);
  }
  show();
}
