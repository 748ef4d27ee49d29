"""How alike two pictures are: PSNR, SSIM, HaarPSI and FLIP.

Pictures are (3, H, W) in 0..1, sRGB. Constants are those of the papers and of their authors' code, so that
figures can be compared with others'.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LIMIT_DB = 100.0
"""PSNR of pictures that differ by less than what is kept of them (16 bit): as good as equal."""
SMALLEST = 16
"""Pixels: HaarPSI's largest wavelet on half the size."""

_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_CONSTANTS = (0.01**2, 0.03**2)
_HAAR_C, _HAAR_ALPHA, _HAAR_SCALES = 30.0, 4.2, 3
_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


def mse(reference: Tensor, picture: Tensor) -> float:
    """Mean square error over pixels and channels."""
    return float(((reference.double() - picture.double()) ** 2).mean())


def decibels(error: float) -> float:
    """PSNR of a mean square error, at most :data:`LIMIT_DB`."""
    return min(LIMIT_DB, -10 * math.log10(error)) if error > 0 else LIMIT_DB


def ssim(reference: Tensor, picture: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), the mean over channels; 1 is equal.

    As the authors advise, large pictures are averaged down first, to a shorter side of about 256 pixels.
    """
    both = torch.stack([reference, picture]).double()
    factor = max(1, round(min(both.shape[-2:]) / 256))
    x, y = F.avg_pool2d(both, factor)[:, :, None]  # channels as a batch
    window = min(_SSIM_WINDOW, *(side - 1 + side % 2 for side in x.shape[-2:]))
    offsets = torch.arange(window, dtype=x.dtype) - window // 2
    line = torch.softmax(-(offsets**2) / (2 * _SSIM_SIGMA**2), 0)

    def blurred(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    var_x, var_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = _SSIM_CONSTANTS
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return float((luminance * structure).mean())


def haarpsi(reference: Tensor, picture: Tensor) -> float:
    """Haar wavelet-based perceptual similarity (Reisenhofer et al. 2018), in color; 0 to 1, which is equal.

    Both sides must have :data:`SMALLEST` pixels or more.
    """
    pair = torch.stack([reference, picture]).double() * 255
    yiq = torch.einsum("ck,bkhw->bchw", pair.new_tensor(_YIQ), pair)
    odd = max(side % 2 for side in yiq.shape[-2:])
    yiq = F.avg_pool2d(F.pad(yiq, (0, odd, 0, odd)), 2)
    # (pair, scale, direction, h, w); the coarsest scale is the weight of the finer ones.
    haar = torch.stack([_wavelets(yiq[:, :1], 2 ** (i + 1)) for i in range(_HAAR_SCALES)], 1).abs()
    weights = haar[:, -1].amax(0)
    similar = _alike(haar[0, :-1], haar[1, :-1]).mean(0)
    color = F.avg_pool2d(F.pad(yiq[:, 1:], (0, 1, 0, 1)), 2, stride=1).abs()
    similar = torch.cat([similar, _alike(color[0], color[1]).mean(0, keepdim=True)])
    weights = torch.cat([weights, weights.mean(0, keepdim=True)])
    if not (total := weights.sum()):
        return 1.0
    score = (torch.sigmoid(_HAAR_ALPHA * similar) * weights).sum() / total
    return min(1.0, float((torch.logit(score) / _HAAR_ALPHA) ** 2))


def _wavelets(luma: Tensor, size: int) -> Tensor:
    """(B, 1, h, w) -> (B, 2, h, w): horizontal and vertical Haar coefficients, of the same size."""
    kernel = torch.full((size, size), 1 / size, dtype=luma.dtype)
    kernel[size // 2 :] *= -1
    before, after = size // 2 - 1, size // 2
    return F.conv2d(F.pad(luma, (before, after, before, after)), torch.stack([kernel, kernel.T])[:, None])


def _alike(x: Tensor, y: Tensor) -> Tensor:
    return (2 * x * y + _HAAR_C) / (x**2 + y**2 + _HAAR_C)


@functools.lru_cache(maxsize=1)
def flip_library() -> Any:
    """The module ``flip_evaluator``, or None if it is not installed."""
    try:
        import flip_evaluator
    except ImportError:
        return None
    return flip_evaluator


def flip(reference: Tensor, picture: Tensor) -> float | None:
    """Mean FLIP error (Andersson et al. 2020) at 67 pixels a degree; 0 is equal, 1 the most.

    None where ``flip-evaluator`` is not installed.
    """
    if (library := flip_library()) is None:
        return None
    x, y = (side.permute(1, 2, 0).float().contiguous().numpy() for side in (reference, picture))
    return float(library.evaluate(x, y, "LDR", applyMagma=False)[1])
