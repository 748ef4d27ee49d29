"""DiT, ControlNet, text encoders and VAE on the device, against the same weights in float32 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from on_device import CUDA, DEVICE, PRECISIONS, SMALL, Precision, assert_close, computing
from tiny_models import encode, inputs, randomize, tiny
from torch import Tensor, nn

import hydit_core
from hydit_core.model.attention import sdpa, training_attention
from hydit_core.model.blocks import Block
from hydit_core.model.config import DiTConfig
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.model.rope import rope_table
from hydit_core.pipeline import Pipeline

Figure = Callable[[str, float], None]
CONFIGS = {"v1.2": tiny(), "v1.1": tiny(old=True)}
SIZE = (11, 14)  # odd and off-square: circular padding and centered rotary positions
each_precision = pytest.mark.parametrize("name", PRECISIONS)


def on_device(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything on the device; text features in the dtype of the computation, as the pipeline casts them."""
    moved = {key: value.to(DEVICE) for key, value in values.items()}
    return moved | {key: moved[key].to(dtype) for key in ("bert", "t5")}


def made(cls: type[DiT] | type[ControlNet], config: DiTConfig) -> DiT | ControlNet:
    model = cls(config)
    randomize(model, seed=3)
    return model.eval()


@torch.no_grad()
def dit_output(model: DiT, values: dict[str, Tensor], control: list[Tensor] | None = None) -> Tensor:
    return model(values["x"], values["t"], encode(model, values), control)


@each_precision
@pytest.mark.parametrize("version", CONFIGS)
def test_dit(version: str, name: str, figure: Figure) -> None:
    precision, config = PRECISIONS[name], CONFIGS[version]
    model, values = made(DiT, config), inputs(config, SIZE)
    generator = torch.Generator().manual_seed(5)
    control = [
        torch.randn(2, 6 * 7, config.hidden_size, generator=generator) for _ in range(config.num_controls)
    ]
    expected = dit_output(model, values, control)
    moved = copy.deepcopy(model).to(DEVICE, precision.dtype)
    with computing(precision):
        found = dit_output(moved, on_device(values, precision.dtype), [c.to(DEVICE) for c in control])
    assert found.device.type == DEVICE.type and found.dtype == torch.float32  # the dtype of x
    assert_close(found, expected, precision.tolerance, figure)


@each_precision
def test_controlnet(name: str, figure: Figure) -> None:
    precision, config = PRECISIONS[name], CONFIGS["v1.2"]
    model, values = made(ControlNet, config), inputs(config, SIZE)

    @torch.no_grad()
    def residuals(net: ControlNet, values: dict[str, Tensor]) -> Tensor:
        return torch.stack(net(values["x"], values["t"], encode(net, values), values["hint"]))

    expected = residuals(model, values)
    moved = copy.deepcopy(model).to(DEVICE, precision.dtype)
    with computing(precision):
        found = residuals(moved, on_device(values, precision.dtype))
    assert_close(found, expected, precision.tolerance, figure)


def gradients(model: DiT, values: dict[str, Tensor], *, bf16: bool = False) -> Tensor:
    with torch.autocast(values["x"].device.type, torch.bfloat16, enabled=bf16):
        output = model(values["x"], values["t"], encode(model, values))
    output.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("bf16", "checkpointing", "tolerance"),
    # A gradient has gone through twice the layers of an output.
    [(False, 0.0, 4e-5), (False, 1.0, 4e-5), (True, 1.0, 5e-2)],
    ids=["fp32", "fp32-checkpointed", "bf16-checkpointed"],
)
def test_gradients(bf16: bool, checkpointing: float, tolerance: float, figure: Figure) -> None:
    config = CONFIGS["v1.2"]
    model = DiT(config, attention=training_attention)
    randomize(model, seed=3)
    values = inputs(config, SIZE)
    moved = copy.deepcopy(model).to(DEVICE)
    moved.gradient_checkpointing = checkpointing
    expected = gradients(model, values)
    with computing(PRECISIONS["fp32"]):
        found = gradients(moved, on_device(values, torch.float32), bf16=bf16)
    assert_close(found, expected, tolerance, figure)


@pytest.fixture(scope="module")
def wide() -> tuple[Block, list[Tensor], Tensor, tuple[int, int]]:
    """A block of DiT-g/2 with a skip, its inputs at 1024 x 1024 pixels, and what it makes of them."""
    config, grid = DiTConfig(), (16, 12) if SMALL else (64, 64)
    block = Block(config, sdpa, nn, skip=True).eval().requires_grad_(False)
    randomize(block, seed=1)
    generator = torch.Generator().manual_seed(2)
    tokens, width = grid[0] * grid[1], config.hidden_size
    x, skip = (torch.randn(1, tokens, width, generator=generator) for _ in range(2))
    text = torch.randn(1, config.text_len + config.t5_len, config.text_dim, generator=generator)
    vector = torch.randn(1, width, generator=generator)
    values = [x, text, vector, skip]
    return block, values, block(x, text, vector, rope_table(*grid, config.head_dim), skip), grid


@each_precision
def test_block_of_full_width(wide: tuple, name: str, figure: Figure) -> None:
    block, values, expected, grid = wide
    precision = PRECISIONS[name]
    moved = copy.deepcopy(block).to(DEVICE, precision.dtype)
    x, text, vector, skip = (value.to(DEVICE, precision.dtype) for value in values)
    rope = rope_table(*grid, DiTConfig().head_dim, device=DEVICE)
    with computing(precision):
        found = moved(x, text, vector, rope, skip)
    assert found.dtype == precision.dtype
    assert_close(found, expected, precision.tolerance, figure)


@each_precision
@pytest.mark.parametrize("head_dim", [64, 72, 88])  # 88: DiT-g/2
def test_attention_is_the_formula(name: str, head_dim: int, figure: Figure) -> None:
    precision, generator = PRECISIONS[name], torch.Generator().manual_seed(4)
    tokens = 200 if SMALL else 1024
    q, k, v = torch.randn(3, 2, tokens, 4, head_dim, generator=generator).double()
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / head_dim**0.5
    expected = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(-2)
    wide = torch.stack((q, k, v), dim=2).to(DEVICE, precision.dtype)  # as Wqkv gives them: not contiguous
    with computing(precision):
        found = sdpa(*wide.unbind(2))
    assert_close(found, expected, precision.tolerance, figure)


def test_rotary_table_is_that_of_the_cpu(figure: Figure) -> None:
    for grid in ((64, 64), (80, 48), (45, 91)):
        for found, expected in zip(rope_table(*grid, 88, device=DEVICE), rope_table(*grid, 88), strict=True):
            assert_close(found, expected, 1e-6, figure)


def test_inputs_that_are_no_contiguous_tensors(figure: Figure) -> None:
    config = CONFIGS["v1.2"]
    model = made(DiT, config).to(DEVICE)
    values = on_device(inputs(config, SIZE), torch.float32)
    control = [torch.ones(2, 6 * 7, config.hidden_size, device=DEVICE)] * config.num_controls
    expected = dit_output(model, values, control)
    x, t5 = values["x"], values["t5"]
    strided = values | {
        "x": x.contiguous(memory_format=torch.channels_last),
        "t5": torch.stack((t5, t5), dim=-1)[..., 0],
        "t": values["t"].expand(2, 2).t()[:, 0],
    }
    found = dit_output(model, strided, [c[:1].expand(2, -1, -1) for c in control])
    assert_close(found, expected, 2e-5, figure)


def test_small_inputs_may_stay_on_the_cpu(figure: Figure) -> None:
    """Timesteps, masks and sizes: what is made by hand is made on the CPU.

    Equal up to rounding: the sines of the timesteps are then the CPU's.
    """
    config = CONFIGS["v1.1"]
    model, values = made(DiT, config).to(DEVICE), inputs(config, SIZE)
    moved = on_device(values, torch.float32)
    mixed = moved | {key: values[key] for key in ("t", "bert_mask", "t5_mask", "sizes")}
    assert_close(dit_output(model, mixed), dit_output(model, moved), 2e-5, figure)
    net = made(ControlNet, config).to(DEVICE)
    with torch.no_grad():
        outputs = [net(moved["x"], mixed["t"], encode(net, mixed), v["hint"])[-1] for v in (values, moved)]
    assert_close(*outputs, 2e-5, figure)


@pytest.mark.skipif(not CUDA, reason="there is only one device")
def test_a_picture_on_another_device_is_told() -> None:
    config = CONFIGS["v1.2"]
    model, values = made(DiT, config).to(DEVICE), inputs(config, SIZE)
    context = encode(model, on_device(values, torch.float32))
    with pytest.raises(RuntimeError, match=r"device|should be the same"):
        model(values["x"], values["t"], context)


@pytest.fixture(scope="module")
def embedded() -> Pipeline:
    return hydit_core.load(device="cpu", dtype="float32")


def loaded(precision: Precision) -> Pipeline:
    return hydit_core.load(device=DEVICE, dtype=precision.dtype)


PROMPTS = ["a red apple", "两只蓝色的小鸟", ""]


@each_precision
def test_text_encoders(embedded: Pipeline, name: str, figure: Figure) -> None:
    precision = PRECISIONS[name]
    expected = embedded.text.encode(PROMPTS)
    encoders = loaded(precision).text
    with computing(precision):
        found = encoders.encode(PROMPTS)
    assert torch.equal(found.bert_mask.cpu(), expected.bert_mask)
    for part in ("bert", "t5"):
        features = getattr(found, part)
        assert features.device.type == DEVICE.type
        rows = getattr(expected, f"{part}_mask").bool()
        assert_close(features.cpu()[rows], getattr(expected, part)[rows], precision.tolerance, figure, part)


@each_precision
def test_vae(embedded: Pipeline, name: str, figure: Figure) -> None:
    precision, generator = PRECISIONS[name], torch.Generator().manual_seed(6)
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 96), torch.linspace(-1, 1, 128), indexing="ij")
    picture = torch.stack((rows, columns, (3 * rows * columns).sin()))[None]
    latents = torch.randn(1, 4, 12, 16, generator=generator)
    with torch.no_grad():
        moments, pixels = embedded.vae.encode_moments(picture), embedded.vae.decode(latents)
        vae = loaded(precision).vae
        with computing(precision):
            found = vae.encode_moments(picture), vae.decode(latents)
            tiled = vae.decode(latents.to(DEVICE), tile=8)
    assert_close(found[0], moments, precision.tolerance, figure, "encode")
    assert_close(found[1], pixels, precision.tolerance, figure, "decode")
    expected_tiles = embedded.vae.decode(latents, tile=8)
    assert_close(tiled, expected_tiles, precision.tolerance, figure, "tiles")


@each_precision
def test_networks_of_other_widths(name: str, figure: Figure) -> None:
    """Head widths that a kernel may not have: 12, 20."""
    precision = PRECISIONS[name]
    for width, heads in ((48, 4), (80, 4)):
        config = replace(tiny(depth=2, hidden=width, heads=heads), mlp_hidden=3 * width)
        model, values = made(DiT, config), inputs(config, (8, 8))
        expected = dit_output(model, values)
        moved = copy.deepcopy(model).to(DEVICE, precision.dtype)
        with computing(precision):
            found = dit_output(moved, on_device(values, precision.dtype))
        assert_close(found, expected, precision.tolerance, figure, f"head {width // heads}")
