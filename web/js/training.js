// The training nodes: what the last run says of the pictures, of the LoRA, or of the training that it looked at.

import { app } from "../../../scripts/app.js";
import { translateReport } from "./locale.js";
import { idOf } from "./nodes.js";
import { showTold } from "./told.js";

// What the text depends on.
const NODES = {
  HyDiTDatasetCheck: ["dataset_name", "base_name", "resolution"],
  HyDiTTrainLoRA: [
    "dataset_name", "base_name", "output_name", "trigger", "kind", "budget", "budget_unit", "settings",
  ],
  HyDiTTrainMonitor: ["run_name"],
};

app.registerExtension({
  name: "hydit.training",
  nodeCreated(node) {
    const inputs = NODES[idOf(node)];
    if (!inputs) return;
    showTold(node, {
      name: "hydit_train",
      words: "training",
      inputs,
      lines: 10,
      translate: (said) => translateReport(said, "training"),
    });
  },
});
