"""Every name of a dtype means what torch means by it, at every door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hydit_core import dtypes
from hydit_core.errors import ConfigError
from hydit_core.weights.__main__ import main as weights

MEANING = {
    "fp32": torch.float32, "float32": torch.float32,
    "fp16": torch.float16, "float16": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn, "fp8_e4m3fn": torch.float8_e4m3fn, "float8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2, "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


@pytest.mark.parametrize("name", MEANING)
def test_names(name: str) -> None:
    assert dtypes.dtype_of(name) == MEANING[name]
    assert dtypes.DTYPES[dtypes.dtype_name(MEANING[name])] == MEANING[name]
    if MEANING[name].itemsize > 1:
        assert dtypes.choose_dtype(name, torch.device("cpu")) == MEANING[name]


def test_every_list_of_names_is_known() -> None:
    for name in {*dtypes.HOST, *dtypes.STORED, *dtypes.COMPUTE} - {"auto"}:
        assert name in MEANING and dtypes.dtype_of(name) == MEANING[name]


@pytest.mark.parametrize("name", ["float", "FP16", "int8", "torch.float16", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype .*fp32, fp16, bf16"):
        dtypes.dtype_of(name)


def test_nothing_is_computed_in_eight_bits() -> None:
    with pytest.raises(ConfigError, match="unknown dtype 'fp8'"):
        dtypes.choose_dtype("fp8", torch.device("cpu"))


@pytest.mark.parametrize("name", ["bf16", "bfloat16", "fp8_e4m3fn"])
def test_a_command_takes_each_spelling(name: str, tiny_model_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert (
        weights(["convert", str(tiny_model_file), "-o", str(out), "--layout", "tencent", "--dtype", name])
        == 0
    )
    with safe_open(out, "pt") as file:
        assert file.get_tensor("blocks.0.mlp.fc1.weight").dtype == MEANING[name]
