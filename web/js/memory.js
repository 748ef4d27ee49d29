// What a run told about a node, kept in the node's properties: cached runs tell nothing again, and a workflow
// that is opened again was not run yet.

import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

/**
 * Keep `text` under `name`, and what it was said of (`of`, a short string) beside it.
 *
 * A run is not an edit: the newest state of the undo history is amended, so that undo takes back what the user
 * did last and not the text.
 */
export function remember(node, name, text, of) {
  const kept = { [name]: text, [`${name}_of`]: of };
  node.properties ??= {};
  Object.assign(node.properties, kept);
  const state = app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.activeState;
  const saved = savedGraph(state, node.graph)?.nodes?.find(({ id }) => String(id) === String(node.id));
  if (!saved) return;
  saved.properties = { ...saved.properties, ...kept };
  api.dispatchCustomEvent?.("graphChanged", state); // the page keeps its draft for a reload up to date
}

/** {text, of} of what was kept, or undefined. */
export function recall(node, name) {
  const text = node.properties?.[name];
  return typeof text === "string" ? { text, of: node.properties[`${name}_of`] } : undefined;
}

export function forget(node, name) {
  if (!node.properties) return;
  delete node.properties[name];
  delete node.properties[`${name}_of`];
}

/** A short name for a long text: FNV-1a, 32 bits. */
export function fingerprint(text) {
  let hash = 0x811c9dc5;
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 0x01000193);
  return (hash >>> 0).toString(16).padStart(8, "0");
}

function savedGraph(state, graph) {
  if (!graph || graph === (app.rootGraph ?? app.graph)) return state;
  return state?.definitions?.subgraphs?.find(({ id }) => id === graph.id);
}
