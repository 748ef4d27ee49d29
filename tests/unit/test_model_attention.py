"""The CPU's bfloat16 attention by matrix products against PyTorch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_models import encode, inputs, randomize, tiny

from hydit_core.model import attention
from hydit_core.model.attention import sdpa
from hydit_core.model.dit import DiT


def tensors(n: int, m: int, head_dim: int, dtype: torch.dtype, batch: int = 2, heads: int = 5):
    generator = torch.Generator().manual_seed(n)
    shapes = ((batch, heads, n, head_dim), (batch, heads, m, head_dim), (batch, heads, m, head_dim))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("head_dim", [72, 88, 96, 40])
@pytest.mark.parametrize(("n", "m"), [(700, 333), (65, 2**14), (1, 7)])
def test_products_equal_fused_attention_in_float32(n, m, head_dim):
    q, k, v = tensors(n, m, head_dim, torch.float32)
    out = attention.attention_by_products(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=2e-5)


def test_products_in_bfloat16_are_close_to_float32():
    q, k, v = tensors(300, 400, 88, torch.bfloat16)
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    out = attention.attention_by_products(q, k, v)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).std() < 0.015 * exact.std()


@pytest.mark.parametrize("able", [False, True])
def test_products_serve_large_bfloat16_inference_alone(able, monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "_cpu_multiplies_bfloat16_outside_tiles", lambda: able)
    products = attention.attention_by_products
    monkeypatch.setattr(attention, "attention_by_products", lambda *a: calls.append(a) or products(*a))

    def called(n, m, dtype):
        calls.clear()
        q, k, v = (x.transpose(1, 2) for x in tensors(n, m, 16, dtype, batch=1, heads=2))
        expected = F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v)))
        out = sdpa(q, k, v, options={"any": 1})
        assert out.shape == (1, n, 32)
        torch.testing.assert_close(
            out.float(),
            expected.transpose(1, 2).flatten(-2),
            rtol=0,
            atol=0.05 if dtype != torch.float32 else 1e-5,
        )
        return bool(calls)

    with torch.no_grad():
        assert called(1024, 333, torch.bfloat16) == able
        assert not called(1024, 333, torch.float32)
        assert not called(64, 64, torch.bfloat16)
    assert not called(1024, 333, torch.bfloat16)


@torch.no_grad()
def test_a_bfloat16_model_is_as_exact_with_products(monkeypatch):
    model = DiT(tiny(depth=8))
    randomize(model, 0)
    values = inputs(model.config, (16, 16))
    low = {n: v.bfloat16() if v.is_floating_point() and n != "t" else v for n, v in values.items()}
    exact = model(values["x"], values["t"], encode(model, values))
    model.bfloat16()
    for pay in (False, True):
        monkeypatch.setattr(attention, "_products_pay", lambda q, k, pay=pay: pay)
        out = model(low["x"], low["t"], encode(model, low)).float()
        assert (out - exact).square().mean().sqrt() < 0.02 * exact.std(), pay
