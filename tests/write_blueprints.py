"""Blueprints, which are ready-made subgraphs in the page's node library: described here once, written to
`subgraphs/*.json`.

    python tests/write_blueprints.py

ComfyUI takes a blueprint's name from its file's name, and has no translations for it, so the names are in two
languages. Category, description (which is its help page, too) and words to search for are in the file; for
packs' blueprints the pages up to 1.58.1 drop those words, and search in the names alone.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lay_out_workflows import Box, Sheet, column, group, row, set_places, shut, stages

from hydit_core.pictures.workflow import KINDS, Graph, Kind, Output

FOLDER = Path(__file__).resolve().parent.parent / "subgraphs"
NAMESPACE = uuid.UUID("8e7a3c02-6f0a-4f36-9d35-1b0b5d3b1c5e")
"""Identities are computed from names: the same description gives the same file."""
INTO, OUT_OF = -10, -20
"""What the page calls the two edges of a subgraph."""
SLOT = 20
"""Height of a slot there."""

IMAGE = ("IMAGE", "IMAGE")
MASK = ("MASK", "MASK")
MORE = KINDS | {
    "Canny": Kind((("image", "IMAGE"),), (IMAGE,), (210, 90)),
    "ImageToMask": Kind((("image", "IMAGE"),), (MASK,), (210, 60)),
    "MaskToImage": Kind((("mask", "MASK"),), (IMAGE,), (140, 34)),
    "SetLatentNoiseMask": Kind((("samples", "LATENT"), ("mask", "MASK")), (("LATENT", "LATENT"),), (188, 54)),
}


class Slot(NamedTuple):
    """An input of a blueprint, as its users see it.

    A widget's type is that of its socket: INT, FLOAT, STRING, COMBO. `targets` are numbers of nodes and names
    of their inputs or widgets.
    """

    name: str
    label: str
    type: str
    targets: tuple[tuple[int, str], ...]


@dataclass
class Blueprint:
    """One task: `graph` is what is inside, `layout` where it stands there, `output` its picture."""

    name: str
    description: str
    aliases: tuple[str, ...]
    graph: Graph = field(default_factory=lambda: Graph(MORE))
    slots: list[Slot] = field(default_factory=list)
    layout: Box | None = None
    output: Output | None = None

    def add(self, type: str, title: str | None = None, /, **values: Any) -> list[Output]:
        """Add a node: outputs among the values are links, what else there is are widgets, in order."""
        links = {name: value for name, value in values.items() if isinstance(value, Output)}
        widgets = {name: value for name, value in values.items() if name not in links}
        return self.graph.add(type, (0, 0), links, widgets, title=title)

    def ask(self, name: str, label: str, type: str, *targets: tuple[list[Output], str]) -> None:
        """Make an input of the whole of one or more inputs or widgets of nodes."""
        numbers = tuple((outputs[0].node, of) for outputs, of in targets)
        self.slots.append(Slot(name, label, type, numbers))


# -- the five tasks ------------------------------------------------------------------------------------------

MODEL, WORDS, PICTURE = "Model · 模型", "Words · 提示词", "Picture · 图片"
START, SAMPLING = "Starting point · 起点", "Sampling · 采样"
EMBEDDED = "[embedded] hydit-icons-128"
SIDE = 128

BEGIN = (
    "It runs as it is, with the small model that comes with these nodes and draws icons of 128 × 128 pixels. "
    "For larger pictures choose a HunyuanDiT checkpoint and a size it was trained for, such as 1024 × 1024. "
    "With steps 0 and cfg 0, the model's recommendations are used."
)
BEGIN_ZH = (
    "添加后即可运行：默认使用插件自带的小模型，画 128 × 128 的图标。"
    "要画大图，请换成混元DiT 的 checkpoint，并选用它训练过的尺寸，例如 1024 × 1024。"
    "步数和 cfg 填 0，就采用模型推荐的值。"
)


def described(english: str, chinese: str) -> str:
    """A help page in both languages."""
    return f"{english} {BEGIN}\n\n{chinese}{BEGIN_ZH}"


class Ends(NamedTuple):
    """What every task begins with."""

    loader: list[Output]
    positive: list[Output]
    negative: list[Output]


def begin(blueprint: Blueprint, prompt: str, clip: Output | None = None) -> Ends:
    """The loader and both prompts; with another `clip`, that of a LoRA, the loader is there already."""
    loader = [Output(1, slot) for slot in range(3)]
    if clip is None:
        loader = blueprint.add(
            "HyDiTCheckpointLoader", ckpt_name=EMBEDDED, weight_dtype="default", load_key="auto"
        )
        clip = loader[1]
    words = {"text_mt5": "", "mode": "exact", "width": 0, "height": 0}
    positive = blueprint.add("HyDiTTextEncode", "Prompt · 提示词", clip=clip, text=prompt, **words)
    negative = blueprint.add("HyDiTTextEncode", "Negative prompt · 负面提示词", clip=clip, text="", **words)
    blueprint.ask("prompt", "prompt · 提示词", "STRING", (positive, "text"))
    blueprint.ask("negative_prompt", "negative prompt · 负面", "STRING", (negative, "text"))
    blueprint.ask("ckpt_name", "model · 模型", "COMBO", (loader, "ckpt_name"))
    return Ends(loader, positive, negative)


def sample(
    blueprint: Blueprint, model: Output, words: Iterable[Output], latent: Output, **more: Any
) -> Output:
    """Sampler and decoder; asks for what is usually changed."""
    positive, negative = words
    denoise = more.get("denoise", 1.0)
    sampler = blueprint.add(
        "HyDiTKSampler",
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latent,
        seed=1,
        control_after_generate="randomize",
        preset="model's own",
        sampler="preset's",
        spacing="preset's",
        steps=0,
        cfg=0.0,
        guidance_rescale=-1.0,
        denoise=denoise,
        cfg_end=1.0,
    )
    blueprint.ask("seed", "seed · 种子", "INT", (sampler, "seed"))
    blueprint.ask("steps", "steps · 步数", "INT", (sampler, "steps"))
    blueprint.ask("cfg", "cfg", "FLOAT", (sampler, "cfg"))
    if "denoise" in more:
        blueprint.ask("denoise", "denoise · 降噪", "FLOAT", (sampler, "denoise"))
    return blueprint.add("VAEDecode", samples=sampler[0], vae=Output(1, 2))[0]


def ask_size(blueprint: Blueprint, *nodes: list[Output]) -> None:
    for name, label in (("width", "width · 宽"), ("height", "height · 高")):
        blueprint.ask(name, label, "INT", *((outputs, name) for outputs in nodes))


def empty(blueprint: Blueprint) -> list[Output]:
    return blueprint.add("HyDiTEmptyLatent", width=SIDE, height=SIDE, batch_size=1)


def scaled(blueprint: Blueprint, **image: Output) -> list[Output]:
    """A picture in the size that is asked for; what is too much at its edges is cut off."""
    return blueprint.add(
        "ImageScale", **image, upscale_method="lanczos", width=SIDE, height=SIDE, crop="center"
    )


def text_to_image() -> Blueprint:
    blueprint = Blueprint(
        "Text to Image (HunyuanDiT) · 文生图",
        described("Draws a picture from a prompt in Chinese or English.", "按中文或英文提示词画一张图。"),
        ("text to image", "txt2img", "hunyuan", "hydit", "混元", "文生图"),
    )
    loader, positive, negative = begin(blueprint, "three blue stars")
    latent = empty(blueprint)
    ask_size(blueprint, latent)
    blueprint.output = sample(blueprint, loader[0], (positive[0], negative[0]), latent[0])
    blueprint.layout = stages(
        group(MODEL, column(1, 4)), group(WORDS, column(2, 3)), group(SAMPLING, column(5, shut(6)))
    )
    return blueprint


def image_to_image() -> Blueprint:
    blueprint = Blueprint(
        "Image to Image (HunyuanDiT) · 图生图",
        described(
            "Redraws a picture as the prompt says: the lower denoise is, the more of it stays.",
            "按提示词重画一张图：降噪（denoise）越低，保留的原图越多。",
        ),
        ("image to image", "img2img", "hunyuan", "hydit", "混元", "图生图"),
    )
    loader, positive, negative = begin(blueprint, "a red apple")
    image = scaled(blueprint)
    latent = blueprint.add("VAEEncode", pixels=image[0], vae=loader[2])
    blueprint.ask("image", "image · 图片", "IMAGE", (image, "image"))
    ask_size(blueprint, image)
    blueprint.output = sample(blueprint, loader[0], (positive[0], negative[0]), latent[0], denoise=0.6)
    blueprint.layout = stages(
        group(MODEL, column(1)),
        group(WORDS, column(2, 3)),
        group(START, column(4, shut(5))),
        group(SAMPLING, column(6, shut(7))),
    )
    return blueprint


def inpaint() -> Blueprint:
    blueprint = Blueprint(
        "Inpaint (HunyuanDiT) · 局部重绘",
        described(
            "Redraws what the mask covers; every other pixel stays as it was.",
            "只重绘遮罩盖住的部分，其余像素不变。",
        ),
        ("inpaint", "mask", "hunyuan", "hydit", "混元", "局部重绘", "局部重绘"),
    )
    loader, positive, negative = begin(blueprint, "a blue butterfly")
    image = scaled(blueprint)
    shown = blueprint.add("MaskToImage")
    large = scaled(blueprint, image=shown[0])
    mask = blueprint.add("ImageToMask", image=large[0], channel="red")
    encoded = blueprint.add("VAEEncode", pixels=image[0], vae=loader[2])
    latent = blueprint.add("SetLatentNoiseMask", samples=encoded[0], mask=mask[0])
    blueprint.ask("image", "image · 图片", "IMAGE", (image, "image"))
    blueprint.ask("mask", "mask · 遮罩", "MASK", (shown, "mask"))
    ask_size(blueprint, image, large)
    drawn = sample(blueprint, loader[0], (positive[0], negative[0]), latent[0], denoise=1.0)
    (blueprint.output,) = blueprint.add(
        "ImageCompositeMasked", destination=image[0], source=drawn, mask=mask[0], x=0, y=0,
        resize_source=False,
    )  # fmt: skip
    blueprint.layout = stages(
        group(MODEL, column(1)),
        group(WORDS, column(2, 3)),
        group(START, row(column(4, shut(8), shut(9)), column(shut(5), 6, 7))),
        group(SAMPLING, column(10, shut(11))),
        group(PICTURE, column(12)),
    )
    return blueprint


def controlnet() -> Blueprint:
    blueprint = Blueprint(
        "ControlNet Canny (HunyuanDiT) · 按边缘生成",
        described(
            "Draws a new picture along the edges of another one. The ControlNet must belong to the model.",
            "沿着一张图的边缘画出新的图。ControlNet 必须与模型配套。",
        ),
        ("controlnet", "canny", "edges", "hunyuan", "hydit", "混元", "边缘", "控制"),
    )
    loader, positive, negative = begin(blueprint, "a red star")
    control = blueprint.add(
        "HyDiTControlNetLoader", control_net_name=f"{EMBEDDED}-canny", weight_dtype="default", load_key="auto"
    )
    image = scaled(blueprint)
    edges = blueprint.add("Canny", image=image[0], low_threshold=0.2, high_threshold=0.4)
    steered = blueprint.add(
        "HyDiTControlNetApply",
        positive=positive[0],
        negative=negative[0],
        control_net=control[0],
        image=edges[0],
        vae=loader[2],
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
        layer_weights="uniform(1)",
    )
    latent = empty(blueprint)
    blueprint.ask("image", "image · 图片", "IMAGE", (image, "image"))
    blueprint.ask("control_net_name", "ControlNet", "COMBO", (control, "control_net_name"))
    blueprint.ask("strength", "strength · 强度", "FLOAT", (steered, "strength"))
    ask_size(blueprint, image, latent)
    blueprint.output = sample(blueprint, loader[0], steered, latent[0])
    blueprint.layout = stages(
        group(MODEL, column(1, 4, 8)),
        group(WORDS, column(2, 3)),
        group("Edges · 边缘", column(5, 6, 7)),
        group(SAMPLING, column(9, shut(10))),
    )
    return blueprint


def lora() -> Blueprint:
    blueprint = Blueprint(
        "LoRA (HunyuanDiT) · 使用 LoRA",
        described(
            "Draws a picture from a prompt with a LoRA, which must belong to the model.",
            "用 LoRA 按提示词画一张图。LoRA 必须与模型配套。",
        ),
        ("lora", "style", "text to image", "hunyuan", "hydit", "混元", "风格"),
    )
    loader = blueprint.add(
        "HyDiTCheckpointLoader", ckpt_name=EMBEDDED, weight_dtype="default", load_key="auto"
    )
    adapted = blueprint.add(
        "HyDiTLoraLoader",
        model=loader[0],
        clip=loader[1],
        lora_name=f"{EMBEDDED}-delft",
        strength_model=1.0,
        strength_clip=1.0,
        block_weights="uniform(1)",
        partial=False,
    )
    _, positive, negative = begin(blueprint, "a sailboat", clip=adapted[1])
    blueprint.ask("lora_name", "LoRA", "COMBO", (adapted, "lora_name"))
    blueprint.ask("strength", "strength · 强度", "FLOAT", (adapted, "strength_model"))
    latent = empty(blueprint)
    ask_size(blueprint, latent)
    blueprint.output = sample(blueprint, adapted[0], (positive[0], negative[0]), latent[0])
    blueprint.layout = stages(
        group(MODEL, column(1, 2, 5)), group(WORDS, column(3, 4)), group(SAMPLING, column(6, shut(7)))
    )
    return blueprint


BLUEPRINTS = (text_to_image, image_to_image, inpaint, controlnet, lora)


# -- as the page reads it ------------------------------------------------------------------------------------


def identity(*names: str) -> str:
    return str(uuid.uuid5(NAMESPACE, "/".join(names)))


def inside(blueprint: Blueprint) -> dict[str, Any]:
    """The subgraph's definition: the graph, with links from and to its edges."""
    assert blueprint.layout and blueprint.output
    workflow = blueprint.graph.workflow()
    set_places(blueprint.layout, workflow)
    nodes = {shown["id"]: shown for shown in workflow["nodes"]}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(keys, link, strict=True)) for link in workflow["links"]]

    def link(origin: int, origin_slot: int, target: int, target_slot: int, type: str) -> int:
        links.append(
            dict(zip(keys, (len(links) + 1, origin, origin_slot, target, target_slot, type), strict=True))
        )
        return len(links)

    into = []
    for slot, asked in enumerate(blueprint.slots):
        numbers = []
        for number, name in asked.targets:
            target = _socket(nodes[number], name, asked.type, blueprint.graph)
            numbers.append(link(INTO, slot, number, target, asked.type))
            nodes[number]["inputs"][target]["link"] = numbers[-1]
        into.append(_edge(blueprint, asked.name, asked.type, numbers, label=asked.label))
    drawn, slot = blueprint.output
    number = link(drawn, slot, OUT_OF, 0, "IMAGE")
    source = nodes[drawn]["outputs"][slot]
    source["links"] = [*(source["links"] or []), number]
    out_of = [_edge(blueprint, "IMAGE", "IMAGE", [number])]

    width = blueprint.layout.size(Sheet(workflow))[0]
    return {
        "id": identity(blueprint.name),
        "version": 1,
        "state": {
            "lastGroupId": len(workflow["groups"]),
            "lastNodeId": len(nodes) + 1,
            "lastLinkId": len(links),
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "description": blueprint.description,
        "category": "HunyuanDiT",
        "inputNode": {"id": INTO, "bounding": [-260, 0, 200, SLOT * (len(into) + 2)]},
        "outputNode": {"id": OUT_OF, "bounding": [width + 60, 0, 120, SLOT * 3]},
        "inputs": list(_placed(into, -80)),
        "outputs": list(_placed(out_of, width + 80)),
        "widgets": [],
        "nodes": workflow["nodes"],
        "groups": workflow["groups"],
        "links": links,
        "extra": {},
    }


def _socket(shown: dict[str, Any], name: str, type: str, graph: Graph) -> int:
    """The number of a node's input; a widget's is added behind the others."""
    for slot, socket in enumerate(shown["inputs"]):
        if socket["name"] == name:
            assert (socket["type"], socket["link"]) == (type, None), (shown["type"], name)
            return slot
    assert name in graph.nodes[shown["id"] - 1].widgets, (shown["type"], name)
    shown["inputs"].append({"name": name, "type": type, "widget": {"name": name}, "link": None})
    return len(shown["inputs"]) - 1


def _edge(blueprint: Blueprint, name: str, type: str, links: list[int], **more: str) -> dict[str, Any]:
    return {"id": identity(blueprint.name, type, name), "name": name, "type": type, "linkIds": links, **more}


def _placed(slots: list[dict[str, Any]], x: float) -> Iterator[dict[str, Any]]:
    for number, slot in enumerate(slots):
        yield {**slot, "pos": [x, SLOT * (number + 1)]}


def written(blueprint: Blueprint) -> dict[str, Any]:
    """A workflow of one node, which is the subgraph: how blueprints are kept."""
    definition = inside(blueprint)
    widgets = [slot for slot in blueprint.slots if not _is_link(slot)]
    sampler = next(shown["id"] for shown in definition["nodes"] if shown["type"] == "HyDiTKSampler")
    shown = {
        "id": len(definition["nodes"]) + 1,
        "type": definition["id"],
        "title": blueprint.name,
        "pos": [0, 0],
        "size": [400, 40 + 26 * len(blueprint.slots) + 130],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [
            {
                "name": slot.name,
                "label": slot.label,
                "type": slot.type,
                **({} if _is_link(slot) else {"widget": {"name": slot.name}}),
                "link": None,
            }
            for slot in blueprint.slots
        ],
        "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": []}],
        "properties": {
            # As the page knows its widgets: by a node inside and the name there.
            "proxyWidgets": [
                *([str(slot.targets[0][0]), slot.targets[0][1]] for slot in widgets),
                [str(sampler), "control_after_generate"],
            ]
        },
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": shown["id"],
        "last_link_id": 0,
        "nodes": [shown],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintSearchAliases": list(blueprint.aliases)},
    }


def _is_link(slot: Slot) -> bool:
    return slot.type in ("IMAGE", "MASK")


def text(blueprint: Blueprint) -> str:
    return json.dumps(written(blueprint), indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    made = {
        FOLDER / f"{blueprint.name}.json": text(blueprint) for blueprint in (make() for make in BLUEPRINTS)
    }
    for old in set(FOLDER.glob("*.json")) - made.keys():
        old.unlink()
    for path, content in made.items():
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
