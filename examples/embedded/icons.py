"""Turn an icon package into RGBA pictures: Twemoji's SVGs, drawn shapes, hue-tinted objects.

The package ``@iconify-json/twemoji`` is JSON with SVG bodies, so plain Python reads it; resvg turns each SVG
into pixels.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent

# Twemoji's own palette, so that drawn shapes and tints look like the rest.
PALETTE = {
    "red": "#dd2e44",
    "orange": "#f4900c",
    "yellow": "#fdcb58",
    "green": "#78b159",
    "blue": "#55acee",
    "purple": "#aa8ed6",
    "pink": "#f4a6c6",
    "brown": "#c1694f",
    "black": "#31373d",
}
# Target hue (degrees), saturation factor and value factor of a tint.
TINTS = {
    "red": (354, 1.0, 1.0),
    "orange": (30, 1.0, 1.06),
    "yellow": (46, 0.95, 1.1),
    "green": (110, 0.75, 0.88),
    "blue": (207, 0.9, 1.04),
    "purple": (268, 0.75, 0.92),
    "pink": (336, 0.48, 1.12),
    "brown": (18, 0.62, 0.72),
    "black": (210, 0.2, 0.26),
}


class IconSet:
    """The SVGs of one iconify package folder."""

    def __init__(self, folder: Path) -> None:
        data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.icons: dict[str, dict] = data["icons"]
        self.width, self.height = data.get("width", 16), data.get("height", 16)
        chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.by_codepoint = {code.lower(): name for code, name in chars.items() if name in self.icons}

    def svg(self, codepoint: str) -> str:
        """The SVG of an emoji given by its code points in hexadecimal, such as ``1F34E``."""
        return self.named(self.name_of(codepoint))

    def name_of(self, codepoint: str) -> str:
        """The package's own name of an emoji."""
        code = codepoint.lower().replace(" ", "-")
        for candidate in (code, code + "-fe0f", code.replace("-fe0f", "")):
            if candidate in self.by_codepoint:
                return self.by_codepoint[candidate]
        raise KeyError(codepoint)

    def named(self, name: str) -> str:
        icon = self.icons[name]
        width, height = icon.get("width", self.width), icon.get("height", self.height)
        left, top = icon.get("left", 0), icon.get("top", 0)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )


def rasterize(svg: str, size: int) -> Image.Image:
    """SVG text to an RGBA picture of ``size`` x ``size`` pixels."""
    import resvg_py  # only rendering needs it, measuring does not

    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA").resize((size, size), Image.Resampling.LANCZOS)


def _points(corners: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.3f},{y:.3f}" for x, y in corners)


def shape_svg(shape: str, colour: str) -> str:
    """A plain shape in one color of the palette, on a 36 x 36 canvas like Twemoji's."""
    fill = PALETTE[colour]
    if shape == "heart":
        body = (
            '<path d="M18 33C8 25 2 19 2 11.5C2 6.500 5.800 3 10.300 3C13.500 3 16.500 4.800 18 7.800'
            'C19.500 4.800 22.500 3 25.700 3C30.200 3 34 6.500 34 11.500C34 19 28 25 18 33Z"/>'
        )
    elif shape == "star":
        corners = []
        for i in range(10):
            radius = 16.5 if i % 2 == 0 else 7.2
            angle = math.radians(-90 + 36 * i)
            corners.append((18 + radius * math.cos(angle), 19 + radius * math.sin(angle)))
        body = (
            f'<polygon points="{_points(corners)}" stroke="{fill}" stroke-width="1" stroke-linejoin="round"/>'
        )
    elif shape == "circle":
        body = '<circle cx="18" cy="18" r="16"/>'
    elif shape == "square":
        body = '<rect x="3" y="3" width="30" height="30" rx="3"/>'
    elif shape == "triangle":
        body = '<polygon points="18,3 34,31 2,31" stroke-linejoin="round"/>'
    elif shape == "diamond":
        body = '<polygon points="18,2 33,18 18,34 3,18"/>'
    elif shape == "moon":
        body = '<path d="M23 2.500A16 16 0 1 0 33.500 26.500A13.500 13.500 0 0 1 23 2.500Z"/>'
    else:
        raise KeyError(shape)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36"><g fill="{fill}">{body}</g></svg>'


def tint(picture: Image.Image, colour: str) -> Image.Image:
    """A picture with its saturated parts moved to another hue; grays, whites and blacks stay."""
    hue, saturation, value = TINTS[colour]
    rgba = np.asarray(picture)
    hsv = np.asarray(picture.convert("RGB").convert("HSV")).astype(np.float32)
    coloured = hsv[..., 1] > 60
    hsv[..., 0] = np.where(coloured, hue / 360 * 255, hsv[..., 0])
    hsv[..., 1] = np.where(coloured, np.clip(hsv[..., 1] * saturation, 0, 255), hsv[..., 1])
    hsv[..., 2] = np.where(coloured, np.clip(hsv[..., 2] * value, 0, 255), hsv[..., 2])
    rgb = np.asarray(Image.fromarray(hsv.round().astype(np.uint8), "HSV").convert("RGB"))
    return Image.fromarray(np.dstack([rgb, rgba[..., 3]]))


def on_white(picture: Image.Image) -> Image.Image:
    """RGBA over white, as RGB."""
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")
