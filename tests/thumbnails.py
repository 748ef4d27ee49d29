"""How the thumbnail of a workflow is put together from what the workflow drew, and what stands for files that
are not here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from workflow_files import shrink

SIZE = 384
INSET = 112
"""Side of a small picture in a corner of a thumbnail, with its frame."""
MARGIN = 6
EMBEDDED = {"ckpt_name": "[embedded] hydit-icons-128", "weight_dtype": "default", "load_key": "auto"}
LOADERS = {"HyDiTCheckpointLoader": 0, "HyDiTDiTLoader": 0, "HyDiTTextEncoderLoader": 1, "VAELoader": 2}
"""What loads MODEL, CLIP and VAE, and which output of the checkpoint loader its first one is."""
NEGATIVE = "错误的眼睛，糟糕的人脸，毁容，糟糕的艺术，变形，多余的肢体，模糊的颜色，模糊，重复，病态，残缺，"
"""Tencent's: words that the embedded model does not have."""
WORDS = {"森林里的一只红狐狸，毛发细腻": "一只狐狸"}
"""What the embedded model is asked for instead."""
EXAMPLES = {"hydit_controlnet_v1.2": ("一片枫叶", 1), "hydit_image_prompt_v1.2": ("a blue fish", 3)}
"""Prompt and seed of the picture that stands for the user's own."""
WITHOUT_INSETS = ("hydit_inpaint", "hydit_inpaint_controlnet", "hydit_tile_upscale")
"""The picture itself shows what it was made from."""
TILES_DENOISE = 0.15
"""Of tiles, where no ControlNet keeps what is there."""
STEERING = {"HyDiTControlNetApply": "image", "HyDiTIPAdapterApply": "image", "VAEEncode": "pixels"}
"""Nodes that draw by a picture, and their input for it."""

Prompt = dict[str, Any]
Pictures = Mapping[str, Sequence[Image.Image]]
"""The pictures of each node that shows some, by its number."""


def is_published(prompt: Prompt) -> bool:
    """Whether it names files that do not come with the repository."""
    models = (node["inputs"].get("ckpt_name", "") for _, node in _of(prompt, *LOADERS))
    return not all(name.startswith("[embedded]") for name in models)


def stand_in(prompt: Prompt) -> Prompt:
    """The same graph at 128 x 128 with the embedded files in place of published ones.

    A ControlNet for anything but edges has no counterpart and gets strength 0. Without it, tiles are redrawn
    only a little.
    """
    if not is_published(prompt):
        return prompt
    prompt = shrink(copy.deepcopy(prompt))
    outputs = {number: LOADERS[node["class_type"]] for number, node in _of(prompt, *LOADERS)}
    for _, node in _of(prompt, *LOADERS):
        node.update(class_type="HyDiTCheckpointLoader", inputs=dict(EMBEDDED))
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in outputs:
                node["inputs"][name] = [value[0], outputs[value[0]] + value[1]]
    for _, node in _of(prompt, "HyDiTTextEncode"):
        text = node["inputs"]["text"]
        node["inputs"]["text"] = "" if text == NEGATIVE else WORDS.get(text, text)
    edges = {number for number, node in _of(prompt, "HyDiTControlNetLoader") if "canny" in _name(node)}
    for _, node in _of(prompt, "HyDiTControlNetLoader"):
        node["inputs"]["control_net_name"] = "[embedded] hydit-icons-128-canny"
    for _, node in _of(prompt, "HyDiTControlNetApply"):
        node["inputs"]["strength"] = 1.5 if node["inputs"]["control_net"][0] in edges else 0
    for _, node in _of(prompt, "HyDiTIPAdapterLoader"):
        node["inputs"].update(
            ip_adapter_name="[embedded] hydit-icons-128-image", clip_vision_name="automatic"
        )
    for _, node in _of(prompt, "HyDiTIPAdapterApply"):
        node["inputs"]["weight"] = 1
    tiled = {number for number, _ in _of(prompt, "HyDiTTiles")}
    for _, node in _of(prompt, "HyDiTKSampler"):
        if node["inputs"]["model"][0] in tiled:
            node["inputs"]["denoise"] = TILES_DENOISE
    return prompt


def _name(node: dict[str, Any]) -> str:
    return str(node["inputs"]["control_net_name"])


def _of(prompt: Prompt, *types: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Nodes of these types with their numbers, in order."""
    return ((n, prompt[n]) for n in sorted(prompt, key=int) if prompt[n]["class_type"] in types)


# -- which pictures ------------------------------------------------------------------------------------------


def shown(host: Any, result: Any) -> dict[str, list[Image.Image]]:
    """The pictures of each node that shows some, of a run of `in_process.Host`."""
    found: dict[str, list[Image.Image]] = {}
    for number, output in result.outputs.items():
        if "hydit_train" in output:  # what a node shows of a data set
            continue
        for image in output.get("images", []):
            with Image.open(host.base / image["type"] / image["subfolder"] / image["filename"]) as opened:
                found.setdefault(number, []).append(opened.convert("RGB"))
    return found


def results(prompt: Prompt, pictures: Pictures) -> list[Image.Image]:
    """What the workflow saves; a strip as the pictures that it was joined from."""
    found = [picture for number, _ in _of(prompt, "SaveImage") for picture in pictures[number]]
    return [part for picture in found for part in _parts(picture)]


def _parts(strip: Image.Image) -> list[Image.Image]:
    side = strip.height
    return [strip.crop((left, 0, left + side, side)) for left in range(0, strip.width, side)]


def given(prompt: Prompt, pictures: Pictures) -> list[Image.Image]:
    """What the saved picture is drawn by, besides words: where it begins, edges, pictures as prompts."""
    seen: dict[str, Image.Image] = {}
    ancestors = _ancestors(prompt, [number for number, _ in _of(prompt, "SaveImage")])
    for number, node in _of(prompt, *STEERING):
        if number in ancestors:
            source = _source(prompt, node["inputs"][STEERING[node["class_type"]]])
            if source in pictures:
                seen[source] = pictures[source][0]
    return list(seen.values())


def _ancestors(prompt: Prompt, numbers: Sequence[str]) -> set[str]:
    """These nodes, and all that they depend on."""
    found: set[str] = set()
    for number in numbers:
        links = [value[0] for value in prompt[number]["inputs"].values() if isinstance(value, list)]
        found |= {number} | _ancestors(prompt, links)
    return found


def _source(prompt: Prompt, link: list[Any]) -> str:
    """The node that shows this picture, or the one that it was scaled from."""
    for number, node in _of(prompt, "PreviewImage"):
        if node["inputs"]["images"] == link:
            return number
    source = prompt[link[0]]
    image = source["inputs"].get("image")
    return _source(prompt, image) if isinstance(image, list) else link[0]


# -- how they are put together -------------------------------------------------------------------------------


def compose(name: str, prompt: Prompt, pictures: Pictures) -> Image.Image:
    """The thumbnail: the saved picture, two side by side or four; in white corners, what it was drawn by."""
    drawn = results(prompt, pictures)
    thumbnail = _tiled(drawn)
    insets = [] if name in WITHOUT_INSETS else given(prompt, pictures)
    if len(drawn) == 1:
        for picture, corner in zip(insets, _corners(thumbnail, len(insets)), strict=True):
            frame = ImageOps.expand(_large(picture, INSET - 4), 2, "#8a8a8a")
            thumbnail.paste(frame, corner)
    return thumbnail


def _tiled(drawn: Sequence[Image.Image]) -> Image.Image:
    across = 1 if len(drawn) == 1 else 2
    side = SIZE // across
    sheet = Image.new("RGB", (SIZE, SIZE), "white")
    top = (SIZE - side * -(-len(drawn) // across)) // 2
    for number, picture in enumerate(drawn):
        sheet.paste(_large(picture, side), (number % across * side, top + number // across * side))
    return sheet


def _large(picture: Image.Image, side: int) -> Image.Image:
    return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def _corners(thumbnail: Image.Image, count: int) -> list[tuple[int, int]]:
    """The places of `count` insets in the corners with the least in them."""
    near, far = MARGIN, SIZE - INSET - MARGIN
    corners = [(near, near), (far, near), (near, far), (far, far)]
    ink = 255 - np.asarray(thumbnail.convert("L"), float)
    covered = {(x, y): ink[y : y + INSET, x : x + INSET].mean() for x, y in corners}
    return sorted(sorted(corners, key=lambda corner: covered[corner])[:count], key=corners.index)
