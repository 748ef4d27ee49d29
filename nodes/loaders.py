"""Loaders: from files and folders to MODEL, CLIP and VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..hydit_core.dtypes import HOST, dtype_name
from ..hydit_core.errors import WeightsError
from ..hydit_core.facts import ModelInfo
from ..hydit_core.weights.bundle import Bundle, bundle
from ..hydit_core.weights.detect import FileKind
from ..hydit_core.weights.source import TensorSource
from .host import folders
from .host.clip import load_clip
from .host.model import load_model
from .host.quantised import text as quantised_text
from .host.vae import load_vae
from .schema import make_schema

_CATEGORY = "HunyuanDiT/loaders"
AUTO = "auto"
"""For ``load_key``: what a file with several sets of weights is known for."""
_SAME = "same as bert_name"
# What to do in a graph with a file of another kind.
_ADVICE = {
    "dit": "load it with HyDiTDiTLoader",
    "bert": "load it with HyDiTTextEncoderLoader",
    "t5": "load it with HyDiTTextEncoderLoader",
    "vae": "load it with VAELoader",
    "lora": "give it to a LoRA loader, behind a MODEL",
    "controlnet": "load it with HyDiTControlNetLoader",
    "ip_adapter": "load it with HyDiTIPAdapterLoader",
    "vision": "choose it as clip_vision_name of HyDiTIPAdapterLoader",
    "other": "it needs its own model's loader",
}


class HyDiTCheckpointLoader(io.ComfyNode):
    """A whole model from one file or folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTCheckpointLoader",
            display_name="HunyuanDiT Checkpoint Loader",
            category=_CATEGORY,
            description="Loads HunyuanDiT with its text encoders and VAE from one all-in-one file, a "
            "diffusers folder or Tencent's folder. It recognizes the version and shows it on the node.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=folders.checkpoint_names(),
                    tooltip="[embedded] is a small model that comes with these nodes. The others are in "
                    "ComfyUI/models/checkpoints and models/diffusers; a name that ends in / is a folder.",
                ),
                dtype_input("the DiT"),
                load_key_input(),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The denoising network, for samplers and LoRA loaders."),
                io.Clip.Output("CLIP", tooltip="BERT and mT5, for HyDiTTextEncode."),
                io.Vae.Output("VAE", tooltip="Between latents and pictures."),
            ],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name: Any = None) -> bool | str:
        return folders.check(ckpt_name, *folders.CHECKPOINTS)

    @classmethod
    def fingerprint_inputs(cls, ckpt_name: str, **_: str) -> str:
        return folders.fingerprint(folders.resolve(ckpt_name, *folders.CHECKPOINTS))

    @classmethod
    def execute(cls, ckpt_name: str, weight_dtype: str, load_key: str = AUTO) -> io.NodeOutput:
        path = folders.resolve(ckpt_name, *folders.CHECKPOINTS)
        opened = bundle(path, load_key=chosen_key(load_key))
        # Before anything is loaded, so that a missing part costs no time.
        source, info = _vae_of_whole(opened)
        model = load_model(opened, weight_dtype=weight_dtype)
        clip = load_clip(opened)
        vae = load_vae(source, info)
        return io.NodeOutput(model, clip, vae, ui={"hydit_version": [_model_text(opened, weight_dtype)]})


class HyDiTDiTLoader(io.ComfyNode):
    """The denoising network alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTDiTLoader",
            display_name="HunyuanDiT DiT Loader",
            category=_CATEGORY,
            description="Loads HunyuanDiT's denoising network alone, from any of its published files: "
            "Tencent's .pt, diffusers, or out of an all-in-one file. Text encoders and VAE have loaders of "
            "their own.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "load diffusion model", "unet loader"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folders.dit_names(),
                    tooltip="[embedded] is a small model that comes with these nodes. The others are in "
                    "ComfyUI/models/diffusion_models, models/checkpoints and models/diffusers; a name that "
                    "ends in / is a folder.",
                ),
                dtype_input("the DiT"),
                load_key_input(),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="For samplers and LoRA loaders.")],
        )

    @classmethod
    def validate_inputs(cls, model_name: Any = None) -> bool | str:
        return folders.check(model_name, *folders.DIT)

    @classmethod
    def fingerprint_inputs(cls, model_name: str, **_: str) -> str:
        return folders.fingerprint(folders.resolve(model_name, *folders.DIT))

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str, load_key: str = AUTO) -> io.NodeOutput:
        path = folders.resolve(model_name, *folders.DIT)
        opened = bundle(path, only=("dit",), load_key=chosen_key(load_key))
        if opened.dit is None:
            raise wrong_kind(opened.path, opened.kind, "a HunyuanDiT (DiT) checkpoint")
        model = load_model(opened, weight_dtype=weight_dtype)
        return io.NodeOutput(model, ui={"hydit_version": [_model_text(opened, weight_dtype)]})


class HyDiTTextEncoderLoader(io.ComfyNode):
    """BERT and mT5, together or from two places."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.text_encoder_names()
        return make_schema(
            node_id="HyDiTTextEncoderLoader",
            display_name="HunyuanDiT Text Encoder Loader",
            category=_CATEGORY,
            description="Loads HunyuanDiT's two text encoders: from one file or folder that has both, or "
            "BERT from one and mT5 from another.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "load clip", "bert", "mt5", "dual clip loader"],
            inputs=[
                io.Combo.Input(
                    "bert_name",
                    options=names,
                    tooltip="BERT: a file, the folder that it was downloaded as (name ends in /), or "
                    "anything that holds a whole model. From ComfyUI/models/text_encoders, "
                    "models/checkpoints and models/diffusers. Its vocab.txt is looked for in the file, then "
                    "beside it.",
                ),
                io.Combo.Input(
                    "mt5_name",
                    options=[_SAME, *names],
                    default=_SAME,
                    tooltip="mT5, from the same place or from another. Its spiece.model is looked for in the "
                    "file, then beside it (ComfyUI's lists do not show that file).",
                ),
                dtype_input("BERT and mT5"),
            ],
            outputs=[io.Clip.Output("CLIP", tooltip="For HyDiTTextEncode.")],
        )

    @classmethod
    def validate_inputs(cls, bert_name: Any = None, mt5_name: Any = None) -> bool | str:
        found = folders.check(bert_name, *folders.TEXT_ENCODERS)
        if found is not True or mt5_name == _SAME:
            return found
        return folders.check(mt5_name, *folders.TEXT_ENCODERS)

    @classmethod
    def fingerprint_inputs(cls, bert_name: str, mt5_name: str, **_: str) -> str:
        names = dict.fromkeys((bert_name, bert_name if mt5_name == _SAME else mt5_name))
        paths = (folders.resolve(name, *folders.TEXT_ENCODERS) for name in names)
        return " ".join(folders.fingerprint(path) for path in paths)

    @classmethod
    def execute(cls, bert_name: str, mt5_name: str, weight_dtype: str) -> io.NodeOutput:
        bert = mt5 = bundle(folders.resolve(bert_name, *folders.TEXT_ENCODERS), only=("bert", "t5"))
        if mt5_name not in (_SAME, bert_name):
            mt5 = bundle(folders.resolve(mt5_name, *folders.TEXT_ENCODERS), only=("t5",))
        clip = load_clip(bert, mt5, weight_dtype=weight_dtype)
        text = f"BERT {_stored(bert.bert, weight_dtype)}, mT5 {_stored(mt5.mt5, weight_dtype)}"
        return io.NodeOutput(clip, ui={"hydit_version": [text]})


def dtype_input(what: str) -> io.Combo.Input:
    """The widget ``weight_dtype`` of a loader of ``what``."""
    return io.Combo.Input(
        "weight_dtype",
        options=["default", *HOST],
        default="default",
        tooltip=f"In which precision to keep {what} in memory. default: ComfyUI chooses for the file and the "
        "machine, and quantised layers stay so. fp8 takes half the memory of fp16 and changes the picture a "
        "little; fp16 may overflow (black pictures).",
    )


def load_key_input() -> io.String.Input:
    """The widget ``load_key`` of a loader; older workflows lack it."""
    return io.String.Input(
        "load_key",
        optional=True,
        default=AUTO,
        tooltip="Which weights of a .pt file that holds several: ema, module, distill ... auto: ema, if it "
        "is there. The node shows which were taken, and what else is there.",
    )


def chosen_key(load_key: str) -> str | None:
    """The ``load_key`` of the library; None lets it choose."""
    key = load_key.strip()
    return None if key in ("", AUTO) else key


def _vae_of_whole(opened: Bundle) -> tuple[TensorSource, ModelInfo]:
    """The VAE of a complete model; raises if something that the checkpoint loader returns is missing."""
    if opened.dit is None:
        raise wrong_kind(opened.path, opened.kind, "a HunyuanDiT all-in-one checkpoint")
    parts = {"BERT": opened.bert, "mT5": opened.mt5, "VAE": opened.vae}
    missing = [name for name, part in parts.items() if part is None]
    if opened.vae is None or missing:
        raise WeightsError(
            f"{opened.path} is {opened.kind.name} without {' and '.join(missing)}; "
            "load it with HyDiTDiTLoader, and the rest with HyDiTTextEncoderLoader and VAELoader"
        )
    return opened.vae, opened.info


def wrong_kind(path: Path, kind: FileKind, expected: str) -> WeightsError:
    """The error for a file of the wrong kind, which names the node for it."""
    advice = kind.advice or _ADVICE.get(kind.kind, "choose another")
    return WeightsError(f"{path} is {kind.name}; expected {expected}; {advice}")


def _model_text(opened: Bundle, weight_dtype: str) -> str:
    """For example "HunyuanDiT-g/2 v1.2, ema, fp16"."""
    name = opened.kind.name.removeprefix("a ").removesuffix(" checkpoint").removesuffix(" all-in-one")
    diffusion = opened.info.diffusion
    said = [name, sets_text(opened) or opened.info.variant, _stored(opened.dit, weight_dtype)]
    said += [f"{diffusion.prediction}-prediction"] if diffusion.prediction != "v" else []
    return ", ".join(filter(None, said))


def sets_text(opened: Bundle) -> str:
    """Which of a file's several sets of weights was taken, and what else is there: "ema (not module)"."""
    taken, others = opened.sets
    return f"{taken} (not {', '.join(others)})" if others else ""


def _stored(source: TensorSource | None, weight_dtype: str) -> str:
    """The file's dtype, or how its layers are quantised."""
    if said := quantised_text(source, weight_dtype):
        return said
    dtype = source.main_dtype() if source is not None else None
    return dtype_name(dtype) if dtype is not None else ""
