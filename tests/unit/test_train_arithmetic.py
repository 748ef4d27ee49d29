"""The trainer's arithmetic against formulas written out in float64: updates, averages, validation, attention.

The network is a line, ``y = W x + b`` with the loss ``|y - target|^2``, whose gradient is known by hand; the
loop around it is the real one.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from line import PROCESSES, ROWS, WEIGHTS, LineData, LineObjective, example, numbers
from train_setup import needs_muon, records

from hydit_core.model import attention
from hydit_core.model.attention import attention_by_products, sdpa, training_attention
from hydit_core.train.config import TrainConfig
from hydit_core.train.loop import Trainer
from hydit_core.train.validation import validate

STEPS, MICRO = 4, 2
FACTORS = [0.5, 1.0, 1.0, 0.55]
"""Two steps of warm-up, then a line that would reach a tenth at step 4: 0.1 + 0.9 x (1 - 1/2) at step 3."""
LR, MUON_LR, DECAY, EPS, BETAS, MOMENTUM = 0.03, 0.02, 0.3, 0.05, (0.8, 0.9), 0.7


def settings(folder: Path, optimizer: str, clip: float) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "model": {"init_from": folder / "none"},
            "data": {"sources": [{"path": folder}]},
            "optimizer": {
                "name": optimizer, "lr": LR, "muon_lr": MUON_LR, "weight_decay": DECAY, "eps": EPS,
                "betas": BETAS, "muon_momentum": MOMENTUM,
            },
            "schedule": {"kind": "linear", "warmup_steps": 2, "min_lr": 0.1},
            "run": {
                "output_dir": folder / "run", "steps": STEPS, "batch_size": ROWS, "grad_accumulation": MICRO,
                "clip_norm": clip, "device": "cpu",
            },
            "ema": {"decay": 0.6},
            "metrics": {"every": 1, "tensorboard": False},
        }
    )  # fmt: skip


def gradients(w: np.ndarray, b: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The gradient of a step's loss, the mean over all rows of all its micro-batches, and that loss."""
    dw, db, loss = np.zeros_like(w), np.zeros_like(b), 0.0
    for micro in range(MICRO):
        x, target = example(step * MICRO + micro)
        for row in range(ROWS):
            error = w @ x[row] + b - target[row]
            share = WEIGHTS[row] / (ROWS * MICRO)
            dw += share * 2 * np.outer(error, x[row])
            db += share * 2 * error
            loss += share * (error**2).sum()
    return dw, db, loss


class AdamW:
    """Loshchilov and Hutter 2019, algorithm 2."""

    def __init__(self) -> None:
        self.m, self.v, self.count = 0.0, 0.0, 0

    def __call__(self, value: np.ndarray, gradient: np.ndarray, lr: float, decay: float) -> np.ndarray:
        self.count += 1
        self.m = BETAS[0] * self.m + (1 - BETAS[0]) * gradient
        self.v = BETAS[1] * self.v + (1 - BETAS[1]) * gradient**2
        m, v = self.m / (1 - BETAS[0] ** self.count), self.v / (1 - BETAS[1] ** self.count)
        return value - lr * decay * value - lr * m / (np.sqrt(v) + EPS)


class Muon:
    """Jordan 2024: momentum after Nesterov, then five Newton-Schulz steps towards an orthogonal matrix."""

    def __init__(self) -> None:
        self.momentum = 0.0

    def __call__(self, value: np.ndarray, gradient: np.ndarray, lr: float, decay: float) -> np.ndarray:
        self.momentum = MOMENTUM * self.momentum + (1 - MOMENTUM) * gradient
        x = ((1 - MOMENTUM) * gradient + MOMENTUM * self.momentum).T  # wide
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        rows, columns = value.shape
        return value - lr * decay * value - lr * math.sqrt(max(1, rows / columns)) * x.T


@pytest.mark.parametrize("clip", [0.0, 18.0])
@pytest.mark.parametrize("optimizer", ["adamw", needs_muon("muon")])
def test_steps_are_those_computed_by_hand(optimizer: str, clip: float, tmp_path: Path) -> None:
    """Accumulation, sample weights, clipping, warm-up and decay, weight decay, averages."""
    trainer = Trainer(settings(tmp_path, optimizer, clip), LineObjective(), LineData(), PROCESSES)
    assert trainer.run()

    w, b = numbers(1, shape=(4, 3)), numbers(2, shape=(4,))
    mean_w, mean_b = w, b
    update_w, update_b = Muon() if optimizer == "muon" else AdamW(), AdamW()
    norms, losses = [], []
    for step, factor in enumerate(FACTORS):
        dw, db, loss = gradients(w, b, step)
        norm = math.sqrt((dw**2).sum() + (db**2).sum())
        norms.append(norm)
        losses.append(loss)
        scale = min(1.0, clip / norm) if clip else 1.0
        w = update_w(w, scale * dw, factor * (MUON_LR if optimizer == "muon" else LR), DECAY)
        b = update_b(b, scale * db, factor * LR, 0.0)
        keep = min(0.6, 1 - (2 + step) ** (-2 / 3))
        mean_w, mean_b = keep * mean_w + (1 - keep) * w, keep * mean_b + (1 - keep) * b
    assert not clip or min(norms) < clip < max(norms), "one step must be clipped, another not"

    # torch's Muon orthogonalizes in bfloat16
    close = {"rtol": 0, "atol": 1.5e-3 if optimizer == "muon" else 2e-6}
    found = trainer.trained
    np.testing.assert_allclose(found["dit.blocks.0.weight"].detach(), w, **close)
    np.testing.assert_allclose(found["dit.blocks.0.bias"].detach(), b, **close)
    assert trainer.ema is not None
    np.testing.assert_allclose(trainer.ema.average["dit.blocks.0.weight"], mean_w, **close)
    np.testing.assert_allclose(trainer.ema.average["dit.blocks.0.bias"], mean_b, **close)

    written = [record for record in records(tmp_path / "run") if "lr" in record]
    assert [r["lr"] for r in written] == pytest.approx([LR * factor for factor in FACTORS])
    assert [r["grad_norm"] for r in written] == pytest.approx(norms, rel=1e-2)
    assert [r["loss"] for r in written] == pytest.approx(losses, rel=1e-2)


def test_validation_counts_each_row_by_its_weight(tmp_path: Path) -> None:
    """A row that only fills the last batch counts nothing, and batches count by their rows."""
    objective = LineObjective()
    w, b = numbers(1, shape=(4, 3)), numbers(2, shape=(4,))
    losses = []
    for number, rows in ((20, 3), (21, 1)):
        x, target = example(number)
        losses += [float(((w @ x[row] + b - target[row]) ** 2).sum()) for row in range(rows)]
    found = validate(objective, LineData(), PROCESSES, contextlib.nullcontext)
    mean = sum(losses) / 4
    # The grid of four timesteps has one in each band, pictures take them in steps of three, and both batches
    # begin at the first.
    bands = {"t0_249": (losses[0] + losses[3]) / 2, "t500_749": losses[2], "t750_999": losses[1]}
    expected = {"val_loss": mean, "val_mse": mean, "val_vlb": 0.0}
    assert found == pytest.approx(expected | {f"val_mse_{name}": loss for name, loss in bands.items()})


def test_prior_pictures_are_measured_by_themselves() -> None:
    """They change nothing of what decides."""
    w, b = numbers(1, shape=(4, 3)), numbers(2, shape=(4,))
    x, target = example(22)
    mean = sum(float(((w @ x[row] + b - target[row]) ** 2).sum()) for row in range(2)) / 2
    data = LineData()
    plain = validate(LineObjective(), data, PROCESSES, contextlib.nullcontext)
    data.layout = SimpleNamespace(validation=(0, 1, 2, 3), prior_validation=(4, 5))
    objective, asked = LineObjective(), Counter[int]()
    inputs = objective.inputs
    objective.inputs = lambda batch, draws: asked.update([batch.step]) or inputs(batch, draws)  # type: ignore
    found = validate(objective, data, PROCESSES, contextlib.nullcontext)
    assert asked == {20: 1, 21: 1, 22: 2}  # four values of half as many pictures
    prior = {name: found.pop(name) for name in ("val_prior_loss", "val_prior_mse")}
    assert prior == pytest.approx(dict.fromkeys(prior, mean)) and found == plain


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Softmax of q k^T / sqrt(width), row by row; (B, N, heads, width)."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for sample in range(q.shape[0]):
        for head in range(q.shape[2]):
            scores = q[sample, :, head] @ k[sample, :, head].T / math.sqrt(q.shape[3])
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[sample, :, head] = weights / weights.sum(1, keepdims=True) @ v[sample, :, head]
    return out


def attention_inputs(n: int, m: int, width: int) -> list[np.ndarray]:
    """Queries and keys three times as large as normal ones: a softmax that a wrong scale changes much."""
    shapes = ((2, n, 3, width), (2, m, 3, width), (2, m, 3, width))
    q, k, v = (numbers(5, i, n, shape=shape) for i, shape in enumerate(shapes))
    return [3 * q, k, v]


@pytest.mark.parametrize(
    ("function", "n", "m", "width"),
    [
        (training_attention, 20, 9, 12),  # matrix products
        (training_attention, 150, 130, 8),  # PyTorch's own
        (sdpa, 20, 9, 12),
        (lambda q, k, v: by_products(q, k, v), 70, 33, 12),
    ],
    ids=["training-short", "training-long", "sdpa", "products"],
)
def test_attention_is_the_softmax_formula(function: Any, n: int, m: int, width: int) -> None:
    arrays = attention_inputs(n, m, width)
    exact = exact_attention(*arrays)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        out = function(*(torch.from_numpy(x).to(dtype) for x in arrays))
        assert out.dtype == dtype and out.shape == (2, n, 3 * width)
        np.testing.assert_allclose(out.float().unflatten(-1, (3, width)), exact, rtol=0, atol=error)


def test_only_short_attention_goes_through_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(attention, "sdpa", lambda q, k, v, **_: seen.append((q.shape[1], k.shape[1])))
    for n, m in ((128, 128), (129, 128), (1, 128 * 128), (2, 128 * 128), (16, 20)):
        q, k, v = (torch.zeros(1, length, 1, 4) for length in (n, m, m))
        training_attention(q, k, v)
    assert seen == [(129, 128), (2, 128 * 128)]


def by_products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return attention_by_products(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(-2)


def test_gradients_of_short_attention_are_those_of_the_formula() -> None:
    """Along one direction of each input, against a difference quotient in float64."""
    arrays = attention_inputs(10, 7, 8)
    direction = numbers(6, shape=(2, 10, 3, 8))
    tensors = [torch.from_numpy(x).float().requires_grad_() for x in arrays]
    out = training_attention(*tensors).unflatten(-1, (3, 8))
    (out * torch.from_numpy(direction).float()).sum().backward()
    for i, x in enumerate(arrays):
        step = 1e-5 * numbers(7, i, shape=x.shape)
        ends = [
            (exact_attention(*arrays[:i], x + s * step, *arrays[i + 1 :]) * direction).sum() for s in (1, -1)
        ]
        found = float((tensors[i].grad.double() * torch.from_numpy(step)).sum())
        assert found == pytest.approx((ends[0] - ends[1]) / 2, rel=1e-3), "qkv"[i]
