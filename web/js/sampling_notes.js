// HyDiTKSampler: what the last run has to say against its settings; no row while that is nothing.

import { app } from "../../../scripts/app.js";
import { translateReport } from "./locale.js";
import { idOf } from "./nodes.js";
import { showTold } from "./told.js";

app.registerExtension({
  name: "hydit.samplingNotes",
  nodeCreated(node) {
    if (idOf(node) !== "HyDiTKSampler") return;
    showTold(node, {
      name: "hydit_notes",
      words: "notes",
      inputs: ["preset", "denoise"],
      lines: 6,
      quiet: true,
      translate: (said) => translateReport(said, "notes"),
    });
  },
});
