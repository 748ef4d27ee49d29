"""What a file may say of itself: one check for files, config.json, schedulers and whoever writes."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import write_tiny_model

from hydit_core import facts
from hydit_core.diffusion.denoiser import predict_x0
from hydit_core.diffusion.samplers import SAMPLERS
from hydit_core.errors import ConfigError, WeightsError
from hydit_core.facts import DiffusionConfig, ModelInfo, SamplingDefaults
from hydit_core.generate.__main__ import main as generate
from hydit_core.weights.bundle import bundle

BAD = {
    "version": ("", "version", ["v9", "", None, 1.2, ["v1.2"]], "one of v1.0, v1.1, v1.2"),
    "pooler_heads": ("", "pooler_heads", [0, -8, True, 8.0, "8", 10**9, None], "a whole number from 1 to"),
    "rope_base": ("", "rope_base", [0, 10**6, False], "a whole number from 1 to"),
    "base": ("", "base", [5, "x" * 1001], "a text of up to"),
    "posterior": ("", "posterior", ["mean", None, True], "'sample' or 'mode'"),
    "variant": ("", "variant", [["ema"]], "a text of up to"),
    "timesteps": ("diffusion", "num_train_timesteps", [0, 1, 10**12, 1000.0, True], "a whole number from 2"),
    "beta_start": ("diffusion", "beta_start", [0, -0.1, 1, "0.1", True], "a number from"),
    "beta_end": ("diffusion", "beta_end", [0, 1.5, [0.1]], "a number from"),
    "prediction": (
        "diffusion",
        "prediction",
        ["banana", "v_prediction", None, {}],
        "one of v, epsilon, sample",
    ),
    "sampler": ("defaults", "sampler", ["nope", 3], "one of ddpm"),
    "spacing": ("defaults", "spacing", ["karras", None], "one of leading"),
    "steps": ("defaults", "steps", [True, 0, -5, 2.5, "25", 10**6], "a whole number from 1"),
    "cfg": ("defaults", "cfg", [0.5, True, "6", -1], "a number from 1"),
    "guidance_rescale": ("defaults", "guidance_rescale", [-0.1, 1.1], "a number from 0 to 1"),
    "width": ("defaults", "width", [0, 1001, 10**9, -8, 64.0], "that 8 divides"),
    "height": ("defaults", "height", [7, None], "that 8 divides"),
    "negative": ("defaults", "negative", [None, 3], "a text"),
    "heads": ("bert", "num_attention_heads", [0, True, 2.0, -1, "2"], "a whole number from 1"),
    "act": ("bert", "hidden_act", ["eval", 1], "one of gelu"),
    "eps": ("bert", "layer_norm_eps", [0, -1e-6, 5, "1e-12"], "a number from"),
    "case": ("bert", "do_lower_case", [1, "true", None], "true or false"),
    "distance": ("t5", "relative_attention_max_distance", [0, 1, True, 1e3], "a whole number from 2"),
    "feed forward": ("t5", "feed_forward_proj", ["gated", "gated-gated-gelu", ""], "one of gelu"),
    "groups": ("vae", "norm_num_groups", [0, -32, True, "32"], "a whole number from 1"),
    "scale": ("vae", "scaling_factor", ["0.13", 0, -1, True, None, 1e30], "a number from"),
    "shift": ("vae", "shift_factor", ["0", [0]], "a number from"),
    "rgb": ("vae", "preview_rgb", [[], [[1, 2]], [["a", 0, 0]], 3, [[1, 2, True]]], "rows of three numbers"),
}


def said(section: str, name: str, value: object) -> dict[str, str]:
    values = {section: {name: value}} if section else {name: value}
    return {"hydit.config": json.dumps({"format": 1, **values})}


@pytest.mark.parametrize("section, name, values, expected", BAD.values(), ids=BAD)
def test_values_that_no_model_has_are_refused_when_read_and_when_written(section, name, values, expected):
    dotted = f"{section}.{name}" if section else name
    for value in values:
        with pytest.raises(WeightsError) as error:
            ModelInfo.from_metadata(said(section, name, value), version="v1.2")
        text = str(error.value)
        assert (
            text.startswith(f"metadata 'hydit.config': {dotted} is ") and expected in text and len(text) < 600
        )
        with pytest.raises(ConfigError, match=dotted.replace(".", r"\.")):
            start = ModelInfo.published("v1.2")
            if section in ("", "bert", "t5", "vae"):
                replace(start, **({name: value} if not section else {section: {name: value}}))
            else:
                replace(start, **{section: replace(getattr(start, section), **{name: value})})


@pytest.mark.parametrize("values, message", [
    ({"diffusion": {"beta_start": 0.03, "beta_end": 0.01}}, "beta_start 0.03 is above diffusion.beta_end"),
    ({"diffusion": {"beta_end": 0.9}}, "leave .* of the signal"),
    ({"defaults": {"steps": 1000}}, "room for 999 with 'leading' spacing"),
    ({"diffusion": {"num_train_timesteps": 40}}, "defaults.steps is 50; the schedule has room for 39"),
    ({"bert": []}, "bert is .*; expected an object"),
    ({"diffusion": "v"}, "diffusion is 'v'; expected an object"),
    ({"defaults": None}, "defaults is None; expected an object"),
    ({"format": True}, "format number"),
    ({"format": 0}, "format number"),
    ({"format": 1.0}, "format number"),
])  # fmt: skip
def test_values_that_contradict_each_other(values, message):
    with pytest.raises(WeightsError, match=message):
        ModelInfo.from_metadata({"hydit.config": json.dumps({"format": 1, **values})}, version="v1.2")


def test_the_ends_of_the_ranges_are_accepted():
    for version, beta_end in (("v1.1", 0.03), ("v1.2", 0.018), ("v1.2", 0.1)):
        values = {"version": version, "diffusion": {"beta_end": beta_end, "beta_start": 1e-4}}
        info = ModelInfo.from_metadata({"hydit.config": json.dumps({"format": 1, **values})}, version="v1.2")
        assert info.diffusion.beta_end == beta_end
    trailing = replace(SamplingDefaults(), spacing="trailing", steps=1000, cfg=1, width=8)
    assert ModelInfo("v1.2", defaults=trailing).defaults.steps == 1000


def test_the_lists_of_names_are_those_of_the_code():
    assert tuple(SAMPLERS) == facts.SAMPLER_NAMES
    for name in facts.PREDICTIONS:
        predict_x0(*(4 * [_one()]), name)


def _one():
    import torch

    return torch.ones(1)


def test_every_activation_is_known_to_transformers():
    from transformers.activations import ACT2FN

    for name in facts.ACTIVATIONS:
        assert ACT2FN[name] is not None


def test_unknown_names_are_told_and_passed_over():
    values = {"format": 1, "versoin": "v1.0", "defaults": {"step\x1bs": 3, "cfg": 2}, "vae": {"groups": 1}}
    with pytest.warns(UserWarning, match=r"versoin, defaults\.step\\x1bs, vae\.groups"):
        info = ModelInfo.from_metadata({"hydit.config": json.dumps(values)}, version="v1.1")
    assert (info.version, info.defaults.cfg, info.defaults.steps) == ("v1.1", 2, 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelInfo.from_metadata({"hydit.config": ModelInfo.published("v1.0").to_json()}, version="v1.2")


def test_schedules_check_themselves():
    with pytest.raises(ConfigError, match="beta_end is nan"):
        DiffusionConfig(beta_end=float("nan"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("facts") / "tiny.safetensors")


HOSTILE = {
    "meta_deep": '{"format": 1, "x": ' + "[" * 100_000,
    "meta_pooler0": {"pooler_heads": 0},
    "meta_bert_heads0": {"bert": {"num_attention_heads": 0}},
    "meta_vae_groups0": {"vae": {"norm_num_groups": 0}},
    "meta_vae_scale_str": {"vae": {"scaling_factor": "0.13"}},
    "betas_0": {"diffusion": {"beta_start": 0, "beta_end": 0}},
    "prediction_x": {"diffusion": {"prediction": "banana"}},
    "default_steps_bool": {"defaults": {"steps": True}},
    "train_steps_1e12": {"diffusion": {"num_train_timesteps": 10**12}},
    "version": {"version": "v9"},
    "infinite": '{"format": 1, "diffusion": {"beta_end": 1e999}}',
    "digits": '{"format": 1, "pooler_heads": ' + "9" * 10_000 + "}",
    "twice": '{"format": 1, "pooler_heads": 4, "pooler_heads": 8}',
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_metadata_is_one_line_at_the_command_line(tiny, tmp_path, capsys, what):
    said = HOSTILE[what]
    with safe_open(tiny, "pt") as file:
        metadata = dict(file.metadata())
    if isinstance(said, dict):
        said = json.dumps({**json.loads(metadata["hydit.config"]), **said})
    path = tmp_path / "bad.safetensors"
    save_file(load_file(tiny), path, {**metadata, "hydit.config": said})
    out = tmp_path / "out"
    assert generate(["--model", str(path), "--prompt", "a red apple", "--out", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {path}") and err.count("\n") == 1 and len(err) < 600
    assert not list(out.glob("*"))


def test_config_json_is_checked_too(tiny, tmp_path):
    full = load_file(tiny)
    prefix = "text_encoders.hydit_clip.transformer.bert."
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    bert = {key.removeprefix(prefix): value for key, value in full.items() if key.startswith(prefix)}
    save_file(bert, folder / "model.safetensors")
    for content, message in (
        ({"model_type": "bert", "num_attention_heads": 0}, r"config\.json: bert\.num_attention_heads is 0"),
        ([], r"config\.json holds a list; expected an object"),
    ):
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=message):
            bundle(folder, only=("bert",))
