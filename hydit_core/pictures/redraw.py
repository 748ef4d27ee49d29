"""The graph that draws a picture of ``generate`` again in ComfyUI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from .. import embedded
from ..dtypes import COMPUTE, short_name
from ..images import SIZE_MULTIPLE, Geometry, probe
from ..weights.bundle import bundle
from .workflow import KINDS, Graph, Output

_INNER = ("transformer", "t2i", "controlnet")
"""Folders that ComfyUI's lists show under the name of their parent."""
_BELOW = 780
"""Top of the second row, below loaders and prompts."""
_COLUMN = 360
"""From the left of one node to that of the next. The page leaves out texts if a graph is too wide for it."""
_GAP = 50
"""Between two nodes of a column, for the title of the lower one."""


def redraw(
    parameters: Mapping[str, Any],
    *,
    model: Path | None = None,
    text_encoders: Path | None = None,
    vae: Path | None = None,
    init_image: Path | None = None,
    loras: Sequence[Path] = (),
    controlnets: Sequence[Path] = (),
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
    """
    graph = Graph()
    parts, top = _load(graph, parameters, model or embedded.embedded_model(), text_encoders, vae)
    left = _adapt(graph, parameters, loras, parts)
    width, height = parameters["width"], parameters["height"]
    upscale = parameters.get("upscale", {})
    mask = pixels = None
    if init_image is None:
        width, height = upscale.get("width", width), upscale.get("height", height)
        stock = width % 16 or height % 16 or max(width, height) > 8192
        (latent,) = graph.add(
            "EmptyLatentImage" if stock else "HyDiTEmptyLatent",
            (0, top),
            widgets={"width": width, "height": height, "batch_size": 1},
        )
    else:
        kept = "inpaint" in parameters
        pixels = _start_picture(graph, init_image, (width, height), kept=kept)
        place = (_COLUMN, _beneath("ImageCrop", _BELOW))
        (latent,) = graph.add("VAEEncode", place, {"pixels": pixels, "vae": parts["VAE"]})
        if kept:
            mask, latent = _masked(graph, parameters["inpaint"]["picture"], (width, height), latent)
    texts = [
        graph.add(
            "HyDiTTextEncode",
            (left, y),
            {"clip": parts["CLIP"]},
            {"text": parameters[name], "text_mt5": "", "mode": "exact", "width": 0, "height": 0},
            title=title,
        )[0]
        for name, title, y in (
            ("prompt", "Prompt", 0),
            ("negative", "Negative prompt", _beneath("HyDiTTextEncode")),
        )
    ]
    again = upscale.get("width") is not None
    steering = _controls(parameters, controlnets)
    early, late = (steering, []) if not again else _split(steering)
    first, right = _steer(graph, parameters, early, texts, parts["VAE"], left + _COLUMN, pixels)
    network = parts["MODEL"]
    if tolerance := parameters.get("forecast", 0.0):
        settings = {"preset": "custom", "tolerance": tolerance}
        (network,) = graph.add("HyDiTForecast", (right, 0), {"model": network}, settings)
        right += _COLUMN
    tiled = network
    if upscale:
        below = _beneath("HyDiTKSampler")
        (tiled,) = graph.add("HyDiTTiles", (right, below), {"model": network}, _tiles(upscale))
    strength = parameters.get("strength", 1.0)
    (sampled,) = _sample(
        graph, parameters, right, network if again else tiled, first, latent, 1.0 if again else strength
    )
    right += _COLUMN
    (image,) = graph.add("VAEDecode", (right, 0), {"samples": sampled, "vae": parts["VAE"]})
    below = _beneath("VAEDecode")
    if again:
        (large,) = graph.add(
            "ImageScale",
            (right, below),
            {"image": image},
            {
                "upscale_method": "lanczos",
                "width": parameters["width"],
                "height": parameters["height"],
                "crop": "center",
            },
        )
        place = (right, _beneath("ImageScale", below))
        (latent,) = graph.add("VAEEncode", place, {"pixels": large, "vae": parts["VAE"]})
        second, right = _steer(graph, parameters, late, texts, parts["VAE"], right + _COLUMN, large)
        (sampled,) = _sample(graph, parameters, right, tiled, second, latent, strength)
        right += _COLUMN
        (image,) = graph.add("VAEDecode", (right, 0), {"samples": sampled, "vae": parts["VAE"]})
    if mask is not None and pixels is not None:
        (image,) = graph.add(
            "ImageCompositeMasked",
            (right, below),
            {"destination": pixels, "source": image, "mask": mask},
            {"x": 0, "y": 0, "resize_source": False},
        )
        below = _beneath("ImageCompositeMasked", below)
    graph.add("SaveImage", (right, below), {"images": image}, {"filename_prefix": "hydit"})
    return graph


Steering = Sequence[tuple[Path, Mapping[str, Any]]]
"""ControlNets' files, and what a picture says about each."""


def _controls(parameters: Mapping[str, Any], files: Sequence[Path]) -> Steering:
    return list(zip(files, parameters.get("controls", ()), strict=True))


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
) -> list[Output]:
    return graph.add(
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


def _masked(graph: Graph, name: str, size: tuple[int, int], latent: Output) -> tuple[Output, Output]:
    """Load the mask as it was used; returns it, and the latents masked where any of their pixels is."""
    top = _beneath("LoadImage", _BELOW)
    left = -2 * _COLUMN
    (mask,) = graph.add(
        "LoadImageMask",
        (left, _BELOW),
        widgets={"image": name, "channel": "red", "upload": "image"},
        title="Mask",
    )
    (shown,) = graph.add("MaskToImage", (left, top), {"mask": mask})
    top = _beneath("MaskToImage", top)
    width, height = (side // SIZE_MULTIPLE for side in size)
    (small,) = graph.add(
        "ImageScale",
        (left, top),
        {"image": shown},
        {"upscale_method": "area", "width": width, "height": height, "crop": "disabled"},
    )
    top = _beneath("ImageScale", top)
    (shares,) = graph.add("ImageToMask", (left, top), {"image": small}, {"channel": "red"})
    top = _beneath("ImageToMask", top)
    (any_of_it,) = graph.add("ThresholdMask", (left, top), {"mask": shares}, {"value": 0.0})
    place = (_COLUMN, _beneath("VAEEncode", _beneath("ImageCrop", _BELOW)))
    (latent,) = graph.add("SetLatentNoiseMask", place, {"samples": latent, "mask": any_of_it})
    return mask, latent


def _beneath(kind: str, top: int = 0) -> int:
    """The top of the next node in a column, below one of this kind."""
    return top + KINDS[kind].size[1] + _GAP


def _adapt(
    graph: Graph, parameters: Mapping[str, Any], files: Sequence[Path], parts: dict[str, Output]
) -> int:
    """Apply the LoRAs, one after the other, to what is in ``parts``; returns the left of the next column.

    There are two to a column.
    """
    for number, (file, lora) in enumerate(zip(files, parameters.get("loras", ()), strict=True)):
        top = _beneath("HyDiTLoraLoader") if number % 2 else 0
        parts["MODEL"], parts["CLIP"], _ = graph.add(
            "HyDiTLoraLoader",
            (_COLUMN * (1 + number // 2), top),
            {"model": parts["MODEL"], "clip": parts["CLIP"]},
            {
                "lora_name": list_name(file),
                "strength_model": lora["strength"],
                "strength_clip": lora["strength"],
                "block_weights": lora["block_weights"],
            },
        )
    return _COLUMN * (1 + (len(files) + 1) // 2)


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

    Those of kind ``tile`` follow the picture that is ``enlarged``.
    """
    for file, control in steering:
        loader = {"control_net_name": list_name(file), "weight_dtype": _weight_dtype(parameters)}
        (net,) = graph.add("HyDiTControlNetLoader", (left, 0), widgets=loader)
        image = enlarged
        if "picture" in control or image is None:
            image, _ = graph.add(
                "LoadImage",
                (left, _beneath("HyDiTControlNetLoader")),
                widgets={"image": control["picture"], "upload": "image"},
                title="Control picture",
            )
        texts = graph.add(
            "HyDiTControlNetApply",
            (left, _beneath("LoadImage", _beneath("HyDiTControlNetLoader"))),
            {"positive": texts[0], "negative": texts[1], "control_net": net, "image": image, "vae": vae},
            {
                "strength": control["scale"],
                "start_percent": control["start"],
                "end_percent": control["end"],
                "layer_weights": control["weights"],
            },
        )
        left += _COLUMN
    return texts, left


def _weight_dtype(parameters: Mapping[str, Any]) -> str:
    dtype = short_name(parameters["dtype"])
    return dtype if dtype in COMPUTE else "default"


def _load(
    graph: Graph, parameters: Mapping[str, Any], model: Path, text_encoders: Path | None, vae: Path | None
) -> tuple[dict[str, Output], int]:
    """Add the loaders; returns MODEL, CLIP and VAE, and the top of the free space below the loaders."""
    dtype = {"weight_dtype": _weight_dtype(parameters)}
    outputs: dict[str, Output] = {}
    top = 0

    def add(type: str, take: Iterable[str], **widgets: Any) -> None:
        nonlocal top
        found = graph.add(type, (0, top), widgets=widgets)
        top = _beneath(type, top)
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
        # ComfyUI's loader opens only a VAE's own file; ours also takes one out of a whole model.
        both = {"CLIP", "VAE"} if text_encoders == vae else {"VAE"}
        add("HyDiTCheckpointLoader", both, ckpt_name=list_name(vae), **dtype)
    if rest := {"MODEL", "CLIP", "VAE"} - outputs.keys():
        add("HyDiTCheckpointLoader", rest, ckpt_name=list_name(model), **dtype)
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
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        return f"{path.resolve().name}/{files[0].name}" if files else None
    return path.name if bundle(path, only=("vae",)).kind.kind == "vae" else None


def _start_picture(graph: Graph, path: Path, size: tuple[int, int], *, kept: bool = False) -> Output:
    """Load the picture and fit it to ``size`` as :class:`~..images.Geometry` does; returns its pixels.

    With ``kept`` its pixels stay as they are if the size allows it, as for inpainting.
    """
    original, alpha = probe(path)
    geometry = Geometry.cut(original, size) if kept else Geometry.cover(original, size)
    image, mask = graph.add(
        "LoadImage",
        (-_COLUMN, 0),
        widgets={"image": path.name, "upload": "image"},
        title="Start picture",
    )
    top = _BELOW
    if alpha:
        # On a white ground, as load_picture has it.
        width, height = geometry.original
        below = _beneath("LoadImage")
        (white,) = graph.add(
            "EmptyImage",
            (-_COLUMN, below),
            widgets={"width": width, "height": height, "batch_size": 1, "color": 0xFFFFFF},
        )
        (opaque,) = graph.add("InvertMask", (-_COLUMN, _beneath("EmptyImage", below)), {"mask": mask})
        (image,) = graph.add(
            "ImageCompositeMasked",
            (0, top),
            {"destination": white, "source": image, "mask": opaque},
            {"x": 0, "y": 0, "resize_source": False},
        )
        top = _beneath("ImageCompositeMasked", top)
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
            (_COLUMN, _BELOW),
            {"image": image},
            {"width": size[0], "height": size[1], "x": geometry.left, "y": geometry.top},
        )
    return image
