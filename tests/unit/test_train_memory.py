"""The memory estimate against what PyTorch really keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TINY
from train_setup import CONFIG

from hydit_core.model.dit import DiT
from hydit_core.model.rope import rope_table
from hydit_core.train.config import load_config
from hydit_core.train.memory import activation_bytes, estimate


def kept_bytes(model: DiT, run: Callable[[], object]) -> int:
    """What autograd keeps of ``run()`` for the backward pass, the weights left out."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept)


@pytest.mark.parametrize("checkpointing", [0.0, 0.5, 1.0])
def test_activations_are_those_of_a_real_forward(checkpointing: float) -> None:
    batch, width, height = 4, 256, 192
    model = DiT(TINY)
    model.initialize(torch.Generator().manual_seed(0))
    model.gradient_checkpointing = checkpointing
    context = model.encode_context(
        torch.randn(batch, 12, 32), torch.ones(batch, 12), torch.randn(batch, 16, 32), torch.ones(batch, 16)
    )
    latents = torch.randn(batch, 4, height // 8, width // 8)
    expected = kept_bytes(model, lambda: model(latents, torch.zeros(batch), context))
    if checkpointing:
        # Computing a block again needs the room of one block on top of what is kept. Blocks with a skip keep
        # more; the estimate is the mean.
        tokens, dim = width * height // 256, TINY.hidden_size
        x, skip = (torch.randn(batch, tokens, dim, requires_grad=True) for _ in range(2))
        rope = rope_table(height // 16, width // 16, TINY.head_dim)
        blocks = [
            kept_bytes(
                model,
                lambda b=block: b(
                    x, context.text, context.vector, rope, skip if hasattr(b, "skip_norm") else None
                ),
            )
            for block in model.blocks
        ]
        expected += sum(blocks) // len(blocks)
    found = activation_bytes(TINY, batch, (width, height), torch.float32, checkpointing)
    assert found == pytest.approx(expected, rel=0.1)


def test_state_is_twenty_bytes_a_parameter(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(CONFIG, encoding="utf-8")
    config = load_config(path)
    trained = {"a": torch.empty(1000, 1000, device="meta"), "b": torch.empty(500, device="meta")}
    full = estimate(config, trained, set(), 7, TINY, (64, 64))
    assert full.total - full.activations - 7 == 20 * 1_000_500
    muon = estimate(config, trained, {"a"}, 0, TINY, (64, 64))
    assert muon.optimizer == 4 * 1_000_000 + 8 * 500
    assert f"{full.total / 2**20:.1f} MiB" in full.lines()[-1]
