// HyDiTModelSave, HyDiTLoraSave: the file that the last run wrote, and what there is to know about it.

import { app } from "../../../scripts/app.js";
import { idOf } from "./nodes.js";
import { showTold } from "./told.js";

const NODES = ["HyDiTModelSave", "HyDiTLoraSave"];

app.registerExtension({
  name: "hydit.savedFile",
  nodeCreated(node) {
    if (!NODES.includes(idOf(node))) return;
    showTold(node, { name: "hydit_saved", words: "saved", inputs: ["filename_prefix"], lines: 6 });
  },
});
