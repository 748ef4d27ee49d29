"""The shipped workflows, the files that they ask for, and what their pictures must show."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
API = ROOT / "tests" / "workflows_api"
#: Values of widgets that the page adds.
PAGE_ONLY = ("fixed", "randomize", "image")
#: A node's mode.
MUTED = 2
#: Where the workflows' files belong.
MODEL_FOLDERS = (
    "checkpoints", "clip_vision", "controlnet", "diffusion_models", "ipadapter", "text_encoders", "vae",
)  # fmt: skip

Box = tuple[float, float, float, float]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def api(name: str) -> dict[str, Any]:
    """The stored API copy, without titles: they are in the page's language."""
    return without_titles(read(API / f"{name}.json"))


def without_titles(prompt: dict[str, Any]) -> dict[str, Any]:
    return {number: {k: v for k, v in node.items() if k != "_meta"} for number, node in prompt.items()}


def linked(workflow: dict[str, Any]) -> dict[str, Any]:
    """The links of a workflow in API form; asserts that both ends of each agree about it."""
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    prompt = {}
    for node in workflow["nodes"]:
        inputs = {}
        for slot, socket in enumerate(node["inputs"]):
            if socket["link"] is None:
                continue
            number, source, source_slot, target, target_slot, kind = links[socket["link"]]
            assert (target, target_slot, kind) == (node["id"], slot, socket["type"])
            output = nodes[source]["outputs"][source_slot]
            assert number in output["links"] and output["type"] == kind
            inputs[socket["name"]] = [str(source), source_slot]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def box(node: dict[str, Any], title: float = 30) -> Box:
    """Left, top, right and bottom of what a node covers; its title is above its position.

    A collapsed node is only its title, and at most as wide as it was.
    """
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - title, x + width, y + (0 if node["flags"].get("collapsed") else height)


def extent(workflow: dict[str, Any]) -> tuple[float, float]:
    """Width and height of all nodes, which is what the page fits into its window."""
    left, top, right, bottom = zip(*map(box, workflow["nodes"]), strict=True)
    return max(right) - min(left), max(bottom) - min(top)


def overlaps(workflow: dict[str, Any], title: float = 40) -> list[str]:
    """Pairs of nodes that cover each other."""
    return overlapping([(f"{node['id']} {node['type']}", box(node, title)) for node in workflow["nodes"]])


def overlapping(boxes: Sequence[tuple[str, Box]]) -> list[str]:
    """Pairs of named boxes that cover each other by a pixel or more, and by how much."""
    found = []
    for i, (a, p) in enumerate(boxes):
        for b, q in boxes[:i]:
            width, height = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
            if width >= 1 and height >= 1:
                found.append(f"{a} covers {b} by {width:.0f} x {height:.0f}")
    return found


def backward(workflow: dict[str, Any]) -> list[tuple[str, str]]:
    """Links that lead neither to the right nor down."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    found = []
    for _, source, _, target, *_ in workflow["links"]:
        a, b = box(nodes[source]), box(nodes[target])
        if b[1] < a[3] and b[0] < a[2]:
            found.append((nodes[source]["type"], nodes[target]["type"]))
    return found


def unmuted(name: str) -> dict[str, Any]:
    """The API form with the muted nodes in it; names of widgets are those of others of the type."""
    workflow, prompt = read(next(path for path in WORKFLOWS if path.stem == name)), api(name)
    names = {node["class_type"]: list(_widgets(node)) for node in prompt.values()}
    links = linked(workflow)
    for node in workflow["nodes"]:
        if node["mode"] == MUTED:
            values = [value for value in node["widgets_values"] if value not in PAGE_ONLY]
            inputs = dict(zip(names[node["type"]], values, strict=False)) | links[str(node["id"])]["inputs"]
            prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widgets(node: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}


def write_models(models: Path) -> None:
    """The files that the workflows name: the embedded models' parts, and a random VAE of SDXL's size."""
    from loader_files import EMBEDDED, write_pipeline

    for kind in MODEL_FOLDERS:
        (models / kind).mkdir(parents=True, exist_ok=True)
    _write_controls(models)
    _write_ip_adapter(models)
    target = models / "checkpoints" / "hunyuan_dit_1.2.safetensors"
    target.write_bytes(EMBEDDED.read_bytes())
    encoders = models / "text_encoders" / "HunyuanDiT-v1.2"
    write_pipeline(encoders)
    transformer = encoders / "transformer" / "diffusion_pytorch_model.safetensors"
    transformer.rename(models / "diffusion_models" / "hunyuan_dit_1.2_transformer.safetensors")
    _write_sdxl_vae(models / "vae" / "sdxl_vae.safetensors")


def _write_controls(models: Path) -> None:
    """ControlNets as Tencent and TTPlanet publish them, without metadata, and pictures to control by."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(ROOT / "hydit_core" / "assets" / "controlnet" / "hydit-icons-128-canny.safetensors")
    for kind in ("canny_distill", "depth_distill", "pose_distill"):
        torch.save(tensors, models / "controlnet" / f"pytorch_model_{kind}.pt")
    half = OrderedDict((name, tensor.half()) for name, tensor in tensors.items())
    for kind in ("inpaint", "tile"):
        torch.save(half, models / "controlnet" / f"pytorch_model_{kind}_ema_module_only.pt")
    for name in ("example", "depth", "pose"):
        picture = Image.new("RGB", (200, 160))
        ImageDraw.Draw(picture).ellipse((50, 30, 150, 130), fill="white")
        picture.save(models.parent / "input" / f"{name}.png")


def _write_ip_adapter(models: Path) -> None:
    """As Tencent publishes it, but with random weights that change pictures a little."""
    import torch
    from tiny import randomize
    from vision_files import clip_names, vision_model

    from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
    from hydit_core.weights.bundle import bundle

    config = bundle(ROOT / "hydit_core" / "assets" / "hydit-icons-128.safetensors").kind.config
    net = randomize(IPAdapter(IPAdapterConfig.for_dit(config, 12, 4)), 5, 0.02)
    torch.save(net.state_dict(), models / "ipadapter" / "ipa.pt")
    torch.save({"state_dict": clip_names(vision_model())}, models / "clip_vision" / "clip_img_encoder.pt")


def _write_sdxl_vae(path: Path) -> None:
    """ComfyUI's VAELoader takes no other size than the published one: 84 M values, drawn once."""
    import torch
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    values = torch.randn(2_400_000, generator=torch.Generator().manual_seed(0)).half()
    tensors = {}
    for name, tensor in vae.state_dict().items():
        drawn = values[: tensor.numel()].clone().view(tensor.shape)
        scale = 1.0 if tensor.ndim < 2 else (tensor[0].numel()) ** -0.5
        tensors[name] = drawn * scale
    save_file(tensors, path)


#: Values of these types' widgets are in pixels.
IN_PIXELS = {
    "HyDiTEmptyLatent": ("width", "height"),
    "HyDiTTiles": ("tile_width", "tile_height", "overlap"),
    "ImageScale": ("width", "height"),
    "MaskComposite": ("x", "y"),
    "SolidMask": ("width", "height"),
}


def shrink(prompt: dict[str, Any]) -> dict[str, Any]:
    """With an eighth of the size where that is one of the published models': the files are small.

    What trains does so for a few steps.
    """
    for node in prompt.values():
        if node["class_type"] == "HyDiTTrainLoRA":
            node["inputs"]["budget"] = 12
    sizes = [n["inputs"]["width"] for n in prompt.values() if n["class_type"] == "HyDiTEmptyLatent"]
    if max(sizes) > 128:
        for node in prompt.values():
            for name in IN_PIXELS.get(node["class_type"], ()):
                node["inputs"][name] //= 8
    return prompt


def check_pictures(name: str, pictures: Sequence[Image.Image]) -> None:
    """Assert that a workflow drew what its prompts ask for, and shows its results larger than they are.

    What enlarges has the highest numbers of all nodes.
    """
    count = len(pictures) - sum(node["class_type"] == "ImageScaleBy" for node in api(name).values())
    shown = [np.asarray(picture.convert("RGB"), float) for picture in pictures[:count]]
    for large in pictures[count:]:
        assert min(large.size) >= 256
        again = [np.asarray(large.resize(p.size, Image.Resampling.BOX), float) for p in pictures[:count]]
        assert min(np.abs(a - b).mean() for a, b in zip(again, shown, strict=True)) < 3
    edges = [picture for picture in shown if _is_edges(picture)]
    shown = [picture for picture in shown if not _is_edges(picture)]
    for number, picture in enumerate(shown):
        height = 256 if name == "hydit_tile_upscale" and number else 128
        assert picture.shape[::2] == (height, 3) and picture.shape[1] in (height, 512), "size"
        assert picture.std() > 10, "blank"
    assert len(edges) == {"hydit_two_controlnets": 2}.get(name, "hydit_controlnet" in name)
    if name == "hydit_split_files":  # its VAE is random
        return
    assert all(picture[:6, 60:].mean() > 180 for picture in shown), "the background is white"
    checks = {
        "hydit_text_to_image_embedded": lambda a: [_color(a) == "blue", _things(a) == 3],
        "hydit_text_to_image_v1.2": lambda a: [_color(a[40:80, 44:84]) in ("red", "dark")],  # a sunflower
        "hydit_train_lora": lambda plain, taught: [0.2 < np.abs(plain - taught).mean() < 60],
        "hydit_custom_sampling": lambda a: [_color(a) == "blue"],  # a robot
        "hydit_image_to_image": lambda a, b: [_color(a) == "green", _color(b) == "red"],
        "hydit_inpaint": lambda a, b: [
            _color(a[:, :64]) == "red",
            (a[:, :64] == b[:, :64]).all(),
            _color(b[:, 64:]) == "blue",
        ],
        "hydit_inpaint_controlnet": lambda a, b: [
            _color(a) == "red", (a[:, :64] == b[:, :64]).all(), (a[:, 64:] != b[:, 64:]).mean() > 0.1
        ],
        "hydit_tile_upscale": lambda a, large: [
            3 < np.abs(np.repeat(np.repeat(a, 2, 0), 2, 1) - large).mean() < 40
        ],
        "hydit_two_prompts": lambda a, b: [
            _color(a) == "blue", _color(b[:, :60]) == "red", _color(b[:, 68:]) == "blue"
        ],
        "hydit_controlnet_canny_embedded": lambda a, b: [
            _same_outline(a, b) > 0.8, (a != b).mean() > 0.1, _color(b) == "red"
        ],
        "hydit_controlnet_image_to_image": lambda a, b: [_same_outline(a, b) > 0.65, _color(b) == "red"],
        "hydit_controlnet_layer_weights": lambda a, uniform, decay, early, late, strip: [
            min(_same_outline(a, picture) for picture in (uniform, decay)) > 0.8,
            _same_outline(a, early) + 0.2 < _same_outline(a, late),
            _same_outline(a, early) < 0.6,
            np.abs(np.hstack([uniform, decay, early, late]) - strip).max() <= 1,
        ],
        "hydit_controlnet_v1.2": lambda a: [_color(a) == "red"],
        "hydit_image_prompt": lambda frog, car: [
            _color(frog) == _color(car) == "green", _same_outline(frog, car) < 0.8
        ],
        "hydit_image_prompt_v1.2": lambda a: [0.1 < (a.min(axis=-1) < 200).mean() < 0.8],  # a cat
        "hydit_lora_strengths": lambda none, half, one, more, strip: [
            _blue(none) < _blue(half) < _blue(one),
            _blue(more) > 0.9,
            np.abs(np.hstack([none, half, one, more]) - strip).max() <= 1,
        ],
        "hydit_fast": lambda forecast, full: [
            0 < np.abs(forecast - full).mean() < 3, _color(forecast) == _color(full) == "red"
        ],
        "hydit_turbo": lambda few, full: [
            _same_outline(few, full) > 0.8, _color(few) == _color(full) == "blue"
        ],
        "hydit_lora_merge": lambda merged, without: [_blue(without) < 0.5 < _blue(merged)],
        "hydit_two_controlnets": lambda star, heart, a: [
            _same_outline(star[:, :64], a[:, :64]) > 0.7,
            _same_outline(heart[:, 64:], a[:, 64:]) > 0.7,
            _color(a) == "red",
        ],
    }  # fmt: skip
    assert all(checks[name](*shown)), name


def _is_edges(picture: np.ndarray) -> bool:
    """Whether it is thin lines in white on black."""
    white = (picture > 250).mean()
    return 0.005 < white < 0.2 and white + (picture < 5).mean() == 1


def _same_outline(a: np.ndarray, b: np.ndarray) -> float:
    """How much of what either covers is covered by both, 0 to 1."""
    p, q = (picture.min(axis=-1) < 200 for picture in (a, b))
    return float((p & q).sum() / (p | q).sum())


def _blue(picture: np.ndarray) -> float:
    """The share of what is not white that is blue more than anything."""
    inked = picture[picture.min(axis=-1) < 200]
    return float((inked[:, 2] > inked[:, :2].max(axis=-1) + 10).mean())


def _things(picture: np.ndarray) -> int:
    """How many things stand apart on white."""
    from scipy.ndimage import label

    sizes = np.bincount(label(picture.min(axis=-1) < 200)[0].ravel())[1:]
    return int((sizes > 50).sum())


def _color(picture: np.ndarray) -> str:
    """The most common of the plain colors among what is not white."""
    inked = picture[picture.min(axis=-1) < 200]
    dark = inked.max(axis=-1) < 90
    if dark.mean() > 0.5:
        return "dark"
    colored = inked[~dark]
    share = np.bincount(colored.argmax(axis=-1), minlength=3)
    return ("red", "green", "blue")[int(share.argmax())]
