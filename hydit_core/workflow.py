"""ComfyUI workflows as JSON: a small graph builder, and the graph that draws a picture again.

ComfyUI has two forms. The *workflow* is what its page opens: nodes with places, sizes and widget values.
The *prompt* is what its server runs: node types, values and links. ComfyUI's own pictures carry both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from . import embedded
from .data.images import Geometry, probe_size
from .weights.parts import bundle

PACK = {"cnr_id": "hydit", "ver": "0.1.0"}
"""Properties of our nodes: by them the page can offer to install the pack where it is missing."""
CORE = {"cnr_id": "comfy-core", "ver": "0.3.64"}
"""The same for ComfyUI's own nodes; the oldest version that is supported."""

_PAGE_ONLY = ("control_after_generate", "upload")
"""Widgets that the page adds; the server does not know them."""
_DYNAMIC = ("text", "text_mt5")
"""Widgets with texts that the page rewrites, see :func:`literal`."""
_INNER = ("transformer", "t2i", "controlnet")
"""Folders that ComfyUI's lists show by the one above them."""
_BELOW = 1050
"""Height of the second row, below loaders and prompts."""
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Kind(NamedTuple):
    """What the page must know of a node type: sockets in order as (name, type), and a size in pixels.

    A widget that is linked is among the sockets too.
    """

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    size: tuple[int, int]


_PARTS = (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE"))
_IMAGE = (("IMAGE", "IMAGE"),)
_LATENT = (("LATENT", "LATENT"),)
KINDS: dict[str, Kind] = {
    "HyDiTCheckpointLoader": Kind((), _PARTS, (430, 220)),
    "HyDiTDiTLoader": Kind((), _PARTS[:1], (430, 190)),
    "HyDiTTextEncoderLoader": Kind((), _PARTS[1:2], (430, 220)),
    "HyDiTTextEncode": Kind(
        (("clip", "CLIP"),), (("CONDITIONING", "CONDITIONING"), ("report", "STRING")), (430, 420)
    ),
    "HyDiTControlNetLoader": Kind((), (("CONTROL_NET", "CONTROL_NET"),), (430, 190)),
    "HyDiTControlNetApply": Kind(
        (
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("control_net", "CONTROL_NET"),
            ("image", "IMAGE"),
            ("vae", "VAE"),
            ("mask", "MASK"),
        ),
        (("POSITIVE", "CONDITIONING"), ("NEGATIVE", "CONDITIONING")),
        (430, 400),
    ),
    "HyDiTEmptyLatent": Kind((), _LATENT, (430, 260)),
    "HyDiTKSampler": Kind(
        (
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ),
        _LATENT,
        (430, 600),
    ),
    "EmptyLatentImage": Kind((), _LATENT, (430, 180)),
    "VAELoader": Kind((), _PARTS[2:], (430, 130)),
    "LoadImage": Kind((), (("IMAGE", "IMAGE"), ("MASK", "MASK")), (430, 480)),
    "InvertMask": Kind((("mask", "MASK"),), (("MASK", "MASK"),), (230, 80)),
    "EmptyImage": Kind((), _IMAGE, (430, 200)),
    "ImageCompositeMasked": Kind(
        (("destination", "IMAGE"), ("source", "IMAGE"), ("mask", "MASK")), _IMAGE, (430, 260)
    ),
    "ImageScale": Kind((("image", "IMAGE"),), _IMAGE, (430, 230)),
    "ImageCrop": Kind((("image", "IMAGE"),), _IMAGE, (430, 230)),
    "VAEEncode": Kind((("pixels", "IMAGE"), ("vae", "VAE")), _LATENT, (230, 110)),
    "VAEDecode": Kind((("samples", "LATENT"), ("vae", "VAE")), _IMAGE, (230, 110)),
    "SaveImage": Kind((("images", "IMAGE"),), (), (430, 480)),
}


class Output(NamedTuple):
    """Slot ``slot`` of node ``node``: what an input is linked to."""

    node: int
    slot: int


@dataclass
class _Node:
    type: str
    at: tuple[int, int]
    size: tuple[int, int]
    links: dict[str, Output]
    widgets: dict[str, Any]
    title: str | None
    properties: dict[str, Any]


@dataclass
class Graph:
    """Nodes that are added from left to right, each linked to earlier ones."""

    kinds: Mapping[str, Kind] = field(default_factory=lambda: KINDS)
    nodes: list[_Node] = field(default_factory=list)
    groups: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        type: str,
        at: tuple[int, int],
        links: Mapping[str, Output] | None = None,
        widgets: Mapping[str, Any] | None = None,
        *,
        size: tuple[int, int] | None = None,
        title: str | None = None,
        **properties: Any,
    ) -> list[Output]:
        """Add a node; gives its outputs.

        Args:
            type: a key of ``kinds``.
            at: left upper corner on the page.
            links: outputs of earlier nodes, by input name.
            widgets: values in the page's order, its own (``control_after_generate``) included.
            size: instead of the type's usual one.
            title: instead of the type's display name.
            properties: go into the node's ``properties``.
        """
        number = len(self.nodes) + 1
        kind = self.kinds[type]
        self.nodes.append(
            _Node(type, at, size or kind.size, dict(links or {}), dict(widgets or {}), title, properties)
        )
        return [Output(number, slot) for slot in range(len(kind.outputs))]

    def prompt(self) -> dict[str, Any]:
        """The API form, which ComfyUI's server runs."""
        return {
            str(number): {
                "class_type": node.type,
                "inputs": {
                    **{name: value for name, value in node.widgets.items() if name not in _PAGE_ONLY},
                    **{name: [str(output.node), output.slot] for name, output in node.links.items()},
                },
            }
            for number, node in enumerate(self.nodes, 1)
        }

    def workflow(self) -> dict[str, Any]:
        """The UI form, which ComfyUI's page opens."""
        links: list[list[Any]] = []
        for number, node in enumerate(self.nodes, 1):
            for slot, (name, socket) in enumerate(self.kinds[node.type].inputs):
                if name in node.links:
                    links.append([len(links) + 1, *node.links[name], number, slot, socket])
        return {
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(links),
            "nodes": [self._node(number, node, links) for number, node in enumerate(self.nodes, 1)],
            "links": links,
            "groups": self.groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _node(self, number: int, node: _Node, links: list[list[Any]]) -> dict[str, Any]:
        kind = self.kinds[node.type]
        into = {(link[3], link[4]): link[0] for link in links}
        out_of = [
            [link[0] for link in links if (link[1], link[2]) == (number, slot)]
            for slot in range(len(kind.outputs))
        ]
        return {
            "id": number,
            "type": node.type,
            **({"title": node.title} if node.title else {}),
            "pos": list(node.at),
            "size": list(node.size),
            "flags": {},
            "order": number - 1,
            "mode": 0,
            "inputs": [
                {
                    "name": name,
                    "type": socket,
                    **({"widget": {"name": name}} if name in node.widgets else {}),
                    "link": into.get((number, slot)),
                }
                for slot, (name, socket) in enumerate(kind.inputs)
            ],
            "outputs": [
                {"name": name, "type": socket, "links": out_of[slot] or None}
                for slot, (name, socket) in enumerate(kind.outputs)
            ],
            "properties": {
                "Node name for S&R": node.type,
                **(PACK if node.type.startswith("HyDiT") else CORE),
                **node.properties,
            },
            "widgets_values": [
                literal(value) if name in _DYNAMIC else value for name, value in node.widgets.items()
            ],
        }


def literal(text: str) -> str:
    r"""``text`` as it must stand in a prompt widget for the page to send exactly ``text``.

    The page drops C comments and draws from ``{a|b}`` in prompts; ``\`` before one of ``{}|`` protects it.
    """

    def protect(match: re.Match[str]) -> str:
        slashes, special = match.groups()
        odd = len(slashes) % 2
        if not special:  # the page adds a word to an odd backslash at the end
            return slashes + " " * odd
        # Backslashes are read in pairs: the odd one gets a partner, and `special` a choice of its own.
        return f"{slashes}\\{{\\{special}}}" if odd else f"{slashes}\\{special}"

    protected = re.sub(r"(\\*)([{}|]|\Z)", protect, text)
    return re.sub(r"/(?=[/*])", "/{}", protected)  # a choice of nothing


def redraw(
    parameters: Mapping[str, Any],
    *,
    model: Path | None = None,
    text_encoders: Path | None = None,
    vae: Path | None = None,
    init_image: Path | None = None,
) -> Graph:
    """The graph that draws a picture of ``generate`` again.

    Every setting is written out, so that the picture does not depend on presets. Files appear under their
    names in ComfyUI's lists, a folder's ending in ``/``; they are expected in ComfyUI's folders.

    Args:
        parameters: of the picture, as :func:`~.png.read_parameters` gives them.
        model, text_encoders, vae: what it was drawn with; None: the embedded model, or inside ``model``.
        init_image: the picture that it started from.
    """
    graph = Graph()
    parts, top = _load(graph, parameters, model or embedded.embedded_model(), text_encoders, vae)
    width, height = parameters["width"], parameters["height"]
    if init_image is None:
        stock = width % 16 or height % 16 or max(width, height) > 8192
        (latent,) = graph.add(
            "EmptyLatentImage" if stock else "HyDiTEmptyLatent",
            (0, top),
            widgets={"width": width, "height": height, "batch_size": 1},
        )
    else:
        pixels = _start_picture(graph, init_image, (width, height))
        (latent,) = graph.add("VAEEncode", (490, _BELOW + 300), {"pixels": pixels, "vae": parts["VAE"]})
    texts = [
        graph.add(
            "HyDiTTextEncode",
            (490, y),
            {"clip": parts["CLIP"]},
            {"text": parameters[name], "text_mt5": "", "mode": "exact", "width": 0, "height": 0},
            title=title,
        )[0]
        for name, title, y in (("prompt", "Prompt", 0), ("negative", "Negative prompt", 490))
    ]
    (sampled,) = graph.add(
        "HyDiTKSampler",
        (980, 0),
        {"model": parts["MODEL"], "positive": texts[0], "negative": texts[1], "latent_image": latent},
        {
            "seed": parameters["seed"],
            "control_after_generate": "fixed",
            "preset": "model's own",
            **{name: parameters[name] for name in ("sampler", "spacing", "steps", "cfg", "guidance_rescale")},
            "denoise": parameters.get("strength", 1.0),
        },
    )
    (image,) = graph.add("VAEDecode", (1470, 0), {"samples": sampled, "vae": parts["VAE"]})
    graph.add("SaveImage", (1760, 0), {"images": image}, {"filename_prefix": "hydit"})
    return graph


def _load(
    graph: Graph, parameters: Mapping[str, Any], model: Path, text_encoders: Path | None, vae: Path | None
) -> tuple[dict[str, Output], int]:
    """Add the loaders; gives MODEL, CLIP and VAE, and where the space below the loaders begins."""
    dtype = {"weight_dtype": _DTYPES.get(parameters["dtype"], "default")}
    outputs: dict[str, Output] = {}
    top = 0

    def add(type: str, take: Iterable[str], **widgets: Any) -> None:
        nonlocal top
        found = graph.add(type, (0, top), widgets=widgets)
        top += KINDS[type].size[1] + 70
        names = [name for name, _ in KINDS[type].outputs]
        outputs.update({name: found[names.index(name)] for name in take})

    if text_encoders and vae:
        add("HyDiTDiTLoader", ["MODEL"], model_name=list_name(model), **dtype)
    vae_file = _vae_file(vae) if vae else None
    if text_encoders and (text_encoders != vae or vae_file):
        name = list_name(text_encoders)
        add("HyDiTTextEncoderLoader", ["CLIP"], bert_name=name, mt5_name="same as bert_name", **dtype)
    if vae_file:
        add("VAELoader", ["VAE"], vae_name=vae_file)
    elif vae:
        # ComfyUI's loader opens a VAE's own file only; ours takes it out of a whole model.
        both = {"CLIP", "VAE"} if text_encoders == vae else {"VAE"}
        add("HyDiTCheckpointLoader", both, ckpt_name=list_name(vae), **dtype)
    if rest := {"MODEL", "CLIP", "VAE"} - outputs.keys():
        add("HyDiTCheckpointLoader", rest, ckpt_name=list_name(model), **dtype)
    return outputs, top


def list_name(path: Path) -> str:
    """What ComfyUI's lists call a file or folder that lies directly in one of its folders."""
    path = path.resolve()
    if path.parent == embedded.ASSETS.resolve():
        return f"[embedded] {path.stem}"
    if path.is_dir() and path.name in _INNER:
        path = path.parent
    return f"{path.name}/" if path.is_dir() else path.name


@cache
def _vae_file(path: Path) -> str | None:
    """The name of a VAE's own weights in ComfyUI's list; None if ``path`` holds more than a VAE."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        return f"{path.resolve().name}/{files[0].name}" if files else None
    return path.name if bundle(path, only=("vae",)).kind.kind == "vae" else None


def _has_alpha(path: Path) -> bool:
    with Image.open(path) as opened:
        return "A" in opened.getbands() or "transparency" in opened.info


def _start_picture(graph: Graph, path: Path, size: tuple[int, int]) -> Output:
    """Load the picture and fit it to ``size`` as :class:`~.data.images.Geometry` does; gives its pixels."""
    geometry = Geometry.cover(probe_size(path), size)
    alpha = _has_alpha(path)
    image, mask = graph.add(
        "LoadImage",
        (-1270 if alpha else -490, _BELOW),
        widgets={"image": path.name, "upload": "image"},
        title="Start picture",
    )
    if alpha:
        # Laid on white, as load_picture does.
        width, height = geometry.original
        (white,) = graph.add(
            "EmptyImage",
            (-1270, _BELOW + 550),
            widgets={"width": width, "height": height, "batch_size": 1, "color": 0xFFFFFF},
        )
        (opaque,) = graph.add("InvertMask", (-780, _BELOW), {"mask": mask})
        (image,) = graph.add(
            "ImageCompositeMasked",
            (-490, _BELOW),
            {"destination": white, "source": image, "mask": opaque},
            {"x": 0, "y": 0, "resize_source": False},
        )
    width, height = geometry.resized
    (image,) = graph.add(
        "ImageScale",
        (0, _BELOW),
        {"image": image},
        {"upscale_method": "lanczos", "width": width, "height": height, "crop": "disabled"},
    )
    if geometry.resized != size:
        # Not ImageScale's own crop: it cuts before it scales, up to half a pixel of the original off.
        (image,) = graph.add(
            "ImageCrop",
            (490, _BELOW),
            {"image": image},
            {"width": size[0], "height": size[1], "x": geometry.left, "y": geometry.top},
        )
    return image
