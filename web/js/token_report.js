// HyDiTTextEncode: how many tokens the last run counted in the prompt, and what was cut.

import { app } from "../../../scripts/app.js";
import { translateReport } from "./locale.js";
import { idOf } from "./nodes.js";
import { showTold } from "./told.js";

app.registerExtension({
  name: "hydit.tokenReport",
  nodeCreated(node) {
    if (idOf(node) !== "HyDiTTextEncode") return;
    showTold(node, {
      name: "hydit_report",
      words: "report",
      inputs: ["text", "text_mt5", "mode"],
      lines: 8,
      translate: translateReport,
    });
  },
});
