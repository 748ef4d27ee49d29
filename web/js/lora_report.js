// The LoRA nodes: what the last run found in the chosen file, and what of it fits the model.

import { app } from "../../../scripts/app.js";
import { idOf } from "./nodes.js";
import { showTold } from "./told.js";

const NODES = ["HyDiTLoraLoader", "HyDiTLoraMerge"];

app.registerExtension({
  name: "hydit.loraReport",
  nodeCreated(node) {
    if (!NODES.includes(idOf(node))) return;
    showTold(node, { name: "hydit_lora", words: "lora", inputs: ["lora_name"], drop: true, lines: 6 });
  },
});
