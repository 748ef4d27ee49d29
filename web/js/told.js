// A row of text on a node: what its last run said, in the run's message, under one name.

import { api } from "../../../scripts/api.js";
import { text } from "./locale.js";
import { fingerprint, forget, recall, remember } from "./memory.js";
import { after, idOf, widgetOf } from "./nodes.js";
import { addRow, addStyle } from "./rows.js";

const LINE = 16;

const CSS = `
.hydit-told { overflow: auto; padding: 0 4px; user-select: text; cursor: text; }
.hydit-told > div { white-space: pre-wrap; overflow-wrap: anywhere; }
.hydit-old > div { opacity: 0.5; }
`;

/** All that was said since the page was opened, by name and by what the node was then (`signature`). */
const said = new Map();
/** For each row of a node that is in a graph: look there. */
const lookups = new Set();

// A node whose result comes from the server's cache says nothing, though another one, in another workflow, did.
api.addEventListener("execution_success", () => {
  for (const lookUp of lookups) lookUp();
});

/**
 * Show on `node` what its runs say under `name`.
 *
 * @param {string} name in the run's message, in the node's properties, and of the row.
 * @param {string} words where the row's texts are in the translations: label, none, old.
 * @param {string[]} inputs the widgets that it depends on. When one of them changes, the text is grayed.
 * @param {string[]} drop those of them at whose change it goes instead.
 * @param {number} lines beyond which the row scrolls.
 * @param {(text: string) => string} translate to the page's language.
 */
export function showTold(node, { name, words, inputs, drop = [], lines, translate = (line) => line }) {
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
  const check = (...changed) => {
    const drops = drop.some((input) => changed.includes(input));
    if (drops && recall(node, name) && recall(node, name).of !== now()) forget(node, name);
    show();
  };

  const take = (told) => {
    said.set(`${name} ${signature(node)}`, told);
    remember(node, name, told, now());
    show();
  };
  const lookUp = () => {
    const told = said.get(`${name} ${signature(node)}`);
    if (told !== undefined && recall(node, name)?.of !== now()) take(told);
  };

  addRow(node, name, frame, () => Math.min(Math.max(body.offsetHeight, LINE), lines * LINE));
  after(node, "onExecuted", (output) => {
    if (output?.[name]) take([].concat(output[name]).join("\n"));
  });
  after(node, "onAdded", () => lookups.add(lookUp));
  after(node, "onRemoved", () => lookups.delete(lookUp));
  after(node, "onConfigure", () => check(...inputs));
  for (const input of inputs) {
    const widget = widgetOf(node, input);
    if (widget) after(widget, "callback", () => check(input));
  }
  show();
}

/** What a node and all before it are set to: two nodes of which this is the same are told the same. */
function signature(node, known = new Map()) {
  if (!known.has(node)) {
    const values = node.widgets?.filter(({ value }) => typeof value !== "object").map(({ value }) => value);
    const before = node.inputs?.map((_, slot) => {
      const from = node.getInputNode?.(slot);
      return from ? [signature(from, known), node.getInputLink?.(slot)?.origin_slot] : null;
    });
    known.set(node, fingerprint(JSON.stringify([idOf(node), values, before])));
  }
  return known.get(node);
}
