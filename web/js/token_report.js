// HyDiTTextEncode: how many tokens the last run counted in the prompt, and what was cut; what the fields are for.

import { app } from "../../../scripts/app.js";
import { text, translateReport } from "./locale.js";
import { idOf, widgetOf } from "./nodes.js";
import { showTold } from "./told.js";

app.registerExtension({
  name: "hydit.tokenReport",
  nodeCreated(node) {
    if (idOf(node) !== "HyDiTTextEncode") return;
    for (const name of ["text", "text_mt5"]) {
      const field = widgetOf(node, name)?.element;
      if (field instanceof HTMLTextAreaElement) field.placeholder = text(`prompts.${name}`);
    }
    showTold(node, {
      name: "hydit_report",
      words: "report",
      inputs: ["text", "text_mt5", "mode"],
      lines: 8,
      translate: (said) => translateReport(said, "report"),
    });
  },
});
