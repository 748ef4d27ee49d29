// HyDiTForecast: how many calls of the last run were real. The server tells it when the sampler is done.

import { app } from "../../../scripts/app.js";
import { translateReport } from "./locale.js";
import { idOf } from "./nodes.js";
import { showTold } from "./told.js";

app.registerExtension({
  name: "hydit.forecastCalls",
  nodeCreated(node) {
    if (idOf(node) !== "HyDiTForecast") return;
    showTold(node, {
      name: "hydit_forecast",
      words: "forecast",
      inputs: ["preset", "tolerance"],
      lines: 4,
      translate: (said) => translateReport(said, "forecast"),
    });
  },
});
