"""Recognizing what a file is, only from its names and shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import HyditError, WeightsError
from ..facts import METADATA_KEY, ModelInfo
from ..model.config import DIT_G2_V12, DIT_XL2_V12, DiTConfig
from ..model.ip_adapter import MARKS as IP_ADAPTER_NAMES
from ..model.ip_adapter import IPAdapterConfig
from .families import LORA, other_family
from .layouts import belongs_to_model, find_model, to_tencent
from .quantised import refuse_quantised
from .source import TensorSource, as_source
from .views import TensorView, rename
from .vision_layout import find_vision, vision_config, vision_view

BERT_PREFIXES = ("text_encoders.hydit_clip.", "cond_stage_model.hydit_clip.", "hydit_clip.")
MT5_PREFIXES = ("text_encoders.mt5xl.", "cond_stage_model.mt5xl.", "mt5xl.")
VAE_PREFIXES = ("vae.", "first_stage_model.")

_WANTED = {
    "dit": "a HunyuanDiT (DiT) checkpoint",
    "controlnet": "a HunyuanDiT ControlNet",
    "lora": "a HunyuanDiT LoRA",
    "bert": "a BERT text encoder",
    "t5": "an mT5 text encoder",
    "vae": "a VAE",
    "ip_adapter": "a HunyuanDiT IP-Adapter",
}
_PUBLISHED = {
    "controlnet": "Tencent-Hunyuan/HYDiT-ControlNet-v1.2",
    "lora": "Tencent-Hunyuan/HYDiT-LoRA",
    "vae": "madebyollin/sdxl-vae-fp16-fix",
    "ip_adapter": "Tencent-Hunyuan/IP-Adapter",
}
"""Where one of each kind can be had; the rest is in Tencent-Hunyuan/HunyuanDiT-v1.2."""
_ADVICE = {
    "lora": "give it as a LoRA, beside the checkpoint that it changes (python -m hydit_core.lora converts "
    "and merges it)",
    "controlnet": "give it as a ControlNet, beside a checkpoint",
    "ip_adapter": "give it as an IP-Adapter, beside a checkpoint",
    "vision": "give it as the image encoder of an IP-Adapter",
    "dit": "give it as the model",
    "bert": "give it as text encoders, beside a checkpoint",
    "t5": "give it as text encoders, beside a checkpoint",
    "vae": "give it as the VAE",
}


@dataclass(frozen=True)
class FileKind:
    """What a file is.

    Attributes:
        kind: ``dit``, ``controlnet``, ``lora``, ``ip_adapter``, ``vision``, ``bert``, ``t5``, ``vae``,
            ``other`` (a known family that is not ours) or ``unknown``.
        name: what to call it in a sentence, such as "a HunyuanDiT-g/2 v1.2 checkpoint".
        version: "v1.2", or "v1.1" for v1.0 too, whose shapes are the same; "" if not ours.
        layout: "tencent", "diffusers" or "comfy" for DiT and ControlNet; others have their own names.
        prefix: the prefix of the model's names in the file.
        config: the dimensions of a DiT or ControlNet.
        parts: which of "bert", "t5", "vae" an all-in-one file holds besides the DiT.
        advice: what to do with such a file; "" for most.
    """

    kind: str
    name: str
    version: str = ""
    layout: str = ""
    prefix: str = ""
    config: DiTConfig | None = None
    parts: tuple[str, ...] = ()
    advice: str = ""


def detect(source: TensorSource | Mapping[str, torch.Tensor]) -> FileKind:
    """Recognize what the tensors are. Reads no tensor data.

    Raises:
        WeightsError: if it is a HunyuanDiT whose dimensions contradict each other.
    """
    source = as_source(source)
    keys = dict.fromkeys(source.keys())
    for rule in (_lora, _ip_adapter, _model, _vision, _other, _encoder, _vae):
        if kind := rule(source, keys):
            return kind
    return FileKind("unknown", "not a weights file of a kind that is known here")


def expect(source: TensorSource, *wanted: str) -> FileKind:
    """:func:`detect`, with an error in one line if the file is of the wrong kind.

    Raises:
        WeightsError: it is something else (the message says what), or its weights are quantised.
    """
    kind = detect(source)
    require_kind(source, kind, *wanted)
    return kind


def require_kind(source: TensorSource, kind: FileKind, *wanted: str) -> None:
    """As :func:`expect`, for a source whose kind is known."""
    if kind.kind in wanted:
        refuse_quantised(source)
        return
    expected = " or ".join(_WANTED[name] for name in wanted)
    advice = what_to_do(source, kind)
    if kind.kind == "other":
        advice += f"; published: {_PUBLISHED.get(wanted[0], 'Tencent-Hunyuan/HunyuanDiT-v1.2')}"
    taken, others = sets(source.metadata)
    if others:
        advice += f"; that is its {taken!r}, it has {', '.join(others)} too: load_key chooses"
    raise WeightsError(f"{source.path} is {kind.name}; expected {expected}; {advice}")


def sets(metadata: Mapping[str, str]) -> tuple[str, tuple[str, ...]]:
    """Of a torch file with several sets of weights the one that was taken, and the others."""
    taken = metadata.get("hydit.load_key", "")
    listed = metadata.get("hydit.load_keys", "").split(", ")
    return taken, tuple(key for key in listed if key and key != taken.partition(".")[0])


def what_to_do(source: TensorSource, kind: FileKind) -> str:
    """What to do with a file of another kind than is wanted; of an unknown one, what can be seen."""
    first = f"the first of its {len(source)} tensors is {next(iter(source), 'none')}"
    return kind.advice or _ADVICE.get(kind.kind, first)


def tencent_view(source: TensorSource, kind: FileKind) -> TensorView:
    """The DiT or ControlNet of a detected file under Tencent's names, without an IP-Adapter among them."""
    view = to_tencent(source, kind.layout, prefix=kind.prefix)  # type: ignore[arg-type]
    if not _has(view, *IP_ADAPTER_NAMES):
        return view
    return rename(view, lambda key: None if _has((key,), *IP_ADAPTER_NAMES) else key)


def adapter_among(source: TensorSource, kind: FileKind) -> bool:
    """Whether an IP-Adapter is among the tensors of a detected file's DiT: :func:`tencent_view` lacks it."""
    return _has([key for key in source if belongs_to_model(key, kind.prefix)], *IP_ADAPTER_NAMES)


def model_size(config: DiTConfig) -> str:
    """``g/2`` or ``XL/2`` for the published dimensions, else the dimensions themselves."""
    return size_name(config.hidden_size, config.depth, config.mlp_hidden)


def size_name(hidden: int, depth: int, mlp: int | None = None) -> str:
    """As :func:`model_size`; None: the MLP's width is not known."""
    for name, known in (("g/2", DIT_G2_V12), ("XL/2", DIT_XL2_V12)):
        wide = known.mlp_hidden if mlp is None else mlp
        if (hidden, depth, wide) == (known.hidden_size, known.depth, known.mlp_hidden):
            return name
    return f"{hidden}x{depth}"


def version_text(config: DiTConfig, metadata: Mapping[str, str]) -> str:
    """The version in words; shapes cannot tell v1.0 from v1.1, but metadata can."""
    if METADATA_KEY in metadata:
        return ModelInfo.from_metadata(metadata, version=config.version).version
    return "v1.2" if config.version == "v1.2" else "v1.1 or v1.0"


Keys = Mapping[str, Any]


def _has(keys: Iterable[str], *words: str) -> bool:
    return any(word in key for key in keys for word in words)


# Ends of names in LoRA files that hold no factors: full differences, also of norms, and whole weights.
_DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm", ".set_weight")


def _lora(source: TensorSource, keys: Keys) -> FileKind | None:
    styles: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("PEFT", (".lora_A.", ".lora_B.", ".lora_embedding_A")),
        ("kohya", (".lora_down.", ".lora_up.", ".hada_w1_a", ".lokr_w1", ".oft_blocks")),
        ("gui", (".lora.up.", ".lora.down.")),
        ("diffusers", ("_lora.up.", "_lora.down.", ".lora_linear_layer.")),
    )
    style = next((name for name, words in styles if _has(keys, *words)), None)
    if style is None and any(key.startswith("lycoris_") or key.endswith(_DIFFERENCES) for key in keys):
        style = "kohya"
    if style is None:
        return None
    layers = ("attn1.Wqkv.", "attn2.kv_proj.", "attn1.out_proj.", "attn2.out_proj.", "attn2.q_proj.")
    kohya = [name.replace(".", "_", 1) for name in layers]
    if _has(keys, *layers, *kohya, "skip_linear.", "default_modulation"):
        label = {"gui": "Tencent's GUI layout"}.get(style, f"{style} layout")
        return FileKind("lora", f"a HunyuanDiT LoRA ({label})", layout=style.lower())
    if _has(keys, "lora_te1_encoder_layer_") and not _has(keys, "lora_unet_"):
        return FileKind("lora", "a LoRA of HunyuanDiT's BERT (kohya layout)", layout="kohya")
    # diffusers names of this model: blocks.N, not transformer_blocks.N
    ours = [key for key in keys if ".blocks." in f".{key}" and "_blocks." not in key]
    # Wan's blocks have the same names, except for the MLP.
    if _has(dict.fromkeys(ours), ".attn1.to_") and not _has(keys, ".ffn."):
        return FileKind("lora", "a HunyuanDiT LoRA (diffusers names)", layout="diffusers")
    family = _lora_family(keys)
    name = f"a LoRA for {family}, not for HunyuanDiT" if family else "a LoRA of another model"
    return FileKind("other", name, advice=LORA)


def _lora_family(keys: Keys) -> str:
    marks = (
        (
            "HunyuanVideo or HunyuanImage 2.1",
            (".img_attn_qkv.", "_img_mlp_fc1", ".img_mlp.fc1", "token_refiner"),
        ),
        ("Qwen-Image", ("transformer_blocks.0.img_mlp.", "transformer_blocks_0_img_mlp_")),
        ("Flux", ("lora_unet_double_blocks", "single_transformer_blocks", "double_blocks.")),
        ("SD3", ("joint_blocks", "transformer.transformer_blocks.0.attn.add_k_proj")),
        ("SDXL", ("lora_te2_text_model", "lora_unet_input_blocks", "text_encoder_2.")),
        ("SD1.x, SD2 or SDXL", ("down_blocks", "input_blocks", "mid_block")),
    )
    return next((family for family, words in marks if _has(keys, *words)), "")


def _ip_adapter(source: TensorSource, keys: Keys) -> FileKind | None:
    if not _has(keys, *IP_ADAPTER_NAMES) or find_model(keys) is not None:
        return None
    name = "a HunyuanDiT IP-Adapter"
    try:
        config = IPAdapterConfig.from_state_dict(ip_adapter_view(source).shapes())
    except HyditError:  # said when it is to be loaded
        return FileKind("ip_adapter", name, layout="tencent")
    size = size_name(config.hidden_size, config.depth)
    more = " with its image encoder" if find_vision(keys) else ""
    return FileKind("ip_adapter", f"a HunyuanDiT-{size} IP-Adapter{more}", layout="tencent")


def ip_adapter_view(source: TensorSource) -> TensorView:
    """A file's IP-Adapter under Tencent's names, whatever is before them or beside it."""

    def name(key: str) -> str | None:
        if not _has((key,), *IP_ADAPTER_NAMES):
            return None
        start = key.find("blocks.") if "attn2." in key else key.find("ip_adapter_")
        return key[max(start, 0) :]

    return rename(source, name)


def _vision(source: TensorSource, keys: Keys) -> FileKind | None:
    found = find_vision(keys)
    # Beside a text encoder it is part of something else.
    if found is None or _has(keys, "embeddings.word_embeddings.", "token_embedding."):
        return None
    try:
        config = vision_config(vision_view(source, found), found.layout)
    except HyditError:
        return None
    name = f"a CLIP image encoder (width {config.width}, {config.layers} layers, {config.size} px)"
    return FileKind("vision", name, layout=found.layout, prefix=found.prefix)


def _model(source: TensorSource, keys: Keys) -> FileKind | None:
    found = find_model(keys)
    if found is None:
        return None
    layout, prefix = found
    view = to_tencent(source, layout, prefix=prefix)
    try:
        config = DiTConfig.from_state_dict(view.shapes(), **_heads(source))
    except HyditError as error:
        raise WeightsError(f"{source.path} looks like a HunyuanDiT, but: {error}") from error
    version = version_text(config, source.metadata)
    name = f"HunyuanDiT-{model_size(config)} {version}"
    if "final_layer.linear.weight" not in view:
        return FileKind("controlnet", f"a {name} ControlNet", config.version, layout, prefix, config)
    parts = tuple(part for part, prefixes in _PARTS.items() if any(k.startswith(prefixes) for k in keys))
    what = f"a {name} all-in-one checkpoint" if parts else f"a {name} checkpoint"
    if not _has(keys, *IP_ADAPTER_NAMES):
        return FileKind("dit", what, config.version, layout, prefix, config, parts)
    what, advice = (
        f"{what} with an IP-Adapter inside",
        "give it as the model, and as the IP-Adapter too to use that",
    )
    return FileKind("dit", what, config.version, layout, prefix, config, parts, advice)


_PARTS = {"bert": BERT_PREFIXES, "t5": MT5_PREFIXES, "vae": VAE_PREFIXES}


def _heads(source: TensorSource) -> dict[str, int]:
    """What is needed for the dimensions but not visible in shapes."""
    if METADATA_KEY not in source.metadata:
        return {}
    info = ModelInfo.from_metadata(source.metadata, version="v1.2")
    return {"pooler_heads": info.pooler_heads, "rope_base": info.rope_base}


def _other(source: TensorSource, keys: Keys) -> FileKind | None:
    family = other_family(source.shapes())
    return FileKind("other", family.name, advice=family.advice) if family else None


def _anchored(keys: Keys, anchor: str, also: Callable[[str], str]) -> str | None:
    """The prefix before ``anchor``, if the name that ``also`` makes of it exists too."""
    for key in keys:
        if key.endswith(anchor):
            prefix = key[: -len(anchor)]
            if also(prefix) in keys:
                return prefix
    return None


def _encoder(source: TensorSource, keys: Keys) -> FileKind | None:
    prefix = _anchored(
        keys,
        "embeddings.word_embeddings.weight",
        lambda p: f"{p}encoder.layer.0.attention.self.query.weight",
    )
    if prefix is not None:
        vocab, width = _matrix(source, f"{prefix}embeddings.word_embeddings.weight")
        name = f"a BERT text encoder (width {width}, vocabulary {vocab})"
        name += " with a CLIP image encoder" if find_vision(keys) else ""
        return FileKind("bert", name, layout="transformers", prefix=prefix)
    first = "encoder.block.0.layer.0.SelfAttention.q.weight"
    prefix = _anchored(keys, first, lambda p: f"{p}{first}")
    if prefix is None:
        return None
    width = _matrix(source, prefix + first)[1]
    gated = f"{prefix}encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in keys
    vocab = _matrix(source, f"{prefix}shared.weight")[0] if f"{prefix}shared.weight" in keys else 0
    name = f"{'an mT5 or T5 v1.1' if gated else 'a T5 v1.0'} text encoder (width {width}, vocabulary {vocab})"
    return FileKind("t5", name, layout="transformers", prefix=prefix)


def _matrix(source: TensorSource, key: str) -> tuple[int, int]:
    shape = source.shape(key)
    if len(shape) != 2:
        raise WeightsError(f"{source.path} looks like a text encoder, but {key} has shape {shape}")
    return shape[0], shape[1]


def _vae(source: TensorSource, keys: Keys) -> FileKind | None:
    from .vae_layout import detect_vae

    found = detect_vae(keys)
    if found is None:
        return None
    kind = "AutoencoderKL" if found.architecture == "kl" else "AutoencoderTiny (TAESD)"
    return FileKind("vae", f"a VAE ({kind}, {found.layout} names)", layout=found.layout, prefix=found.prefix)
