"""Converted weights in diffusers' own classes: a table that is wrong in both directions is caught here."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.controlnets.controlnet_hunyuan import HunyuanDiT2DControlNetModel
from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
from diffusers_models import diffusers_controlnet, diffusers_dit
from key_lists import key_list
from tiny_models import encode, inputs, randomize, tiny
from torch import Tensor, nn

from hydit_core.facts import ModelInfo
from hydit_core.model.config import DIT_G2_V11, DIT_G2_V12, DIT_XL2_V11, DIT_XL2_V12, DiTConfig
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.model.rope import rope_table
from hydit_core.weights import layouts
from hydit_core.weights.convert import convert
from hydit_core.weights.diffusers_config import controlnet_config, transformer_config
from hydit_core.weights.layouts import from_tencent, to_tencent
from hydit_core.weights.load import load_controlnet, load_dit
from hydit_core.weights.save import save_checkpoint

TOLERANCE = 1e-5
SIZE = (16, 16)


def theirs(model: nn.Module, config: DiTConfig, values: dict[str, Tensor], **more):
    old = model.config.use_style_cond_and_image_meta_size
    return model(
        values["x"],
        values["t"],
        encoder_hidden_states=values["bert"],
        text_embedding_mask=values["bert_mask"],
        encoder_hidden_states_t5=values["t5"],
        text_embedding_mask_t5=values["t5_mask"],
        image_meta_size=values["sizes"] if old else None,
        style=torch.zeros(len(values["x"]), dtype=torch.long) if old else None,
        image_rotary_emb=rope_table(SIZE[0] // 2, SIZE[1] // 2, config.head_dim),
        return_dict=False,
        **more,
    )[0]


def ours(model: DiT | ControlNet, values: dict[str, Tensor], *more: Tensor):
    return model(values["x"], values["t"], encode(model, values), *more)


def error(left: Tensor, right: Tensor) -> float:
    assert right.std() > 0.1
    return ((left - right).abs().max() / right.std()).item()


def random_theirs(model: nn.Module) -> nn.Module:
    """Random values in all of diffusers' parameters, the zero-initialized too."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.ndim < 2:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


@pytest.mark.parametrize("old", [False, True], ids=["v1.2", "v1.1"])
@torch.no_grad()
def test_our_weights_in_diffusers_transformer(old):
    config = tiny(old=old)
    model = DiT(config)
    randomize(model, seed=11)
    reference = diffusers_dit(config)
    reference.load_state_dict(dict(from_tencent(model.state_dict(), "diffusers")), strict=True)
    values = inputs(config, SIZE)
    assert error(ours(model, values), theirs(reference, config, values)) <= TOLERANCE


@pytest.mark.parametrize("old", [False, True], ids=["v1.2", "v1.1"])
@torch.no_grad()
def test_diffusers_weights_in_our_model(old):
    config = tiny(old=old)
    reference = random_theirs(diffusers_dit(config))
    model = DiT(config).eval()
    model.load_state_dict(dict(to_tencent(reference.state_dict(), "diffusers")), strict=True)
    values = inputs(config, SIZE)
    assert error(ours(model, values), theirs(reference, config, values)) <= TOLERANCE


@pytest.mark.parametrize("old", [False, True], ids=["v1.2", "v1.1"])
@torch.no_grad()
def test_controlnets_both_ways(old):
    config = tiny(old=old)
    values = inputs(config, SIZE)
    net = ControlNet(config)
    randomize(net, seed=12)
    reference = diffusers_controlnet(config)
    reference.load_state_dict(dict(from_tencent(net.state_dict(), "diffusers")), strict=True)
    again = ControlNet(config).eval()
    again.load_state_dict(
        dict(to_tencent(random_theirs(diffusers_controlnet(config)).state_dict(), "diffusers"))
    )
    for model, other in ((net, reference), (again, random_theirs(diffusers_controlnet(config)))):
        expected = theirs(other, config, values, controlnet_cond=values["hint"])
        found = ours(model, values, values["hint"])
        assert len(found) == len(expected)
        assert all(error(f, e) <= TOLERANCE for f, e in zip(found, expected, strict=True))


BLOCK = "blocks.{n}."
MISTAKES = {
    "halves not swapped": {"final_layer.adaLN_modulation.1": {"swap": False}},
    "norm2 taken for norm2": {
        BLOCK + "norm2": {"diffusers": (BLOCK + "norm2",)},
        BLOCK + "norm3": {"diffusers": (BLOCK + "norm3",)},
    },
    "q, k, v in another order": {
        BLOCK + "attn1.Wqkv": {"diffusers": tuple(f"{BLOCK}attn1.to_{x}" for x in "vqk")}
    },
    "v before k": {BLOCK + "attn2.kv_proj": {"diffusers": tuple(f"{BLOCK}attn2.to_{x}" for x in "vk")}},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@torch.no_grad()
def test_a_wrong_rule_would_be_seen(monkeypatch, mistake):
    config = tiny()
    model = DiT(config)
    randomize(model, seed=11)
    table = {rule.tencent: rule for rule in layouts.RULES}
    for tencent, changes in MISTAKES[mistake].items():
        table[tencent] = table[tencent]._replace(**changes)
    monkeypatch.setattr(layouts, "_BY_TENCENT", table)
    monkeypatch.setattr(
        layouts, "_BY_DIFFUSERS", {n: rule for rule in table.values() for n in rule.diffusers}
    )
    tensors = model.state_dict()
    there = dict(from_tencent(tensors, "diffusers"))
    back = to_tencent(there, "diffusers")
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)  # the round trip sees nothing
    reference = diffusers_dit(config)
    reference.load_state_dict(there, strict=True)
    values = inputs(config, SIZE)
    assert error(ours(model, values), theirs(reference, config, values)) > 0.05


FULL = {
    "g2_v12": (DIT_G2_V12, HunyuanDiT2DModel),
    "g2_v11": (DIT_G2_V11, HunyuanDiT2DModel),
    "xl2_v12": (DIT_XL2_V12, HunyuanDiT2DModel),
    "xl2_v11": (DIT_XL2_V11, HunyuanDiT2DModel),
    "cn_v12": (DIT_G2_V12, HunyuanDiT2DControlNetModel),
    "cn_v11": (DIT_G2_V11, HunyuanDiT2DControlNetModel),
}


@pytest.mark.parametrize("name", FULL)
def test_published_key_lists_are_those_of_the_classes(name):
    """Every key and shape: keys.json, our model, and diffusers' class built from the config that we write."""
    config, cls = FULL[name]
    info = ModelInfo.published(config.version)
    is_dit = cls is HunyuanDiT2DModel
    with torch.device("meta"):
        written = transformer_config(config, info) if is_dit else controlnet_config(config, info)
        reference = cls.from_config(written)
        model = (DiT if is_dit else ControlNet)(config)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == key_list(name)
    theirs = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    assert from_tencent(model.state_dict(), "diffusers").shapes() == theirs


@pytest.mark.parametrize("old", [False, True], ids=["v1.2", "v1.1"])
@torch.no_grad()
def test_a_converted_folder_opens_in_diffusers_and_comes_back(tmp_path, old):
    config = tiny(old=old)
    model = DiT(config).eval()
    randomize(model, seed=13)
    info = ModelInfo.published(config.version)
    save_checkpoint(tmp_path / "in.safetensors", dit=model.state_dict(), info=info)
    convert(tmp_path / "in.safetensors", tmp_path / "folder", layout="diffusers")
    reference = HunyuanDiT2DModel.from_pretrained(tmp_path / "folder" / "transformer").eval()
    values = inputs(config, SIZE)
    expected = theirs(reference, config, values)
    assert error(ours(model, values), expected) <= TOLERANCE

    reference.save_pretrained(tmp_path / "theirs" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "theirs" / "transformer").glob("*.safetensors"))) > 2
    again, _ = load_dit(tmp_path / "theirs")
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True)
    )


@torch.no_grad()
def test_a_converted_controlnet_opens_in_diffusers_and_comes_back(tmp_path):
    config = tiny()
    net = ControlNet(config).eval()
    randomize(net, seed=14)
    save_checkpoint(tmp_path / "in.safetensors", dit=net.state_dict(), info=ModelInfo.published("v1.2"))
    convert(tmp_path / "in.safetensors", tmp_path / "folder", layout="diffusers")
    reference = HunyuanDiT2DControlNetModel.from_pretrained(tmp_path / "folder").eval()
    values = inputs(config, SIZE)
    expected = theirs(reference, config, values, controlnet_cond=values["hint"])
    found = ours(net, values, values["hint"])
    assert all(error(f, e) <= TOLERANCE for f, e in zip(found, expected, strict=True))
    again, _ = load_controlnet(tmp_path / "folder")
    assert all(torch.equal(again.state_dict()[key], value) for key, value in net.state_dict().items())


def test_the_scheduler_beside_it_opens_in_diffusers(tmp_path):
    from diffusers import DDPMScheduler

    model = DiT(tiny(old=True))
    save_checkpoint(tmp_path / "in.safetensors", dit=model.state_dict(), info=ModelInfo.published("v1.1"))
    convert(tmp_path / "in.safetensors", tmp_path / "folder", layout="diffusers")
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "folder" / "scheduler")
    assert (scheduler.config.beta_end, scheduler.config.prediction_type) == (0.03, "v_prediction")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == 981 and scheduler.timesteps[-1] == 1
