"""Products with int8 weights by way of floats, against comfy-kitchen's own."""

from __future__ import annotations

import pytest
import torch

from hydit_core.weights import int8_products
from hydit_core.weights.packed import INT8, Scheme, pack

kitchen = pytest.importorskip("comfy_kitchen")


@pytest.fixture
def registered():
    before = list(kitchen.registry._priority)
    int8_products.register(kitchen)
    kitchen.registry.enable(int8_products.NAME)  # an earlier test disabled it
    yield kitchen.registry
    kitchen.registry.disable(int8_products.NAME)
    kitchen.registry.set_priority(before)


def of_int64(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.long() @ y.long().T).float()


@pytest.mark.parametrize("columns", [16, 1024, 1408, 6144])
def test_products_are_exact(columns: int) -> None:
    random = torch.Generator().manual_seed(columns)
    a, b = (torch.randint(-128, 128, (n, columns), generator=random, dtype=torch.int8) for n in (5, 7))
    assert torch.equal(int8_products.product(a, b), of_int64(a, b))
    # Large sums of odd numbers, which float32 has no room for: rounded more than once, some come out wrong.
    a, b = (torch.randint(100, 128, (32, columns), generator=random, dtype=torch.int8) for _ in range(2))
    assert torch.equal(int8_products.product(a, b), of_int64(a, b))
    full = torch.full((2, columns), -128, dtype=torch.int8)  # the largest there are
    assert torch.equal(int8_products.product(full, full), of_int64(full, full))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "group", "rows"), [(192, 0, True), (1408, 64, True), (2048, 0, False)])
def test_it_is_what_comfy_kitchen_computes(registered, dtype, columns, group, rows) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, columns, generator=random).to(dtype)
    bias = torch.randn(24, generator=random).to(dtype)
    packed = pack(torch.randn(24, columns, generator=random), Scheme(INT8, rows=rows, group=group))
    given = (x, packed.values, packed.scale, bias, dtype, bool(group), group or 256)
    assert registered.get_capable_backend("int8_linear", {"x": x}) == int8_products.NAME
    found = kitchen.int8_linear(*given)
    with registered.use_backend("eager"):
        expected = kitchen.int8_linear(*given)
    assert found.dtype == dtype and torch.equal(found, expected)
    dense = torch.nn.functional.linear(x.double(), packed.dense().double(), bias.double())
    assert (found.double() - dense).norm() < 0.03 * dense.norm()
