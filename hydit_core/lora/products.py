"""Norms of products, from their factors: a small file may stand for a product too large for any memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 2**20


def product_norm(up: Tensor, down: Tensor) -> float:
    """The Frobenius norm of ``up @ down``, (m, r) and (r, n), in no more memory than the factors need."""
    up, down = up.double(), down.double()
    rank = up.shape[1]
    if up.shape[0] * down.shape[1] <= rank * rank:
        return float((up @ down).norm())
    return _root((up.T @ up) * (down @ down.T))


def hadamard_norm(up1: Tensor, down1: Tensor, up2: Tensor, down2: Tensor) -> float:
    """The Frobenius norm of ``(up1 @ down1) * (up2 @ down2)``, in pieces of bounded size.

    This is itself a product, of rank r1 r2: its factors are all products of a column of ``up1`` with one of
    ``up2``, and of a row of ``down1`` with one of ``down2``. Whichever way takes less arithmetic is used.
    """
    rows, columns = up1.shape[0], down1.shape[1]
    ranks, rank = up1.shape[1] + up2.shape[1], up1.shape[1] * up2.shape[1]
    if rank * rank <= _CHUNK and (rows + columns) * rank * rank < rows * columns * ranks:
        return _root(_gram(up1, up2) * _gram(down1.T, down2.T))
    square = 0.0
    for part in _pieces(rows, columns):
        one, two = (a[part].double() @ b.double() for a, b in ((up1, down1), (up2, down2)))
        square += float((one * two).square().sum())
    return math.sqrt(square)


def _gram(one: Tensor, two: Tensor) -> Tensor:
    """The Gram matrix of all products of a column of (m, r1) with a column of (m, r2): (r1 r2, r1 r2)."""
    rank = one.shape[1] * two.shape[1]
    total = torch.zeros(rank, rank, dtype=torch.float64)
    for part in _pieces(len(one), rank):
        products = (one[part].double()[:, :, None] * two[part].double()[:, None, :]).flatten(1)
        total += products.T @ products
    return total


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def _root(terms: Tensor) -> float:
    """The square root of a sum that rounding may have taken below 0."""
    return math.sqrt(max(float(terms.sum()), 0.0))
