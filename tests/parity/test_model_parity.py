"""The DiT and the ControlNet against diffusers' classes, every weight random (the zero-initialized too)."""

from __future__ import annotations

import pytest
import torch
from diffusers_models import diffusers_controlnet, diffusers_dit, diffusers_state_dict
from tiny_models import encode, inputs, randomize, tiny
from torch import Tensor

from hydit_core.model.config import DiTConfig
from hydit_core.model.controlnet import ControlNet, combine_controls
from hydit_core.model.dit import DiT
from hydit_core.model.rope import rope_table

TOLERANCE = 1e-5
SQUARE, WIDE, TALL = (16, 16), (12, 20), (20, 12)


def theirs(model: torch.nn.Module, values: dict[str, Tensor], rope: tuple[Tensor, Tensor], **more):
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
        image_rotary_emb=rope,
        return_dict=False,
        **more,
    )[0]


def square_rope(config: DiTConfig, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What diffusers' own pipeline makes; right for square pictures only."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    grid = (size[0] // 2, size[1] // 2)
    corners = ((0, 0), (config.rope_base, config.rope_base))
    return get_2d_rotary_pos_embed(config.head_dim, corners, grid, output_type="pt")


def rope_for(config: DiTConfig, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if size[0] == size[1]:
        return square_rope(config, size)
    return rope_table(size[0] // 2, size[1] // 2, config.head_dim, base=config.rope_base)


def error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference, in standard deviations of the reference."""
    return ((ours - reference).abs().max() / reference.std()).item()


@pytest.mark.parametrize("old", [False, True], ids=["v1.2", "v1.1"])
@pytest.mark.parametrize(("depth", "hidden", "heads"), [(8, 64, 2), (8, 128, 4), (40, 64, 4)])
@pytest.mark.parametrize("size", [SQUARE, WIDE, TALL], ids=["square", "wide", "tall"])
@torch.no_grad()
def test_dit_equals_diffusers(size, depth, hidden, heads, old):
    config = tiny(depth, hidden, heads, old)
    model = DiT(config)
    randomize(model, seed=depth)
    values = inputs(config, size)
    reference = theirs(diffusers_dit(config, model.state_dict()), values, rope_for(config, size))
    assert reference.std() > 0.1
    assert error(model(values["x"], values["t"], encode(model, values)), reference) <= TOLERANCE


@pytest.mark.parametrize("old", [False, True], ids=["v1.2", "v1.1"])
@pytest.mark.parametrize("depth", [8, 40])
@pytest.mark.parametrize("size", [SQUARE, TALL], ids=["square", "tall"])
@torch.no_grad()
def test_controlnet_equals_diffusers_and_adds_to_the_skips(size, depth, old):
    config = tiny(depth, old=old)
    model, net = DiT(config), ControlNet(config)
    randomize(model, seed=2)
    randomize(net, seed=3)
    values, rope = inputs(config, size), rope_for(config, size)

    reference = theirs(
        diffusers_controlnet(config, net.state_dict()), values, rope, controlnet_cond=values["hint"]
    )
    residuals = net(values["x"], values["t"], encode(net, values), values["hint"])
    assert len(residuals) == len(reference) == depth // 2 - 1
    for ours, expected in zip(residuals, reference, strict=True):
        assert error(ours, expected) <= TOLERANCE

    weights = [1.3 * 0.825**i for i in range(len(residuals))]
    control = combine_controls([(residuals, weights), (residuals[::-1], 0.3)])
    samples = [w * r + 0.3 * s for w, r, s in zip(weights, reference, reference[::-1], strict=True)]
    base = diffusers_dit(config, model.state_dict())
    expected = theirs(base, values, rope, controlnet_block_samples=list(samples))
    context = encode(model, values)
    assert error(model(values["x"], values["t"], context, control), expected) <= TOLERANCE
    # the controls matter at all, and by layer
    assert error(model(values["x"], values["t"], context), expected) > 1e-2
    assert error(model(values["x"], values["t"], context, control[::-1]), expected) > 1e-2


def _swap(state: dict[str, Tensor], a: str, b: str) -> None:
    for key in [k for k in state if f".{a}." in k]:
        other = key.replace(f".{a}.", f".{b}.")
        state[key], state[other] = state[other], state[key]


def _reorder(state: dict[str, Tensor], name: str, order: list[int]) -> None:
    for key in [k for k in state if name in k]:
        parts = state[key].chunk(len(order))
        state[key] = torch.cat([parts[i] for i in order])


MISTAKES = {
    "norm2 and norm3": lambda s: _swap(s, "norm2", "norm3"),
    "q_norm and k_norm": lambda s: _swap(s, "q_norm", "k_norm"),
    "shift and scale": lambda s: _reorder(s, "adaLN_modulation", [1, 0]),
    "q and k of Wqkv": lambda s: _reorder(s, "Wqkv", [1, 0, 2]),
    "k and v of Wqkv": lambda s: _reorder(s, "Wqkv", [0, 2, 1]),
    "k and v of kv_proj": lambda s: _reorder(s, "kv_proj", [1, 0]),
    "halves of skip_linear": lambda s: s.update(
        {k: v.roll(v.shape[1] // 2, 1) for k, v in s.items() if k.endswith("skip_linear.weight")}
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@torch.no_grad()
def test_parity_notices_a_wrong_mapping(mistake):
    config = tiny()
    model = DiT(config)
    randomize(model, seed=4)
    values = inputs(config, SQUARE)
    state = dict(model.state_dict())
    MISTAKES[mistake](state)
    reference = theirs(diffusers_dit(config, state), values, rope_for(config, SQUARE))
    assert error(model(values["x"], values["t"], encode(model, values)), reference) > 1e-2


@torch.no_grad()
def test_own_rope_equals_diffusers_on_squares():
    config = tiny()
    for ours, expected in zip(rope_table(8, 8, 32), square_rope(config, SQUARE), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=3e-6)


def test_gradients_equal_diffusers():
    config = tiny()
    model = DiT(config)
    randomize(model, seed=5)
    values = inputs(config, SQUARE)
    model(values["x"], values["t"], encode(model, values)).square().mean().backward()
    reference = diffusers_dit(config, model.state_dict())
    theirs(reference, values, rope_for(config, SQUARE)).square().mean().backward()
    gradients = diffusers_state_dict({k: p.grad for k, p in model.named_parameters()})
    assert gradients.keys() == dict(reference.named_parameters()).keys()
    for name, parameter in reference.named_parameters():
        # the absolute part is for the pooler's key bias, whose gradient is 0 but for rounding
        allowed = 1e-4 * parameter.grad.std() + 1e-7
        assert (gradients[name] - parameter.grad).abs().max() <= allowed, name


@pytest.mark.parametrize("size", [(15, 16), (16, 13), (9, 11)])
@torch.no_grad()
def test_odd_sizes_continue_circularly(size):
    """The lacking row and column are the first ones again, as in ComfyUI; the output keeps the odd size."""
    config = tiny()
    model = DiT(config)
    randomize(model, seed=6)
    values = inputs(config, size)
    ours = model(values["x"], values["t"], encode(model, values))
    assert ours.shape[-2:] == size
    rows = torch.arange(size[0] + size[0] % 2) % size[0]
    columns = torch.arange(size[1] + size[1] % 2) % size[1]
    padded = values | {"x": values["x"][:, :, rows][..., columns]}
    reference = theirs(
        diffusers_dit(config, model.state_dict()), padded, rope_table(len(rows) // 2, len(columns) // 2, 32)
    )
    assert error(ours, reference[..., : size[0], : size[1]]) <= TOLERANCE
