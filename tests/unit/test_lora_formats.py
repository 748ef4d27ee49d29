"""LoRA files of every layout: read as the numbers in the file say, and written back exactly."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from key_lists import key_list
from PIL import Image
from safetensors.torch import save_file
from tiny import TINY
from torch import Tensor

from hydit_core.errors import HyditError, LoraError
from hydit_core.lora.__main__ import main
from hydit_core.lora.adapter import changed, module_shapes
from hydit_core.lora.extract import combine
from hydit_core.lora.merge import apply
from hydit_core.lora.reading import from_tensors, read
from hydit_core.lora.summary import describe, plot
from hydit_core.lora.writing import FORMATS, to_tensors, write
from hydit_core.model.dit import DiT

WIDTH = TINY.hidden_size
WQKV, FC1 = "blocks.0.attn1.Wqkv", "blocks.1.mlp.fc1"


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(name: str, up: str, down: str, rank: int = 4, rows: int = 3 * WIDTH) -> dict[str, Tensor]:
    return {f"{name}.{down}": rand(rank, WIDTH), f"{name}.{up}": rand(rows, rank)}


def product(tensors: dict[str, Tensor], scale: float) -> Tensor:
    down, up = tensors.values()
    return (scale * up.double() @ down.double()).float()


def only(adapter, module: str) -> Tensor:
    assert set(adapter.modules) == {f"dit.{module}"}
    rows = 3 * WIDTH
    return changed(torch.zeros(rows, WIDTH), adapter.modules[f"dit.{module}"])


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [
        (f"base_model.model.{WQKV}", "lora_B.weight", "lora_A.weight"),
        (f"base_model.model.{WQKV}", "lora_B.default.weight", "lora_A.default.weight"),
        (WQKV, "lora_B.weight", "lora_A.weight"),
        (f"diffusion_model.{WQKV}", "lora_up.weight", "lora_down.weight"),
        ("lora_unet_" + WQKV.replace(".", "_"), "lora_up.weight", "lora_down.weight"),
    ],
)
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_spellings_and_alpha(name: str, up: str, down: str, alpha: float | None) -> None:
    tensors = pair(name, up, down)
    expected = product(tensors, 1.0 if alpha is None else alpha / 4)
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    torch.testing.assert_close(only(from_tensors(tensors), WQKV), expected)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1 / math.sqrt(4)), (2.0, 0.5)])
def test_tencents_interface(alpha: float | None, scale: float) -> None:
    """Underscores are dots there, and without an alpha its strength is 1 / sqrt(rank)."""
    name = "unet." + WQKV.replace("_", ".")
    tensors = pair(name, "lora.up.weight", "lora.down.weight")
    expected = product(tensors, scale)
    if alpha is not None:
        tensors[f"{name}.weight.alpha"] = torch.tensor(alpha)
    adapter = from_tensors(tensors)
    torch.testing.assert_close(only(adapter, WQKV), expected)
    assert adapter.format == "tencent-gui"


def test_names_of_diffusers_are_rows_of_the_fused_projection() -> None:
    tensors, expected = {}, torch.zeros(3 * WIDTH, WIDTH)
    for i, part in enumerate("qv"):
        name = f"transformer.blocks.0.attn1.to_{part}"
        one = pair(name, "lora_B.weight", "lora_A.weight", rank=2 + i, rows=WIDTH)
        first = {"q": 0, "v": 2 * WIDTH}[part]
        expected[first : first + WIDTH] = product(one, 1.0)
        tensors |= one
    torch.testing.assert_close(only(from_tensors(tensors), WQKV), expected)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": 4, "lora_alpha": 12}, 3.0),
        ({"r": 4, "lora_alpha": 12, "use_rslora": True}, 6.0),
        ({"r": 8, "lora_alpha": 8, "rank_pattern": {"Wqkv": 4}, "alpha_pattern": {"Wqkv": 2}}, 0.5),
    ],
)
def test_the_strength_of_a_peft_folder(tmp_path: Path, config: dict, scale: float) -> None:
    tensors = pair(f"base_model.model.{WQKV}", "lora_B.weight", "lora_A.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        torch.testing.assert_close(only(read(path), WQKV), product(tensors, scale))


@pytest.mark.parametrize(
    ("config", "metadata", "alpha"),
    [
        ({"r": 4, "lora_alpha": 1e300}, {}, None),
        ({"r": 4, "alpha_pattern": {"Wqkv": -1e300}}, {}, None),
        (None, {"ss_network_alpha": "1e300"}, None),
        (None, {}, torch.tensor(1e300, dtype=torch.float64)),
        (None, {}, torch.tensor(float("inf"))),
    ],
)
def test_a_scale_beyond_all_numbers(tmp_path: Path, config: Any, metadata: Any, alpha: Any) -> None:
    """It would end in torch's "cannot be converted to type float without overflow"."""
    tensors = pair(f"base_model.model.{WQKV}", "lora_B.weight", "lora_A.weight")
    if alpha is not None:
        tensors[f"base_model.model.{WQKV}.alpha"] = alpha
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    adapter = read(tmp_path / "adapter_model.safetensors")
    assert describe(adapter)
    with pytest.raises(LoraError, match=r"adapter_model: the alpha of .*Wqkv makes a scale of "):
        apply(adapter, DiT(TINY))


def test_hadamard_and_kronecker_products() -> None:
    name = f"diffusion_model.{WQKV}"
    rows = 3 * WIDTH
    loha = {"hada_w1_a": rand(rows, 2), "hada_w1_b": rand(2, WIDTH), "hada_w2_a": rand(rows, 2)}
    loha["hada_w2_b"] = rand(2, WIDTH) + 1
    first, second = (loha[f"hada_w{i}_a"].double() @ loha[f"hada_w{i}_b"].double() for i in (1, 2))
    found = from_tensors({f"{name}.{k}": v for k, v in loha.items()} | {f"{name}.alpha": torch.tensor(1.0)})
    torch.testing.assert_close(only(found, WQKV), (first * second / 2).float(), atol=1e-5, rtol=1e-5)

    lokr = {"lokr_w1": rand(3, 2), "lokr_w2_a": rand(WIDTH, 2), "lokr_w2_b": rand(2, WIDTH // 2)}
    inner = lokr["lokr_w2_a"].double() @ lokr["lokr_w2_b"].double()
    expected = torch.kron(lokr["lokr_w1"].double(), inner) / 2
    found = from_tensors({f"{name}.{k}": v for k, v in lokr.items()} | {f"{name}.alpha": torch.tensor(1.0)})
    torch.testing.assert_close(only(found, WQKV), expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_scales_to_its_magnitude(axis: int) -> None:
    """m * (W + delta) / ||W + delta||, over the axis that the magnitude's shape tells."""
    weight, name = rand(3 * WIDTH, WIDTH), f"diffusion_model.{WQKV}"
    tensors = pair(name, "lora_up.weight", "lora_down.weight")
    magnitude = rand(3 * WIDTH, 1).abs() if axis == 0 else rand(1, WIDTH).abs()
    whole = weight + product(tensors, 1.0)
    expected = magnitude * whole / whole.norm(dim=1 - axis, keepdim=True)
    adapter = from_tensors({**tensors, f"{name}.dora_scale": magnitude})
    found = changed(weight, adapter.modules[f"dit.{WQKV}"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_written_files_read_back_exactly(tmp_path: Path, format: str) -> None:
    tensors = pair(f"diffusion_model.{WQKV}", "lora_up.weight", "lora_down.weight")
    tensors |= pair(f"diffusion_model.{FC1}", "lora_up.weight", "lora_down.weight", rank=3)
    tensors[f"diffusion_model.{WQKV}.alpha"] = torch.tensor(2.0)
    adapter = from_tensors(tensors)
    path = tmp_path / ("folder" if format == "peft" else "file.safetensors")
    write(adapter, path, format=format, metadata={"modelspec.title": "a style"})
    back = read(path)
    assert set(back.modules) == set(adapter.modules) and back.format == format
    for module, (patch,) in adapter.modules.items():
        (found,) = back.modules[module]
        assert found.scale == patch.scale
        assert all(torch.equal(found.tensors[name], patch.tensors[name]) for name in ("up", "down"))


def test_two_matrices_in_one_state_dict_survive() -> None:
    tensors = pair(f"diffusion_model.{WQKV}", "lora_up.weight", "lora_down.weight")
    assert set(from_tensors(to_tensors(from_tensors(tensors), format="comfy")).modules) == {f"dit.{WQKV}"}


def test_all_402_tensors_of_the_published_size_match() -> None:
    """Their shapes alone: every tensor is one zero, repeated."""
    shapes = key_list("g2_v12")
    ends = ("Wqkv.weight", "q_proj.weight", "kv_proj.weight", "out_proj.weight")
    tensors = {}
    for key, shape in shapes.items():
        if key.endswith(ends):
            name = f"base_model.model.{key.removesuffix('.weight')}"
            tensors[f"{name}.lora_A.weight"] = torch.zeros(1).expand(64, shape[1])
            tensors[f"{name}.lora_B.weight"] = torch.zeros(1).expand(shape[0], 64)
    assert len(tensors) == 402
    assert sum(tensor.numel() for tensor in tensors.values()) == 46_137_344
    match = from_tensors(tensors).require(module_shapes(shapes), base="HunyuanDiT-g/2 v1.2")
    assert len(match.matched) == 201 and not match.unmatched


def test_another_width_is_refused() -> None:
    tensors = pair(f"base_model.model.{WQKV}", "lora_B.weight", "lora_A.weight")
    with pytest.raises(LoraError, match="HunyuanDiT-g/2"):
        from_tensors(tensors).require(module_shapes(key_list("g2_v12")), base="HunyuanDiT-g/2")


def test_no_match_is_refused() -> None:
    tensors = pair("diffusion_model.blocks.77.attn1.Wqkv", "lora_up.weight", "lora_down.weight")
    shapes = module_shapes({key: tuple(t.shape) for key, t in DiT(TINY, device="meta").state_dict().items()})
    with pytest.raises(LoraError):
        from_tensors(tensors).require(shapes, base="the model")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ([f"lora_unet_down_blocks_1_attentions_0_proj_in.lora_{n}.weight" for n in ("up", "down")], "SDXL"),
        (["ip_adapter_img_norm_cond.weight", "blocks.0.attn2.kv_proj_ip_adapter.weight"], "IP-Adapter"),
        (["something.weight"], "something.weight"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, capsys, keys: list[str], what: str) -> None:
    path = tmp_path / "other.safetensors"
    save_file({key: torch.zeros(4, 4) for key in keys}, path)
    with pytest.raises(HyditError, match=what):
        read(path)
    assert main(["inspect", str(path)]) != 0
    said = capsys.readouterr()
    assert "other.safetensors" in said.err and what in said.err and "Traceback" not in said.err


def test_wrappers_of_modules_anywhere_in_a_name() -> None:
    """torch.compile, FSDP, checkpointing, DataParallel: outside, inside, several, with dots and without."""
    ends = ("lora_B.weight", "lora_A.weight")
    for wrapper in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"):
        for name in (
            f"{wrapper}.base_model.model.{WQKV}",
            f"base_model.model.{wrapper}.{WQKV}",
            f"base_model.model.blocks.0.{wrapper}.attn1.{wrapper}.Wqkv",
            f"{wrapper}.module.diffusion_model.{WQKV}.{wrapper}",
            f"lora_unet_{wrapper}_blocks_0_attn1_Wqkv",
            f"lora_unet_blocks_0_{wrapper}_attn1_Wqkv",
            f"unet.{wrapper}.{WQKV}".replace("_", "."),
        ):
            tensors = pair(name, *ends)
            torch.testing.assert_close(only(from_tensors(tensors), WQKV), product(tensors, 1.0))


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "transformer.", "_orig_mod."])
def test_names_of_diffsynth(prefix: str) -> None:
    """q, k, v as in diffusers' layout, but to_out, mlp.0, mlp.2 and modulation.1; alone and together."""
    theirs = {
        "attn1.to_out": "attn1.out_proj",
        "attn2.to_out": "attn2.out_proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
        "modulation.1": "default_modulation.1",
    }
    ends = ("lora_B.default.weight", "lora_A.default.weight")
    for beside in ({}, pair(f"{prefix}blocks.0.attn1.to_q", *ends, rows=WIDTH)):
        tensors = dict(beside)
        for name in theirs:
            tensors |= pair(f"{prefix}blocks.3.{name}", *ends)
        found = from_tensors(tensors).modules
        assert set(found) == {f"dit.blocks.3.{name}" for name in theirs.values()} | (
            {"dit.blocks.0.attn1.Wqkv"} if beside else set()
        )
        assert all(patch.rows is None for name, (patch,) in found.items() if ".3." in name)


def test_older_attention_processors_of_diffusers() -> None:
    name = "transformer.blocks.0.attn1.processor.to_out_lora"
    tensors = pair(name, "up.weight", "down.weight")
    torch.testing.assert_close(only(from_tensors(tensors), "blocks.0.attn1.out_proj"), product(tensors, 1.0))


@pytest.mark.parametrize("number", ["1000000001", "10000", "007", "-1", "\u0663", "9" * 900])
def test_nothing_is_sized_by_a_number_in_a_name(tmp_path: Path, number: str) -> None:
    """It is no block of any model: unknown, like every other name that is not known."""
    odd = f"diffusion_model.blocks.{number}.attn1.Wqkv"
    tensors = pair(odd, "lora_up.weight", "lora_down.weight")
    with pytest.raises(LoraError, match=r"without a module of HunyuanDiT|no LoRA of a kind"):
        from_tensors(tensors)
    tensors |= pair(f"diffusion_model.{WQKV}", "lora_up.weight", "lora_down.weight")
    adapter = from_tensors(tensors)
    assert len(adapter.modules) == 2
    shapes = module_shapes({f"{WQKV}.weight": (3 * WIDTH, WIDTH)})
    assert len(adapter.matched(shapes).unmatched) == 1
    combine([(adapter, 1.0)], 2)
    assert "norm of the change" in describe(adapter)
    plot(adapter, tmp_path / "plot.png")


def test_the_changes_of_a_part_go_by_their_names_in_it() -> None:
    adapter = from_tensors(pair(f"diffusion_model.{WQKV}", "lora_up.weight", "lora_down.weight"))
    assert list(adapter.part("dit")) == [WQKV] and not adapter.part("bert")


def test_a_plot_goes_from_white_over_blue_to_black(tmp_path: Path) -> None:
    tensors = {}
    for block, share in enumerate((0.01, 0.5, 1.0)):
        key = f"diffusion_model.blocks.{block}.mlp.fc1"
        tensors[f"{key}.lora_up.weight"] = torch.full((2 * WIDTH, 1), share)
        tensors[f"{key}.lora_down.weight"] = torch.ones(1, WIDTH)
    plot(from_tensors(tensors), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        colors = image.convert("RGB").getcolors(2**16) or []
        foot = np.asarray(image.convert("L"))[-22:]
    (labels,) = np.nonzero((foot < 100).any(0))
    assert labels.max() - labels.min() < 12  # every fifth block has its number: here the first alone
    areas = [color for count, color in sorted(colors, reverse=True) if count > 300]
    assert areas[0] == (255, 255, 255)
    black, blue, light = sorted(areas[1:])
    assert black == (0, 0, 0) and min(light) > 245
    assert 30 < blue[0] < blue[1] < blue[2] - 50 < 200


def test_far_blocks_make_no_wide_picture(tmp_path: Path) -> None:
    tensors = pair("diffusion_model.blocks.9999.mlp.fc1", "lora_up.weight", "lora_down.weight")
    tensors |= pair(f"diffusion_model.{WQKV}", "lora_up.weight", "lora_down.weight")
    plot(from_tensors(tensors), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width < 2000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"alpha": torch.ones(2)}, r"alpha has the shape \(2,\); expected one number"),
        ({"alpha": torch.ones(0)}, "expected one number"),
        ({"lora_down.weight": torch.tensor(1.0)}, r"the shape \(\); expected 2 dimensions"),
        ({"lora_up.weight": torch.ones(3 * WIDTH)}, "expected 2 dimensions or more"),
        ({"lora_down.weight": torch.ones(0, WIDTH), "lora_up.weight": torch.ones(3, 0)}, "none empty"),
        ({"lora_up.weight": torch.ones(3, 4, dtype=torch.int8)}, "int8; expected floating-point"),
        ({"lora_up.weight": torch.ones(3, 4, dtype=torch.complex64)}, "complex64; expected floating-point"),
        ({"dora_scale": torch.tensor(1.0)}, "expected 1 dimensions or more"),
        ({"diff_b": torch.tensor(1.0)}, "expected 1 dimensions or more"),
        ({"lora_up.weight": torch.ones(3, 5)}, "do not belong together"),
    ],
)
def test_tensors_of_impossible_forms(changes: dict[str, Tensor], said: str) -> None:
    name = f"diffusion_model.{WQKV}"
    tensors = pair(name, "lora_up.weight", "lora_down.weight")
    with pytest.raises(LoraError, match=said) as error:
        from_tensors(tensors | {f"{name}.{key}": value for key, value in changes.items()})
    assert WQKV in str(error.value)


def test_long_names_are_refused_at_once(tmp_path: Path) -> None:
    tensors = pair("transformer." * 1_000_000 + WQKV, "lora_up.weight", "lora_down.weight")
    begin = time.perf_counter()
    with pytest.raises(LoraError, match=r"a tensor name of 12,\d{3},\d{3} characters") as error:
        from_tensors(tensors)
    assert time.perf_counter() - begin < 2 and len(str(error.value)) < 300
