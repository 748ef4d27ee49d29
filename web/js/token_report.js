// HyDiTTextEncode: how many tokens the last run counted in the prompt, and what was cut.

import { app } from "../../../scripts/app.js";
import { text } from "./locale.js";
import { fingerprint, recall, remember } from "./memory.js";
import { after, idOf, widgetOf } from "./nodes.js";
import { addRow, addStyle } from "./rows.js";

const NODE = "HyDiTTextEncode";
const REPORT = "hydit_report"; // in the run's message and in the node's properties
const INPUTS = ["text", "text_mt5", "mode"];
const LINE = 16;
const MOST = 8 * LINE; // beyond that the report scrolls

const CSS = `
.hydit-report { padding: 0 4px; overflow: auto; max-height: ${MOST}px; user-select: text; cursor: text; }
.hydit-report > div { white-space: pre-wrap; overflow-wrap: anywhere; }
.hydit-report.hydit-stale > div { opacity: 0.5; }
`;

app.registerExtension({
  name: "hydit.tokenReport",
  nodeCreated(node) {
    if (idOf(node) !== NODE) return;
    addStyle("hydit-report-style", CSS);
    const frame = document.createElement("div");
    const body = document.createElement("div");
    frame.className = "hydit-report";
    frame.setAttribute("role", "status");
    frame.setAttribute("aria-label", text("report.label"));
    frame.append(body);

    const show = () => {
      const report = recall(node, REPORT);
      const stale = report !== undefined && report.of !== prompts(node);
      body.textContent = report?.text ?? text("report.none");
      body.classList.toggle("hydit-muted", !report);
      frame.classList.toggle("hydit-stale", stale);
      frame.title = stale ? text("report.stale") : "";
      node.setDirtyCanvas?.(true, true);
    };

    addRow(node, REPORT, frame, () => Math.min(Math.max(body.offsetHeight, LINE), MOST));
    after(node, "onExecuted", (output) => {
      const lines = output?.[REPORT];
      if (!lines) return;
      remember(node, REPORT, [].concat(lines).join("\n"), prompts(node));
      show();
    });
    after(node, "onConfigure", show);
    for (const name of INPUTS) {
      const widget = widgetOf(node, name);
      if (widget) after(widget, "callback", show);
    }
    show();
  },
});

/** Names what the report depends on, as far as the node itself knows. */
function prompts(node) {
  return fingerprint(JSON.stringify(INPUTS.map((name) => widgetOf(node, name)?.value ?? null)));
}
