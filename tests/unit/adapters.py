"""Random LoRAs."""

from __future__ import annotations

from pathlib import Path

import torch

from hydit_core.lora.adapter import Adapter
from hydit_core.lora.kinds import LoRA
from hydit_core.weights.bundle import bundle


def whole_adapter(path: Path) -> Adapter:
    """A random LoRA of DiT, BERT and mT5 of an all-in-one file."""
    found, generator, modules = bundle(path), torch.Generator().manual_seed(5), {}
    for part, source in (("dit", found.dit), ("bert", found.bert), ("t5", found.mt5)):
        assert source is not None
        for key in source:
            if any(name in key for name in ("Wqkv.weight", "query.weight", "Attention.q.weight")):
                out, columns = source.shape(key)
                down = torch.randn(2, columns, generator=generator) / 8
                up = torch.randn(out, 2, generator=generator) / 8
                modules[f"{part}.{key[:-7]}"] = [LoRA({"down": down, "up": up})]
    return Adapter(modules, "whole", metadata={"hydit.trigger": "icn"})
