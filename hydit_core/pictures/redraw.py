"""The graph that draws a picture of ``generate`` again in ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .. import embedded
from ..dtypes import COMPUTE, short_name
from ..images import Size, soft_size
from ..weights.bundle import bundle
from .columns import COLUMN, beneath
from .start import Start, add_start
from .workflow import KINDS, Graph, Output

_INNER = ("transformer", "t2i", "controlnet")
"""Folders that ComfyUI's lists show under the name of their parent."""


def redraw(
    parameters: Mapping[str, Any],
    *,
    model: Path | None = None,
    text_encoders: Path | None = None,
    vae: Path | None = None,
    init_image: Path | None = None,
    loras: Sequence[Path] = (),
    controlnets: Sequence[Path] = (),
    ip_adapter: Path | None = None,
    image_encoder: Path | None = None,
) -> Graph:
    """The graph of a picture.

    Every setting is written out, so that the picture does not depend on presets. Files appear under their
    names in ComfyUI's lists, folders with a final ``/``; they are expected in ComfyUI's folders.

    Args:
        parameters: of the picture, as :func:`~.png.read_parameters` gives them.
        model: what it was drawn with; None for the embedded model.
        text_encoders, vae: what it was drawn with; None for those in ``model``.
        init_image: the picture that it started from.
        loras, controlnets: the files of ``parameters["loras"]`` and ``["controls"]``, in their order.
        ip_adapter, image_encoder: of ``parameters["image_prompts"]``.
    """
    graph = Graph()
    parts, top = _load(graph, parameters, model or embedded.embedded_model(), text_encoders, vae)
    left = _adapt(graph, parameters, loras, parts)
    start = add_start(graph, parameters, init_image, parts["VAE"], top)
    texts = _prompts(graph, parameters, parts["CLIP"], left)
    steering = list(zip(controlnets, parameters.get("controls", ()), strict=True))
    first, second = _split(steering) if _twice(parameters) else (steering, [])
    steered, left = _steer(graph, parameters, first, texts, parts["VAE"], left + COLUMN, start.pixels)
    network = parts["MODEL"]
    if ip_adapter is not None and image_encoder is not None:
        network, left = _pictured(graph, parameters, network, ip_adapter, image_encoder, left)
    network, tiled, left = _networks(graph, parameters, network, left)
    strength = parameters.get("strength", 1.0)
    if _twice(parameters):
        sampled = _sample(graph, parameters, left, network, steered, start.latent, 1.0)
        left += COLUMN
        large, latent = _enlarged(graph, parameters, sampled, parts["VAE"], left)
        steered, left = _steer(graph, parameters, second, texts, parts["VAE"], left + COLUMN, large)
    else:
        latent = start.latent
    sampled = _sample(graph, parameters, left, tiled, steered, latent, strength)
    _save(graph, sampled, parts["VAE"], start, left + COLUMN)
    return graph


def _prompts(graph: Graph, parameters: Mapping[str, Any], clip: Output, left: int) -> list[Output]:
    """Add both prompts, one below the other; returns the positive and the negative conditioning."""
    return [
        graph.add(
            "HyDiTTextEncode",
            (left, y),
            {"clip": clip},
            {"text": parameters[name], "text_mt5": "", "mode": "exact", "width": 0, "height": 0},
            title=title,
        )[0]
        for name, title, y in (
            ("prompt", "Prompt", 0),
            ("negative", "Negative prompt", beneath("HyDiTTextEncode")),
        )
    ]


def _twice(parameters: Mapping[str, Any]) -> bool:
    """Whether the picture was drawn in a smaller size first."""
    return "width" in parameters.get("upscale", {})


def _pictured(
    graph: Graph, parameters: Mapping[str, Any], model: Output, adapter: Path, encoder: Path, left: int
) -> tuple[Output, int]:
    """Apply the image prompts one after the other; returns the MODEL and the left of the next column."""
    top = beneath("HyDiTIPAdapterLoader")
    loader = {"ip_adapter_name": list_name(adapter), "clip_vision_name": _encoder_name(encoder, adapter)}
    (net,) = graph.add("HyDiTIPAdapterLoader", (left, 0), widgets=loader)
    for prompt in parameters["image_prompts"]:
        (image, _) = graph.add(
            "LoadImage",
            (left, top),
            widgets={"image": prompt.get("picture", prompt["image"]), "upload": "image"},
            title="Image prompt",
        )
        below = beneath("LoadImage", top)
        links = {"model": model, "ip_adapter": net, "image": image}
        if "mask_picture" in prompt:
            (links["mask"],) = graph.add(
                "LoadImageMask",
                (left, below),
                widgets={"image": prompt["mask_picture"], "channel": "red", "upload": "image"},
                title="Where it acts",
            )
            below = beneath("LoadImageMask", below)
        settings = {
            "weight": prompt["weight"],
            "start_percent": prompt["start"],
            "end_percent": prompt["end"],
            "block_weights": prompt["blocks"],
        }
        (model,) = graph.add("HyDiTIPAdapterApply", (left, below), links, settings)
        left += COLUMN
    return model, left


def _encoder_name(encoder: Path, adapter: Path) -> str:
    """The name of an image encoder in the loader's list, or what finds it as ``generate`` does."""
    if encoder == adapter or encoder.name == "clip_img_encoder.pt":
        return "automatic"
    return _file_below(encoder) or list_name(encoder)


def _networks(
    graph: Graph, parameters: Mapping[str, Any], model: Output, left: int
) -> tuple[Output, Output, int]:
    """Add what changes how a MODEL draws; returns it, it in tiles, and the left of the next column."""
    if tolerance := parameters.get("forecast", 0.0):
        settings = {"preset": "custom", "tolerance": tolerance}
        (model,) = graph.add("HyDiTForecast", (left, 0), {"model": model}, settings)
        left += COLUMN
    tiled = model
    if upscale := parameters.get("upscale"):
        below = beneath("HyDiTKSampler")
        (tiled,) = graph.add("HyDiTTiles", (left, below), {"model": model}, _tiles(upscale))
    return model, tiled, left


def _enlarged(
    graph: Graph, parameters: Mapping[str, Any], sampled: Output, vae: Output, left: int
) -> tuple[Output, Output]:
    """Decode a picture and enlarge it to its final size; returns its pixels and its latents."""
    (image,) = graph.add("VAEDecode", (left, 0), {"samples": sampled, "vae": vae})
    top = beneath("VAEDecode")
    size = {name: parameters[name] for name in ("width", "height")}
    (large,) = graph.add(
        "ImageScale",
        (left, top),
        {"image": image},
        {"upscale_method": "lanczos", **size, "crop": "center"},
    )
    place = (left, beneath("ImageScale", top))
    (latent,) = graph.add("VAEEncode", place, {"pixels": large, "vae": vae})
    return large, latent


def _save(graph: Graph, sampled: Output, vae: Output, start: Start, left: int) -> None:
    """Decode the picture and save it, with the start picture around what was masked."""
    (image,) = graph.add("VAEDecode", (left, 0), {"samples": sampled, "vae": vae})
    below = beneath("VAEDecode")
    if start.mask is not None and start.pixels is not None:
        (image,) = graph.add(
            "ImageCompositeMasked",
            (left, below),
            {"destination": start.pixels, "source": image, "mask": start.mask},
            {"x": 0, "y": 0, "resize_source": False},
        )
        below = beneath("ImageCompositeMasked", below)
    graph.add("SaveImage", (left, below), {"images": image}, {"filename_prefix": "hydit"})


Steering = Sequence[tuple[Path, Mapping[str, Any]]]
"""ControlNets' files, and what a picture says about each."""


def _split(steering: Steering) -> tuple[Steering, Steering]:
    """Those of the first picture, and those of the enlarged one."""
    late = [control.get("preprocess") == "tile" for _, control in steering]
    both = list(zip(steering, late, strict=True))
    return [one for one, second in both if not second], [one for one, second in both if second]


def _tiles(upscale: Mapping[str, Any]) -> dict[str, int]:
    """The widgets of HyDiTTiles. The overlap is that of ``generate``, in pixels."""
    width, height = upscale["tile"]
    return {"tile_width": width, "tile_height": height, "overlap": min(width, height) // 64 * 16}


def _sample(
    graph: Graph,
    parameters: Mapping[str, Any],
    left: int,
    model: Output,
    texts: Sequence[Output],
    latent: Output,
    strength: float,
) -> Output:
    (latent,) = graph.add(
        "HyDiTKSampler",
        (left, 0),
        {"model": model, "positive": texts[0], "negative": texts[1], "latent_image": latent},
        {
            "seed": parameters["seed"],
            "control_after_generate": "fixed",
            "preset": "model's own",
            **{name: parameters[name] for name in ("sampler", "spacing", "steps", "cfg", "guidance_rescale")},
            "denoise": strength,
            "cfg_end": parameters.get("cfg_end", 1.0),
        },
    )
    return latent


def _adapt(
    graph: Graph, parameters: Mapping[str, Any], files: Sequence[Path], parts: dict[str, Output]
) -> int:
    """Apply the LoRAs, one after the other, to what is in ``parts``; returns the left of the next column.

    There are two to a column.
    """
    for number, (file, lora) in enumerate(zip(files, parameters.get("loras", ()), strict=True)):
        top = beneath("HyDiTLoraLoader") if number % 2 else 0
        parts["MODEL"], parts["CLIP"], _ = graph.add(
            "HyDiTLoraLoader",
            (COLUMN * (1 + number // 2), top),
            {"model": parts["MODEL"], "clip": parts["CLIP"]},
            {
                "lora_name": list_name(file),
                "strength_model": lora["strength"],
                "strength_clip": lora["strength"],
                "block_weights": lora["block_weights"],
            },
        )
    return COLUMN * (1 + (len(files) + 1) // 2)


def _steer(
    graph: Graph,
    parameters: Mapping[str, Any],
    steering: Steering,
    texts: list[Output],
    vae: Output,
    left: int,
    enlarged: Output | None,
) -> tuple[list[Output], int]:
    """Add the ControlNets one after the other; returns both conditionings and the left of the next column.

    Those of kind ``tile`` follow the picture that is ``enlarged``, softened.
    """
    for file, control in steering:
        dtype = _weight_dtype(parameters)
        key = {"load_key": control.get("load_key", "auto")}
        loader = {"control_net_name": list_name(file), "weight_dtype": dtype, **key}
        (net,) = graph.add("HyDiTControlNetLoader", (left, 0), widgets=loader)
        top = beneath("HyDiTControlNetLoader")
        if "picture" in control or enlarged is None:
            image, _ = graph.add(
                "LoadImage",
                (left, top),
                widgets={"image": control["picture"], "upload": "image"},
                title="Control picture",
            )
            top = beneath("LoadImage", top)
        else:
            image, top = _softened(graph, enlarged, (parameters["width"], parameters["height"]), left, top)
        texts = graph.add(
            "HyDiTControlNetApply",
            (left, top),
            {"positive": texts[0], "negative": texts[1], "control_net": net, "image": image, "vae": vae},
            {
                "strength": control["scale"],
                "start_percent": control["start"],
                "end_percent": control["end"],
                "layer_weights": control["weights"],
            },
        )
        left += COLUMN
    return texts, left


def _softened(graph: Graph, image: Output, size: Size, left: int, top: int) -> tuple[Output, int]:
    """As :func:`~..images.softened`; returns it and the top of the free space below."""
    for method, (width, height) in (("area", soft_size(size)), ("bilinear", size)):
        settings = {"upscale_method": method, "width": width, "height": height, "crop": "disabled"}
        (image,) = graph.add("ImageScale", (left, top), {"image": image}, settings)
        top = beneath("ImageScale", top)
    return image, top


def _weight_dtype(parameters: Mapping[str, Any]) -> str:
    dtype = short_name(parameters["dtype"])
    return dtype if dtype in COMPUTE else "default"


def _load(
    graph: Graph, parameters: Mapping[str, Any], model: Path, text_encoders: Path | None, vae: Path | None
) -> tuple[dict[str, Output], int]:
    """Add the loaders; returns MODEL, CLIP and VAE, and the top of the free space below the loaders."""
    dtype = {"weight_dtype": _weight_dtype(parameters)}
    own = {**dtype, "load_key": parameters.get("load_key", "auto")}
    outputs: dict[str, Output] = {}
    top = 0

    def add(type: str, take: Iterable[str], **widgets: Any) -> None:
        nonlocal top
        found = graph.add(type, (0, top), widgets=widgets)
        top = beneath(type, top)
        names = [name for name, _ in KINDS[type].outputs]
        outputs.update({name: found[names.index(name)] for name in take})

    if text_encoders and vae:
        add("HyDiTDiTLoader", ["MODEL"], model_name=list_name(model), **own)
    vae_file = _vae_file(vae) if vae else None
    if text_encoders and (text_encoders != vae or vae_file):
        name = list_name(text_encoders)
        add("HyDiTTextEncoderLoader", ["CLIP"], bert_name=name, mt5_name="same as bert_name", **dtype)
    if vae_file:
        add("VAELoader", ["VAE"], vae_name=vae_file)
    elif vae:
        # ComfyUI's loader opens only a VAE's own file; ours also takes one out of a whole model.
        both = {"CLIP", "VAE"} if text_encoders == vae else {"VAE"}
        add("HyDiTCheckpointLoader", both, ckpt_name=list_name(vae), **dtype, load_key="auto")
    if rest := {"MODEL", "CLIP", "VAE"} - outputs.keys():
        add("HyDiTCheckpointLoader", rest, ckpt_name=list_name(model), **own)
    return outputs, top


def list_name(path: Path) -> str:
    """The name in ComfyUI's lists of a file or folder that is directly in one of its folders."""
    path = path.resolve()
    if embedded.ASSETS.resolve() in (path.parent, path.parent.parent):
        return f"[embedded] {path.stem}"
    if path.is_dir() and path.name in _INNER:
        path = path.parent
    return f"{path.name}/" if path.is_dir() else path.name


@cache
def _vae_file(path: Path) -> str | None:
    """The name of a VAE's own weights in ComfyUI's list; None if ``path`` holds more than a VAE."""
    if path.is_dir():
        return _file_below(path)
    return path.name if bundle(path, only=("vae",)).kind.kind == "vae" else None


def _file_below(path: Path) -> str | None:
    """The name of the weights in a folder in lists of files; None if there are none, or it is no folder."""
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    return f"{path.resolve().name}/{files[0].name}" if files else None
