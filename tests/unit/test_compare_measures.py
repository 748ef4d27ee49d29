"""The measures of `compare` against figures that other programs gave for the same pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hydit_core.compare import similarity
from hydit_core.compare.figures import Pair, Result, summary, worst
from hydit_core.compare.similarity import LIMIT_DB, decibels, flip, haarpsi, mse, ssim
from hydit_core.compare.store import Cost

# piq 0.8.0's haarpsi and ssim in float64; scikit-image 0.26's structural_similarity(gaussian_weights=True,
# sigma=1.5, use_sample_covariance=False), which has no averaging down, agrees on all but the last.
GOLDEN = {
    (40, 48): (0.5510568332489698, 0.36015458473441136),
    (33, 50): (0.5653098096686762, 0.3643788783294044),
    (96, 128): (0.6052682320420326, 0.19826352740896994),
    (16, 16): (0.569830738690813, 0.403191291172531),
    (512, 640): (0.594389980919023, 0.3673629454332064),
}


def pictures(height, width):
    y, x = np.mgrid[0:height, 0:width]
    bump = np.exp(-((x - width / 2) ** 2 + (y - height / 3) ** 2) / 200)
    one = np.stack([0.5 + 0.5 * np.sin(x / 5 + y / 9), (x * 7 + y * 13) % 29 / 28, bump])
    other = np.clip(0.9 * np.roll(one, 2, -1) + 0.05 * np.cos(x * y / 50), 0, 1)
    return torch.from_numpy(one), torch.from_numpy(other)


@pytest.mark.parametrize("shape", GOLDEN)
def test_similarity_is_that_of_other_programs(shape):
    one, other = pictures(*shape)
    assert haarpsi(one, other) == pytest.approx(GOLDEN[shape][0], abs=1e-9)
    assert ssim(one, other) == pytest.approx(GOLDEN[shape][1], abs=1e-9)


@pytest.mark.parametrize("measure", (haarpsi, ssim))
def test_equal_pictures_are_equal(measure):
    one, other = pictures(32, 32)
    assert 1 >= measure(one, one) == pytest.approx(1, abs=1e-9)
    assert measure(one, other) == pytest.approx(measure(other, one), abs=1e-9)
    white, black = torch.ones(3, 32, 32), torch.zeros(3, 32, 32)
    assert [measure(white, white), measure(black, black)] == pytest.approx([1, 1], abs=1e-9)


def test_psnr_by_hand():
    one = torch.zeros(3, 20, 20)
    other = torch.full_like(one, 0.1)
    assert decibels(mse(one, other)) == pytest.approx(20)
    other[:, :10] = 0
    assert decibels(mse(one, other)) == pytest.approx(20 + 10 * math.log10(2))
    assert decibels(0) == decibels(1e-30) == LIMIT_DB


def test_flip_knows_equal_and_opposite(monkeypatch):
    pytest.importorskip("flip_evaluator")
    one, other = pictures(40, 48)
    # flip-evaluator 1.7 on the same arrays
    assert flip(one, other) == pytest.approx(0.46962, abs=1e-4)
    assert flip(one, one) == 0
    white = torch.ones(3, 40, 40)
    assert flip(white, 1 - white) > 0.9
    monkeypatch.setattr(similarity, "flip_library", lambda: None)
    assert flip(one, other) is None


def test_the_worst_twentieth():
    values = [float(i) for i in range(1, 42)]
    assert worst(values, higher_is_closer=True) == [1, 2, 3]  # of 41, rounded up
    assert worst(values, higher_is_closer=False) == [41, 40, 39]
    assert worst([5.0], higher_is_closer=True) == [5]


def pair(error):
    figures = {"psnr": decibels(error), "ssim": 1 - error, "haarpsi": 0.5, "flip": None}
    return Pair("x", "x", 0, (32, 32), None, None, error, figures)


def test_a_side_s_figures_by_hand():
    costs = [Cost(1.0, 10, 20), Cost(2.0, 20, 40), Cost(30.0, 12, 24)]
    found = summary(Result("b", "", {}, [pair(0.1), pair(0.001)], costs, right=1, judged=2))
    assert found["psnr"] == pytest.approx({"mean": 20, "worst": 10})
    assert found["psnr_of_mean_mse"] == pytest.approx({"mean": -10 * math.log10(0.0505), "worst": 10})
    assert found["ssim"] == pytest.approx({"mean": 1 - 0.0505, "worst": 0.9})
    assert "flip" not in found
    assert (found["calls"], found["passes"], found["seconds"]) == (14, 28, 2)
    assert (found["right"], found["judged"]) == (1, 2)
