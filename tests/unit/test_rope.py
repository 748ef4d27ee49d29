"""Rotary positions and timestep sinusoids against golden values of Tencent's code."""

from __future__ import annotations

import math

import pytest
import torch

from hydit_core.model.embeddings import timestep_embedding
from hydit_core.model.rope import apply_rope, rope_table

HEAD_DIM = 88

# (rows, columns) of the token grid -> {(table, entry): value} of the token in row 5, column 7
GOLDEN = {
    (64, 64): {
        ("cos", 0): -0.9364567,
        ("cos", 1): -0.9364567,
        ("cos", 2): -0.6683363,
        ("cos", 44): -0.8011436,
        ("cos", 46): -0.0739691,
        ("sin", 0): -0.350783,
        ("sin", 44): 0.598472,
    },
    (48, 80): {("cos", 0): -0.9422224, ("cos", 44): -0.1248582, ("sin", 44): 0.992175},
    (80, 48): {("cos", 0): -0.7936902, ("cos", 44): -0.4161468},
}


@pytest.mark.parametrize("grid", GOLDEN)
def test_golden_values(grid):
    cos, sin = rope_table(*grid, HEAD_DIM)
    assert cos.shape == sin.shape == (grid[0] * grid[1], HEAD_DIM)
    assert cos.dtype == sin.dtype == torch.float32
    for (table, entry), value in GOLDEN[grid].items():
        row = {"cos": cos, "sin": sin}[table][5 * grid[1] + 7]
        assert row[entry].item() == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize(
    ("width", "height", "top", "left", "step_y", "step_x"),
    [
        (1024, 1024, 0, 0, 0.5, 0.5),
        (1280, 1280, 0, 0, 0.4, 0.4),
        (1024, 768, 4, 0, 0.5, 0.5),
        (768, 1024, 0, 4, 0.5, 0.5),
        (1152, 864, 4, 0, 24 / 54, 24 / 54),
        (1280, 960, 4, 0, 0.4, 0.4),
        (1280, 768, 6, 0, 19 / 48, 0.4),  # 6.5 rounds to the even 6
        (768, 1280, 0, 6, 0.4, 19 / 48),
        (16, 16, 0, 0, 32, 32),
    ],
)
def test_published_sizes_are_centered_in_the_base_grid(width, height, top, left, step_y, step_x):
    th, tw = height // 16, width // 16
    cos, sin = (table.double().view(th, tw, 8) for table in rope_table(th, tw, 8))
    y = top + step_y * torch.arange(th, dtype=torch.float64)
    x = left + step_x * torch.arange(tw, dtype=torch.float64)
    # head_dim 8: two frequencies an axis, 1 and 1/100; columns first, every value twice
    for entry, frequency in ((0, 1.0), (1, 1.0), (2, 0.01), (3, 0.01)):
        torch.testing.assert_close(cos[0, :, entry], (x * frequency).cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[-1, :, entry], (x * frequency).sin(), rtol=0, atol=1e-5)
        torch.testing.assert_close(cos[:, 0, 4 + entry], (y * frequency).cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[:, -1, 4 + entry], (y * frequency).sin(), rtol=0, atol=1e-5)


def test_another_base_scales_the_positions():
    small, large = rope_table(8, 8, 8, base=8), rope_table(4, 4, 8, base=4)
    torch.testing.assert_close(small[0].view(8, 8, 8)[:4, :4], large[0].view(4, 4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs_are_rotated_in_float32(dtype):
    x = torch.randn(2, 6, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = rope_table(2, 3, 8)
    expected = torch.empty(2, 6, 3, 8)
    for k in range(0, 8, 2):
        a, b = x[..., k].float(), x[..., k + 1].float()
        expected[..., k] = a * cos[:, k, None] - b * sin[:, k, None]
        expected[..., k + 1] = b * cos[:, k, None] + a * sin[:, k, None]
    out = apply_rope(x, cos, sin)
    assert out.dtype == dtype and out.shape == x.shape
    torch.testing.assert_close(
        out.float(), expected.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6
    )


def test_rotation_of_a_strided_view():
    x = torch.randn(2, 6, 3, 3, 8).unbind(2)[1]
    cos, sin = rope_table(2, 3, 8)
    torch.testing.assert_close(apply_rope(x, cos, sin), apply_rope(x.contiguous(), cos, sin))


def test_rotation_when_compiled():
    x, table = torch.randn(2, 6, 3, 8), rope_table(2, 3, 8)
    compiled = torch.compile(apply_rope, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, *table), apply_rope(x, *table))


def test_sinusoid_golden_values():
    row = timestep_embedding(torch.tensor([801]))[0]
    expected = {
        0: -0.9943739,
        1: -0.6743408,
        2: -0.7932999,
        127: 0.9962977,
        128: 0.1059276,
        129: -0.7384202,
        130: 0.6088311,
        255: 0.0859698,
    }
    assert row.shape == (256,) and row.dtype == torch.float32
    for index, value in expected.items():
        assert row[index].item() == pytest.approx(value, abs=1e-6)


def test_sinusoid_of_fractions():
    row = timestep_embedding(torch.tensor([0.5]))[0]
    assert row[0].item() == pytest.approx(math.cos(0.5), abs=1e-6)
    assert row[128].item() == pytest.approx(math.sin(0.5), abs=1e-6)
