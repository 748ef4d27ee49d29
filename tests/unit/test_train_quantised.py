"""Training a LoRA over a base that is quantised in its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_setup import losses, objective_of, shake, write_lora_run
from train_setup import run_training

from hydit_core.train.config import load_config
from hydit_core.train.dryrun import describe
from hydit_core.weights.frozen import FrozenLinear
from hydit_core.weights.quantise import quantise


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Path:
    return write_lora_run(tmp_path_factory.mktemp("lora"), tiny_model_file)


@pytest.mark.parametrize("form", ["int8_convrot", "fp8_scaled"])
def test_a_quantised_file_as_base(config: Path, tiny_model_file: Path, tmp_path: Path, form: str) -> None:
    """It stays in 8 bits, and the adapters get the gradients that unpacked weights would give them."""
    small = tmp_path / "small.safetensors"
    quantise(tiny_model_file, small, format=form)
    own = [f"model.init_from={small}", "lora.targets=attention+mlp"]
    kept, unpacked = objective_of(config, *own), objective_of(config, *own, "lora.base_precision=fp32")
    layers = [
        m for name, m in kept.parts.dit.named_modules() if isinstance(m, FrozenLinear) and "blocks." in name
    ]
    assert layers and all(layer.weight._qdata.element_size() == 1 for layer in layers)
    assert all(type(p.data) is torch.Tensor for p in unpacked.parts.dit.parameters())
    found = []
    for objective in (kept, unpacked):
        shake(objective)
        losses(objective, config).mean().backward()
        found.append({name: p.grad for name, p in objective.parameters().items()})
    for name, gradient in found[1].items():
        assert torch.allclose(found[0][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max()), name
    said = "\n".join(describe(load_config(config, own)))
    assert f"what the file has in {form} stays so" in said


def test_a_run_over_a_quantised_file(config: Path, tiny_model_file: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.safetensors"
    quantise(tiny_model_file, small, format="int8")
    options = [
        f"model.init_from={small}",
        f"run.output_dir={tmp_path / 'run'}",
        "run.steps=1",
        "samples.every=1",
    ]
    assert run_training(config, *options, 'samples.prompts=["cat"]', "samples.steps=2")
    assert list((tmp_path / "run").rglob("lora.safetensors"))
