"""All names of dtypes: those that people type, the one that is written, and the safetensors format's."""

from __future__ import annotations

import torch

from .errors import ConfigError

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""The names that are written; :func:`short_name` turns the others into them."""

FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})

COMPUTE = ("auto", "fp32", "fp16", "bf16")
"""The dtypes that a network can be computed in."""

HOST = ("fp32", "fp16", "bf16", "fp8_e4m3fn", "fp8_e5m2")
"""What ComfyUI can keep weights in, under its names: a loader's ``weight_dtype``, besides "default"."""

STORED = ("fp32", "fp16", "bf16", "fp8")
"""The dtypes that commands write weights in."""

_OTHERS = {"fp8_e4m3fn": "fp8"} | {str(dtype).removeprefix("torch."): name for name, dtype in DTYPES.items()}


def short_name(name: str) -> str:
    """``fp16`` for ``float16`` and so on: how a dtype is written here. Other texts stay as they are."""
    return _OTHERS.get(name, name)


def dtype_of(name: str) -> torch.dtype:
    """The dtype with this name. Raises :class:`ConfigError` for any other text."""
    try:
        return DTYPES[short_name(name)]
    except KeyError:
        raise ConfigError(f"unknown dtype {name!r}: use one of {', '.join(DTYPES)}") from None


def dtype_name(dtype: torch.dtype) -> str:
    """``fp16`` for ``torch.float16`` and so on; torch's own name for a dtype without a short one."""
    return short_name(str(dtype).removeprefix("torch."))


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in; "auto" is bf16 on GPUs that have it, fp16 on others, and fp32 on the CPU.

    Raises :class:`ConfigError` for an unknown name, and for 8-bit floats, which are for storage only.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type == "cpu":
            return torch.float32
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if short_name(dtype) not in COMPUTE:
        raise ConfigError(f"unknown dtype {dtype!r}: use one of {', '.join(COMPUTE)}")
    return DTYPES[short_name(dtype)]
