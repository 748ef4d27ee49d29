"""The nodes that a graph begins with: empty latents, or a picture, fitted to its size, and its mask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..images import SIZE_MULTIPLE, Geometry, Size, probe
from .columns import BELOW, COLUMN, beneath
from .workflow import Graph, Output


class Start(NamedTuple):
    """What a run begins with."""

    latent: Output
    pixels: Output | None = None
    mask: Output | None = None


def add_start(
    graph: Graph, parameters: Mapping[str, Any], init_image: Path | None, vae: Output, top: int
) -> Start:
    """Add empty latents, below ``top``, or the start picture, with what of it is masked."""
    size = parameters["width"], parameters["height"]
    if init_image is None:
        upscale = parameters.get("upscale", {})
        return Start(_empty(graph, (upscale.get("width", size[0]), upscale.get("height", size[1])), top))
    kept = "inpaint" in parameters
    pixels = _start_picture(graph, init_image, size, kept=kept)
    place = (COLUMN, beneath("ImageCrop", BELOW))
    (latent,) = graph.add("VAEEncode", place, {"pixels": pixels, "vae": vae})
    if not kept:
        return Start(latent, pixels)
    mask, latent = _masked(graph, parameters["inpaint"]["picture"], size, latent)
    return Start(latent, pixels, mask)


def _empty(graph: Graph, size: Size, top: int) -> Output:
    width, height = size
    stock = width % 16 or height % 16 or max(width, height) > 8192
    (latent,) = graph.add(
        "EmptyLatentImage" if stock else "HyDiTEmptyLatent",
        (0, top),
        widgets={"width": width, "height": height, "batch_size": 1},
    )
    return latent


def _start_picture(graph: Graph, path: Path, size: Size, *, kept: bool = False) -> Output:
    """Load the picture and fit it to ``size`` as :class:`~..images.Geometry` does; returns its pixels.

    With ``kept`` its pixels stay as they are if the size allows it, as for inpainting.
    """
    original, alpha = probe(path)
    geometry = Geometry.cut(original, size) if kept else Geometry.cover(original, size)
    image, mask = graph.add(
        "LoadImage",
        (-COLUMN, 0),
        widgets={"image": path.name, "upload": "image"},
        title="Start picture",
    )
    top = BELOW
    if alpha:
        # On a white ground, as load_picture has it.
        width, height = geometry.original
        below = beneath("LoadImage")
        (white,) = graph.add(
            "EmptyImage",
            (-COLUMN, below),
            widgets={"width": width, "height": height, "batch_size": 1, "color": 0xFFFFFF},
        )
        (opaque,) = graph.add("InvertMask", (-COLUMN, beneath("EmptyImage", below)), {"mask": mask})
        (image,) = graph.add(
            "ImageCompositeMasked",
            (0, top),
            {"destination": white, "source": image, "mask": opaque},
            {"x": 0, "y": 0, "resize_source": False},
        )
        top = beneath("ImageCompositeMasked", top)
    width, height = geometry.resized
    if geometry.resized != original or not kept:
        (image,) = graph.add(
            "ImageScale",
            (0, top),
            {"image": image},
            {"upscale_method": "lanczos", "width": width, "height": height, "crop": "disabled"},
        )
    if geometry.resized != size:
        # Not ImageScale's own crop: it crops before scaling, up to half a pixel of the original off.
        (image,) = graph.add(
            "ImageCrop",
            (COLUMN, BELOW),
            {"image": image},
            {"width": size[0], "height": size[1], "x": geometry.left, "y": geometry.top},
        )
    return image


def _masked(graph: Graph, name: str, size: Size, latent: Output) -> tuple[Output, Output]:
    """Load the mask as it was used; returns it, and the latents masked where any of their pixels is."""
    top = beneath("LoadImage", BELOW)
    left = -2 * COLUMN
    (mask,) = graph.add(
        "LoadImageMask",
        (left, BELOW),
        widgets={"image": name, "channel": "red", "upload": "image"},
        title="Mask",
    )
    (shown,) = graph.add("MaskToImage", (left, top), {"mask": mask})
    top = beneath("MaskToImage", top)
    width, height = (side // SIZE_MULTIPLE for side in size)
    (small,) = graph.add(
        "ImageScale",
        (left, top),
        {"image": shown},
        {"upscale_method": "area", "width": width, "height": height, "crop": "disabled"},
    )
    top = beneath("ImageScale", top)
    (shares,) = graph.add("ImageToMask", (left, top), {"image": small}, {"channel": "red"})
    top = beneath("ImageToMask", top)
    (any_of_it,) = graph.add("ThresholdMask", (left, top), {"mask": shares}, {"value": 0.0})
    place = (COLUMN, beneath("VAEEncode", beneath("ImageCrop", BELOW)))
    (latent,) = graph.add("SetLatentNoiseMask", place, {"samples": latent, "mask": any_of_it})
    return mask, latent
