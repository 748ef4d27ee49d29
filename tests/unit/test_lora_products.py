"""Norms of products from their factors: exact, and with no more arithmetic than the cheaper way needs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hydit_core.lora.products import hadamard_norm, product_norm


@pytest.mark.parametrize(("rows", "columns", "rank"), [(300, 200, 3), (24, 40, 20), (5, 7, 30)])
def test_the_norm_of_a_product(rows: int, columns: int, rank: int) -> None:
    up, down = torch.randn(rows, rank), torch.randn(rank, columns)
    with FlopCounterMode(display=False) as counter:
        found = product_norm(up, down)
    assert found == pytest.approx(float((up.double() @ down.double()).norm()), rel=1e-9)
    assert counter.get_total_flops() <= 2 * (rows + columns) * rank * rank


@pytest.mark.parametrize(("rows", "columns", "rank"), [(300, 200, 2), (40, 24, 8), (9, 300, 3)])
def test_the_norm_of_a_hadamard_product_takes_the_cheaper_way(rows: int, columns: int, rank: int) -> None:
    up1, up2 = torch.randn(rows, rank), torch.randn(rows, rank + 1)
    down1, down2 = torch.randn(rank, columns), torch.randn(rank + 1, columns)
    with FlopCounterMode(display=False) as counter:
        found = hadamard_norm(up1, down1, up2, down2)
    product = (up1.double() @ down1.double()) * (up2.double() @ down2.double())
    assert found == pytest.approx(float(product.norm()), rel=1e-9)
    joint = rank * (rank + 1)
    ways = ((rows + columns) * joint**2, rows * columns * (2 * rank + 1))
    assert counter.get_total_flops() == 2 * min(ways)


def test_what_is_not_finite_has_no_norm() -> None:
    up, down = torch.randn(20, 2), torch.randn(2, 30)
    up[3, 1] = math.nan
    assert math.isnan(product_norm(up, down))
    assert math.isnan(hadamard_norm(up, down, up, down))
