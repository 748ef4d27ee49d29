"""What callers of the model rely on: names, dtypes, untouched inputs, injection, initialization."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_models import encode, inputs, randomize, tiny
from torch import nn

from hydit_core.model import config as presets
from hydit_core.model.attention import sdpa
from hydit_core.model.controlnet import ControlNet, combine_controls
from hydit_core.model.dit import Context, DiT

SIZE = (8, 12)


def build(kind=DiT, *, seed: int = 0, **dims):
    model = kind(tiny(**dims))
    randomize(model, seed)
    return model


def run(model, values, **more):
    if isinstance(model, ControlNet):
        return torch.stack(model(values["x"], values["t"], encode(model, values), values["hint"], **more))
    return model(values["x"], values["t"], encode(model, values), **more)


def expected_names(depth: int, skips: bool, style: bool, controlnet: bool) -> set[str]:
    """Tencent's names, written out from the published files."""
    pairs = ["mlp_t5.0", "mlp_t5.2", "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    pairs += ["extra_embedder.0", "extra_embedder.2"] + [f"pooler.{x}_proj" for x in "qkvc"]
    for i in range(depth // 2 - 1 if controlnet else depth):
        names = ["norm1", "norm2", "norm3", "default_modulation.1", "mlp.fc1", "mlp.fc2"]
        names += [f"attn1.{x}" for x in ("Wqkv", "q_norm", "k_norm", "out_proj")]
        names += [f"attn2.{x}" for x in ("q_proj", "kv_proj", "q_norm", "k_norm", "out_proj")]
        names += ["skip_norm", "skip_linear"] if i > depth // 2 else []
        pairs += [f"blocks.{i}.{name}" for name in names]
    if controlnet:
        pairs += ["before_proj"] + [f"after_proj_list.{i}" for i in range(depth // 2 - 1)]
    else:
        pairs += ["final_layer.linear", "final_layer.adaLN_modulation.1"]
    singles = {"text_embedding_padding", "pooler.positional_embedding"}
    singles |= {"style_embedder.weight"} if style else set()
    return singles | {f"{name}.{kind}" for name in pairs for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("kind", "name", "tensors", "parameters"),
    [
        (DiT, "DIT_G2_V12", 1304, 1_499_952_032),
        (DiT, "DIT_G2_V11", 1305, 1_516_534_048),
        (DiT, "DIT_XL2_V12", 920, 713_784_480),
        (DiT, "DIT_XL2_V11", 921, 726_171_936),
        (ControlNet, "DIT_G2_V12", 634, 744_223_296),
        (ControlNet, "DIT_G2_V11", 635, 760_805_312),
    ],
)
def test_published_names_and_sizes(kind, name, tensors, parameters):
    config = getattr(presets, name)
    model = kind(config, device="meta")
    state = model.state_dict()
    assert set(state) == expected_names(config.depth, True, config.style_cond, kind is ControlNet)
    assert (len(state), sum(p.numel() for p in state.values())) == (tensors, parameters)
    assert not list(model.buffers())
    shapes = {
        "text_embedding_padding": (333, 1024),
        "pooler.positional_embedding": (257, 2048),
        "extra_embedder.0.weight": (4 * config.hidden_size, config.extra_dim),
        "blocks.0.attn1.Wqkv.weight": (3 * config.hidden_size, config.hidden_size),
        "blocks.0.attn2.kv_proj.weight": (2 * config.hidden_size, 1024),
        "blocks.0.attn1.q_norm.weight": (config.head_dim,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("kind", [DiT, ControlNet])
@pytest.mark.parametrize("old", [False, True])
def test_the_callers_tensors_are_not_written_to(kind, old):
    model = build(kind, old=old)
    values = inputs(model.config, (7, 12))
    control = [torch.randn(2, 24, 64) for _ in range(3)]
    before = {name: value.clone() for name, value in values.items()}
    controls_before = [c.clone() for c in control]
    run(model, values, **({"control": control} if kind is DiT else {}))
    assert all(torch.equal(values[name], before[name]) for name in values)
    assert len(control) == 3 and all(torch.equal(a, b) for a, b in zip(control, controls_before, strict=True))


@torch.no_grad()
def test_a_batch_equals_its_samples_one_by_one():
    model = build(old=True)
    values = inputs(model.config, SIZE)
    together = run(model, values)
    for i in range(2):
        alone = run(model, {name: value[i : i + 1] for name, value in values.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=2e-5)


@torch.no_grad()
def test_context_cat_is_one_batch():
    model = build()
    values = inputs(model.config, SIZE)
    parts = [encode(model, {k: v[i : i + 1] for k, v in values.items()}) for i in range(2)]
    joined = model(values["x"], values["t"], Context.cat(parts))
    torch.testing.assert_close(joined, run(model, values), rtol=0, atol=2e-5)


@torch.no_grad()
def test_masked_rows_are_replaced_but_reach_the_pooled_vector():
    model = build()
    values = inputs(model.config, SIZE)
    plain = encode(model, values)
    hidden = ~values["bert_mask"].bool()
    changed = encode(model, values | {"bert": values["bert"].masked_fill(hidden[..., None], 1e4)})
    assert torch.equal(changed.text, plain.text) and torch.equal(changed.vector, plain.vector)
    rows = model.config.text_len
    assert torch.equal(plain.text[0, 4], model.text_embedding_padding[4])
    assert torch.equal(plain.text[0, rows + 3], model.text_embedding_padding[rows + 3])

    hidden = ~values["t5_mask"].bool()
    changed = encode(model, values | {"t5": values["t5"].masked_fill(hidden[..., None], 0.0)})
    assert torch.equal(changed.text, plain.text)
    assert (changed.vector - plain.vector).abs().max() > 1e-2


@torch.no_grad()
def test_longer_text_repeats_the_padding_rows():
    model = build()
    config, values = model.config, inputs(tiny(), SIZE)
    longer = values | {
        "bert": values["bert"].repeat(1, 2, 1),
        "bert_mask": values["bert_mask"].repeat(1, 2),
    }
    text = encode(model, longer).text
    torch.testing.assert_close(text[:, : config.text_len], text[:, config.text_len : 2 * config.text_len])
    assert torch.equal(encode(model, longer).vector, encode(model, values).vector)
    assert run(model, longer).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert": torch.zeros(2, 6, 23)}, r"bert features \(2, 6, 23\); expected \(batch, 6, 24\)"),
        ({"t5": torch.zeros(2, 8, 32)}, r"t5 features \(2, 8, 32\)"),
        ({"t5_mask": torch.zeros(2, 8)}, r"t5 mask \(2, 8\); expected \(2, 9\)"),
        ({"sizes": None}, "image_meta_size"),
    ],
)
def test_features_that_do_not_fit_are_named(change, message):
    model = build(old=True)
    with pytest.raises(ValueError, match=message):
        encode(model, inputs(model.config, SIZE) | change)


@pytest.mark.parametrize("count", [2, 4])
def test_a_wrong_number_of_controls_is_refused(count):
    model = build()
    values = inputs(model.config, SIZE)
    with pytest.raises(ValueError, match=f"{count} residuals.*3 skips"):
        run(model, values, control=[torch.zeros(2, 24, 64)] * count)


@torch.no_grad()
def test_a_missing_control_is_a_zero():
    model = build()
    values = inputs(model.config, SIZE)
    control = list(torch.randn(3, 2, 24, 64))
    with_zero = run(model, values, control=[control[0], torch.zeros_like(control[1]), control[2]])
    assert torch.equal(run(model, values, control=[control[0], None, control[2]]), with_zero)


def test_a_hint_of_another_size_is_refused():
    net = build(ControlNet)
    values = inputs(net.config, SIZE)
    with pytest.raises(ValueError, match=r"hint latents are \(4, 8, 10\); expected \(4, 8, 12\)"):
        run(net, values | {"hint": torch.zeros(2, 4, 8, 10)})


@pytest.mark.parametrize("kind", [DiT, ControlNet])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [8, 40])
@torch.no_grad()
def test_low_precision_is_close_to_float32(kind, dtype, depth):
    model = build(kind, depth=depth)
    values = inputs(model.config, (16, 16))
    reference = run(model, values)
    low = {n: v.to(dtype) if v.is_floating_point() and n != "t" else v for n, v in values.items()}
    model.to(dtype)
    assert model.dtype == dtype
    out = run(model, low)
    assert out.dtype == dtype
    relative = (out.float() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert relative < (0.005 if dtype == torch.float16 else 0.02)


@torch.no_grad()
def test_float32_latents_through_a_low_precision_model():
    model = build().to(torch.bfloat16)
    values = inputs(model.config, SIZE)
    low = {n: v.to(torch.bfloat16) if n in ("bert", "t5") else v for n, v in values.items()}
    assert run(model, low).dtype == torch.float32


@torch.no_grad()
def test_bfloat16_keeps_neighboring_timesteps_apart():
    model = build().to(torch.bfloat16)
    values = inputs(model.config, SIZE, batch=1)
    low = {n: v.to(torch.bfloat16) if n in ("bert", "t5", "x") else v for n, v in values.items()}
    context = encode(model, low)
    conditions = [model._condition(torch.tensor([t]), context).float() for t in (800.0, 801.0, 802.0)]
    assert (conditions[1] - conditions[0]).abs().max() > 0.1
    exact = DiT(model.config)
    exact.load_state_dict(model.state_dict())
    expected = exact.t_embedder(torch.tensor([801.0]), torch.float32) + context.vector.float()
    assert (conditions[1] - expected).abs().max() < 0.05


@torch.no_grad()
def test_timesteps_may_be_scalars_integers_and_fractions():
    model = build()
    values = inputs(model.config, SIZE)
    context = encode(model, values)
    reference = model(values["x"], torch.tensor([12.0, 12.0]), context)
    assert torch.equal(model(values["x"], torch.tensor(12), context), reference)
    assert not torch.equal(model(values["x"], torch.tensor(12.5), context), reference)


@pytest.mark.parametrize("kind", [DiT, ControlNet])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_changes_no_gradient(kind, frozen):
    """With frozen inputs too, where only the inner weights (as with LoRA) ask for gradients."""
    model = build(kind)
    assert not model.gradient_checkpointing  # unless asked for
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("blocks.1." in name)
    values = inputs(model.config, SIZE)
    calls = {"all": 0}
    model.blocks[1].register_forward_pre_hook(lambda *_: calls.update(all=calls["all"] + 1))
    gradients = []
    for fraction, expected_calls in ((0.0, 1), (0.5, 2), (True, 2)):
        calls["all"] = 0
        model.zero_grad()
        model.gradient_checkpointing = fraction
        run(model, values).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        assert calls["all"] == expected_calls
    assert gradients[0]
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        assert all(torch.equal(other[name], gradients[0][name]) for name in other)


def test_the_context_is_differentiable():
    model = build(old=True)
    values = inputs(model.config, SIZE)
    values["bert"].requires_grad_()
    values["t5"].requires_grad_()
    run(model, values).square().mean().backward()
    mask = values["bert_mask"].bool()
    assert values["bert"].grad[mask].abs().min() > 0 and values["bert"].grad[~mask].abs().max() == 0
    assert (values["t5"].grad.abs().sum(-1) > 0).all()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused


def test_every_weight_takes_part_under_autocast():
    model = build()
    values = inputs(model.config, SIZE)
    reference = run(model, values)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(model, values)
    assert out.dtype == torch.float32
    assert (out - reference).square().mean().sqrt() < 0.03 * reference.std()
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Recording:
    """An operations namespace that offers nothing but what the contract names."""

    def __init__(self):
        self.made: list[nn.Module] = []

    def __getattr__(self, name):
        assert name in ("Linear", "LayerNorm", "Conv2d", "Embedding"), name

        def make(*args, **kwargs):
            self.made.append(getattr(nn, name)(*args, **kwargs))
            return self.made[-1]

        return make


@pytest.mark.parametrize("kind", [DiT, ControlNet])
def test_layers_and_attention_are_injected(kind):
    operations, seen = Recording(), []

    def attention(q, k, v, *, options=None):
        seen.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), options))
        return sdpa(q, k, v)

    model = kind(tiny(old=True), operations=operations, attention=attention)
    with_weights = {m for m in model.modules() if list(m.parameters(recurse=False))}
    bare = {m for m in with_weights if m not in operations.made}
    assert bare == {model, model.pooler}
    assert {n for m in bare for n, _ in m.named_parameters(recurse=False)} == {
        "text_embedding_padding",
        "positional_embedding",
    }
    options = {"cond_or_uncond": [0, 1]}
    run(model, inputs(model.config, SIZE), options=options)
    assert len(seen) == 2 * len(model.blocks)
    assert seen[0] == ((2, 24, 2, 32), (2, 24, 2, 32), (2, 24, 2, 32), options)
    assert seen[1] == ((2, 24, 2, 32), (2, 15, 2, 32), (2, 15, 2, 32), options)


@torch.no_grad()
def test_bare_parameters_may_stay_in_another_dtype():
    """Hosts cast layers as they stream them, but not parameters that belong to no layer."""
    model = build()
    values = inputs(model.config, SIZE)
    low = {n: v.bfloat16() if n in ("x", "bert", "t5") else v for n, v in values.items()}
    padding, position = model.text_embedding_padding.data, model.pooler.positional_embedding.data
    model.bfloat16()
    model.text_embedding_padding.data, model.pooler.positional_embedding.data = padding, position
    assert run(model, low).dtype == torch.bfloat16


@torch.no_grad()
def test_a_subclass_can_replace_a_block():
    class Host(DiT):
        def _run_block(self, index, x, text, vector, rope, skip=None, options=None):
            seen.append((index, skip is not None))
            if index in (options or {}).get("skip_blocks", ()):
                return x
            return super()._run_block(index, x, text, vector, rope, skip, options)

    seen: list[tuple[int, bool]] = []
    model = Host(tiny())
    randomize(model, 0)
    values = inputs(model.config, SIZE)
    assert torch.equal(run(model, values), run(build(), values))
    assert seen == [(i, i > 4) for i in range(8)]
    assert not torch.equal(run(model, values, options={"skip_blocks": [3]}), run(model, values))


@pytest.mark.parametrize("old", [False, True])
def test_fresh_weights_have_the_published_distributions(old):
    config = tiny(hidden=128, heads=4, old=old)
    model = DiT(config)
    model.initialize(torch.Generator().manual_seed(0))
    state = model.state_dict()
    dim = config.hidden_size
    for name, bound in {
        "blocks.3.attn1.Wqkv.weight": math.sqrt(6 / (4 * dim)),
        "blocks.6.skip_linear.weight": math.sqrt(6 / (3 * dim)),
        "blocks.0.mlp.fc1.weight": math.sqrt(6 / (4 * dim)),
        "x_embedder.proj.weight": math.sqrt(6 / (dim + 16)),
        "mlp_t5.0.weight": math.sqrt(6 / (128 + 32)),
    }.items():
        assert 0.97 * bound < state[name].abs().max() <= bound, name
        assert state[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    stds = {f"{a}.weight": 0.02 for a in ("t_embedder.mlp.0", "t_embedder.mlp.2", "extra_embedder.0")}
    stds |= {"extra_embedder.2.weight": 0.02, "text_embedding_padding": 1.0}
    stds |= {"pooler.positional_embedding": 32**-0.5} | ({"style_embedder.weight": 1.0} if old else {})
    for name, std in stds.items():
        assert state[name].std() == pytest.approx(std, rel=0.15), name
    zero = {n for n, p in state.items() if not p.any()}
    expected = {n for n in state if n.endswith(".bias") or "default_modulation" in n}
    expected |= {"final_layer.linear.weight", "final_layer.adaLN_modulation.1.weight"}
    assert zero == expected
    assert all((p == 1).all() for n, p in state.items() if "norm" in n and n.endswith("weight"))


def test_fresh_weights_depend_on_the_generator_alone():
    models = [DiT(tiny()) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(1)
        model.initialize(torch.Generator().manual_seed(seed))
    a, b, c = (m.state_dict() for m in models)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["mlp_t5.0.weight"], c["mlp_t5.0.weight"])


def test_an_untrained_model_outputs_exactly_zero():
    model = DiT(tiny(old=True))
    model.initialize()
    values = inputs(model.config, (9, 16))
    out = run(model, values)
    assert out.shape == (2, 8, 9, 16) and not out.any()
    net = ControlNet(tiny(old=True))
    net.initialize()
    assert not run(net, values).any()


@torch.no_grad()
def test_a_controlnet_made_from_a_base_is_its_first_half():
    model = build(old=True)
    net = ControlNet.from_base(model)
    state = model.state_dict()
    added = {n for n in net.state_dict() if n not in state}
    assert added == {n for n in net.state_dict() if n.startswith(("before_proj", "after_proj_list"))}
    for name, value in net.state_dict().items():
        assert not value.any() if name in added else torch.equal(value, state[name])
        assert name in added or value.data_ptr() != state[name].data_ptr()
    values = inputs(model.config, SIZE)
    assert not run(net, values).any()
    # with the identity after each block, its residuals are the base's own skips
    for layer in net.after_proj_list:
        layer.weight.copy_(torch.eye(64))
    skips = []
    for block in model.blocks[:3]:
        block.register_forward_hook(lambda _module, _inputs, output: skips.append(output))
    run(model, values)
    assert torch.equal(run(net, values), torch.stack(skips))


@torch.no_grad()
def test_the_hint_may_be_one_for_the_batch():
    net = build(ControlNet)
    values = inputs(net.config, SIZE)
    one = values | {"hint": values["hint"][:1]}
    both = values | {"hint": values["hint"][:1].repeat(2, 1, 1, 1)}
    torch.testing.assert_close(run(net, one), run(net, both))


def test_controls_are_weighted_and_summed():
    a, b = ([torch.full((1, 2, 3), float(10 * k + i)) for i in range(3)] for k in (1, 2))
    combined = combine_controls([(a, 0.5), (b, [1, 0, -2]), (b, torch.tensor([0.0, 0.0, 1.0]))])
    assert [c[0, 0, 0].item() for c in combined] == [5 + 20, 5.5, 6 - 44 + 22]
    assert a[0][0, 0, 0] == 10
    with pytest.raises(ValueError, match="3 residuals with 2 weights"):
        combine_controls([(a, [1, 2])])
    with pytest.raises(ValueError, match="2 residuals"):
        combine_controls([(a, 1.0), (b[:2], 1.0)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_norms_and_silu_compute_in_float32_whatever_the_dtype(dtype):
    """The model leans on this: it casts nothing for the float32 norms and SiLU of the published model."""
    generator = torch.Generator().manual_seed(0)
    x = (300 * torch.randn(64, 1408, generator=generator) + 200).to(dtype)
    weight, bias = (torch.randn(1408, generator=generator).to(dtype) for _ in range(2))
    low = F.layer_norm(x, (1408,), weight, bias, 1e-6)
    exact = F.layer_norm(x.float(), (1408,), weight.float(), bias.float(), 1e-6)
    assert (low - exact.to(dtype)).float().abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert torch.equal(F.silu(x), F.silu(x.float()).to(dtype))
