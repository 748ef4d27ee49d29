"""Build prompts in ComfyUI's API format."""

from __future__ import annotations

import copy
from typing import Any

Link = list  # [node id, output index]


class Node:
    """One node of a graph; `out(i)` is what other nodes take as an input."""

    def __init__(self, node_id: str) -> None:
        self.id = node_id

    def out(self, index: int = 0) -> Link:
        return [self.id, index]


class Graph:
    """Nodes in the order in which they were added, ids "1", "2", ...

    `prompt` is the API dictionary. Inputs that are given as a Node mean its output 0.
    """

    def __init__(self, prompt: dict[str, Any] | None = None) -> None:
        self.prompt: dict[str, Any] = copy.deepcopy(prompt or {})
        self.defaults: set[str] = set()

    def add(self, class_type: str, *, _defaults: bool = False, _id: str | None = None, **inputs: Any) -> Node:
        """Add a node. With `_defaults`, widgets not given take the schema's defaults when it runs."""
        node_id = _id or str(max((int(key) for key in self.prompt if key.isdigit()), default=0) + 1)
        given = {name: value.out(0) if isinstance(value, Node) else value for name, value in inputs.items()}
        self.prompt[node_id] = {"class_type": class_type, "inputs": given}
        if _defaults:
            self.defaults.add(node_id)
        return Node(node_id)

    def set(self, node: Node | str, **inputs: Any) -> Graph:
        """Change inputs of a node that is there."""
        self.prompt[node.id if isinstance(node, Node) else node]["inputs"].update(inputs)
        return self

    def copy(self) -> Graph:
        other = Graph(self.prompt)
        other.defaults = set(self.defaults)
        return other

    def filled(self, input_types: Any) -> dict[str, Any]:
        """A copy of the prompt with the defaults filled in.

        `input_types(class_type)` gives {"required": {name: (type, options)}, "optional": ...}, as both
        INPUT_TYPES() and /object_info do.
        """
        prompt = copy.deepcopy(self.prompt)
        for node_id in self.defaults:
            node = prompt[node_id]
            types = input_types(node["class_type"])
            for name, spec in {**types.get("required", {}), **types.get("optional", {})}.items():
                if name in node["inputs"]:
                    continue
                found, value = _default(spec)
                if found:
                    node["inputs"][name] = value
        return prompt


def _default(spec: Any) -> tuple[bool, Any]:
    """Whether an input is a widget with a default, and that default."""
    kind = spec[0]
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if "default" in options:
        return True, options["default"]
    choices = kind if isinstance(kind, list) else options.get("options") if kind == "COMBO" else None
    if choices:
        return True, choices[0]
    empty = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}
    return (True, empty[kind]) if isinstance(kind, str) and kind in empty else (False, None)


def text_to_image(
    prompt: str = "a red apple",
    negative: str = "",
    *,
    ckpt: str = "[embedded] hydit-icons-128",
    width: int = 128,
    height: int = 128,
    batch_size: int = 1,
    seed: int = 1,
    steps: int = 2,
    cfg: float = 6.0,
    save: bool = True,
    loader: dict[str, Any] | None = None,
    encode: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
) -> Graph:
    """Our nodes from checkpoint to picture, by default with the embedded model.

    Nodes: "1" loader, "2" and "3" positive and negative, "4" empty latent, "5" sampler, "6" VAE decode and,
    with `save`, "7" PreviewImage. The last three dictionaries override inputs of those nodes.
    """
    g = Graph()
    loaded = g.add("HyDiTCheckpointLoader", _defaults=True, ckpt_name=ckpt, **(loader or {}))
    clip = {"clip": loaded.out(1), **(encode or {})}
    positive = g.add("HyDiTTextEncode", _defaults=True, **{**clip, "text": prompt})
    other = g.add("HyDiTTextEncode", _defaults=True, **{**clip, "text": negative})
    latent = g.add("HyDiTEmptyLatent", width=width, height=height, batch_size=batch_size)
    settings = {"seed": seed, "steps": steps, "cfg": cfg, **(sampler or {})}
    sampled = g.add(
        "HyDiTKSampler", _defaults=True, model=loaded.out(0), positive=positive.out(0),
        negative=other.out(0), latent_image=latent.out(0), **settings,
    )  # fmt: skip
    image = g.add("VAEDecode", samples=sampled.out(0), vae=loaded.out(2))
    if save:
        g.add("PreviewImage", images=image.out(0))
    return g
