"""LoRAs as their makers publish them, with random weights, and the changes that they stand for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from published_parts import Change, Tensors, Written, encoders, write_json
from safetensors.torch import save_file
from tiny import TINY, randomize
from torch import Tensor

from hydit_core.model.dit import DiT


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@functools.cache
def layers() -> dict[str, tuple[int, int]]:
    """The DiT's matrices by their modules' names."""
    state = randomize(DiT(TINY), 0).state_dict()
    return {
        key.removesuffix(".weight"): (value.shape[0], value.shape[1])
        for key, value in state.items()
        if key.endswith(".weight") and value.ndim == 2
    }


def product(down: Tensor, up: Tensor, scale: float = 1.0) -> Change:
    return lambda base: base + scale * up.double() @ down.double()


def tencents_lora(name: str) -> Callable[[Path], Written]:
    """A folder of peft's, rank and alpha 64, of all attention's layers and one of the pooler."""

    def write(folder: Path) -> Written:
        root = folder / name
        root.mkdir()
        targets = ("Wqkv", "q_proj", "kv_proj", "out_proj")
        factors, changes = {}, {}
        for module, (rows, columns) in layers().items():
            if module.endswith(targets):
                down, up = draw(64, columns), draw(rows, 64)
                factors[f"base_model.model.{module}.lora_A.weight"] = down
                factors[f"base_model.model.{module}.lora_B.weight"] = up
                changes[f"dit.{module}.weight"] = product(down, up)
        save_file(factors, root / "adapter_model.safetensors")
        mapping = {"base_model_class": "HunYuanDiT", "parent_library": "hydit.modules.models"}
        config = {
            **{"auto_mapping": mapping, "base_model_name_or_path": None, "bias": "none"},
            **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True},
            **{"layers_pattern": None, "layers_to_transform": None, "lora_alpha": 64, "lora_dropout": 0.0},
            **{"modules_to_save": None, "peft_type": "LORA", "r": 64, "revision": None},
            **{"target_modules": list(targets), "task_type": None},
        }
        write_json(root / "adapter_config.json", config)
        return Written(root, changes=changes)

    return write


_SPLIT = {
    "attn1.Wqkv": ("to_q", "to_k", "to_v"),
    "attn2.q_proj": ("to_q",),
    "attn2.kv_proj": ("to_k", "to_v"),
}


def split(
    prefix: str, down: str, up: str, others: dict[str, str], dora: bool = False
) -> tuple[Tensors, dict]:
    """A LoRA of rank 3 for each of q, k and v by itself, and for ``others``, by their modules' names."""
    tensors: Tensors = {}
    changes: dict[str, Change] = {}

    def one(name: str, rows: int, columns: int, seed: int) -> Change:
        a, b, length = draw(3, columns, seed=seed), draw(rows, 3, seed=seed), draw(rows, seed=seed).abs() + 1
        tensors[f"{prefix}{name}.{down}"], tensors[f"{prefix}{name}.{up}"] = a, b
        plain = product(a, b)
        if not dora:
            return plain
        tensors[f"{prefix}{name}.lora_magnitude_vector"] = length
        return lambda base: length.double()[:, None] * plain(base) / plain(base).norm(dim=1, keepdim=True)

    for block in range(TINY.depth):
        for module, names in _SPLIT.items():
            rows, columns = layers()[f"blocks.{block}.{module}"]
            attention = module.partition(".")[0]
            each = [
                one(f"blocks.{block}.{attention}.{name}", rows // len(names), columns, seed=block + index)
                for index, name in enumerate(names)
            ]
            changes[f"dit.blocks.{block}.{module}.weight"] = functools.partial(_of_rows, each)
        for name, module in others.items():
            changes[f"dit.blocks.{block}.{module}.weight"] = one(
                f"blocks.{block}.{name}", *layers()[f"blocks.{block}.{module}"], seed=block
            )
    return tensors, changes


def _of_rows(each: list[Change], base: Tensor) -> Tensor:
    return torch.cat([change(part) for change, part in zip(each, base.chunk(len(each)), strict=True)])


def t2itrainer(dora: bool) -> Callable[[Path], Written]:
    """diffusers' names, as its pipelines save them."""

    def write(folder: Path) -> Written:
        others = {"attn1.to_out.0": "attn1.out_proj", "attn2.to_out.0": "attn2.out_proj"}
        tensors, changes = split("transformer.", "lora_A.weight", "lora_B.weight", others, dora)
        path = folder / "pytorch_lora_weights.safetensors"
        save_file(tensors, path)
        return Written(path, changes=changes)

    return write


def diffsynth(folder: Path) -> Written:
    """A checkpoint of its trainer, with names of its own for the last layers."""
    others = {f"{attention}.to_out": f"{attention}.out_proj" for attention in ("attn1", "attn2")}
    others |= {"mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "modulation.1": "default_modulation.1"}
    tensors, changes = split("", "lora_A.default.weight", "lora_B.default.weight", others)
    torch.save(tensors, folder / "epoch=0-step=500.ckpt")
    return Written(folder / "epoch=0-step=500.ckpt", changes=changes)


def kohya(folder: Path) -> Written:
    """With BERT's and mT5's layers, alpha 2 at rank 4."""
    sizes = {f"dit.{name}": size for name, size in layers().items() if name.startswith("blocks.")}
    for part, tensors in zip(("bert", "t5"), encoders(), strict=True):
        for key, value in tensors.items():
            if key.endswith((".attention.self.query.weight", ".SelfAttention.q.weight", "dense.weight")):
                sizes[f"{part}.{key.removesuffix('.weight')}"] = (value.shape[0], value.shape[1])
    prefixes = {"dit": "lora_unet_", "bert": "lora_te1_", "t5": "lora_te2_"}
    tensors, changes = {}, {}
    for module, (rows, columns) in sizes.items():
        part, _, name = module.partition(".")
        key = prefixes[part] + name.replace(".", "_")
        down, up = draw(4, columns), draw(rows, 4)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
        changes[f"{module}.weight"] = product(down, up, 0.5)
    metadata = {"ss_network_module": "hunyuan_models.lora", "ss_network_dim": "4", "ss_network_alpha": "2"}
    path = folder / "style.safetensors"
    save_file(tensors, path, metadata)
    return Written(path, changes=changes)


def lycoris(algorithm: str) -> Callable[[Path], Written]:
    """Rank 4 and alpha 2; as lycoris-lora 4.1 names its tensors, and as it computes while it trains."""

    def write(folder: Path) -> Written:
        tensors, changes = {}, {}
        for module, (rows, columns) in layers().items():
            if module.startswith("blocks."):
                own, change = _LYCORIS[algorithm](rows, columns)
                prefix = f"lycoris_{module.replace('.', '_')}."
                tensors |= {prefix + name: value for name, value in own.items()}
                changes[f"dit.{module}.weight"] = change
        if algorithm == "full":
            for name in ("norm1", "norm2", "norm3"):
                weight, bias = draw(TINY.hidden_size), draw(TINY.hidden_size, seed=1)
                key = f"lycoris_blocks_0_{name}"
                tensors |= {f"{key}.w_norm": weight, f"{key}.b_norm": bias}
                changes[f"dit.blocks.0.{name}.weight"] = functools.partial(_added, weight)
                changes[f"dit.blocks.0.{name}.bias"] = functools.partial(_added, bias)
        path = folder / f"lycoris_{algorithm}.safetensors"
        save_file(tensors, path, {"ss_network_module": "lycoris.kohya"})
        return Written(path, changes=changes)

    return write


def _added(change: Tensor, base: Tensor) -> Tensor:
    return base + change.double()


def _loha(rows: int, columns: int) -> tuple[Tensors, Change]:
    own = {"hada_w1_a": draw(rows, 4), "hada_w1_b": draw(4, columns)}
    own |= {"hada_w2_a": draw(rows, 4, seed=1), "hada_w2_b": draw(4, columns, seed=1)}
    one, two = (own[f"hada_{w}_a"].double() @ own[f"hada_{w}_b"].double() for w in ("w1", "w2"))
    return own | {"alpha": torch.tensor(2.0)}, lambda base: base + 0.5 * one * two


def _lokr(rows: int, columns: int) -> tuple[Tensors, Change]:
    own = {"lokr_w1": draw(4, 4), "lokr_w2_a": draw(rows // 4, 4), "lokr_w2_b": draw(4, columns // 4)}
    second = own["lokr_w2_a"].double() @ own["lokr_w2_b"].double()
    whole = torch.kron(own["lokr_w1"].double(), second)
    return own | {"alpha": torch.tensor(2.0)}, lambda base: base + 0.5 * whole


def _full(rows: int, columns: int) -> tuple[Tensors, Change]:
    difference = draw(rows, columns)
    return {"diff": difference}, functools.partial(_added, difference)


_LYCORIS = {"loha": _loha, "lokr": _lokr, "full": _full}
