// A row of text on a node: what its last run said, in the run's message, under one name.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";
import { text } from "./locale.js";
import { fingerprint, forget, recall, remember } from "./memory.js";
import { after, widgetOf } from "./nodes.js";
import { addRow, addStyle, grow } from "./rows.js";

const LINE = 16;

const CSS = `
.hydit-told { overflow: auto; padding: 0 4px; user-select: text; cursor: text; }
.hydit-told > div { white-space: pre-wrap; overflow-wrap: anywhere; }
.hydit-old > div { opacity: 0.5; }
`;

/** The rows of nodes that are in a graph: {node, name, missing(), take(told)}. */
const rows = new Set();
/** Milliseconds between attempts: the history has a run shortly after its end was told. */
const ATTEMPTS = [0, 200, 500, 1000, 2000];

// A node whose result comes from the server's cache says nothing, in ComfyUIs that do not know that it has something
// to say; the history of the run holds it.
api.addEventListener("execution_success", async ({ detail }) => {
  const missing = [...rows].filter((row) => row.missing());
  if (!missing.length) return;
  const outputs = await outputsOf(detail.prompt_id);
  for (const [id, output] of Object.entries(outputs)) {
    const node = nodeOf(id);
    for (const row of missing.filter((row) => row.node === node && row.missing())) row.take(output?.[row.name]);
  }
});

/** What the nodes of a run said, by their numbers: {"3": {hydit_report: ["..."]}}. */
async function outputsOf(promptId) {
  for (const delay of ATTEMPTS) {
    await new Promise((resolve) => setTimeout(resolve, delay));
    const response = await api.fetchApi(`/history/${encodeURIComponent(promptId)}`).catch(() => undefined);
    const run = response?.ok ? (await response.json())[promptId] : undefined;
    if (run) return run.outputs ?? {};
  }
  return {};
}

/** The node of a number as the server knows it: "12:3" is node 3 in the subgraph that node 12 is. */
function nodeOf(id) {
  let graph = app.rootGraph ?? app.graph;
  const path = String(id).split(":");
  for (const number of path.slice(0, -1)) graph = graph?.getNodeById?.(number)?.subgraph;
  return graph?.getNodeById?.(path.at(-1)) ?? undefined;
}

/**
 * Show on `node` what its runs say under `name`.
 *
 * @param {string} name in the run's message, in the node's properties, and of the row.
 * @param {string} words where the row's texts are in the translations: label, none, old.
 * @param {string[]} inputs the widgets that it depends on. When one of them changes, the text is grayed.
 * @param {string[]} drop those of them at whose change it goes instead.
 * @param {number} lines beyond which the row scrolls.
 * @param {boolean} quiet there is no row while there is nothing to show.
 * @param {(text: string) => string} translate to the page's language.
 */
export function showTold(node, { name, words, inputs, drop = [], lines, quiet = false, translate = (line) => line }) {
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
    body.textContent = told ? translate(told.text) : quiet ? "" : text(`${words}.none`);
    frame.hidden = !body.textContent;
    body.classList.toggle("hydit-muted", !told);
    frame.classList.toggle("hydit-old", old);
    frame.title = old ? text(`${words}.old`) : "";
    if (quiet && added) grow(node);
    node.setDirtyCanvas?.(true, true);
  };
  const check = (...changed) => {
    const drops = drop.some((input) => changed.includes(input));
    if (drops && recall(node, name) && recall(node, name).of !== now()) forget(node, name);
    show();
  };

  const take = (told) => {
    if (!told) return;
    remember(node, name, [].concat(told).join("\n"), now());
    show();
  };
  const row = { node, name, take, missing: () => recall(node, name)?.of !== now() };

  const height = () => (frame.hidden ? 0 : Math.min(Math.max(body.offsetHeight, LINE), lines * LINE));
  const added = addRow(node, name, frame, height);
  after(node, "onExecuted", (output) => take(output?.[name]));
  after(node, "onAdded", () => rows.add(row));
  after(node, "onRemoved", () => rows.delete(row));
  after(node, "onConfigure", () => check(...inputs));
  for (const input of inputs) {
    const widget = widgetOf(node, input);
    if (widget) after(widget, "callback", () => check(input));
  }
  show();
}
