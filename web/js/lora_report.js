// The LoRA nodes: what the last run found in the chosen file, and what of it fits the model.

import { app } from "../../../scripts/app.js";
import { translateReport } from "./locale.js";
import { after, idOf, widgetOf } from "./nodes.js";
import { showTold } from "./told.js";

// What the report depends on.
const NODES = {
  HyDiTLoraLoader: ["lora_name"],
  HyDiTLoraMerge: ["lora_name", "strength", "block_weights"],
};

/** What was saved before there was `partial` used whatever fitted, and still does. */
function keepPartial(node) {
  const widget = widgetOf(node, "partial");
  if (!widget) return;
  after(node, "onConfigure", (saved) => {
    const values = saved?.widgets_values;
    if (Array.isArray(values) && values.length <= node.widgets.indexOf(widget)) widget.value = true;
  });
}

app.registerExtension({
  name: "hydit.loraReport",
  nodeCreated(node) {
    const inputs = NODES[idOf(node)];
    if (!inputs) return;
    keepPartial(node);
    showTold(node, {
      name: "hydit_lora",
      words: "lora",
      inputs,
      drop: ["lora_name"],
      lines: 6,
      translate: (said) => translateReport(said, "lora"),
    });
  },
});
