"""One table, both directions, on every key of every published layout."""

from __future__ import annotations

import pytest
import torch
from key_lists import NAMES, key_list

from hydit_core.errors import WeightsError
from hydit_core.weights.layouts import COMFY_PREFIX, LAYOUTS, find_model, from_tencent, to_tencent
from hydit_core.weights.source import MemorySource, TensorSource

TENCENT_NAMES = [name for name in NAMES if not name.startswith(("diffusers", "ipa"))]


def random_tensors(name: str) -> dict[str, torch.Tensor]:
    """A published key list with random values, every dimension divided until the whole is small."""
    generator = torch.Generator().manual_seed(0)
    shapes = {key: [max(1, n // 88) for n in shape] for key, shape in key_list(name).items()}
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def no_data(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in key_list(name).items()}


def equal(left: TensorSource, right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == list(right) and all(torch.equal(left[key], right[key]) for key in right)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TENCENT_NAMES)
def test_every_layout_there_and_back(name, layout):
    tensors = random_tensors(name)
    there = from_tencent(tensors, layout)
    assert all(there[key].shape == there.shape(key) for key in there)
    assert equal(to_tencent(dict(there), layout), tensors)
    # through the lazy view as well
    assert equal(to_tencent(there, layout), tensors)


def test_the_published_diffusers_keys_are_the_converted_ones():
    ours = from_tencent(no_data("g2_v12"), "diffusers").shapes()
    assert ours == key_list("diffusers_g2_v12")
    assert to_tencent(no_data("diffusers_g2_v12"), "diffusers").shapes() == key_list("g2_v12")


def test_rows_go_where_diffusers_has_them():
    tensors = random_tensors("g2_v12")
    view = from_tencent(tensors, "diffusers")
    q, k, v = tensors["blocks.3.attn1.Wqkv.weight"].chunk(3)
    for name, part in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(view[f"blocks.3.attn1.to_{name}.weight"], part)
    k, v = tensors["blocks.3.attn2.kv_proj.bias"].chunk(2)
    assert torch.equal(view["blocks.3.attn2.to_k.bias"], k)
    assert torch.equal(view["blocks.3.attn2.to_v.bias"], v)
    shift, scale = tensors["final_layer.adaLN_modulation.1.weight"].chunk(2)
    assert torch.equal(view["norm_out.linear.weight"], torch.cat((scale, shift)))
    assert torch.equal(view["blocks.3.norm2.weight"], tensors["blocks.3.norm3.weight"])
    assert torch.equal(view["blocks.3.norm3.weight"], tensors["blocks.3.norm2.weight"])


def test_casting_while_fusing():
    tensors = {key: value.half() for key, value in random_tensors("g2_v12").items()}
    view = to_tencent(from_tencent(tensors, "diffusers"), "diffusers")
    key = "blocks.0.attn1.Wqkv.weight"
    assert view.get(key).dtype == torch.float16
    assert torch.equal(view.get(key, torch.float32), tensors[key].float())
    tensors[key][0, 0] = 5000.0
    eight = view.get(key, torch.float8_e4m3fn).float()
    assert torch.equal(eight, tensors[key].clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_style_row_stays(layout):
    tensors = random_tensors("g2_v11")
    style = "style_embedder.weight"
    tensors[style] = torch.randn(3, tensors[style].shape[1])
    there = dict(from_tencent(tensors, layout))
    assert torch.equal(to_tencent(there, layout)[style], tensors[style][:1])


def test_unknown_names_are_kept_on_the_way_in_and_refused_on_the_way_out():
    diffusers = dict(from_tencent(random_tensors("g2_v12"), "diffusers"))
    diffusers["blocks.0.attn1.surprise.weight"] = torch.ones(1)
    del diffusers["blocks.1.attn1.to_k.weight"]
    view = to_tencent(diffusers, "diffusers")
    assert "blocks.0.attn1.surprise.weight" in view
    assert "blocks.1.attn1.Wqkv.weight" not in view
    assert "blocks.1.attn1.to_q.weight" in view and "blocks.1.attn1.Wqkv.bias" in view
    with pytest.raises(WeightsError, match=r"no diffusers name for 1 tensors: blocks\.0\.attn2\.ip"):
        from_tencent({**random_tensors("g2_v12"), "blocks.0.attn2.ip.weight": torch.ones(1)}, "diffusers")


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.diffusion_model.",
        "model.",
        "module.",
        "base_model.model.",
        "transformer.",
        "diffusion_model.",
        "_orig_mod.",
        "module.model.",
    ],
)
@pytest.mark.parametrize("name", ["g2_v12", "diffusers_g2_v12", "cn_v11"])
def test_every_prefix(name, prefix):
    tensors = {prefix + key: value for key, value in no_data(name).items()}
    tensors["vae.encoder.conv_in.weight"] = torch.ones(1)
    tensors["text_encoders.mt5xl.transformer.shared.weight"] = torch.ones(1)
    found = find_model(tensors)
    assert found is not None
    layout, found_prefix = found
    assert found_prefix == prefix
    if name == "diffusers_g2_v12":
        assert layout == "diffusers"
    else:
        assert layout == ("comfy" if prefix in (COMFY_PREFIX, "model.") else "tencent")
    expected = key_list("g2_v12" if name == "diffusers_g2_v12" else name)
    assert to_tencent(tensors, layout, prefix=prefix).shapes() == expected


def test_the_model_is_preferred_to_its_average():
    tensors = {
        f"{prefix}{key}": v for prefix in ("model_ema.", "model.") for key, v in no_data("g2_v12").items()
    }
    assert find_model(tensors) == ("comfy", "model.")


def test_views_release_what_they_have_read():
    source = MemorySource(dict(from_tencent(random_tensors("g2_v12"), "diffusers")))
    view = to_tencent(source, "diffusers")
    view.get("blocks.0.attn1.Wqkv.weight")
    view.release("blocks.0.attn1.Wqkv.weight")
    for part in "qkv":
        with pytest.raises(KeyError):
            source.get(f"blocks.0.attn1.to_{part}.weight")
    assert source.get("blocks.0.attn1.to_q.bias") is not None
