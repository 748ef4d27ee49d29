// Options of combos under their translated names. The values that are saved and sent stay as they are.

import { app } from "../../../scripts/app.js";
import { optionLabels } from "./locale.js";
import { idOf } from "./nodes.js";

app.registerExtension({
  name: "hydit.optionLabels",
  nodeCreated(node) {
    const translated = optionLabels(idOf(node));
    for (const widget of node.widgets ?? []) {
      const labels = translated[widget.name];
      // Only lists that are translated as a whole: lists of files keep the page's own menu and its filter.
      const values = widget.options?.values;
      if (!labels || !Array.isArray(values) || !values.every((value) => value in labels)) continue;
      if (values.every((value) => labels[value] === value)) continue;
      widget.options.getOptionLabel = (value) => labels[value] ?? value ?? "";
    }
  },
});
