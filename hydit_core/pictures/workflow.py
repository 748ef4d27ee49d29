"""ComfyUI workflows as JSON: a small graph builder.

ComfyUI has two forms. The *workflow* is what its page opens: nodes with positions, sizes and widget values.
The *prompt* is what its server runs: node types, values and links. ComfyUI's own pictures carry both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..version import VERSION

PACK = {"cnr_id": "hydit", "ver": VERSION}
"""Properties of our nodes, by which the page can offer to install the pack if it is missing."""
CORE = {"cnr_id": "comfy-core", "ver": "0.3.64"}
"""The same for ComfyUI's own nodes, with the oldest version that is supported."""

_PAGE_ONLY = ("control_after_generate", "upload")
"""Widgets that the page adds and the server does not know."""
_DYNAMIC = ("text", "text_mt5")
"""Widgets whose text the page rewrites, see :func:`literal`."""


class Kind(NamedTuple):
    """What the page has to know about a node type: sockets in order as (name, type), and a size in pixels.

    The size is what the node needs in either look of the page, its picture included; smaller ones grow.
    A linked widget is also a socket.
    """

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[tuple[str, str], ...]
    size: tuple[int, int]


_PARTS = (("MODEL", "MODEL"), ("CLIP", "CLIP"), ("VAE", "VAE"))
_IMAGE = (("IMAGE", "IMAGE"),)
_LATENT = (("LATENT", "LATENT"),)
KINDS: dict[str, Kind] = {
    "HyDiTCheckpointLoader": Kind((), _PARTS, (320, 210)),
    "HyDiTDiTLoader": Kind((), _PARTS[:1], (320, 170)),
    "HyDiTTextEncoderLoader": Kind((), _PARTS[1:2], (320, 170)),
    "HyDiTTextEncode": Kind(
        (("clip", "CLIP"),), (("CONDITIONING", "CONDITIONING"), ("report", "STRING")), (320, 340)
    ),
    "HyDiTLoraLoader": Kind(
        (("model", "MODEL"), ("clip", "CLIP")), (*_PARTS[:2], ("report", "STRING")), (320, 300)
    ),
    "HyDiTControlNetLoader": Kind((), (("CONTROL_NET", "CONTROL_NET"),), (320, 185)),
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
        (320, 280),
    ),
    "HyDiTIPAdapterLoader": Kind((), (("IP_ADAPTER", "HYDIT_IP_ADAPTER"),), (320, 200)),
    "HyDiTIPAdapterApply": Kind(
        (("model", "MODEL"), ("ip_adapter", "HYDIT_IP_ADAPTER"), ("image", "IMAGE"), ("mask", "MASK")),
        (("MODEL", "MODEL"),),
        (320, 250),
    ),
    "HyDiTEmptyLatent": Kind((), _LATENT, (320, 220)),
    "HyDiTKSampler": Kind(
        (
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("negative", "CONDITIONING"),
            ("latent_image", "LATENT"),
        ),
        _LATENT,
        (320, 630),
    ),
    "HyDiTTiles": Kind((("model", "MODEL"),), (("MODEL", "MODEL"),), (320, 180)),
    "HyDiTForecast": Kind((("model", "MODEL"),), (("MODEL", "MODEL"),), (320, 150)),
    "EmptyLatentImage": Kind((), _LATENT, (320, 120)),
    "VAELoader": Kind((), _PARTS[2:], (320, 70)),
    "LoadImage": Kind((), (("IMAGE", "IMAGE"), ("MASK", "MASK")), (320, 330)),
    "LoadImageMask": Kind((), (("MASK", "MASK"),), (320, 330)),
    "MaskToImage": Kind((("mask", "MASK"),), _IMAGE, (230, 40)),
    "ImageToMask": Kind((("image", "IMAGE"),), (("MASK", "MASK"),), (320, 70)),
    "ThresholdMask": Kind((("mask", "MASK"),), (("MASK", "MASK"),), (320, 70)),
    "SetLatentNoiseMask": Kind((("samples", "LATENT"), ("mask", "MASK")), _LATENT, (230, 60)),
    "InvertMask": Kind((("mask", "MASK"),), (("MASK", "MASK"),), (230, 40)),
    "EmptyImage": Kind((), _IMAGE, (320, 160)),
    "ImageCompositeMasked": Kind(
        (("destination", "IMAGE"), ("source", "IMAGE"), ("mask", "MASK")), _IMAGE, (320, 170)
    ),
    "ImageScale": Kind((("image", "IMAGE"),), _IMAGE, (320, 150)),
    "ImageCrop": Kind((("image", "IMAGE"),), _IMAGE, (320, 150)),
    "VAEEncode": Kind((("pixels", "IMAGE"), ("vae", "VAE")), _LATENT, (230, 60)),
    "VAEDecode": Kind((("samples", "LATENT"), ("vae", "VAE")), _IMAGE, (230, 60)),
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
    """Nodes that are added one after the other, each linked to earlier ones."""

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
        """Add a node; returns its outputs.

        Args:
            type: a key of ``kinds``.
            at: upper left corner on the page.
            links: outputs of earlier nodes, by input name.
            widgets: values in the page's order, its own (``control_after_generate``) included.
            size: instead of the type's usual size.
            title: instead of the type's display name.
            properties: more of the node's ``properties``.
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
    r"""What to write into a prompt widget for the page to send exactly ``text``.

    The page removes C comments from prompts and picks one of ``{a|b}``; ``\`` escapes ``{``, ``}`` and ``|``.
    """

    def protect(match: re.Match[str]) -> str:
        slashes, special = match.groups()
        odd = len(slashes) % 2
        if not special:  # the page would append a word to an odd backslash at the end
            return slashes + " " * odd
        # Backslashes are read in pairs: the odd one gets a partner, `special` becomes a choice of its own.
        return f"{slashes}\\{{\\{special}}}" if odd else f"{slashes}\\{special}"

    protected = re.sub(r"(\\*)([{}|]|\Z)", protect, text)
    return re.sub(r"/(?=[/*])", "/{}", protected)  # a choice between nothing
