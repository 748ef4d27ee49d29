"""LoRA files of every format, written by hand, and the weights that each must give."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

D, TEXT = 64, 32  # widths of sampling_models.CONFIG: of the blocks and mT5, of BERT
QKV, OUT, KV = "blocks.1.attn1.Wqkv", "blocks.1.attn1.out_proj", "blocks.2.attn2.kv_proj"
POOLER = "pooler.q_proj"

Weights = dict[str, Tensor]


@dataclass
class Form:
    """One file (or folder): its tensors and what they do to a model's weights at a strength."""

    tensors: Weights
    expected: Callable[[Weights, float], Weights]
    config: dict[str, object] | None = None
    metadata: dict[str, str] | None = None

    def write(self, path: Path) -> Path:
        if self.config is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(self.tensors, path, metadata=self.metadata)
            return path
        path.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, path / "adapter_model.safetensors", metadata=self.metadata)
        (path / "adapter_config.json").write_text(json.dumps(self.config), encoding="utf-8")
        return path


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.3 * torch.randn(shape, generator=generator)


def _added(changes: Weights) -> Callable[[Weights, float], Weights]:
    """W + s * change, in float64."""

    def expected(weights: Weights, s: float) -> Weights:
        return {name: weights[name].double() + s * change.double() for name, change in changes.items()}

    return expected


def _normed(changes: Weights, magnitudes: Weights, axis: int) -> Callable[[Weights, float], Weights]:
    """DoRA: W + s * (m (W + change) / ||W + change|| - W), in float64."""

    def expected(weights: Weights, s: float) -> Weights:
        found = {}
        for name, change in changes.items():
            before = weights[name].double()
            whole = before + change.double()
            norm = whole.pow(2).sum(dim=1 - axis, keepdim=True).sqrt()
            after = magnitudes[name].double().reshape(norm.shape) * whole / norm
            found[name] = before + s * (after - before)
        return found

    return expected


def forms() -> dict[str, Form]:
    """By name; those with a config are PEFT's folders."""
    d = D
    found: dict[str, Form] = {}
    r = draw(11)
    pairs = {QKV: (r(4, d), r(3 * d, 4)), OUT: (r(4, d), r(d, 4)), POOLER: (r(4, d), r(d, 4))}

    def peft(names: tuple[str, str], scale: float, **config: object) -> Form:
        tensors = {}
        for module, (down, up) in pairs.items():
            tensors |= {f"base_model.model.{module}.{names[0]}": down}
            tensors |= {f"base_model.model.{module}.{names[1]}": up}
        changes = {f"{m}.weight": scale * up @ down for m, (down, up) in pairs.items()}
        return Form(tensors, _added(changes), {"peft_type": "LORA", "r": 4, **config})

    usual = ("lora_A.weight", "lora_B.weight")
    found["peft"] = peft(usual, 2.0, lora_alpha=8)
    found["peft-rslora"] = peft(usual, 4.0, lora_alpha=8, use_rslora=True)
    found["peft-old"] = peft(("lora_A.default.weight", "lora_B.default.weight"), 1.0, lora_alpha=4)

    def one(style: str, alpha: float) -> Form:
        tensors = {}
        for module, (down, up) in pairs.items():
            name = (
                f"lora_unet_{module.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{module}"
            )
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        changes = {f"{m}.weight": alpha / 4 * up @ down for m, (down, up) in pairs.items()}
        return Form(tensors, _added(changes), metadata={"modelspec.trigger_phrase": "pixel icon"})

    found["kohya"], found["comfy"] = one("kohya", 2.0), one("comfy", 6.0)
    found["diffusers"] = _diffusers(d, draw(12))
    for axis in (0, 1):
        found[f"dora-{axis}"] = _dora(pairs, axis)
    found["loha"], found["lokr"] = _loha(d, draw(13)), _lokr(d, draw(14))
    r = draw(15)
    diff, bias = r(d, d), r(d)
    name = "diffusion_model." + OUT
    found["diff"] = Form(
        {f"{name}.diff": diff, f"{name}.diff_b": bias}, _added({f"{OUT}.weight": diff, f"{OUT}.bias": bias})
    )
    return found


def _diffusers(d: int, r: Callable[..., Tensor]) -> Form:
    """Slices of the fused projections; the key's is left out, and v has another rank."""
    tensors, slices = {}, {}
    for name, target, start, rank, width in (
        ("blocks.1.attn1.to_q", QKV, 0, 4, d),
        ("blocks.1.attn1.to_v", QKV, 2, 2, d),
        ("blocks.2.attn2.to_k", KV, 0, 4, TEXT),
    ):
        down, up = r(rank, width), r(d, rank)
        tensors |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        slices[name] = (target, start * d, up @ down)
    changes = {f"{QKV}.weight": torch.zeros(3 * d, d), f"{KV}.weight": torch.zeros(2 * d, TEXT)}
    for target, start, change in slices.values():
        changes[f"{target}.weight"][start : start + d] = change
    return Form(tensors, _added(changes))


def _dora(pairs: dict[str, tuple[Tensor, Tensor]], axis: int) -> Form:
    """kohya's names; LyCORIS can norm along either axis."""
    r, tensors, changes, magnitudes = draw(16 + axis), {}, {}, {}
    for module, (down, up) in pairs.items():
        name, shape = (
            "lora_unet_" + module.replace(".", "_"),
            (len(up), 1) if axis == 0 else (1, down.shape[1]),
        )
        magnitude = 1 + r(*shape).abs()
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors |= {f"{name}.alpha": torch.tensor(4.0), f"{name}.dora_scale": magnitude}
        changes[f"{module}.weight"], magnitudes[f"{module}.weight"] = up @ down, magnitude
    return Form(tensors, _normed(changes, magnitudes, axis))


def _loha(d: int, r: Callable[..., Tensor]) -> Form:
    name = "lora_unet_" + OUT.replace(".", "_")
    w = {"hada_w1_a": r(d, 4), "hada_w1_b": r(4, d), "hada_w2_a": r(d, 4), "hada_w2_b": r(4, d)}
    change = 0.5 * (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])
    tensors = {f"{name}.{key}": value for key, value in w.items()} | {f"{name}.alpha": torch.tensor(2.0)}
    return Form(tensors, _added({f"{OUT}.weight": change}))


def _lokr(d: int, r: Callable[..., Tensor]) -> Form:
    name = "lora_unet_" + QKV.replace(".", "_")
    w1, w2_a, w2_b = r(4, 4), r(3 * d // 4, 4), r(4, d // 4)
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": w2_a, f"{name}.lokr_w2_b": w2_b}
    tensors[f"{name}.alpha"] = torch.tensor(3.0)
    return Form(tensors, _added({f"{QKV}.weight": 0.75 * torch.kron(w1, w2_a @ w2_b)}))
