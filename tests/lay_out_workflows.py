"""The positions of the shipped workflows' nodes: described here once, written into `workflows/*.json`.
It also writes this version of hydit there.

    python tests/lay_out_workflows.py            writes places, sizes and groups of all workflows
    python tests/lay_out_workflows.py NAME ...   of these only

ComfyUI's template browser fits a workflow into three quarters of the window, and the page draws no text
when that makes it smaller than about 0.58. So a workflow must be compact, and as wide as a window in shape:
`ROOM` says what is allowed. Steps that nobody changes are collapsed to their titles.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from registry import version

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "workflows"
VERSION = version((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

TITLE = 30
"""Height of a node's title, which stands above its position."""
GAP = 14
"""Between nodes of a column, and from a group's frame to what is in it."""
SIDE = 22
"""Between columns of a group: links need it."""
HEADER = 40
"""Of a group, for its title."""
ROOM = {"hydit_text_to_image_embedded": (1620, 960)}
"""Width and height of all nodes that make a scale of 0.7 on the smallest of the tested pages."""
ROOM_OTHERS = (1895, 1128)
"""The same for 0.6."""

SIZES = {
    "CFGGuider": (210, 102), "Canny": (210, 90), "ConditioningCombine": (217, 54),
    "ConditioningSetMask": (210, 110), "EmptyImage": (210, 138), "HyDiTCheckpointLoader": (251, 202),
    "HyDiTControlNetApply": (239, 278), "HyDiTControlNetLoader": (247, 178), "HyDiTDiTLoader": (210, 162),
    "HyDiTDatasetCheck": (260, 500), "HyDiTEmptyLatent": (213, 224), "HyDiTForecast": (210, 180),
    "HyDiTIPAdapterApply": (239, 230), "HyDiTIPAdapterLoader": (251, 168), "HyDiTKSampler": (210, 622),
    "HyDiTLayerWeights": (219, 302),
    "HyDiTLoraLoader": (211, 296), "HyDiTLoraMerge": (210, 292), "HyDiTLoraSave": (210, 208),
    "HyDiTSampler": (210, 114), "HyDiTScheduler": (210, 142), "HyDiTTextEncode": (210, 372),
    "HyDiTTextEncoderLoader": (263, 162), "HyDiTTiles": (210, 174), "HyDiTTrainLoRA": (260, 600),
    "ImageCompositeMasked": (212, 158), "ImageScale": (210, 146),
    "ImageScaleBy": (210, 90), "ImageStitch": (210, 150), "ImageToMask": (210, 62), "InvertMask": (140, 34),
    "LoadImage": (223, 322), "MarkdownNote": (210, 88), "MaskComposite": (210, 138),
    "MaskToImage": (140, 34), "PreviewImage": (140, 256),
    "PrimitiveInt": (210, 84), "RandomNoise": (210, 84), "SamplerCustomAdvanced": (212, 334),
    "SaveImage": (210, 300), "SetLatentNoiseMask": (188, 54), "SolidMask": (210, 118),
    "VAEDecode": (140, 54), "VAEEncode": (140, 54), "VAELoader": (210, 62),
}  # fmt: skip
"""Width and height that a node needs below its title in either look of the page, with its picture: a smaller
one grows over its neighbours. Muted nodes may be less high."""


COLLAPSED = 226
"""Width of a collapsed node in Nodes 2.0."""


class Placed(NamedTuple):
    """Where a node stands."""

    left: float
    top: float
    width: float
    height: float
    collapsed: bool


class Sheet:
    """One workflow while it is laid out."""

    def __init__(self, workflow: dict[str, Any]) -> None:
        self.types = {node["id"]: node["type"] for node in workflow["nodes"]}
        self.muted = {node["id"] for node in workflow["nodes"] if node["mode"]}
        self.placed: dict[int, Placed] = {}
        self.groups: list[tuple[str, tuple[float, float, float, float]]] = []


class Box(NamedTuple):
    """Something with a size that can be put somewhere; `put` gets a sheet, left, top, width."""

    size: Callable[[Sheet], tuple[float, float]]
    put: Callable[[Sheet, float, float, float], None]


def node(number: int, width: float = 300, height: float = 0, *, collapsed: bool = False) -> Box:
    """A node; a collapsed one takes the place of its title."""

    def full(sheet: Sheet) -> float:
        # Nodes 2.0 fits collapsed nodes in as if they were open; any page gives them what they need.
        return TITLE if collapsed else height or SIZES[sheet.types[number]][1]

    def size(sheet: Sheet) -> tuple[float, float]:
        return width, TITLE + (0 if collapsed else full(sheet))

    def put(sheet: Sheet, left: float, top: float, wide: float) -> None:
        least = SIZES[sheet.types[number]]
        if collapsed:
            least = (COLLAPSED, 0)
        enough = wide >= least[0] and (full(sheet) >= least[1] or number in sheet.muted)
        assert enough, f"node {number} needs {least}, has {(wide, full(sheet))}"
        sheet.placed[number] = Placed(left, top + TITLE, wide, full(sheet), collapsed)

    return Box(size, put)


def shut(number: int, width: float = COLLAPSED) -> Box:
    """A collapsed node: `width` must hold its title."""
    return node(number, width, collapsed=True)


def column(*parts: Box | int, width: float = 0, gap: float = GAP) -> Box:
    """One below the other, all as wide as the widest or as `width`."""
    boxes = [part if isinstance(part, Box) else node(part, width or 300) for part in parts]

    def size(sheet: Sheet) -> tuple[float, float]:
        sizes = [box.size(sheet) for box in boxes]
        return width or max(w for w, _ in sizes), sum(h for _, h in sizes) + gap * (len(boxes) - 1)

    def put(sheet: Sheet, left: float, top: float, wide: float) -> None:
        for box in boxes:
            box.put(sheet, left, top, wide)
            top += box.size(sheet)[1] + gap

    return Box(size, put)


def row(*boxes: Box, gap: float = SIDE) -> Box:
    """Side by side; what is too wide is given to the last."""

    def size(sheet: Sheet) -> tuple[float, float]:
        sizes = [box.size(sheet) for box in boxes]
        return sum(w for w, _ in sizes) + gap * (len(boxes) - 1), max(h for _, h in sizes)

    def put(sheet: Sheet, left: float, top: float, wide: float) -> None:
        spare = wide - size(sheet)[0]
        for box in boxes:
            width = box.size(sheet)[0] + (spare if box is boxes[-1] else 0)
            box.put(sheet, left, top, width)
            left += width + gap

    return Box(size, put)


def group(title: str, box: Box) -> Box:
    """A frame with a title around `box`."""

    def size(sheet: Sheet) -> tuple[float, float]:
        width, height = box.size(sheet)
        return width + 2 * GAP, height + HEADER + GAP

    def put(sheet: Sheet, left: float, top: float, wide: float) -> None:
        sheet.groups.append((title, (left, top, wide, size(sheet)[1])))
        box.put(sheet, left + GAP, top + HEADER, wide - 2 * GAP)

    return Box(size, put)


def stages(*boxes: Box) -> Box:
    """Groups side by side."""
    return row(*boxes, gap=GAP)


def first(*below: Box, width: float = 300, note: float = 160) -> Box:
    """The two notes above what a graph starts from."""
    return column(node(1, width, note), node(2, width, note), *below)


def drawn(*boxes: Box) -> Box:
    return group("Picture · 图片", column(*boxes))


MODEL, WORDS, SAMPLING = "Model · 模型", "Words · 提示词", "Sampling · 采样"
FIRST, EDGES, FOLLOW = "First picture · 第一张图", "Edges · 边缘", "Follow them · 照着画"


LAYOUTS: dict[str, Box] = {
    "hydit_text_to_image_embedded": stages(
        first(group(MODEL, column(3, 4)), width=328, note=165),
        group(WORDS, column(5, 6, width=320)),
        group(SAMPLING, column(node(7, 300, 622), shut(8), node(10, 300))),
        drawn(node(11, 450, 500), node(9, 450)),
    ),
    "hydit_text_to_image_v1.2": stages(
        first(group(MODEL, column(3, 4)), width=328, note=180),
        group(WORDS, column(5, 6, width=320)),
        group(SAMPLING, column(node(7, 310, 622), shut(8))),
        drawn(node(9, 560, 720)),
    ),
    "hydit_split_files": stages(
        column(node(1, 328, 200), group(MODEL, column(3, 4, 5, 6))),
        column(node(2, 348, 200), group(WORDS, column(7, 8, width=320))),
        group(SAMPLING, column(node(9, 310, 622), shut(10))),
        drawn(node(11, 600, 760)),
    ),
    "hydit_fast": stages(
        first(group(MODEL, column(3, 4, 5, width=290)), width=318, note=150),
        group(WORDS, column(6, 7, width=290)),
        group("With forecasts · 使用预测", column(node(8, 290), node(9, 290), shut(10, 290))),
        group("Every call · 全部调用", column(shut(12, 290), shut(13, 290), node(14, 290))),
        drawn(node(15, 440), node(16, 440, 480), node(11, 440)),
    ),
    "hydit_turbo": stages(
        first(group(MODEL, column(3, 4, 5, width=290)), width=318, note=160),
        group(WORDS, column(6, 7, width=290)),
        group("With the LoRA · 加上 LoRA", column(node(8, 330), node(9, 330), shut(10, 330))),
        group("Without · 不加", column(shut(12, 290), shut(13, 290), node(14, 290))),
        drawn(node(15, 400), node(16, 400, 480), node(11, 400)),
    ),
    "hydit_custom_sampling": stages(
        first(group(MODEL, column(3, 4, width=290)), width=318, note=150),
        group(WORDS, column(node(5, 290), node(6, 290))),
        group("Parts · 部件", column(7, 8, 9, 10, width=270)),
        group(SAMPLING, column(node(11, 280, 440), shut(12), node(14, 280))),
        drawn(node(15, 470, 520), node(13, 470)),
    ),
    "hydit_image_to_image": stages(
        first(group(MODEL, column(3, 4, width=290)), width=318, note=150),
        group(WORDS, column(5, 6, shut(7), width=290)),
        column(
            group(FIRST, column(shut(8, 280), shut(9, 280), node(10, 280, 280))),
            group("Its latent · 转为 Latent", column(node(11, 280), shut(12, 280))),
        ),
        group(SAMPLING, column(node(13, 290), shut(14), node(16, 290))),
        drawn(node(17, 480, 520), node(15, 480)),
    ),
    "hydit_inpaint": stages(
        first(group(MODEL, column(3, 4, width=290)), width=318, note=150),
        group(WORDS, column(5, 6, shut(7), width=290)),
        column(
            group(FIRST, column(shut(8, 270), shut(9, 270), node(10, 270))),
            group("Mask · 遮罩", column(11, 12, 13, width=270)),
        ),
        group(SAMPLING, column(shut(14, 290), shut(15, 290), node(16, 290), shut(17, 290))),
        drawn(node(18, 480), node(20, 480), node(21, 480, 370), node(19, 480)),
    ),
    "hydit_inpaint_controlnet": stages(
        first(group(MODEL, column(3, 4, width=290)), width=318, note=190),
        group(WORDS, column(5, 6, shut(7), width=270)),
        column(
            group(FIRST, column(shut(8, 250), shut(9, 250), node(10, 250))),
            group("Mask · 遮罩", column(11, 12, 13, width=250)),
        ),
        group(FOLLOW, column(shut(16, 260), node(17, 260), node(18, 260), node(19, 260))),
        group(SAMPLING, column(shut(14, 260), shut(15, 260), node(20, 260), shut(21, 260))),
        drawn(node(22, 330), node(23, 330, 480)),
    ),
    "hydit_tile_upscale": stages(
        first(group(MODEL, column(3, 4, width=290)), width=318, note=190),
        group(WORDS, column(5, 6, width=270)),
        column(
            group(FIRST, column(shut(7, 260), shut(8, 260), node(9, 260))),
            group("Larger · 放大", column(node(10, 260), shut(11, 260), shut(12, 260), shut(13, 260))),
        ),
        column(group(FOLLOW, column(14, 15, width=260)), group("Tiles · 分块", node(16, 260))),
        group(SAMPLING, column(node(17, 260))),
        drawn(shut(18, 330), node(19, 330, 480)),
    ),
    "hydit_controlnet_canny_embedded": stages(
        first(group(MODEL, column(3, 4, 5, width=290)), width=318, note=136),
        group(WORDS, column(6, 7, shut(8), width=290)),
        column(
            group(FIRST, column(shut(9, 280), shut(10, 280), node(11, 280, 280))),
            group(EDGES, column(node(12, 280), node(13, 280, 280))),
        ),
        group(FOLLOW, column(node(14, 290), node(15, 290), shut(16, 290))),
        drawn(node(18, 480), node(19, 480, 500), node(17, 480)),
    ),
    "hydit_controlnet_image_to_image": stages(
        first(group(MODEL, column(3, 4, 5, width=290)), width=318, note=136),
        group(WORDS, column(6, 7, shut(8), width=290)),
        column(
            group(FIRST, column(shut(9, 280), shut(10, 280), node(11, 280), node(12, 280))),
            group(EDGES, column(node(14, 280), node(15, 280))),
        ),
        group(FOLLOW, column(shut(13, 290), node(16, 290), node(17, 290), shut(18, 290))),
        drawn(node(20, 480), node(21, 480, 500), node(19, 480)),
    ),
    "hydit_controlnet_layer_weights": stages(
        first(group(MODEL, column(3, 4, 5, width=270)), width=298, note=130),
        group(WORDS, column(7, 8, shut(9), width=270)),
        column(
            group(FIRST, column(shut(10), shut(11), node(12), width=226)),
            group(EDGES, column(13, 14, width=226)),
            group("Seed of all four · 共用种子", node(6, 226)),
        ),
        column(
            *(
                stages(
                    *(
                        group(title, row(
                            node(n, 232),
                            column(shut(n + 1), shut(n + 2), shut(n + 3), shut(n + 4), width=226),
                            gap=GAP,
                        ))
                        for n, title in pair
                    )
                )
                for pair in (
                    ((15, "Uniform · 各层相同"), (20, "Decay · 递增")),
                    ((25, "Only early · 只用前半"), (30, "Only late · 只用后半")),
                )
            ),
            group("Side by side · 并排", row(
                column(shut(35), shut(36), shut(37), shut(39), shut(38), width=226),
                node(40, 738, 257),
            )),
        ),
    ),
    "hydit_controlnet_v1.2": stages(
        first(group(MODEL, column(3, 4, width=262)), width=290, note=170),
        group(WORDS, column(5, 6, width=262)),
        column(
            group("Canny · 边缘", row(
                column(7, node(8, height=400), width=250), column(9, 10, node(11, height=290), width=215),
                node(12, 240), node(13, 240), column(shut(14), node(15, 240, 516)),
                gap=GAP,
            )),
            stages(*(
                group(title, row(
                    column(node(n), node(n + 1, height=115), width=330),
                    column(shut(n + 2), shut(n + 3), shut(n + 4), shut(n + 5), width=236),
                ))
                for n, title in ((16, "Depth · 深度"), (22, "Pose · 姿态"))
            )),
        ),
    ),
    "hydit_image_prompt": stages(
        first(group(MODEL, column(3, 4, shut(5, 290), width=290)), width=318, note=190),
        group(WORDS, column(6, 7, shut(8), width=290)),
        column(
            group(FIRST, column(shut(9, 280), shut(10, 280), node(11, 280, 280))),
            group("Picture prompt · 图像提示", column(node(12, 280))),
        ),
        group(SAMPLING, column(node(13, 290), shut(14, 290))),
        drawn(node(16, 480), node(17, 480, 500), node(15, 480)),
    ),
    "hydit_image_prompt_v1.2": stages(
        first(group(MODEL, column(3, 4, width=300)), width=328, note=200),
        group("Picture prompt · 图像提示", column(5, node(6, height=340), 9, width=300)),
        group(WORDS, column(7, 8, width=310)),
        group(SAMPLING, column(node(10, 310, 622), shut(11))),
        drawn(node(12, 490, 720)),
    ),
    "hydit_two_controlnets": stages(
        first(group(MODEL, column(3, 4, 5, width=280)), width=308, note=136),
        column(
            group(WORDS, column(8, shut(9), width=270)),
            group("Halves · 左右两半", column(shut(20), shut(21), node(22), shut(23), width=270)),
        ),
        column(
            *(
                group(title, row(
                    node(words, 250),
                    column(
                        shut(sampler), shut(sampler + 1), shut(sampler + 2), shut(edges), node(edges + 1),
                        width=240,
                    ),
                    gap=GAP,
                ))
                for title, words, sampler, edges in (
                    ("Left outline · 左边的轮廓", 6, 10, 16), ("Right outline · 右边的轮廓", 7, 13, 18)
                )
            ),
        ),
        column(group(FOLLOW, column(24, 25, width=260)), group("File · 文件", node(28, 260))),
        drawn(node(26, 330), shut(27), shut(29), node(30, 330, 302)),
    ),
    "hydit_two_prompts": stages(
        first(group(MODEL, column(3, 4, width=270)), width=298, note=150),
        group("Two halves · 左右两半", column(10, 11, width=250)),
        column(
            group("Two encoders · 两个编码器", column(5, shut(6), width=250)),
            group("Masks · 遮罩", column(shut(12), shut(13), node(14), shut(15), 16, 17, width=250, gap=7)),
        ),
        group("Two encoders · 两个编码器", column(node(7), shut(8), node(9), width=240)),
        group("Two halves · 左右两半", column(shut(18), node(19), shut(20), node(21), width=240)),
        drawn(shut(22, 390), node(23, 390, 420), shut(24), node(25, 390, 420)),
    ),
    "hydit_lora_strengths": stages(
        first(group(MODEL, column(3, 4, 5, width=280)), width=308, note=150),
        group(WORDS, column(6, 7, width=280)),
        column(
            *(
                stages(
                    *(
                        group(f"Strength · 强度 {strength}", row(
                            node(n, 330), column(shut(n + 1), shut(n + 2), shut(n + 3), width=226)
                        ))
                        for n, strength in pair
                    )
                )
                for pair in (((8, "0"), (12, "0.5")), ((16, "1"), (20, "1.5")))
            ),
            group("Side by side · 并排", row(
                column(shut(24), shut(25), shut(26), shut(28), shut(27), width=226),
                node(29, 930, 264),
            )),
        ),
    ),
    "hydit_train_lora": stages(
        first(group(MODEL, node(3, 300)), width=328, note=190),
        group("Pictures and training · 图像与训练", row(node(4, 330, 700), node(5, 330, 700))),
        column(
            group(WORDS, column(node(6, 250), shut(7, 250), node(8, 250))),
            group(SAMPLING, column(*(shut(n, 250) for n in (9, 10, 11, 12, 15)))),
        ),
        drawn(node(13, 320), shut(14, 320), node(16, 320, 420)),
    ),
    "hydit_lora_merge": stages(
        first(group(MODEL, column(3, 4, 5, width=290)), width=318, note=140),
        group(WORDS, column(6, 7, width=290)),
        group("Merging · 合并", column(8, 9, 10, width=290)),
        column(
            group("With it · 加上 LoRA", column(node(11), width=290, gap=5)),
            group("Without · 不加", column(shut(14), shut(15), node(16), width=290, gap=5)),
        ),
        drawn(shut(12, 480), node(17, 480), node(18, 480, 480), node(13, 480)),
    ),
}  # fmt: skip


def set_places(box: Box, workflow: dict[str, Any]) -> None:
    """Put every node and group of `workflow` in its place."""
    sheet = Sheet(workflow)
    box.put(sheet, 0, 0, box.size(sheet)[0])
    assert sheet.placed.keys() == sheet.types.keys(), sheet.placed.keys() ^ sheet.types.keys()
    for shown in workflow["nodes"]:
        place = sheet.placed[shown["id"]]
        shown["pos"], shown["size"] = [place.left, place.top], [place.width, place.height]
        shown["flags"] = {"collapsed": True} if place.collapsed else {}
    workflow["groups"] = [
        {"id": number, "title": title, "bounding": list(frame),
         "color": "#3f789e", "font_size": 24, "flags": {}}
        for number, (title, frame) in enumerate(sheet.groups, 1)
    ]  # fmt: skip


def laid_out(name: str, workflow: dict[str, Any]) -> dict[str, Any]:
    """The workflow with every node and group in its place, and this version; nothing else is changed."""
    set_places(LAYOUTS[name], workflow)
    for shown in workflow["nodes"]:
        if shown["type"].startswith("HyDiT"):
            shown["properties"]["ver"] = VERSION
    workflow["extra"] = {}
    return workflow


def main() -> None:
    for name in sys.argv[1:] or LAYOUTS:
        path = FOLDER / f"{name}.json"
        workflow = laid_out(name, json.loads(path.read_text(encoding="utf-8")))
        path.write_text(json.dumps(workflow, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
