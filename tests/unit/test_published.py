"""Files as people have them: several sets of weights in one, several files in a folder, what is not read."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from PIL import Image
from published_files import BESIDE
from safetensors.torch import save_file
from tiny_models import randomize, tiny

from hydit_core.errors import LoraError, WeightsError
from hydit_core.generate.__main__ import main as generate
from hydit_core.lora.reading import read
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.pictures.png import read_parameters
from hydit_core.weights.bundle import bundle
from hydit_core.weights.load import load_controlnet, load_dit


def controlnet(old: bool = False) -> OrderedDict[str, torch.Tensor]:
    net = ControlNet(tiny(old=old))
    randomize(net, seed=4)
    return OrderedDict((key, value.half()) for key, value in net.state_dict().items())


def same(loaded: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    found = loaded.state_dict()
    return found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)


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


def test_a_set_of_another_kind_says_what_else_is_there(tmp_path: Path) -> None:
    model = DiT(tiny())
    randomize(model, seed=6)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": model.state_dict(), "ema": controlnet()}, path)
    with pytest.raises(
        WeightsError, match=r"v1.2 ControlNet; .*that is its 'ema', it has module too: load_key"
    ):
        load_dit(path)
    assert same(load_dit(path, load_key="module")[0], model.state_dict())
    assert same(load_controlnet(path)[0], controlnet())


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
        facts = read_parameters(out)
        assert facts.get("load_key", "default") == key
        graph = json.loads(Image.open(out).text["prompt"])
        loader = next(n["inputs"] for n in graph.values() if n["class_type"] == "HyDiTDiTLoader")
        assert loader["load_key"] == ("auto" if key == "default" else key)
    assert drawn["default"] == drawn["ema"] != drawn["module"]


def test_of_several_controlnets_in_a_folder_none_is_taken(tmp_path: Path) -> None:
    """Tencent's three lie in one folder, under names that look like those of one model's sets of weights."""
    for kind in ("canny", "depth", "pose"):
        torch.save(controlnet(), tmp_path / f"pytorch_model_{kind}_distill.pt")
    with pytest.raises(WeightsError, match="3 weights files; name one of them"):
        load_controlnet(tmp_path)


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
