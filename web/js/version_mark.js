// The loaders: which model the last run found in the chosen file.

import { app } from "../../../scripts/app.js";
import { idOf } from "./nodes.js";
import { showTold } from "./told.js";

const FILES = {
  HyDiTCheckpointLoader: ["ckpt_name", "load_key"],
  HyDiTControlNetLoader: ["control_net_name", "load_key"],
  HyDiTDiTLoader: ["model_name", "load_key"],
  HyDiTIPAdapterLoader: ["ip_adapter_name", "clip_vision_name"],
  HyDiTTextEncoderLoader: ["bert_name", "mt5_name"],
};

app.registerExtension({
  name: "hydit.versionMark",
  nodeCreated(node) {
    const inputs = FILES[idOf(node)];
    if (inputs) showTold(node, { name: "hydit_version", words: "version", inputs, drop: inputs, lines: 3 });
  },
});
