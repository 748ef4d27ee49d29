"""Print the rows of the table in docs/scaling.md: what one process needs to train DiT-g/2, as estimated.

python docs/make_memory.py
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn

from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.train.config import TrainConfig
from hydit_core.train.memory import of_run

ROWS: dict[str, dict[str, Any]] = {
    "all weights": {"objective": {"kind": "full"}},
    "all weights, kept in bf16": {
        "objective": {"kind": "full"},
        "optimizer": {"name": "adamw_8bit"},
        "run": {"weights": "bf16"},
        "ema": {"enabled": False},
    },
    "ControlNet": {"objective": {"kind": "controlnet"}, "data.control": {"kind": "canny"}},
    "LoRA": {"objective": {"kind": "lora"}, "ema": {"enabled": False}},
}
CELLS = [
    ("all weights", "fp32"),
    ("all weights", "bf16"),
    ("all weights, kept in bf16", "bf16"),
    ("ControlNet", "fp32"),
    ("LoRA", "bf16"),
]
RANKS = (1, 2, 8, 64)
"""So many processes split the model: one is ``ddp``, with any number of copies."""


def configuration(row: dict[str, Any], precision: str) -> TrainConfig:
    """One picture of 1024 x 1024 a step; activations are computed again; captions are cached."""
    data = {"sources": [{"path": "."}], "resolution": 1024, "cache": {"text": True}}
    if "data.control" in row:
        data["control"] = row["data.control"]
    run = {"output_dir": "run", "steps": 1, "batch_size": 1, "precision": precision, **row.get("run", {})}
    return TrainConfig.model_validate(
        {
            "model": {"init_from": "base"},
            "data": data,
            "run": {**run, "gradient_checkpointing": True},
            "checkpoint": {"export_all_in_one": False},
            **{key: value for key, value in row.items() if "." not in key and key != "run"},
        },
        context={"base": "."},
    )


def main() -> None:
    text: Any = SimpleNamespace(bert=nn.Module(), t5=nn.Module())
    for name, precision in CELLS:
        config = configuration(ROWS[name], precision)
        totals = [
            of_run(config, DiT(DiTConfig(), device="meta"), text, (1024, 1024), ranks).total
            for ranks in (RANKS[:1] if config.run.weights == "bf16" else RANKS)  # which are not split
        ]
        cells = [f"{total / 2**30:.1f}" for total in totals]
        print(f"| {name} | {precision} | " + " | ".join(cells + [""] * (len(RANKS) - len(cells))) + " |")


if __name__ == "__main__":
    main()
