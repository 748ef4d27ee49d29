"""A rank-64 LoRA on a DiT of the published size, in a real server: what fits, what it does, what it holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from comfy_server import ComfyServer
from full_size_files import attention_lora, random_file
from graphs import Graph, Link, Node
from key_lists import key_list
from memory import STATUS, Peak
from safetensors.torch import load_file, save_file
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc"),
]

RANK, ALPHA, STRENGTH = 64, 32.0, 0.8
SHAPES = key_list("g2_v12")
DIT = "g2_v12.safetensors"
#: What the text encoders would give; the published ones would be another 4 GB.
TEXT = """
import torch


class RandomText:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "draw", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 1})}}

    def draw(self, seed):
        g = torch.Generator().manual_seed(seed)
        extra = {
            "attention_mask": (torch.arange(77) < 9).long()[None],
            "conditioning_mt5xl": torch.randn(1, 256, 2048, generator=g),
            "attention_mask_mt5xl": (torch.arange(256) < 12).long()[None],
        }
        return ([[torch.randn(1, 77, 1024, generator=g), extra]],)


NODE_CLASS_MAPPINGS = {"RandomText": RandomText}
"""


class Made(NamedTuple):
    """What a graph made: latents, what the LoRA's node says, the most memory that it took, files' size."""

    latents: Tensor
    said: str
    peak: int
    size: int


@contextmanager
def running(factors: dict[str, tuple[Tensor, Tensor]]) -> Iterator[ComfyServer]:
    """A fresh server with the DiT, and the LoRA as kohya's file and as PEFT's folder."""
    server = ComfyServer(name="server-lora-full-size", nodes=TEXT)
    try:
        random_file(server.models_dir / "diffusion_models" / DIT, SHAPES)
        loras = server.models_dir / "loras"
        loras.mkdir(exist_ok=True)
        write_kohya(loras / "kohya.safetensors", factors)
        write_peft(loras / "peft", factors)
        yield server
    finally:
        server.close()


def write_kohya(path: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    tensors = {}
    for module, (down, up) in factors.items():
        name = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, path)


def write_peft(folder: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    tensors = {}
    for module, (down, up) in factors.items():
        name = f"base_model.model.{module}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    assert len(tensors) == 402
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def draw(server: ComfyServer, add_lora: Callable[[Graph, Node], Link] | None = None) -> Made:
    """One step at 128 x 128."""
    g = Graph()
    model = g.add("HyDiTDiTLoader", model_name=DIT, weight_dtype="default")
    changed = add_lora(g, model) if add_lora else model
    positive, negative = (g.add("RandomText", seed=seed) for seed in (1, 2))
    sampled = g.add(
        "HyDiTKSampler", _defaults=True, model=changed, positive=positive, negative=negative,
        latent_image=g.add("HyDiTEmptyLatent", width=128, height=128, batch_size=1), seed=3, steps=1,
    )  # fmt: skip
    g.add("SaveLatent", samples=sampled, filename_prefix="made")
    with Peak(server.process.pid) as peak:
        result = server.run(g, timeout=600).check()
    (path,) = server.output_dir.glob("made*.latent")
    latents = load_file(path)["latent_tensor"]
    path.unlink()
    said = "\n".join(text for ui in result.outputs.values() for text in ui.get("hydit_lora", []))
    size = (server.models_dir / "diffusion_models" / DIT).stat().st_size
    print(f"{peak.grown / 1e9:.2f} GB, {peak.grown / size:.2f} x the DiT's file; {said!r}")
    return Made(latents, said, peak.grown, size)


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference in standard deviations."""
    assert found.shape == expected.shape == (1, 4, 16, 16) and expected.isfinite().all()
    return float((found - expected).abs().max() / expected.std())


@pytest.fixture(scope="module")
def factors() -> dict[str, tuple[Tensor, Tensor]]:
    return attention_lora(RANK, SHAPES)


@pytest.fixture(scope="module")
def stock(factors) -> tuple[Made, Made]:
    """By ComfyUI's own LoRA loader; and without a LoRA."""

    def load(g: Graph, model: Node) -> Link:
        name = "kohya.safetensors"
        return g.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=STRENGTH).out()

    with running(factors) as server:
        return draw(server, load), draw(server)


def check(
    made: Made, stock: tuple[Made, Made], factors: dict[str, tuple[Tensor, Tensor]], merged: int = 0
) -> None:
    """The same picture as ComfyUI's own loader's, nothing left out, and in no more memory.

    `merged` is the size of a LORA_MODEL that is held besides.
    """
    own, plain = stock
    apart = off(made.latents, own.latents), off(made.latents, plain.latents)
    print(f"{apart[0]:.1e} of the standard deviation from ComfyUI's own, {apart[1]:.1e} from no LoRA")
    assert apart[0] < 1e-4 and apart[1] > 0.01
    assert "201 modules of the DiT" in made.said and "has no" not in made.said
    assert made.peak <= 1.1 * own.peak + merged
    # ComfyUI keeps what it patches
    patched = sum(2 * up.shape[0] * down.shape[1] for down, up in factors.values())
    assert 1.1e9 < patched < 1.3e9
    assert made.peak <= 1.2 * made.size + patched + 0.3e9 + merged


def test_loader(factors, stock):
    """PEFT's folder: 402 tensors, 201 modules."""

    def load(g: Graph, model: Node) -> Link:
        given = {"lora_name": "peft/", "strength_model": STRENGTH}
        return g.add("HyDiTLoraLoader", _defaults=True, model=model, **given).out()

    with running(factors) as server:
        made = draw(server, load)
    assert made.said.startswith("peft LoRA of rank 64")
    check(made, stock, factors)


def test_merged_and_saved(factors, stock):
    """It twice, 0.5 and 0.3 strong, as one of rank 128: on the model at once, and in a file."""

    def merge(g: Graph, model: Node) -> Link:
        first = g.add("HyDiTLoraMerge", _defaults=True, lora_name="kohya.safetensors", strength=0.5)
        given = {"lora_name": "peft/", "strength": STRENGTH - 0.5, "lora": first, "model": model}
        both = g.add("HyDiTLoraMerge", _defaults=True, **given)
        g.add("HyDiTLoraSave", _defaults=True, lora=both, format="comfy")
        return both.out(1)

    with running(factors) as server:
        made = draw(server, merge)
        (path,) = (server.output_dir / "loras").glob("*.safetensors")
        saved = load_file(path)
    # Both nodes report, in the order of their runs' messages
    assert "peft LoRA of rank 64: 201 modules of the DiT\nmerged: kohya at 0.5, peft at 0.3" in made.said
    both = sum(2 * 4 * factor.numel() for pair in factors.values() for factor in pair)  # float32
    check(made, stock, factors, merged=both)
    assert len(saved) == 3 * 201
    for module, (down, up) in factors.items():
        name = f"diffusion_model.{module}"
        found = saved[f"{name}.lora_up.weight"].float(), saved[f"{name}.lora_down.weight"].float()
        assert found[0].shape[1] == 128
        rows, columns = slice(None, None, 64), slice(None, None, 64)
        change = float(saved[f"{name}.alpha"]) / 128 * found[0][rows] @ found[1][:, columns]
        expected = STRENGTH * ALPHA / RANK * up[rows].float() @ down[:, columns].float()
        assert (change - expected).abs().max() <= 2e-3 * expected.abs().max(), module
