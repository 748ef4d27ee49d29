"""Quantised weights that cannot be read: recognized by the names of their scales, and refused by name.

Without its scale such a weight is wrong, hundreds of times too large, and its shape does not show it.
ComfyUI's formats in 8 bits are read, see :mod:`.unpacking`.
"""

from __future__ import annotations

import re

from ..errors import WeightsError
from .packed import FORMATS
from .source import TensorSource
from .unpacking import METADATA, NOTE, is_read, layer_notes

# The family that writes such weights, and what is at the end of a name, or in it.
_MARKS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$")),
    ("bitsandbytes", re.compile(r"\.quant_state\.")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("optimum-quanto", re.compile(r"\.(weight\._(data|scale|shift)|weight_qtype|(input|output)_scale)$")),
    ("torchao", re.compile(r"\.weight[:_.]+(qdata|tensor_impl|int_data|layout_tensor|zero_point)(\.|$)")),
    ("ComfyUI's scaled fp8, without its scales", re.compile(r"(^|\.)(scale_weight|scale_input)$")),
    ("scaled fp8 or int8", re.compile(r"(^|\.)\w*weight_(scale|zero_point|shape|packed)(_inv|_2)?$")),
    ("scaled fp8 or int8", re.compile(r"\.weight\.(scale|scales|zero_point|zeros?)$")),
)
_METADATA = ("quantization_config", "quantization_metadata")


def quantised(source: TensorSource) -> str | None:
    """What quantised a source in a way that is not read, and what shows it; None for other weights."""
    metadata = source.metadata
    found = next((key for key in _METADATA if key in metadata), None)
    if found is not None:
        return f"it is quantised: metadata {found}"
    if METADATA in metadata or any(name.endswith(f".{NOTE}") for name in source):
        for layer, note in layer_notes(source).items():
            if not is_read(form := note.get("format")):
                return f"it is quantised (ComfyUI's {str(form)[:40]}): {layer}"
    for name in source:
        for family, mark in _MARKS:
            if mark.search(name):
                return f"it is quantised ({family}): {name}"
    return None


def refuse_quantised(source: TensorSource) -> None:
    """Raise :class:`WeightsError` for a file whose weights are meaningless without the scales beside them."""
    if said := quantised(source):
        raise WeightsError(
            f"{source.path}: {said}. Such weights cannot be read; use the model in fp16 or bf16, or in "
            f"ComfyUI's {', '.join(FORMATS)}"
        )
