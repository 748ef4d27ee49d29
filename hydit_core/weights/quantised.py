"""Quantised weights: recognized by the names of their scales, and refused until they can be read.

Without its scale such a weight is wrong, hundreds of times too large, and its shape does not show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..errors import WeightsError
from .source import TensorSource

# The family that writes such weights, and what is at the end of a name, or in it.
_MARKS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("ComfyUI's scaled fp8", re.compile(r"(^|\.)(scaled_fp8|scale_weight|scale_input)$")),
    ("ComfyUI's quantised layers", re.compile(r"(^|\.)comfy_quant$")),
    ("bitsandbytes", re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format)$")),
    ("bitsandbytes", re.compile(r"\.quant_state\.")),
    ("GPTQ or AWQ", re.compile(r"\.(qweight|qzeros|g_idx)$")),
    ("optimum-quanto", re.compile(r"\.(weight\._(data|scale|shift)|weight_qtype|(input|output)_scale)$")),
    ("torchao", re.compile(r"\.weight[:_.]+(qdata|tensor_impl|int_data|layout_tensor|zero_point)(\.|$)")),
    ("scaled fp8 or int8", re.compile(r"(^|\.)\w*weight_(scale|zero_point|shape|packed)(_inv|_2)?$")),
    ("scaled fp8 or int8", re.compile(r"\.weight\.(scale|scales|zero_point|zeros?)$")),
)
_METADATA = ("_quantization_metadata", "quantization_config", "quantization_metadata")


def quantised(names: Iterable[str], metadata: Mapping[str, str]) -> str | None:
    """What quantised a file, and the name that shows it; None for ordinary weights."""
    found = next((key for key in _METADATA if key in metadata), None)
    if found is not None:
        return f"it is quantised: metadata {found}"
    for name in names:
        for family, mark in _MARKS:
            if mark.search(name):
                return f"it is quantised ({family}): {name}"
    return None


def refuse_quantised(source: TensorSource) -> None:
    """Raise :class:`WeightsError` for a file whose weights are meaningless without the scales beside them."""
    if said := quantised(source, source.metadata):
        raise WeightsError(
            f"{source.path}: {said}. Such weights cannot be read yet; use the model in fp16 or bf16"
        )
