"""The LoRA loader: every format's weights, on our MODEL and on ComfyUI's own, and what it says."""

from __future__ import annotations

from typing import Any

import lora_nodes
import pytest
import torch
from graphs import Graph
from lora_files import POOLER, QKV, forms
from lora_nodes import LOADER, loader, written
from model_runs import error, ksampler
from safetensors.torch import save_file
from sampling_models import native_model, our_model, weights
from torch import Tensor

FORMS = forms()
ADDED = [name for name in FORMS if not name.startswith("dora")]


def lora_name(name: str) -> str:
    return f"{name}/" if FORMS[name].config else f"{name}.safetensors"


@pytest.fixture(scope="module", autouse=True)
def loras(host):
    with written(host, {lora_name(name): form for name, form in FORMS.items()}) as folder:
        yield folder


@pytest.fixture(scope="module")
def model(either_model):
    return either_model


@pytest.fixture(scope="module")
def ours(host, tmp_path_factory):
    return our_model(host, tmp_path_factory.mktemp("dit"))


def load(host: Any, model: Any, name: str, **widgets: Any) -> Any:
    """The MODEL with the LoRA."""
    return lora_nodes.load(host, model, name, **widgets)[0]


def refused(host: Any, model: Any, name: str, **widgets: Any) -> str:
    result = host.run(loader(host, model, name, **widgets))
    assert not result.ok
    return str(result.error)


def patched(model: Any) -> dict[str, Tensor]:
    """A MODEL's weights while its patches are on them."""
    model.patch_model(device_to=torch.device("cpu"))
    try:
        state = model.model.diffusion_model.state_dict()
        return {key: value.detach().clone() for key, value in state.items()}
    finally:
        model.unpatch_model(torch.device("cpu"))


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, of all weights, in units of the largest value of each."""
    before = weights()
    assert set(found) == set(before)
    wanted = {key: value.double() for key, value in before.items()} | expected
    return max(
        float((found[key].double() - value).abs().max() / value.abs().max().clamp_min(1e-3))
        for key, value in wanted.items()
    )


# -- weights -------------------------------------------------------------------------------------------------


def test_weights_are_what_the_file_means(host, model):
    before = patched(model)
    for name, form in FORMS.items():
        for strength in (1.0, -0.5):
            found = patched(load(host, model, lora_name(name), strength_model=strength))
            assert off(found, form.expected(weights(), strength)) <= 1e-6, (name, strength)
            assert off(found, form.expected(weights(), -strength)) > 0.01, (name, strength)
    after = patched(model)  # the one that was given has none of it
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_there_and_back(host, ours):
    for name in ADDED:
        there = load(host, ours, lora_name(name), strength_model=0.7)
        back = load(host, there, lora_name(name), strength_model=-0.7)
        assert off(patched(back), {}) <= 1e-6, name


def test_a_dora_comes_after_what_is_there(host, ours):
    both = load(host, load(host, ours, lora_name("comfy")), lora_name("dora-0"))
    expected = FORMS["comfy"].expected(weights(), 1.0)
    expected |= FORMS["dora-0"].expected({**weights(), **expected}, 1.0)
    assert off(patched(both), expected) <= 1e-6


def test_strength_zero_adds_no_patch(host, ours):
    assert load(host, ours, lora_name("comfy"), strength_model=0.0).patches == {}


def test_block_weights(host, ours):
    """Blocks 0 to 3 of this model; the pooler is in none."""
    found = patched(load(host, ours, lora_name("comfy"), strength_model=2.0, block_weights="9, 0.25, 0, 0"))
    expected = FORMS["comfy"].expected(weights(), 0.5)
    expected[f"{POOLER}.weight"] = FORMS["comfy"].expected(weights(), 2.0)[f"{POOLER}.weight"]
    assert off(found, expected) <= 1e-6
    early = load(host, ours, lora_name("comfy"), block_weights="only-late(1)")
    assert set(early.patches) == {f"diffusion_model.{POOLER}.weight"}
    assert "3 block weights for a model with 4 blocks" in refused(
        host, ours, lora_name("comfy"), block_weights="1, 2, 3"
    )


def test_on_short_weights(host, tmp_path_factory):
    """ComfyUI adds in float32 and rounds the sum once."""
    folder = tmp_path_factory.mktemp("dit")
    our_model(host, folder)
    path = next(folder.iterdir())
    for dtype, step in {"fp16": 2**-10, "bf16": 2**-7, "fp8_e4m3fn": 2**-3}.items():
        short = host.module("nodes.host.model").load_model(path, weight_dtype=dtype)
        base = {k: v.clone() for k, v in short.model.diffusion_model.state_dict().items()}
        for name in ("comfy", "dora-1"):
            found = patched(load(host, short, lora_name(name)))
            expected = FORMS[name].expected({key: value.double() for key, value in base.items()}, 1.0)
            for key, value in expected.items():
                assert found[key].dtype == base[key].dtype
                assert ((found[key].double() - value).abs() <= step * value.abs().clamp_min(0.02)).all()


def test_streamed_weights_give_the_same_picture(host, ours):
    """Low memory: layers stay where they are, and their patches are applied at each use."""
    plain = ksampler(host, ours, steps=1)
    for name in ("comfy", "diffusers", "dora-0", "dora-1", "loha", "diff"):
        model = load(host, ours, lora_name(name))
        expected = ksampler(host, model, steps=1)
        model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
        try:
            assert model.model.diffusion_model.blocks[0].attn1.Wqkv.comfy_cast_weights
            found = ksampler(host, model, steps=1)
        finally:
            model.unpatch_model(torch.device("cpu"))
        assert error(found, expected) < 1e-4 < error(expected, plain), name


def test_the_picture_is_the_same_on_both_models(host, ours):
    for name in ("peft", "dora-0"):
        found = ksampler(host, load(host, ours, lora_name(name)), steps=1)
        native = load(host, native_model(host), lora_name(name))
        assert error(found, ksampler(host, native, steps=1)) < 1e-3


def test_where_comfyuis_own_loader_agrees_and_where_not(host, ours):
    """On the output axis, ComfyUI divides by the norm of the old weights."""
    apart = {}
    for name in ("kohya", "comfy", "loha", "lokr", "diff", "dora-1", "dora-0"):
        g = Graph()
        node = g.add(
            "LoraLoaderModelOnly", model=host.give(g, ours), lora_name=lora_name(name), strength_model=0.8
        )
        found = patched(host.values(g, node)[0])
        apart[name] = off(found, FORMS[name].expected(weights(), 0.8))
    assert apart.pop("dora-0") > 0.1
    assert max(apart.values()) <= 1e-5


# -- what is listed and said ---------------------------------------------------------------------------------


def test_what_is_listed(host):
    listed = host.input_types(LOADER)["required"]["lora_name"][1]["options"]
    assert {lora_name(name) for name in FORMS} <= set(listed)
    own = [name for name in listed if name.startswith("[embedded] ")]
    assert own == listed[: len(own)]
    assets = host.module("hydit_core.embedded").ASSETS / "lora"
    assert own == [f"[embedded] {path.stem}" for path in sorted(assets.glob("*.safetensors"))]
    assert sorted(name for name in listed if name.endswith("/")) == ["peft-old/", "peft-rslora/", "peft/"]


def text(host: Any, model: Any, name: str, **widgets: Any) -> str:
    g = loader(host, model, name, **widgets)
    (shown,) = host.run(g).check().outputs["2"]["hydit_lora"]
    assert host.values(g, ("2", 2)) == [shown]
    return shown


def test_the_report(host, ours, loras):
    lines = text(host, ours, lora_name("kohya")).split("\n")
    assert "kohya" in lines[0] and "rank 4" in lines[0] and "3 modules of the DiT" in lines[0]
    assert lines[1:] == ["trigger words: pixel icon"]
    more = dict(FORMS["comfy"].tensors)
    for block in range(4, 10):
        more |= {
            f"diffusion_model.blocks.{block}.mlp.fc1.lora_down.weight": torch.ones(2, 64),
            f"diffusion_model.blocks.{block}.mlp.fc1.lora_up.weight": torch.ones(256, 2),
        }
    save_file(more, loras / "deep.safetensors")
    host.refresh()
    shown = text(host, ours, "deep.safetensors", partial=True)
    assert "the model has no blocks.4.mlp.fc1" in shown and shown.endswith("and 2 more")
    said = refused(host, ours, "deep.safetensors", partial=False)
    assert "6 of its 9 modules for the DiT are not in" in said
    # A graph that was saved before there was the input.
    g = Graph()
    widgets = {"strength_model": 1.0, "strength_clip": 1.0, "block_weights": "uniform(1)"}
    node = g.add(LOADER, model=host.give(g, ours), lora_name="deep.safetensors", **widgets)
    g.add("HyDiTTestCapture", value=node.out(0))
    host.run(g).check()


def test_what_fits_nothing_is_an_error_that_names_it(host, ours, loras):
    r = torch.ones
    sdxl = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": r(4, 640),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight": r(640, 4),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha": torch.tensor(4.0),
    }
    save_file(sdxl, loras / "sdxl.safetensors")
    wide = {
        f"diffusion_model.{QKV}.lora_down.weight": r(4, 128),
        f"diffusion_model.{QKV}.lora_up.weight": r(384, 4),
    }
    save_file(wide, loras / "wide.safetensors")
    texts = {
        "lora_te1_encoder_layer_0_attention_self_query.lora_down.weight": r(4, 64),
        "lora_te1_encoder_layer_0_attention_self_query.lora_up.weight": r(64, 4),
    }
    save_file(texts, loras / "texts.safetensors")
    save_file(weights(), loras / "base.safetensors")
    host.refresh()
    assert "SDXL" in refused(host, ours, "sdxl.safetensors")
    assert "other dimensions" in refused(host, ours, "wide.safetensors")
    assert "connect clip" in refused(host, ours, "texts.safetensors")
    assert "base.safetensors" in refused(host, ours, "base.safetensors")


def test_another_family_of_models_is_refused(host):
    base = host.comfy_module("comfy.model_base")
    other = native_model(host)
    other.model = object.__new__(base.SDXL)
    with pytest.raises(host.module("hydit_core.errors").HyditError, match="SDXL, not HunyuanDiT"):
        lora = host.module("nodes.host.lora")
        lora.apply_lora(lora.open_lora(host.models_dir / "loras" / lora_name("comfy")), other)


def test_either_separator_and_files_that_change(host, ours, loras):
    form = FORMS["comfy"]
    path = form.write(loras / "sub" / "again.safetensors")
    host.refresh()
    for name in ("sub/again.safetensors", r"sub\again.safetensors"):
        found = patched(load(host, ours, name))
        assert off(found, form.expected(weights(), 1.0)) <= 1e-6
    g = loader(host, ours, "sub/again.safetensors")
    host.run(g).check()
    assert "2" in host.run(g, keep_cache=True).check().cached
    FORMS["kohya"].write(path)
    (after,) = host.values(g, ("2", 0), keep_cache=True)
    assert off(patched(after), FORMS["kohya"].expected(weights(), 1.0)) <= 1e-6
    path.unlink()
    host.refresh()
    assert "not there (any more)" in refused(host, ours, "sub/again.safetensors")


def test_the_embedded_lora_is_found_by_its_name(host, ours, monkeypatch, tmp_path):
    FORMS["comfy"].write(tmp_path / "lora" / "some-style.safetensors")
    monkeypatch.setattr(host.module("hydit_core.embedded"), "ASSETS", tmp_path)
    found = patched(load(host, ours, "[embedded] some-style"))
    assert off(found, FORMS["comfy"].expected(weights(), 1.0)) <= 1e-6
    assert "some-style" in refused(host, ours, "[embedded] another")


def test_the_file_is_not_needed_afterwards(host, ours, loras):
    path = FORMS["comfy"].write(loras / "gone.safetensors")
    host.refresh()
    model = load(host, ours, "gone.safetensors")
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert off(patched(model), FORMS["comfy"].expected(weights(), 1.0)) <= 1e-6
    path.unlink()
