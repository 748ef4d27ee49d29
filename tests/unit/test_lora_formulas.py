"""What LoRA files mean, by formulas in float64 that are written out and share no code with the library."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import TINY, randomize
from torch import Tensor

from hydit_core.lora.adapter import Adapter, Patch, changed
from hydit_core.lora.formats import from_tensors, read
from hydit_core.lora.fuse import fused
from hydit_core.lora.merge import apply
from hydit_core.model.dit import DiT

WIDTH = TINY.hidden_size
FC1, FINAL = "blocks.1.mlp.fc1", "final_layer.adaLN_modulation.1"
ROWS = {FC1: TINY.mlp_hidden, FINAL: 2 * WIDTH}
NAMES = {FC1: "blocks.1.ff.net.0.proj", FINAL: "norm_out.linear"}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


@pytest.fixture(scope="module")
def model() -> DiT:
    return randomize(DiT(TINY), 1)


def after(model: DiT, adapter: Adapter, strength: float = 1.0) -> dict[str, Tensor]:
    """What has become of the weights and biases that a LoRA changes."""
    before, tuned = model.state_dict(), copy.deepcopy(model)
    apply(adapter, tuned, strength)
    return {key: value for key, value in tuned.state_dict().items() if not torch.equal(value, before[key])}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=2e-6 * float(expected.abs().max())
    )


# -- where the strength comes from -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "metadata", "scale"),
    [
        (None, {}, 1.0),
        (None, {"ss_network_alpha": "2"}, 0.5),
        (None, {"lora_alpha": "12"}, 3.0),
        (None, {"ss_network_alpha": "None", "lora_alpha": "2"}, 0.5),
        (6.0, {"ss_network_alpha": "2"}, 1.5),
    ],
)
def test_alpha_of_the_tensor_then_of_the_metadata(
    model: DiT, alpha: float | None, metadata: dict[str, str], scale: float
) -> None:
    key = f"lora_unet_{FC1.replace('.', '_')}"
    down, up = rand(4, WIDTH), rand(ROWS[FC1], 4)
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    if alpha is not None:
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    found = after(model, from_tensors(tensors, metadata=metadata), 0.5)
    weight = model.state_dict()[f"{FC1}.weight"].double()
    assert found.keys() == {f"{FC1}.weight"}
    close(found[f"{FC1}.weight"], weight + 0.5 * scale * up.double() @ down.double())


def test_alpha_of_the_tensor_is_over_the_rank_whatever_stands_beside_it(model: DiT, tmp_path: Path) -> None:
    key, down, up = f"base_model.model.{FC1}", rand(4, WIDTH), rand(ROWS[FC1], 4)
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"ss_network_alpha": "1"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = after(model, read(tmp_path))[f"{FC1}.weight"]
    close(found, model.state_dict()[f"{FC1}.weight"].double() + 6 / 4 * up.double() @ down.double())


@pytest.mark.parametrize("rslora", [False, True])
def test_the_bias_of_a_factor_is_scaled_and_a_plain_one_is_not(
    model: DiT, tmp_path: Path, rslora: bool
) -> None:
    """peft's lora_bias: up.bias stands behind the scale, as up.weight does; diff_b is a difference."""
    key, down, up, bias = f"base_model.model.{FC1}", rand(4, WIDTH), rand(ROWS[FC1], 4), rand(ROWS[FC1])
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up, f"{key}.lora_B.bias": bias}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": rslora, "lora_bias": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    found, state = after(model, read(tmp_path), 0.5), model.state_dict()
    close(found[f"{FC1}.bias"], state[f"{FC1}.bias"].double() + 0.5 * scale * bias.double())
    close(
        found[f"{FC1}.weight"],
        state[f"{FC1}.weight"].double() + 0.5 * scale * up.double() @ down.double(),
    )
    key = f"diffusion_model.{FC1}"
    plain = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.diff_b": bias}
    found = after(model, from_tensors({**plain, f"{key}.alpha": torch.tensor(1.0)}), 0.5)
    close(found[f"{FC1}.bias"], state[f"{FC1}.bias"].double() + 0.5 * bias.double())


# -- LoHa and LoKr, in both layouts ------------------------------------------------------------------------


def loha(rows: int, rank: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    t = {
        "hada_w1_a": rand(rows, rank),
        "hada_w1_b": rand(rank, WIDTH, seed=1),
        "hada_w2_a": rand(rows, rank, seed=2),
        "hada_w2_b": rand(rank, WIDTH, seed=3),
    }
    d = {name: tensor.double() for name, tensor in t.items()}
    return t, (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"])


def lokr(rows: int, outer: int, factored: str, rank: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """``outer``: rows of w1; ``factored``: which of "1", "2", "12" are products of two."""
    shapes = {"1": (outer, 2), "2": (rows // outer, WIDTH // 2)}
    tensors, parts = {}, []
    for seed, (number, (high, wide)) in enumerate(shapes.items()):
        if number in factored:
            a, b = rand(high, rank, seed=seed), rand(rank, wide, seed=seed + 5)
            tensors |= {f"lokr_w{number}_a": a, f"lokr_w{number}_b": b}
            parts.append(a.double() @ b.double())
        else:
            tensors[f"lokr_w{number}"] = whole = rand(high, wide, seed=seed)
            parts.append(whole.double())
    w1, w2 = parts
    blocks = [torch.cat([w1[i, j] * w2 for j in range(w1.shape[1])], 1) for i in range(w1.shape[0])]
    return tensors, torch.cat(blocks)


def lora(rows: int, rank: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    down, up = rand(rank, WIDTH), rand(rows, rank, seed=4)
    return {"lora_down.weight": down, "lora_up.weight": up}, up.double() @ down.double()


KINDS = {
    "lora": lora,
    "loha": loha,
    # 4: the halves are halves of w1's rows; 1: of w2's.
    **{f"lokr {outer} {of}": (outer, of) for outer in (1, 4) for of in ("", "1", "2", "12")},
}


def change_of(kind: str, module: str) -> tuple[dict[str, Tensor], Tensor, bool]:
    """The tensors of a file, what they multiply out to, and whether alpha counts for them."""
    made = KINDS[kind]
    if callable(made):
        return *made(ROWS[module]), True
    return *lokr(ROWS[module], *made), bool(made[1])


@pytest.mark.parametrize("module", [FC1, FINAL])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_in_both_layouts(model: DiT, kind: str, module: str) -> None:
    """alpha / rank of its factors, which a Kronecker product of two whole matrices has not.

    In diffusers' layout the final modulation is (scale, shift), in Tencent's (shift, scale).
    """
    tensors, product, has_alpha = change_of(kind, module)
    change = 2 / 3 * product if has_alpha else product
    weight = model.state_dict()[f"{module}.weight"].double()
    bias, plain_bias = rand(ROWS[module]), model.state_dict()[f"{module}.bias"].double()
    half = ROWS[module] // 2
    for name, swap in (
        (f"diffusion_model.{module}", False),
        (f"transformer.{NAMES[module]}", module == FINAL),
    ):
        file = {f"{name}.{key}": value for key, value in tensors.items()}
        file |= {f"{name}.alpha": torch.tensor(2.0), f"{name}.diff_b": bias}
        found = after(model, from_tensors(file), 0.7)
        expected, shift = change, bias.double()
        if swap:
            expected = torch.cat([expected[half:], expected[:half]])
            shift = torch.cat([shift[half:], shift[:half]])
        assert found.keys() == {f"{module}.weight", f"{module}.bias"}
        close(found[f"{module}.weight"], weight + 0.7 * expected)
        close(found[f"{module}.bias"], plain_bias + 0.7 * shift)


@pytest.mark.parametrize("factored", ["", "2"])
def test_the_alpha_of_pefts_kronecker_product(model: DiT, tmp_path: Path, factored: str) -> None:
    """peft scales by alpha / r of its configuration, without factors too."""
    tensors, product = lokr(ROWS[FC1], 4, factored)
    save_file({f"base_model.model.{FC1}.{key}": value for key, value in tensors.items()},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LOKR", "r": 3, "alpha": 8, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = after(model, read(tmp_path))[f"{FC1}.weight"]
    close(found, model.state_dict()[f"{FC1}.weight"].double() + 8 / 3 * product)


# -- DoRA --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr 4 2"])
@pytest.mark.parametrize("diffusers", [False, True])
def test_dora(model: DiT, kind: str, axis: int, diffusers: bool) -> None:
    """W' = m * (W + delta) / ||W + delta||, and a strength goes straight from W to W'."""
    tensors, product, _ = change_of(kind, FINAL)
    rows, half = ROWS[FINAL], WIDTH
    magnitude = rand(rows, 1).abs() + 0.5 if axis == 0 else rand(1, WIDTH).abs() + 0.5
    name = f"transformer.{NAMES[FINAL]}" if diffusers else f"diffusion_model.{FINAL}"
    file = {f"{name}.{key}": value for key, value in tensors.items()}
    file |= {f"{name}.alpha": torch.tensor(2.0), f"{name}.dora_scale": magnitude}
    delta, m = 2 / 3 * product, magnitude.double()
    if diffusers:
        delta = torch.cat([delta[half:], delta[:half]])
        m = m if axis else torch.cat([m[half:], m[:half]])
    weight = model.state_dict()[f"{FINAL}.weight"].double()
    whole = weight + delta
    length = whole.square().sum(dim=1 - axis, keepdim=True).sqrt()
    full = m * whole / length
    for strength in (1.0, 0.3):
        found = after(model, from_tensors(file), strength)[f"{FINAL}.weight"]
        close(found, weight + strength * (full - weight))


def test_a_fresh_dora_changes_nothing() -> None:
    """Its magnitude is the length of the rows, and its up is zero."""
    weight = rand(6, 5)
    patch = Patch(
        "lora",
        {"down": rand(2, 5), "up": torch.zeros(6, 2)},
        magnitude=weight.double().square().sum(1, keepdim=True).sqrt().float(),
    )
    for strength in (1.0, 0.5, -1.0):
        close(changed(weight, [patch], strength), weight)


# -- parts of a fused projection ---------------------------------------------------------------------------


@pytest.mark.parametrize("scales", [(0.5, 0.5), (0.5, 2.0)])
def test_parts_of_a_projection_as_one_change(scales: tuple[float, float]) -> None:
    """q and v of 3 x 4 rows; at one scale and at two, with a bias on v."""
    (a, b), bias = scales, rand(4)
    q = Patch("lora", {"down": rand(2, 5), "up": rand(4, 2)}, a, rows=(0, 4))
    v = Patch("lora", {"down": rand(1, 5), "up": rand(4, 1)}, b, rows=(8, 12), bias=bias)
    expected = torch.zeros(12, 5, dtype=torch.float64)
    expected[:4] = a * rand(4, 2).double() @ rand(2, 5).double()
    expected[8:] = b * rand(4, 1).double() @ rand(1, 5).double()
    whole = fused([q, v], 12)
    close(whole.delta(), expected)
    assert whole.bias is not None
    close(whole.bias, torch.cat([torch.zeros(8), bias]))
    mixed = fused([q, Patch("diff", {"diff": rand(4, 5)}, rows=(4, 8))], 12)
    expected[4:8], expected[8:] = rand(4, 5).double(), 0
    close(mixed.delta(), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_a_change(kind: str) -> None:
    tensors, product, has_alpha = change_of(kind, FC1)
    file = {f"diffusion_model.{FC1}.{key}": value for key, value in tensors.items()}
    file[f"diffusion_model.{FC1}.alpha"] = torch.tensor(-2.0)
    ((patch,),) = from_tensors(file).modules.values()
    expected = float(product.square().sum().sqrt()) * (2 / 3 if has_alpha else 1)
    assert patch.norm() == pytest.approx(expected, rel=1e-5)
