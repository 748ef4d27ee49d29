"""What nodes of ComfyUI and of others hang into the attention, each against its own formula."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from graphs import Graph
from model_runs import add_ksampler, error, ksampler
from packs import load_pack
from sampling_models import CONFIG, our_model
from torch import Tensor

from hydit_core.model.rope import apply_rope, rope_table

CONFIG = dataclasses.replace(CONFIG, depth=6)  # input 0 to 2, middle 3, output 0 and 1
MIDDLE = 3
PAG_PACK = "sd-perturbed-attention"


@pytest.fixture(scope="module")
def model(host, tmp_path_factory):
    return our_model(host, tmp_path_factory.mktemp("dit"), CONFIG)


@pytest.fixture(scope="module")
def plain(host, model):
    return ksampler(host, model)


@contextmanager
def attention(
    model: Any, formula: Callable[..., Tensor], name: str = "attn1", *blocks: int
) -> Iterator[None]:
    """In those blocks (default: all) an attention's output is ``formula(module, output, *its arguments)``."""

    def replaced(module: Any, args: Any, given: dict[str, Any], out: Tensor) -> Tensor:
        return formula(module, out, *args)

    network = model.model.diffusion_model
    chosen = [network.blocks[i] for i in blocks or range(len(network.blocks))]
    handles = [getattr(block, name).register_forward_hook(replaced, with_kwargs=True) for block in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def qkv(module: Any, x: Tensor, rope: Any) -> list[Tensor]:
    """Queries, keys and values of the self-attention, (B, heads, N, head_dim)."""
    q, k, v = module.Wqkv(x).unflatten(-1, (3, module.num_heads, -1)).unbind(2)
    q, k = apply_rope(module.q_norm(q), *rope), apply_rope(module.k_norm(k), *rope)
    return [part.transpose(1, 2) for part in (q, k, v)]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def values_alone(module: Any, out: Tensor, x: Tensor, rope: Any, options: Any) -> Tensor:
    """Perturbed attention (Ahn et al. 2024): the attention map is the identity."""
    return module.out_proj(qkv(module, x, rope)[2].transpose(1, 2).flatten(2))


def mean_query(module: Any, out: Tensor, x: Tensor, rope: Any, options: Any) -> Tensor:
    """Smoothed energy guidance (Hong 2024) with an infinite blur: every query is their mean."""
    q, k, v = qkv(module, x, rope)
    return module.out_proj(softmax_attention(q.mean(2, keepdim=True).expand_as(q), k, v))


def guided_by(host: Any, model: Any, formula: Any, scale: float, *blocks: int) -> Any:
    """A MODEL with guidance away from the prediction that ``formula`` gives."""
    calc = host.comfy_module("comfy.samplers").calc_cond_batch
    model = model.clone()

    def guidance(args: dict[str, Any]) -> Tensor:
        with attention(model, formula, "attn1", *blocks):
            (weak,) = calc(args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"])
        return args["denoised"] + scale * (args["cond_denoised"] - weak)

    model.set_model_sampler_post_cfg_function(guidance)
    return model


def patched(host: Any, model: Any, node: str, **inputs: Any) -> Tensor:
    """The latents of a MODEL behind a node."""
    g = Graph()
    return host.values(
        g, add_ksampler(host, g, g.add(node, _defaults=True, model=host.give(g, model), **inputs))
    )[0]["samples"]


def with_patch(model: Any, kind: str, patch: Any) -> Any:
    model = model.clone()
    model.set_model_patch(patch, kind)
    return model


def with_replacement(model: Any, kind: str, patch: Any, *block: Any) -> Any:
    model = model.clone()
    model.set_model_patch_replace(patch, kind, *block)
    return model


# -- nodes ---------------------------------------------------------------------------------------------------


def test_perturbed_attention_guidance(host, model, plain):
    found = patched(host, model, "PerturbedAttentionGuidance", scale=2.0)
    assert error(found, ksampler(host, guided_by(host, model, values_alone, 2.0, MIDDLE))) < 1e-4
    assert error(found, plain) > 0.01


@pytest.mark.parametrize(
    ("place", "number", "block"), [("input", 1, 1), ("middle", 0, MIDDLE), ("output", 1, 5)]
)
def test_perturbed_attention_of_any_block(host, model, plain, place, number, block):
    load_pack(host, PAG_PACK, "PerturbedAttention")
    found = patched(host, model, "PerturbedAttention", scale=2.0, unet_block=place, unet_block_id=number)
    assert error(found, ksampler(host, guided_by(host, model, values_alone, 2.0, block))) < 1e-4
    assert error(found, plain) > 0.01


def test_smoothed_energy_guidance(host, model, plain):
    load_pack(host, PAG_PACK, "SmoothedEnergyGuidanceAdvanced")
    found = patched(host, model, "SmoothedEnergyGuidanceAdvanced", scale=2.0, blur_sigma=-1.0)
    assert error(found, ksampler(host, guided_by(host, model, mean_query, 2.0, MIDDLE))) < 1e-3
    blurred = patched(host, model, "SmoothedEnergyGuidanceAdvanced", scale=2.0, blur_sigma=1.0)
    assert error(found, plain) > 0.01 and error(blurred, found) > 1e-3


def test_self_attention_guidance_runs(host, model, plain):
    """It takes the attention map of the middle block, and blurs where that is high."""
    found = patched(host, model, "SelfAttentionGuidance", scale=1.0, blur_sigma=2.0)
    assert torch.isfinite(found).all() and error(found, plain) > 1e-3


def test_normalized_attention_guidance(host, model, plain):
    """Of ComfyUI itself (Chen et al. 2025, algorithm 1, on the output of self-attention)."""
    if "NAGuidance" not in host.nodes.NODE_CLASS_MAPPINGS:
        pytest.skip(f"ComfyUI {host.version} has no NAGuidance")
    scale, alpha, tau = 4.0, 0.6, 1.7

    def formula(module: Any, out: Tensor, x: Tensor, rope: Any, options: Any) -> Tensor:
        halves = dict(zip(options["cond_or_uncond"], out.chunk(2), strict=True))
        positive, negative = halves[0], halves[1]
        pushed = positive + (scale - 1) * (positive - negative)
        ratio = pushed.abs().sum(-1, keepdim=True) / positive.abs().sum(-1, keepdim=True)
        limited = pushed * torch.where(ratio > tau, tau / ratio, 1.0)
        halves[0] = alpha * limited + (1 - alpha) * positive
        return torch.cat([halves[i] for i in options["cond_or_uncond"]])

    found = patched(host, model, "NAGuidance", nag_scale=scale, nag_alpha=alpha, nag_tau=tau)
    with attention(model, formula):
        assert error(found, ksampler(host, model)) < 1e-4
    assert error(found, plain) > 0.01


def test_scaled_positions(host, model, plain):
    if "ScaleROPE" not in host.nodes.NODE_CLASS_MAPPINGS:
        pytest.skip(f"ComfyUI {host.version} has no ScaleROPE")
    assert torch.equal(patched(host, model, "ScaleROPE"), plain)
    moved = {"scale_x": 1.5, "shift_x": -2.0, "scale_y": 0.5, "shift_y": 3.0}
    found = patched(host, model, "ScaleROPE", **moved)
    network = model.model.diffusion_model
    with pytest.MonkeyPatch.context() as patch:
        # 4 x 6 tokens: the columns span 32 positions, the rows 21 in the middle of them
        columns = -2.0 + 1.5 * torch.arange(6) * 32 / 6
        rows = 6 + 3.0 + 0.5 * torch.arange(4) * 21 / 4
        frequencies = 10000.0 ** -(torch.arange(0, 8, 2).double() / 8)
        angles = torch.cat(
            (
                (columns[:, None] * frequencies).repeat_interleave(2, 1).expand(4, 6, 8),
                (rows[:, None] * frequencies).repeat_interleave(2, 1)[:, None].expand(4, 6, 8),
            ),
            dim=-1,
        ).reshape(24, 16)
        table = angles.cos().float(), angles.sin().float()
        patch.setattr(type(network), "_rope", lambda *_: table)
        assert error(found, ksampler(host, model)) < 1e-4
    assert error(found, plain) > 0.01


# -- every kind of patch -------------------------------------------------------------------------------------


def test_patches_that_change_nothing_change_nothing(host, model, plain):
    optimized = host.comfy_module("comfy.ldm.modules.attention").optimized_attention
    same: list[Any] = [
        with_patch(model, "attn1_patch", lambda n, context, value, extra: (n, context, value)),
        with_patch(model, "attn2_patch", lambda n, context, value, extra: (n, context, value)),
        with_patch(model, "attn1_output_patch", lambda n, extra: n),
        with_patch(model, "attn2_output_patch", lambda n, extra: n),
    ]
    for kind in ("attn1", "attn2"):
        for block in (("double_block", 2), ("middle", 0), ("middle", 0, 0), ("output", 1)):
            same.append(
                with_replacement(
                    model, kind, lambda q, k, v, extra: optimized(q, k, v, extra["n_heads"]), *block
                )
            )
    for one in same:
        assert error(ksampler(host, one), plain) < 1e-5
    assert torch.equal(ksampler(host, model), plain)


def test_what_goes_into_self_attention(host, model, plain):
    changed = with_patch(model, "attn1_patch", lambda n, context, value, extra: (2 * n, context + 1, -value))

    def formula(module: Any, out: Tensor, x: Tensor, rope: Any, options: Any) -> Tensor:
        q, k, v = (qkv(module, given, rope)[i] for i, given in enumerate((2 * x, x + 1, -x)))
        return module.out_proj(softmax_attention(q, k, v))

    found = ksampler(host, changed)
    with attention(model, formula):
        assert error(found, ksampler(host, model)) < 1e-4
    assert error(found, plain) > 0.01


def test_what_goes_into_cross_attention(host, model, plain):
    shorter = with_patch(
        model, "attn2_patch", lambda n, context, value, extra: (n, context[:, :5] * 2, value[:, :5])
    )

    def formula(module: Any, out: Tensor, x: Tensor, text: Tensor, rope: Any, options: Any) -> Tensor:
        q = module.q_proj(x).unflatten(-1, (module.num_heads, -1))
        k = module.kv_proj(text[:, :5] * 2).chunk(2, -1)[0].unflatten(-1, (module.num_heads, -1))
        v = module.kv_proj(text[:, :5]).chunk(2, -1)[1].unflatten(-1, (module.num_heads, -1))
        q, k = apply_rope(module.q_norm(q), *rope), module.k_norm(k)
        return module.out_proj(softmax_attention(*(part.transpose(1, 2) for part in (q, k, v))))

    found = ksampler(host, shorter)
    with attention(model, formula, "attn2"):
        assert error(found, ksampler(host, model)) < 1e-4
    assert error(found, plain) > 0.01


def test_what_comes_out(host, model, plain):
    for kind, factor in (("attn1", 0.0), ("attn2", 0.5)):
        changed = with_patch(model, f"{kind}_output_patch", lambda n, extra, factor=factor: n * factor)
        found = ksampler(host, changed)
        with attention(model, lambda module, out, *_, factor=factor: out * factor, kind):
            assert error(found, ksampler(host, model)) < 1e-5
        assert error(found, plain) > 0.01


def test_what_patches_are_told(host, model):
    seen: list[dict[str, Any]] = []

    def note(n: Tensor, extra: dict[str, Any]) -> Tensor:
        seen.append({**extra, "shape": tuple(n.shape)})
        return n

    ksampler(host, with_patch(model, "attn1_output_patch", note), steps=1)
    assert [extra["block"] for extra in seen] == [("double_block", i) for i in range(6)]
    for i, extra in enumerate(seen):
        assert (extra["block_index"], extra["block_type"], extra["total_blocks"]) == (i, "double", 6)
        assert (extra["n_heads"], extra["dim_head"], extra["shape"]) == (4, 16, (2, 24, 64))
        assert sorted(extra["cond_or_uncond"]) == [0, 1] and "sigmas" in extra
        assert extra["original_shape"] == [2, 4, 8, 12] and extra["activations_shape"] == [2, 64, 4, 6]
        assert "patches" not in extra and "patches_replace" not in extra


def test_the_native_unet_agrees_on_the_convention(host):
    """What is above, run by ComfyUI's own block: the same calls with tensors of the same form."""
    module = host.comfy_module("comfy.ldm.modules.attention")
    operations = host.comfy_module("comfy.ops").disable_weight_init
    block = module.BasicTransformerBlock(
        64, 4, 16, context_dim=32, dtype=torch.float32, device="cpu", operations=operations
    )
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    seen: dict[str, Any] = {}

    def note(name: str, result: Callable[..., Any]) -> Callable[..., Any]:
        def patch(*args: Any) -> Any:
            seen[name] = [tuple(a.shape) if isinstance(a, Tensor) else sorted(a) for a in args]
            return result(*args)

        return patch

    options: dict[str, Any] = {"block": ("middle", 0), "block_index": 0, "patches": {}, "patches_replace": {}}
    for kind in ("attn1", "attn2"):
        options["patches"][f"{kind}_patch"] = [note(f"{kind}_patch", lambda n, c, v, extra: (n, c, v))]
        options["patches"][f"{kind}_output_patch"] = [note(f"{kind}_output_patch", lambda n, extra: n)]
        options["patches_replace"][kind] = {("middle", 0): note(kind, lambda q, k, v, extra: q)}
    block(torch.randn(2, 24, 64), torch.randn(2, 28, 32), options)
    native, seen = seen, {}
    network = host.module("nodes.host.patches").PatchedBlock
    attend = host.module("nodes.host.attention").HostAttention()
    config = host.module("hydit_core.model.config").DiTConfig(**dataclasses.asdict(CONFIG))
    ours = network(config, attend, torch.nn)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    place = {"block": ("double_block", 3), "block_index": 3, "block_type": "double", "total_blocks": 6}
    text, vector = torch.randn(2, 28, 32), torch.randn(2, 64)
    with torch.no_grad():
        ours(torch.randn(2, 24, 64), text, vector, rope_table(4, 6, 16), None, {**options, **place})
    assert seen.keys() == native.keys() and len(seen) == 6
    for name, arguments in native.items():
        assert seen[name][:-1] == arguments[:-1] and set(arguments[-1]) <= set(seen[name][-1]), name


# -- what is refused -----------------------------------------------------------------------------------------


def failure(host: Any, model: Any) -> str:
    g = Graph()
    node = add_ksampler(host, g, host.give(g, model))
    g.add("PreviewAny", source=node)
    result = host.run(g)
    assert not result.ok and result.error.node_id == node.id
    message = result.error.exception_message
    assert "\n" not in message and result.error.exception_type.endswith("HyditError")
    return message


def takes_a_dictionary(args: dict[str, Any]) -> Tensor:
    return args["x"]


def takes_positions(q: Tensor, k: Tensor, v: Tensor, pe: Any, attn_mask: Any = None) -> dict[str, Tensor]:
    return {"q": q, "k": k, "v": v}


def gives_a_dictionary(n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> dict[str, Tensor]:
    return {"q": n}


def gives_fewer_values(
    n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]
) -> tuple[Tensor, ...]:
    return n, context, value[:, :5]


def gives_another_shape(n: Tensor, extra: dict[str, Any]) -> Tensor:
    return n[:, :1]


@pytest.mark.parametrize(
    ("kind", "patch"),
    [
        ("attn1_patch", takes_a_dictionary),
        ("attn2_patch", takes_a_dictionary),
        ("attn1_patch", takes_positions),
        ("attn1_patch", gives_a_dictionary),
        ("attn1_output_patch", gives_another_shape),
        ("attn2_output_patch", takes_a_dictionary),
        ("attn2_patch", gives_fewer_values),
    ],
)
def test_another_convention_is_refused_by_name(host, model, plain, kind, patch):
    message = failure(host, with_patch(model, kind, patch))
    assert message.startswith(f"{patch.__name__} of test_patches patches {kind} as other models have it")
    assert torch.equal(ksampler(host, model), plain)


@pytest.mark.parametrize("patch", [takes_a_dictionary, lambda q, k, v, extra: q[:, :1]])
def test_replacements_of_another_convention_are_refused(host, model, patch):
    message = failure(host, with_replacement(model, "attn1", patch, "middle", 0))
    assert "patches attn1 as other models have it" in message


@pytest.mark.parametrize("block", [("input", 3), ("output", 2), ("middle", 1), ("double_block", 6)])
def test_blocks_that_are_not_there_are_refused(host, model, block):
    message = failure(host, with_replacement(model, "attn1", lambda q, k, v, extra: v, *block))
    assert f"replaces attn1 of block {block}, and this HunyuanDiT has no such block" in message
    assert "('double_block', 0 to 5)" in message and "('output', 0 to 1)" in message


def test_what_has_no_effect_is_said_in_the_log(host, model, plain, caplog):
    host.module("nodes.host.patches")._warn.cache_clear()
    caplog.set_level(logging.WARNING)
    free_u = with_patch(model, "output_block_patch", lambda h, skip, extra: (2 * h, skip))
    assert torch.equal(ksampler(host, free_u), plain)
    said = [record.getMessage() for record in caplog.records if "no effect" in record.getMessage()]
    assert len(said) == 1 and "output_block_patch" in said[0]
