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

from hydit_core.errors import HyditError, LoraError
from hydit_core.facts import ModelInfo
from hydit_core.lora.__main__ import main
from hydit_core.lora.adapter import Adapter, changed
from hydit_core.lora.extract import combine
from hydit_core.lora.fuse import fused
from hydit_core.lora.kinds import Diff, DoRA, LoHa, LoKr, LoRA
from hydit_core.lora.merge import apply
from hydit_core.lora.patch import Patch
from hydit_core.lora.reading import from_tensors, read
from hydit_core.lora.summary import describe, plot
from hydit_core.model.dit import DiT
from hydit_core.weights.save import save_checkpoint

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
    patch = DoRA(
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
    q = LoRA({"down": rand(2, 5), "up": rand(4, 2)}, a, rows=(0, 4))
    v = LoRA({"down": rand(1, 5), "up": rand(4, 1)}, b, rows=(8, 12), bias=bias)
    expected = torch.zeros(12, 5, dtype=torch.float64)
    expected[:4] = a * rand(4, 2).double() @ rand(2, 5).double()
    expected[8:] = b * rand(4, 1).double() @ rand(1, 5).double()
    whole = fused([q, v], 12)
    close(whole.delta(), expected)
    assert whole.bias is not None
    close(whole.bias, torch.cat([torch.zeros(8), bias]))
    mixed = fused([q, Diff({"diff": rand(4, 5)}, rows=(4, 8))], 12)
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


# -- norms of what fits no memory, and of what is damaged --------------------------------------------------


def random_factors(kind: str, rows: int, columns: int, ranks: tuple[int, int]) -> tuple[Patch, Tensor]:
    """A patch of factors of these ranks, and its matrix in float64."""
    shapes = {"w1_a": (rows, ranks[0]), "w1_b": (ranks[0], columns), "w2_a": (rows, ranks[1])}
    shapes["w2_b"] = (ranks[1], columns)
    t = {name: rand(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    d = {name: tensor.double() for name, tensor in t.items()}
    if kind == "lora":
        return LoRA({"up": t["w1_a"], "down": t["w1_b"]}, 0.5), 0.5 * d["w1_a"] @ d["w1_b"]
    one, two = d["w1_a"] @ d["w1_b"], d["w2_a"] @ d["w2_b"]
    if kind == "loha":
        return LoHa(t, 0.5), 0.5 * one * two
    return LoKr(t, 0.5), 0.5 * torch.kron(one, two)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (40, 30), (300, 200)])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (50, 2), (17, 40)])
def test_norms_from_factors(kind: str, size: tuple[int, int], ranks: tuple[int, int]) -> None:
    if kind == "lokr":
        size = (min(size[0], 12), min(size[1], 12))
    patch, matrix = random_factors(kind, *size, ranks)
    assert patch.norm() == pytest.approx(float(matrix.norm()), rel=1e-9)


LONG = 2**18
BOMBS = {
    "lokr": {"lokr_w1": (512, 512), "lokr_w2": (512, 512)},
    "lokr of factors": {
        "lokr_w1_a": (LONG, 1),
        "lokr_w1_b": (1, LONG),
        "lokr_w2_a": (LONG, 1),
        "lokr_w2_b": (1, LONG),
    },
    "loha": {"hada_w1_a": (LONG, 1), "hada_w1_b": (1, LONG), "hada_w2_a": (LONG, 1), "hada_w2_b": (1, LONG)},
    "lora": {"lora_up.weight": (LONG, 1), "lora_down.weight": (1, LONG)},
    "lora of one number": {"lora_up.weight": (1, LONG), "lora_down.weight": (LONG, 1)},
}
NORMS = {
    "lokr": 2.0**18,
    "lokr of factors": 2.0**36,
    "loha": 2.0**18,
    "lora": 2.0**18,
    "lora of one number": 2.0**18,
}


@pytest.mark.parametrize("module", ["blocks_0_attn1_Wqkv", "norm_out_linear"])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_file_that_stands_for_more_than_any_memory(kind: str, module: str) -> None:
    """Looking at it is cheap: of ones, the norm is the root of how many there are (256 GB and more)."""
    tensors = {f"lora_unet_{module}.{name}": torch.ones(shape) for name, shape in BOMBS[kind].items()}
    adapter = from_tensors(tensors)
    ((patch,),) = adapter.modules.values()
    assert patch.norm() == pytest.approx(NORMS[kind])
    if module == "norm_out_linear":
        assert f"{NORMS[kind]:.4g}" in describe(adapter)
    if patch.kind != "lora":
        with pytest.raises(LoraError, match="larger than any layer"):
            combine([(adapter, 1.0)], 2)


# -- damaged numbers ---------------------------------------------------------------------------------------


def test_a_change_beyond_all_numbers_is_shown(tmp_path: Path) -> None:
    key = f"diffusion_model.{FC1}"
    tensors = {
        f"{key}.lora_down.weight": torch.ones(2, WIDTH) * 1e30,
        f"{key}.lora_up.weight": torch.ones(2, 2),
    }
    adapter = from_tensors({**tensors, f"{key}.alpha": torch.tensor(1e300, dtype=torch.float64)})
    assert "inf" in describe(adapter)
    plot(adapter, tmp_path / "plot.png")


def two_modules(value: float, where: str) -> dict[str, Tensor]:
    tensors = {}
    for module in (FC1, FINAL):
        key = f"diffusion_model.{module}"
        tensors |= {f"{key}.lora_down.weight": rand(2, WIDTH), f"{key}.lora_up.weight": rand(ROWS[module], 2)}
        tensors |= {f"{key}.alpha": torch.tensor(1.0), f"{key}.diff_b": rand(ROWS[module])}
    tensors[f"diffusion_model.{FINAL}.{where}"].view(-1)[0] = value
    return tensors


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("lora_down.weight", math.nan),
        ("lora_up.weight", math.inf),
        ("alpha", -math.inf),
        ("diff_b", math.nan),
    ],
)
def test_numbers_that_are_not_finite(
    where: str, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """inspect counts them; nothing is made of them."""
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_file(two_modules(value, where), path)
    assert main(["inspect", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    shown = capsys.readouterr().out
    assert f"not finite    1 numbers in 1 modules, first dit.{FINAL}" in shown
    for command in (["combine"], ["combine", "--rank", "1"], ["convert"]):
        assert main([*command, str(path), "-o", str(out)]) == 2
        said = capsys.readouterr().err
        assert f"dit.{FINAL} has 1 numbers that are not finite" in said and said.count("\n") == 1
        assert not out.exists()


def test_what_fp16_does_not_hold_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    save_file(two_modules(70000.0, "lora_up.weight"), path)
    assert main(["convert", str(path), "-o", str(out), "--dtype", "fp16"]) == 2
    said = capsys.readouterr().err
    assert f"{FINAL}.lora_up.weight reaches 7e+04, which fp16 does not hold: use bf16 or fp32" in said
    assert not out.exists() and main(["convert", str(path), "-o", str(out), "--dtype", "bf16"]) == 0


@pytest.mark.parametrize("which", ["tuned", "base", "both"])
def test_checkpoints_with_such_numbers_are_not_extracted(
    model: DiT, which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, key = model.state_dict(), f"{FC1}.weight"
    for name in ("tuned", "base"):
        own = {k: v + 0.1 if name == "tuned" and k == key else v.clone() for k, v in state.items()}
        if which in (name, "both"):
            own[key][0, :2] = torch.tensor([math.inf, math.nan])
        save_checkpoint(tmp_path / f"{name}.safetensors", dit=own, info=ModelInfo.published("v1.2"))
    tuned, base, out = (str(tmp_path / f"{name}.safetensors") for name in ("tuned", "base", "out"))
    assert main(["extract", tuned, base, "--rank", "2", "-o", out]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    named = base if which == "base" else tuned
    assert said == f"error: {named}: {key} has 2 numbers that are not finite; it is damaged"
    assert not Path(out).exists()


def test_a_plot_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    adapter = from_tensors(
        {
            f"diffusion_model.{FC1}.lora_up.weight": rand(ROWS[FC1], 2),
            f"diffusion_model.{FC1}.lora_down.weight": rand(2, WIDTH),
        }
    )
    (tmp_path / "no-folder").write_text("a file")
    with pytest.raises(HyditError, match=r"cannot write .*no-folder"):
        plot(adapter, tmp_path / "no-folder" / "norms.png")
