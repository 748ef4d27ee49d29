"""The pipeline on a tiny random model: what it promises about seeds, batches, settings and failures."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DEFAULTS, TINY_V11, write_tiny_model

import hydit_core
from hydit_core import ConfigError, HyditError, load
from hydit_core.devices import choose_device, named_device
from hydit_core.dtypes import choose_dtype
from hydit_core.facts import NEGATIVE_PROMPT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pipe(tiny_model_file):
    return load(tiny_model_file, device="cpu")


def pixels(image):
    return np.asarray(image).astype(int)


def test_pictures_have_the_asked_size_and_follow_seed_and_prompt(pipe):
    first, other_seed, other_prompt = (
        pipe(prompt, width=96, height=64, seed=seed)[0]
        for prompt, seed in (("a red apple", 1), ("a red apple", 2), ("a green car", 1))
    )
    assert first.size == (96, 64) and first.mode == "RGB"
    assert (pixels(first) == pixels(pipe("a red apple", width=96, height=64, seed=1)[0])).all()
    assert (pixels(first) != pixels(other_seed)).any()
    assert (pixels(first) != pixels(other_prompt)).any()


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_a_picture_does_not_depend_on_its_batch(pipe, sampler):
    """The sampler that draws noise at each step, and one that does not."""

    def latents(seed, batch):
        seen = []
        pipe("a red apple", seed=seed, batch=batch, sampler=sampler, callback=lambda i, n, x: seen.append(x))
        return seen[-1]

    together = latents(4, 3)
    for i in range(3):
        alone = latents(4 + i, 1)[0]
        assert (together[i] - alone).abs().max() <= 1e-5 * alone.std()
    assert (together[0] - together[1]).abs().max() > 0.1 * together.std()


def test_several_prompts_in_order_each_from_the_same_seed(pipe):
    both = pipe(["a red apple", "红苹果"], batch=2, seed=3)
    assert len(both) == 4
    for index, prompt in enumerate(("a red apple", "红苹果")):
        alone = pipe(prompt, seed=3)[0]
        assert np.abs(pixels(both[2 * index]) - pixels(alone)).max() <= 1


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_different_prompts_in_one_batch_are_what_each_is_alone(pipe, sampler, monkeypatch):
    rows = [("a red apple", 5, ""), ("a green car", 2**63, "blue"), ("a red apple", 5, "blue")]
    settings = pipe.settings(sampler=sampler, cfg=4.0)
    alone = [
        next(pipe.pictures([text], dataclasses.replace(settings, negative=negative), seed=seed))
        for text, seed, negative in rows
    ]
    predicted, shapes = type(pipe)._predict, []
    monkeypatch.setattr(
        type(pipe), "_predict", lambda *a, **k: shapes.append(len(a[1])) or predicted(*a, **k)
    )
    together = [
        *pipe.pictures([row[0] for row in rows], settings, each=[(seed, text) for _, seed, text in rows])
    ]
    assert set(shapes) == {6}  # guided
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        assert (other.prompt_index, other.prompt, other.seed) == (number, one.prompt, one.seed)
        torch.testing.assert_close(other.pixels, one.pixels, atol=2e-3, rtol=0)
    assert not torch.allclose(together[0].pixels, together[2].pixels, atol=2e-3)
    assert not list(pipe.pictures([], settings, each=[]))


def test_text_is_encoded_once_a_prompt(pipe, monkeypatch):
    calls = []
    encode = pipe.text.encode
    monkeypatch.setattr(pipe.text, "encode", lambda texts: calls.append(texts) or encode(texts))
    pipe(["a red apple", "a green car"], "fish", steps=4, batch=2)
    assert calls == [["fish"], ["a red apple"], ["a green car"]]


def test_guidance_and_negative_prompt_act_only_above_one(pipe):
    plain = pipe("a red apple", cfg=1.0)[0]
    assert (pixels(plain) == pixels(pipe("a red apple", "a green car", cfg=1.0)[0])).all()
    assert (pixels(plain) != pixels(pipe("a red apple", cfg=3.0)[0])).any()
    guided = pipe("a red apple", "", cfg=3.0)[0]
    assert (pixels(guided) != pixels(pipe("a red apple", "a green car", cfg=3.0)[0])).any()
    assert (pixels(guided) != pixels(pipe("a red apple", "", cfg=3.0, guidance_rescale=0.7)[0])).any()


def test_defaults_come_from_the_models_metadata(pipe):
    assert pipe.settings() == DEFAULTS
    changed = pipe.settings(sampler="ddpm", steps=7)
    # A sampler brings its own spacing; everything else stays.
    assert (changed.sampler, changed.spacing, changed.steps) == ("ddpm", "leading", 7)
    assert (changed.cfg, changed.width) == (DEFAULTS.cfg, DEFAULTS.width)


def test_naming_what_the_model_recommends_changes_nothing(pipe, monkeypatch):
    own = dataclasses.replace(DEFAULTS, sampler="euler", spacing="trailing")
    monkeypatch.setattr(pipe, "info", dataclasses.replace(pipe.info, defaults=own))
    assert pipe.settings(sampler="euler") == own
    assert pipe.settings(sampler="ddim").spacing == "leading"


def test_presets_are_the_published_settings(pipe):
    official = pipe.settings("v1.2")
    assert (official.sampler, official.spacing, official.steps, official.cfg) == ("ddpm", "leading", 100, 6.0)
    assert (official.width, official.height, official.negative) == (1024, 1024, NEGATIVE_PROMPT)
    assert pipe.settings("distilled").steps == 25
    diffusers = pipe.settings("diffusers", steps=9)
    assert (diffusers.steps, diffusers.cfg, diffusers.negative) == (9, 5.0, "")


def test_eta_makes_ddim_random_and_belongs_to_no_other_sampler(pipe):
    plain, noisy = (pipe("a red apple", sampler="ddim", eta=eta)[0] for eta in (0.0, 1.0))
    assert (pixels(plain) != pixels(noisy)).any()
    with pytest.raises(ConfigError, match="eta belongs to the ddim sampler; ddpm has none"):
        pipe("a red apple", sampler="ddpm", eta=0.5)


def test_size_condition_reaches_models_that_have_it(tmp_path, monkeypatch):
    old = load(write_tiny_model(tmp_path / "old.safetensors", TINY_V11), device="cpu")
    sizes = []
    encode = old.dit.encode_context

    def spy(*args, image_meta_size, **kwargs):
        sizes.append(image_meta_size)
        return encode(*args, image_meta_size=image_meta_size, **kwargs)

    monkeypatch.setattr(old.dit, "encode_context", spy)
    old("a red apple", width=96, height=64)
    # (original W, H, target W, H, crop left, top), for both halves of guidance.
    assert [size.tolist() for size in sizes] == [[[1024, 1024, 96, 64, 0, 0]] * 2]


def test_image_to_image_stays_closer_to_its_start_the_lower_the_strength(pipe):
    start = Image.effect_noise((100, 70), 60).convert("RGB")

    def latents(strength):
        seen = []
        pipe(
            "a red apple",
            steps=20,
            init_image=start,
            strength=strength,
            callback=lambda i, n, x: seen.append((i, n, x)),
        )
        assert [(i, n) for i, n, _ in seen] == [(i + 1, len(seen)) for i in range(len(seen))]
        return len(seen), seen[-1][2]

    settings = pipe.settings()
    clean = pipe._encode_image(start, settings)
    (few, near), (many, far) = latents(0.1), latents(0.9)
    assert (few, many) == (2, 18)
    assert (near - clean).abs().mean() < 0.5 * (far - clean).abs().mean()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "size 100x64: width and height must be multiples of 8; try 96x64"),
        ({"height": 0}, "size 64x0: width and height must be multiples of 8"),
        ({"sampler": "euler_a"}, "unknown sampler 'euler_a': use one of ddpm, ddim, dpmpp_2m, euler"),
        ({"spacing": "karras"}, "unknown spacing 'karras': use one of leading, linspace, trailing"),
        ({"steps": 0}, "0 steps with 'linspace' spacing: use 1 to 999"),
        ({"cfg": 0.5}, r"cfg 0.5: use 1 \(no guidance\) or more"),
        ({"guidance_rescale": 1.5}, r"guidance rescale 1.5: use 0 \(off\) to 1"),
        ({"preset": "v2"}, "unknown preset 'v2': use one of v1.0, v1.1, v1.2, distilled, diffusers"),
        ({"batch": 0}, "batch 0: use 1 or more"),
        ({"cfg": float("nan")}, "cfg nan: use 1"),
        ({"seed": 2**64}, f"seed {2**64}: use a number from 0 to {2**64 - 1}"),
        ({"strength": 0.0}, "strength 0.0: use a number above 0"),
        ({"strength": 0.6}, "strength 0.6 without a picture to start from: give init_image"),
    ],
)
def test_impossible_settings_are_refused_and_the_next_run_succeeds(pipe, options, message):
    with pytest.raises(ConfigError, match=message):
        pipe("a red apple", **options)
    assert len(pipe("a red apple", steps=1)) == 1


def test_warns_of_cut_prompts_and_unsuitable_sizes_and_still_draws(pipe):
    long = "a red apple " * 9
    with pytest.warns(UserWarning) as caught:
        images = pipe(long, width=320, height=320, steps=1)
    texts = [str(one.message) for one in caught]
    assert len(images) == 1
    assert any(text.startswith("prompt 1, BERT: 29 of at most 12 tokens, cut off:") for text in texts)
    assert any("320x320 is far above the size that this model was made for (64x64)" in text for text in texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe("a red apple", steps=1)


def test_odd_token_grids_give_the_asked_size(pipe):
    """72 pixels are 9 latents, which the model pads to 5 patches."""
    assert pipe("a red apple", width=72, height=56, steps=1)[0].size == (72, 56)


def test_overflow_names_the_block_and_advises_a_dtype(tiny_model_file):
    broken = load(tiny_model_file, device="cpu")
    with torch.no_grad():
        broken.dit.blocks[2].mlp.fc2.bias.fill_(float("inf"))
    with pytest.raises(
        HyditError, match=r"step 1: .* not finite in torch.float32, first in blocks.2.mlp.fc2; try"
    ):
        broken("a red apple")


def test_overflow_of_a_text_encoder_is_named(tiny_model_file):
    broken = load(tiny_model_file, device="cpu")
    with torch.no_grad():
        broken.text.bert.embeddings.LayerNorm.bias.fill_(float("nan"))
    with pytest.raises(HyditError, match=r"text encoders' output is not finite in torch\.float32"):
        broken("a red apple")


def test_overflow_of_the_projected_text_is_not_blamed_on_a_block(tiny_model_file):
    broken = load(tiny_model_file, device="cpu")
    with torch.no_grad():
        broken.dit.mlp_t5[2].bias.fill_(float("inf"))
    with pytest.raises(HyditError, match=r"DiT's projections of the text are not finite in torch\.float32"):
        broken("a red apple")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_gives_nearly_the_same_picture(pipe, tiny_model_file, dtype):
    low = load(tiny_model_file, device="cpu", dtype=dtype)
    assert low.dit.dtype == getattr(torch, dtype)
    expected, found = (pixels(one("a red apple", seed=2)[0]) for one in (pipe, low))
    assert np.abs(expected - found).mean() < 0.1 * expected.std()


def test_auto_dtype_and_device_names(monkeypatch):
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    assert choose_dtype(torch.float16, torch.device("cpu")) is torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16
    with pytest.raises(ConfigError, match="unknown dtype 'int4'"):
        choose_dtype("int4", torch.device("cpu"))
    with pytest.raises(ConfigError, match="device 'warp' cannot be used here"):
        choose_device("warp")


@pytest.mark.parametrize(
    ("there", "name", "rank", "expected"),
    [
        ("cuda mps", "auto", None, "cuda"), ("mps", "auto", None, "mps"), ("", "auto", "1", "cpu"),
        ("cuda", "auto", "1", "cuda:1"), ("cuda", "cuda", "3", "cuda:3"), ("cuda", "cuda:0", "1", "cuda:0"),
    ],
)  # fmt: skip
def test_which_device_a_name_means(there, name, rank, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert str(named_device(name)) == expected
    assert str(named_device(name, mps=False)) == ("cpu" if expected == "mps" else expected)


def test_public_names_are_found_lazily():
    code = (
        "import sys, hydit_core; assert 'torch' not in sys.modules; "
        "assert set(hydit_core.__all__) <= set(dir(hydit_core)); "
        "[getattr(hydit_core, name) for name in hydit_core.__all__]; "
        "assert 'comfy' not in sys.modules and 'peft' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    with pytest.raises(AttributeError, match="has no attribute 'pipe'"):
        _ = hydit_core.pipe


def test_the_lora_functions_are_public():
    """By names that say of what; the commands' own functions."""
    from hydit_core.lora import adapter, extract, merge, reading, writing

    assert hydit_core.load_lora is reading.read and hydit_core.save_lora is writing.write
    assert hydit_core.merge_loras is merge.merge_files and hydit_core.LoraAdapter is adapter.Adapter
    assert hydit_core.combine_loras is extract.combine and hydit_core.extract_lora is extract.extract


def rows_seen(pipe, monkeypatch, **given):
    """The batch of each call of the network, and the pictures."""
    seen = []
    forward = pipe.dit.forward

    def counted(x, *rest, **named):
        seen.append(len(x))
        return forward(x, *rest, **named)

    monkeypatch.setattr(pipe.dit, "forward", counted)
    drawn = pipe("a red apple", **given)
    monkeypatch.undo()
    return seen, drawn


def test_guidance_for_a_part_of_the_run(pipe, monkeypatch):
    """The first steps, rounded up, on both prompts, then the late ones on the rows of the prompt alone."""
    whole, guided = rows_seen(pipe, monkeypatch, steps=9, batch=2, cfg=5.0, guidance_rescale=0.3)
    assert whole == [4] * 9
    part, shorter = rows_seen(
        pipe, monkeypatch, steps=9, batch=2, cfg=5.0, guidance_rescale=0.3, cfg_end=0.34
    )
    assert part == [4] * 4 + [2] * 5
    assert np.abs(pixels(guided[0]) - pixels(shorter[0])).max() > 0
    assert rows_seen(pipe, monkeypatch, steps=9, cfg=1.0, cfg_end=0.34)[0] == [1] * 9
    same = pipe("a red apple", steps=9, batch=2, cfg=5.0, guidance_rescale=0.3, cfg_end=1.0)
    assert (pixels(guided[0]) == pixels(same[0])).all()


def test_late_steps_without_guidance_are_those_of_a_run_without(pipe):
    """From the fourth of six steps on, at the latents where guidance ends, with Python's own arithmetic."""
    seen = []
    given = {"steps": 6, "cfg": 4.0, "seed": 3, "sampler": "euler", "spacing": "leading"}
    pipe("a red apple", **given, cfg_end=0.5, callback=lambda i, n, x: seen.append(x))
    sampling = pipe.settings(steps=6, cfg=4.0, sampler="euler", spacing="leading")
    sigmas = pipe.schedule.sigmas_for("leading", 6).double()
    x = torch.randn(1, *seen[0].shape[1:], generator=torch.Generator().manual_seed(3))
    x = x * float((1 + sigmas[0] ** 2) ** 0.5)
    for i in range(3):
        x = seen[i] + (x - seen[i]) * float(sigmas[i + 1] / sigmas[i])
    alpha = float((1 + sigmas[3] ** 2) ** -0.5)
    t = pipe.schedule.timesteps("leading", 6)[3:4].float()
    with torch.no_grad():
        v = pipe.dit(x * alpha, t, pipe.context(["a red apple"], sampling))[:, :4]
    expected = alpha * alpha * x - float(sigmas[3]) * alpha * v
    assert torch.allclose(seen[3], expected, atol=1e-4 * float(expected.std()))


def test_forecasts_take_fewer_calls_and_off_takes_none(pipe, monkeypatch):
    all_calls, full = rows_seen(pipe, monkeypatch, steps=30, batch=2)
    fewer, near = rows_seen(pipe, monkeypatch, steps=30, batch=2, forecast=0.2)
    assert len(all_calls) == 30 and len(fewer) < 20
    assert 0 < np.abs(pixels(full[0]) - pixels(near[0])).mean() < 8
    drawn = next(pipe.pictures(["a red apple"], pipe.settings(steps=30), forecast=0.2))
    assert (drawn.calls, drawn.real_calls) == (30, len(fewer))
    off = rows_seen(pipe, monkeypatch, steps=30, batch=2, forecast=0)[1]
    assert (pixels(off[1]) == pixels(full[1])).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forecast": "quick"}, "forecast 'quick': use off, safe, fast"),
        ({"cfg_end": 0.0}, "cfg end 0: use a number above 0 up to 1"),
        ({"cfg_end": float("nan")}, "cfg end nan"),
    ],
)
def test_what_is_no_forecast_or_share_is_refused(pipe, given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        pipe("a red apple", **given)
