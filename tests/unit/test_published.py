"""Files as people have them, with random weights: containers and names as their makers write them."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import randomize, tiny

from hydit_core.errors import LoraError, WeightsError
from hydit_core.generate.__main__ import main as generate
from hydit_core.lora.adapter import changed
from hydit_core.lora.reading import read
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.weights.__main__ import main as weights
from hydit_core.weights.bundle import bundle
from hydit_core.weights.layouts import from_tencent
from hydit_core.weights.load import load_controlnet, load_dit


def controlnet(old: bool = False) -> OrderedDict[str, torch.Tensor]:
    net = ControlNet(tiny(old=old))
    randomize(net, seed=4)
    return OrderedDict((key, value.half()) for key, value in net.state_dict().items())


def same(loaded: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    found = loaded.state_dict()
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


# What DeepSpeed's training of HunyuanDiT pickles beside the weights.
BESIDE = {
    "args": argparse.Namespace(model="DiT-g/2", image_size=(1024, 1024), ema_dtype="fp32", log=Path("log")),
    "param_shapes": [OrderedDict(a=torch.Size([3, 4]))],
    "frozen": {"x_embedder", "t_embedder"},
    "buffer_names": [],
    "optimizer": None,
    "lr_scheduler": None,
    "global_steps": 5000,
    "dp_world_size": 8,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["plain", "deepspeed"])
def test_controlnets_of_ttplanet(kind: str, zipped: bool, tmp_path: Path, capsys) -> None:
    """A plain dictionary in half precision, and the older kind with what the training left in it."""
    tensors, path = controlnet(), tmp_path / "TTPLanet_tile.pt"
    content = tensors if kind == "plain" else {"module": tensors, **BESIDE}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert same(load_controlnet(path)[0], tensors)
    assert weights(["inspect", str(path)]) == 0 and "v1.2 ControlNet" in capsys.readouterr().out


def test_a_deepspeed_checkpoint_gives_either_set(tmp_path: Path) -> None:
    model = DiT(tiny(old=True))
    randomize(model, seed=5)
    module = {key: value.half() for key, value in model.state_dict().items()}
    ema = {key: value + 1 for key, value in model.state_dict().items()}
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": module, "ema": ema, **BESIDE}, path)
    for place in (path, tmp_path):
        assert same(load_dit(place)[0], ema)
        assert same(load_dit(place, load_key="module")[0], module)
    with pytest.raises(WeightsError, match="no weights under 'distill'; it has module, ema"):
        load_dit(path, load_key="distill")
    assert load_dit(path)[1].diffusion.beta_end == 0.03


def test_pictures_of_either_set(tiny_model_file: Path, tmp_path: Path) -> None:
    tensors = {key: value.clone() for key, value in dict(bundle(tiny_model_file).dit).items()}
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(
        {"module": tensors, "ema": {key: 1.5 * value for key, value in tensors.items()}, **BESIDE}, file
    )
    parts = [
        "--text-encoders",
        tiny_model_file,
        "--vae",
        tiny_model_file,
        "--device",
        "cpu",
        "--prompt",
        "cat",
    ]
    drawn = {}
    for key in ("default", "ema", "module"):
        more = [] if key == "default" else ["--load-key", key]
        out = tmp_path / f"{key}.png"
        arguments = ["--model", file, *parts, *more, "--size", "64x64", "--steps", 1, "--out", out]
        assert generate([str(argument) for argument in arguments]) == 0
        drawn[key] = Image.open(out).tobytes()
    assert drawn["default"] == drawn["ema"] != drawn["module"]


@pytest.mark.parametrize("old", [False, True])
def test_diffusers_folders_of_a_controlnet(old: bool, tmp_path: Path) -> None:
    tensors = controlnet(old)
    save_file(dict(from_tencent(tensors, "diffusers")), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "HunyuanDiT2DControlNetModel"}))
    assert same(load_controlnet(tmp_path)[0], tensors)


def test_of_several_controlnets_in_a_folder_none_is_taken(tmp_path: Path) -> None:
    """Tencent's three lie in one folder, under names that look like those of one model's sets of weights."""
    for kind in ("canny", "depth", "pose"):
        torch.save(controlnet(), tmp_path / f"pytorch_model_{kind}_distill.pt")
    with pytest.raises(WeightsError, match="3 weights files; name one of them"):
        load_controlnet(tmp_path)


def test_tencents_own_lora(tmp_path: Path) -> None:
    names = ("blocks.0.attn1.Wqkv", "blocks.0.attn2.kv_proj", "pooler.q_proj")
    base = {name: torch.randn(12, 8) for name in names}
    factors = {}
    for name, weight in base.items():
        rows, columns = weight.shape
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(64, columns)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, 64)
    save_file(factors, tmp_path / "adapter_model.safetensors")
    config = {
        "auto_mapping": {"base_model_class": "HunYuanDiT", "parent_library": "hydit.modules.models"},
        **{"base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False, "inference_mode": True},
        **{"init_lora_weights": True, "layers_pattern": None, "lora_alpha": 64, "lora_dropout": 0.0, "r": 64},
        **{"modules_to_save": None, "peft_type": "LORA", "revision": None, "task_type": None},
        "target_modules": ["Wqkv", "q_proj", "kv_proj", "out_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = read(tmp_path)
    assert found.ranks() == [64]
    for name in names:
        a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        [patch] = found.part("dit")[name]
        torch.testing.assert_close(patch.delta().double(), b @ a, atol=1e-4, rtol=1e-5)


def test_a_dora_of_t2itrainer(tmp_path: Path) -> None:
    """Magnitudes on q, k and v by themselves are those of rows of the fused projection."""
    width, rank = 8, 2
    base = torch.randn(3 * width, width)
    file, expected = {}, []
    for index, x in enumerate("qkv"):
        down, up, length = torch.randn(rank, width), torch.randn(width, rank), torch.rand(width) + 1
        name = f"transformer.blocks.3.attn1.to_{x}"
        file |= {
            f"{name}.lora_A.weight": down,
            f"{name}.lora_B.weight": up,
            f"{name}.lora_magnitude_vector": length,
        }
        whole = base[index * width : (index + 1) * width].double() + up.double() @ down.double()
        expected.append(length.double()[:, None] * whole / whole.norm(dim=1, keepdim=True))
    save_file(file, tmp_path / "pytorch_lora_weights.safetensors")
    patches = read(tmp_path / "pytorch_lora_weights.safetensors").part("dit")["blocks.3.attn1.Wqkv"]
    torch.testing.assert_close(changed(base, patches).double(), torch.cat(expected), atol=1e-5, rtol=1e-4)


# Kinds of lycoris-lora 4.1 that are not read, as it writes them.
REFUSED = {
    "GLoRA": {
        "a1.weight": (8, 4),
        "a2.weight": (4, 8),
        "b1.weight": (24, 4),
        "b2.weight": (4, 8),
        "alpha": (),
    },
    "OFT": {"oft_blocks": (6, 4, 4), "alpha": ()},
    "T-LoRA": {"q_layer.weight": (4, 8), "p_layer.weight": (24, 4), "lambda_layer": (1, 4), "alpha": ()},
    "IA3": {"weight": (24,), "on_input": ()},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_lycoris_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "lycoris.safetensors"
    save_file(
        {f"lycoris_blocks_0_attn1_Wqkv.{end}": torch.zeros(shape) for end, shape in REFUSED[kind].items()},
        path,
    )
    with pytest.raises(LoraError, match=f"is of {kind}, which is not supported"):
        read(path)
