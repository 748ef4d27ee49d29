"""Dimensions from shapes, and what a file's metadata says."""

from __future__ import annotations

import json

import pytest
import torch

from hydit_core.errors import ConfigError, WeightsError
from hydit_core.facts import DiffusionConfig, ModelInfo, SamplingDefaults
from hydit_core.model import config as presets
from hydit_core.model.config import DiTConfig
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT

SMALL = DiTConfig(
    hidden_size=160,
    depth=6,
    num_heads=4,
    mlp_hidden=640,
    text_dim=128,
    text_len=20,
    t5_dim=96,
    t5_len=28,
    t5_hidden=384,
    pooled_dim=64,
)


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["DIT_G2_V12", "DIT_G2_V11", "DIT_XL2_V12", "DIT_XL2_V11"])
@pytest.mark.parametrize("kind", [DiT, ControlNet])
def test_dimensions_are_read_from_published_shapes(name, kind):
    config = getattr(presets, name)
    model = kind(config, device="meta")
    assert DiTConfig.from_state_dict(model.state_dict()) == config
    assert DiTConfig.from_state_dict(shapes(model)).version == {"12": "v1.2", "11": "v1.1"}[name[-2:]]


@pytest.mark.parametrize("size_cond", [False, True])
@pytest.mark.parametrize("style_cond", [False, True])
def test_dimensions_of_small_models_and_each_condition_alone(size_cond, style_cond):
    config = DiTConfig.from_dict(SMALL.to_dict() | {"size_cond": size_cond, "style_cond": style_cond})
    for kind in (DiT, ControlNet):
        assert DiTConfig.from_state_dict(shapes(kind(config, device="meta"))) == config


def test_what_shapes_do_not_tell_is_passed_in():
    model = shapes(DiT(SMALL, device="meta"))
    config = DiTConfig.from_state_dict(model, pooler_heads=4, rope_base=16)
    assert (config.pooler_heads, config.rope_base) == (4, 16)


def test_four_output_channels():
    config = DiTConfig.from_dict(SMALL.to_dict() | {"out_channels": 4})
    assert DiTConfig.from_state_dict(shapes(DiT(config, device="meta"))).out_channels == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp_t5.0.weight"), "mlp_t5.0.weight is missing"),
        (lambda s: s.pop("final_layer.linear.weight"), "after_proj_list.5.weight is missing"),
        (lambda s: s.update({"extra_embedder.0.weight": (640, 99)}), "has 99 columns; expected 64"),
        (lambda s: s.update({"blocks.0.attn1.q_norm.weight": (4, 40)}), r"has shape \(4, 40\)"),
    ],
)
def test_foreign_state_dicts_are_refused(change, message):
    state = dict(shapes(DiT(SMALL, device="meta")))
    change(state)
    with pytest.raises(WeightsError, match=message):
        DiTConfig.from_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "3 heads"),
        ({"num_heads": 80}, "multiple of 4"),
        ({"depth": 7}, "depth 7: must be even"),
        ({"pooler_heads": 7}, "pooler_heads 7"),
        ({"widht": 7}, "unknown model dimension: widht"),
    ],
)
def test_impossible_dimensions_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        DiTConfig.from_dict(SMALL.to_dict() | change)


@pytest.mark.parametrize(("version", "beta_end"), [("v1.0", 0.03), ("v1.1", 0.03), ("v1.2", 0.018)])
def test_a_file_without_metadata_has_the_published_values(version, beta_end):
    info = ModelInfo.from_metadata({"format": "pt"}, version=version)
    assert info.diffusion == DiffusionConfig(1000, 0.00085, beta_end, "v")
    assert (info.version, info.pooler_heads, info.rope_base, info.variant) == (version, 8, 32, "")
    assert (info.defaults.sampler, info.defaults.steps, info.defaults.cfg) == ("ddpm", 50, 6.0)
    assert info.defaults.negative.startswith("错误的眼睛，") and info.defaults.negative.endswith("残缺，")


def test_metadata_survives_the_round_trip():
    info = ModelInfo(
        version="v1.1",
        variant="distill",
        pooler_heads=4,
        rope_base=16,
        diffusion=DiffusionConfig(beta_end=0.02, prediction="epsilon"),
        defaults=SamplingDefaults(sampler="dpmpp_2m", steps=25, cfg=2.5, width=128, height=96, negative="坏"),
        bert={"num_attention_heads": 4},
        t5={"relative_attention_max_distance": 64},
        vae={"norm_num_groups": 8, "preview_rgb": [[0.1, 0.2, 0.3]]},
        base="HunyuanDiT-v1.1",
    )
    assert ModelInfo.from_metadata({"hydit.config": info.to_json()}, version="v1.2") == info


def test_absent_values_are_those_of_the_version_in_the_metadata():
    text = json.dumps({"format": 1, "version": "v1.0", "defaults": {"cfg": 2}})
    info = ModelInfo.from_metadata({"hydit.config": text}, version="v1.2")
    assert (info.version, info.diffusion.beta_end, info.defaults.cfg, info.defaults.steps) == (
        "v1.0",
        0.03,
        2,
        50,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 2, "version": "v1.2"}', "format 2.*update hydit"),
        ('{"version": "v1.2"}', "format number"),
        ("[]", "holds a list; expected an object"),
        ("{", "not valid JSON"),
        ('{"format": 1, "pooler_heads": "8"}', "pooler_heads is '8'"),
        ('{"format": 1, "diffusion": 5}', "diffusion is 5"),
    ],
)
def test_bad_metadata_is_refused(text, message):
    with pytest.raises(WeightsError, match=message):
        ModelInfo.from_metadata({"hydit.config": text}, version="v1.2")


def test_an_unknown_version_is_refused():
    with pytest.raises(ConfigError, match=r"v9.*known are v1\.0"):
        ModelInfo.published("v9")
