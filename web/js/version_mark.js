// The loaders: which model the last run found in the chosen file.

import { app } from "../../../scripts/app.js";
import { text } from "./locale.js";
import { forget, recall, remember } from "./memory.js";
import { after, idOf, widgetOf } from "./nodes.js";
import { addRow, addStyle } from "./rows.js";

const VERSION = "hydit_version"; // in the run's message and in the node's properties
const FILES = {
  HyDiTCheckpointLoader: ["ckpt_name"],
  HyDiTDiTLoader: ["model_name"],
  HyDiTTextEncoderLoader: ["bert_name", "mt5_name"],
};
const LINE = 16;
const MOST = 3 * LINE;

const CSS = `
.hydit-version { overflow: hidden; max-height: ${MOST}px; text-align: center; }
.hydit-version > div { overflow-wrap: anywhere; }
`;

app.registerExtension({
  name: "hydit.versionMark",
  nodeCreated(node) {
    const files = FILES[idOf(node)];
    if (!files) return;
    addStyle("hydit-version-style", CSS);
    const frame = document.createElement("div");
    const body = document.createElement("div");
    frame.className = "hydit-version";
    frame.setAttribute("role", "status");
    frame.setAttribute("aria-label", text("version.label"));
    frame.append(body);

    const chosen = () => files.map((name) => widgetOf(node, name)?.value ?? "").join(" + ");
    const show = () => {
      const version = recall(node, VERSION);
      body.textContent = version?.text ?? text("version.none");
      body.classList.toggle("hydit-muted", !version);
      frame.title = version?.text ?? "";
      node.setDirtyCanvas?.(true, true);
    };
    const check = () => {
      const version = recall(node, VERSION);
      if (version && version.of !== chosen()) forget(node, VERSION);
      show();
    };

    addRow(node, VERSION, frame, () => Math.min(Math.max(body.offsetHeight, LINE), MOST));
    after(node, "onExecuted", (output) => {
      const found = output?.[VERSION];
      if (!found) return;
      remember(node, VERSION, [].concat(found).join("\n"), chosen());
      show();
    });
    after(node, "onConfigure", check);
    for (const name of files) {
      const widget = widgetOf(node, name);
      if (widget) after(widget, "callback", check);
    }
    show();
  },
});
