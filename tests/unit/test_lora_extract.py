"""LoRAs out of LoRAs, and out of two checkpoints, against full singular value decompositions."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY, randomize

from hydit_core.embedded import ASSETS
from hydit_core.errors import ConfigError, LoraError, WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.layer_weights import LayerWeights
from hydit_core.lora import reading, writing
from hydit_core.lora.__main__ import main
from hydit_core.lora.adapter import Adapter
from hydit_core.lora.blocks import BlockWeights
from hydit_core.lora.cli import lowest
from hydit_core.lora.extract import combine, cut, extract
from hydit_core.lora.kinds import BiasOnly, Diff, DoRA, LoHa, LoRA
from hydit_core.lora.merge import apply, merge_files
from hydit_core.lora.summary import plot
from hydit_core.lora.weighted import weighted
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.weights.bundle import bundle
from hydit_core.weights.convert import convert
from hydit_core.weights.save import save_checkpoint

SHAPES = {
    "dit.blocks.0.attn1.Wqkv": (192, 64),
    "dit.blocks.1.mlp.fc2": (64, 128),
    "dit.pooler.q_proj": (32, 32),
}


def lora(rank: int, seed: int, scale: float = 1.0, names: tuple[str, ...] = tuple(SHAPES)) -> Adapter:
    generator, modules = torch.Generator().manual_seed(seed), {}
    for name in names:
        out, columns = SHAPES[name]
        down = torch.randn(rank, columns, generator=generator)
        up = torch.randn(out, rank, generator=generator)
        modules[name] = [LoRA({"down": down, "up": up}, scale)]
    return Adapter(
        modules, f"lora{seed}", metadata={"same": "x", "own": str(seed), "hydit.trigger": f"w{seed}"}
    )


def total(module: str, *given: tuple[Adapter, float]) -> torch.Tensor:
    return sum(s * p.delta() for a, s in given for p in a.modules.get(module, []))  # type: ignore[return-value]


def close(found: torch.Tensor, expected: torch.Tensor, share: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


def test_concatenation_is_exact() -> None:
    one, two = (lora(3, 1), 0.5), (lora(2, 2, 0.25, tuple(SHAPES)[:2]), -2.0)
    done = combine([one, two])
    assert done.energy == 1 and set(done.adapter.modules) == set(SHAPES)
    assert [done.adapter.modules[name][0].rank for name in SHAPES] == [5, 5, 3]
    for name in SHAPES:
        close(done.adapter.modules[name][0].delta(), total(name, one, two))
    # At one scale, not a number changes.
    (patch,) = done.adapter.modules["dit.blocks.0.attn1.Wqkv"]
    assert torch.equal(
        patch.tensors["down"][:3], one[0].modules["dit.blocks.0.attn1.Wqkv"][0].tensors["down"]
    )
    assert torch.equal(patch.tensors["up"], torch.cat([
        one[0].modules["dit.blocks.0.attn1.Wqkv"][0].tensors["up"],
        two[0].modules["dit.blocks.0.attn1.Wqkv"][0].tensors["up"],
    ], 1) * torch.tensor([0.5] * 3 + [-0.5] * 2) / patch.scale)  # fmt: skip
    metadata = done.adapter.metadata
    assert metadata["same"] == "x" and "own" not in metadata
    assert metadata["hydit.trigger"] == metadata["modelspec.trigger_phrase"] == "w1, w2"
    assert json.loads(metadata["hydit.combined"]) == [
        {"lora": "lora1", "strength": 0.5},
        {"lora": "lora2", "strength": -2.0},
    ]


def test_svd_to_full_rank_is_exact_and_less_is_the_best(tmp_path: Path) -> None:
    one, two = (lora(24, 1), 1.0), (lora(24, 2, 0.5), 0.7)
    # 48 components, of which the 32 x 32 matrix has but 32.
    full = combine([one, two], 40).adapter
    assert full.modules["dit.pooler.q_proj"][0].rank == 32
    close(full.modules["dit.pooler.q_proj"][0].delta(), total("dit.pooler.q_proj", one, two))
    for rank in (1, 7, 47):
        done = combine([one, two], rank)
        kept = there = 0.0
        for name in SHAPES:
            u, values, v = torch.linalg.svd(total(name, one, two).double(), full_matrices=False)
            best = (u[:, :rank] * values[:rank]) @ v[:rank]
            close(done.adapter.modules[name][0].delta().double(), best, 1e-5)
            energy = values.square()
            assert done.modules[name] == pytest.approx(float(energy[:rank].sum() / energy.sum()), abs=1e-6)
            kept, there = kept + float(energy[:rank].sum()), there + float(energy.sum())
        assert done.energy == pytest.approx(kept / there, abs=1e-6)
    # The same when the matrices are made whole first.
    whole = {name: [Diff({"diff": total(name, one, two)})] for name in SHAPES}
    again, done = combine([(Adapter(whole), 1.0)], 7), combine([one, two], 7)
    assert again.energy == pytest.approx(done.energy, abs=1e-6)
    for name in SHAPES:
        close(again.adapter.modules[name][0].delta(), done.adapter.modules[name][0].delta(), 1e-5)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_cut(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for rank in (1, 5, 24, 99):
        down, up, kept, there = cut(matrix, rank)
        u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
        assert down.shape == (min(rank, 24), shape[1]) and up.shape == (shape[0], min(rank, 24))
        close(up @ down, (u[:, :rank] * values[:rank]) @ v[:rank], 1e-9)
        assert kept == pytest.approx(float(values[:rank].square().sum()))
        assert there == pytest.approx(float(values.square().sum()))
        torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


def test_slices_and_biases_combine() -> None:
    """diffusers' q and v beside a whole Wqkv, and q alone beside q."""
    name, generator = "dit.blocks.0.attn1.Wqkv", torch.Generator().manual_seed(9)
    slices = [
        LoRA(
            {"down": torch.randn(2, 64, generator=generator), "up": torch.randn(64, 2, generator=generator)},
            rows=(64 * i, 64 * i + 64),
        )
        for i in (0, 2)
    ]
    sliced, plain = Adapter({name: slices}, "sliced"), lora(3, 1, names=(name,))
    (patch,) = combine([(sliced, 2.0), (plain, 1.0)]).adapter.modules[name]
    expected = plain.modules[name][0].delta()
    for part in slices:
        expected[part.rows[0] : part.rows[1]] += 2 * part.delta()  # type: ignore[index]
    close(patch.delta(), expected)
    parts = combine([(sliced, 2.0), (sliced, 1.0)], rank=2).adapter.modules[name]
    assert [part.rows for part in parts] == [(0, 64), (128, 192)]
    for part, one in zip(parts, slices, strict=True):
        close(part.delta(), 3 * one.delta(), 1e-5)
    bias = Adapter({name: [BiasOnly(bias=torch.ones(192))]})
    (patch,) = combine([(bias, 2.0), (plain, 1.0), (bias, 1.0)]).adapter.modules[name]
    assert patch.bias is not None and torch.equal(patch.bias, torch.full((192,), 3.0))


def test_what_cannot_be_combined() -> None:
    name = "dit.pooler.q_proj"
    down, up = torch.ones(1, 32), torch.ones(32, 1)
    dora = Adapter({name: [DoRA({"down": down, "up": up}, magnitude=torch.ones(32))]}, "d")
    with pytest.raises(LoraError, match=r"d is a DoRA \(dit.pooler.q_proj\)"):
        combine([(dora, 1.0), (lora(1, 1), 1.0)])
    loha = Adapter({name: [LoHa({"w1_a": up, "w1_b": down, "w2_a": up, "w2_b": down})]}, "h")
    with pytest.raises(LoraError, match="is loha, not a product of two factors: give a rank"):
        combine([(loha, 1.0)])
    close(combine([(loha, 2.0)], 1).adapter.modules[name][0].delta(), torch.full((32, 32), 2.0))
    with pytest.raises(LoraError, match="rank 0: use 1 or more"):
        combine([(loha, 1.0)], 0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and what became of it: blocks 0 and 2 and a norm changed, the rest not."""
    folder = tmp_path_factory.mktemp("pair")
    base, generator = randomize(DiT(TINY), 1), torch.Generator().manual_seed(4)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.startswith(("blocks.0.", "blocks.2.")) and name.endswith(".weight"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.03)
    info = ModelInfo.published("v1.2")
    for name, model in (("base", base), ("tuned", tuned)):
        save_checkpoint(folder / f"{name}.safetensors", dit=model.state_dict(), info=info)
    return folder / "base.safetensors", folder / "tuned.safetensors"


def test_extraction_tells_how_far_it_is(pair) -> None:
    base, tuned = pair
    steps: list[tuple[int, int]] = []
    extract(tuned, base, 2, progress=lambda *step: steps.append(step))
    total = len(load_file(base))
    assert steps == [(number, total) for number in range(1, total + 1)]


def test_the_three_modules_that_lose_most_are_told() -> None:
    energies = {"a": 0.5, "b": 0.25, "c": 1.0, "d": 0.125, "e": 0.999}
    assert lowest(energies) == "d 12.5%, b 25.0%, a 50.0%"
    assert lowest({"b": 0.25}) == "b 25.0%"


def test_extract_then_merge_gives_the_tuned_weights_back(pair, tmp_path: Path) -> None:
    base, tuned = pair
    done = extract(tuned, base, 64)
    before, after = load_file(base), load_file(tuned)
    linear = {
        key
        for key in before
        if key.startswith(("blocks.0.", "blocks.2.")) and key.endswith(".weight") and before[key].dim() == 2
    }
    assert {f"{module.removeprefix('dit.')}.weight" for module in done.adapter.modules} == linear
    assert done.energy == pytest.approx(1, abs=1e-12)
    norms = {key for key in before if not torch.equal(before[key], after[key])} - linear
    assert {name.removeprefix("dit.") for name in done.left_out} == norms and norms
    key = sorted(norms)[0]
    assert done.left_out[f"dit.{key}"] == pytest.approx(float((after[key] - before[key]).norm()))
    writing.write(done.adapter, tmp_path / "lora.safetensors")
    merge_files(base, [(tmp_path / "lora.safetensors", 1.0)], tmp_path / "again.safetensors")
    found = load_file(tmp_path / "again.safetensors")
    for key in before.keys() - norms:
        close(found[key], after[key])
    says = json.loads(done.adapter.metadata["hydit.extracted"])
    assert says == {"tuned": "tuned.safetensors", "base": "base.safetensors", "rank": 64, "energy": 1.0}
    assert done.adapter.metadata["hydit.version"] == "v1.2"


def test_extract_to_a_low_rank_from_any_layout(pair, tmp_path: Path) -> None:
    base, tuned = pair
    convert(tuned, tmp_path / "tuned", layout="diffusers")
    convert(base, tmp_path / "base.safetensors", layout="comfy")
    plain, other = extract(tuned, base, 5), extract(tmp_path / "tuned", tmp_path / "base.safetensors", 5)
    before, after = load_file(base), load_file(tuned)
    kept = there = 0.0
    for module, (patch,) in plain.adapter.modules.items():
        key = module.removeprefix("dit.") + ".weight"
        u, values, v = torch.linalg.svd((after[key] - before[key]).double(), full_matrices=False)
        close(patch.delta().double(), (u[:, :5] * values[:5]) @ v[:5], 1e-5)
        assert torch.equal(patch.delta(), other.adapter.modules[module][0].delta())
        kept, there = kept + float(values[:5].square().sum()), there + float(values.square().sum())
    assert plain.energy == other.energy == pytest.approx(kept / there, abs=1e-9)
    assert 0.1 < plain.energy < 0.9


def test_a_merged_lora_comes_out_again(pair, tmp_path: Path) -> None:
    """What was merged at strength 0.8, text encoders' part too, is what extract finds."""
    base, _ = pair
    adapter = lora(3, 1, 0.1)
    merge_files(base, [(adapter, 0.8)], tmp_path / "merged.safetensors")
    found = extract(tmp_path / "merged.safetensors", base, 3)
    assert not found.left_out and found.energy == pytest.approx(1, abs=1e-6)
    for name in SHAPES:
        close(found.adapter.modules[name][0].delta(), total(name, (adapter, 0.8)), 1e-5)


def test_what_cannot_be_extracted(pair, tmp_path: Path) -> None:
    base, tuned = pair
    with pytest.raises(LoraError, match=r"no matrix of .* differs from"):
        extract(base, base, 4)
    other = DiT(DiTConfig(**{**TINY.to_dict(), "mlp_hidden": 64}))
    save_checkpoint(tmp_path / "other.safetensors", dit=other.state_dict(), info=ModelInfo.published("v1.2"))
    with pytest.raises(LoraError, match=r"is no tuned .*blocks\.0\.mlp\.fc1\.bias: \(64,\) and \(128,\)"):
        extract(tmp_path / "other.safetensors", base, 4)
    writing.write(lora(1, 1), tmp_path / "lora.safetensors")
    with pytest.raises(WeightsError, match="is a HunyuanDiT LoRA"):
        extract(tuned, tmp_path / "lora.safetensors", 4)


def test_command_lines(pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = pair
    out = tmp_path / "out.safetensors"
    assert main(["extract", str(tuned), str(base), "-o", str(out), "--rank", "5", "--dtype", "fp32"]) == 0
    said, expected = capsys.readouterr().out, extract(tuned, base, 5)
    assert f"energy kept at rank 5: {expected.energy:.4%}" in said and "left out: " in said
    model, state = randomize(DiT(TINY), 1), load_file(tuned)
    apply(reading.read(out), model)
    key = "blocks.0.mlp.fc1.weight"
    close(
        model.state_dict()[key], load_file(base)[key] + expected.adapter.modules[f"dit.{key[:-7]}"][0].delta()
    )
    assert not torch.equal(model.state_dict()[key], state[key])
    folder = tmp_path / "folder"
    assert main(["combine", f"{out}:0.5", f"{out}:0.25", "-o", str(folder), "--rank", "4"]) == 0
    assert "energy kept at rank 4: " in capsys.readouterr().out
    assert (folder / "adapter_config.json").is_file() and reading.read(folder).ranks() == [4]
    both = tmp_path / "both.safetensors"
    assert main(["combine", f"{out}:0.5", f"{out}:0.25", "-o", str(both)]) == 0
    assert "exact" in capsys.readouterr().out
    (patch,) = reading.read(both).modules[f"dit.{key[:-7]}"]
    close(patch.delta(), 0.75 * expected.adapter.modules[f"dit.{key[:-7]}"][0].delta())
    assert main(["extract", str(base), str(base), "-o", str(out), "--overwrite", "--rank", "5"]) == 2
    assert "nothing that a LoRA could hold" in capsys.readouterr().err


def test_combining_with_block_weights_is_merging_with_them(pair, tmp_path: Path) -> None:
    """The combined file merged at 1, against both files merged with the weights."""
    base, _ = pair
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    writing.write(lora(3, 1, 0.1), one)
    writing.write(lora(2, 2, 0.2), two)
    numbers = ", ".join(["0.5", "0", *["1"] * (TINY.depth - 2)])
    given = ["--block-weights", "decay(0.5)", "--block-weights", numbers]
    files = [f"{one}:0.5", f"{two}:-2"]
    done, expected = tmp_path / "done.safetensors", tmp_path / "expected.safetensors"
    assert main(["combine", *files, "-o", str(done), *given, "--blocks", str(TINY.depth)]) == 0
    assert main(["merge", str(base), *files, "-o", str(expected), *given]) == 0
    merge_files(base, [(done, 1.0)], tmp_path / "found.safetensors")
    before, found = load_file(base), load_file(tmp_path / "found.safetensors")
    for key, value in load_file(expected).items():
        close(found[key], value)
    changed = {key for key in before if not torch.equal(before[key], found[key])}
    assert changed == {f"{name.removeprefix('dit.')}.weight" for name in SHAPES}
    adapter = reading.read(done)
    assert adapter.modules["dit.blocks.1.mlp.fc2"][0].rank == 3  # what weighs 0 is left out
    assert json.loads(adapter.metadata["hydit.combined"]) == [
        {"lora": "one", "strength": 0.5, "block_weights": "decay(0.5)"},
        {"lora": "two", "strength": -2.0, "block_weights": numbers},
    ]
    whole = combine([(reading.read(one), 0.5)], block_weights="0.5").adapter
    for name in SHAPES:
        share = 0.25 if "blocks" in name else 0.5
        close(whole.modules[name][0].delta(), total(name, (reading.read(one), share)))


def test_block_weights_that_cannot_be_combined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"lora1 fits no known model, .*\(--blocks\)"):
        combine([(lora(1, 1), 1.0)], block_weights="only-late")
    with pytest.raises(ConfigError, match="1 blocks to weight, but lora1 is for a model with 2 or more"):
        combine([(lora(1, 1), 1.0)], block_weights="only-late", depth=1)
    with pytest.raises(ConfigError, match="3 block weights for a model with 4 blocks"):
        combine([(lora(1, 1), 1.0)], block_weights="1, 2, 3", depth=4)
    with pytest.raises(LoraError, match="all strengths are 0"):
        combine([(lora(1, 1), 0.0)])
    down, up = torch.ones(1, 32), torch.ones(32, 1)
    patch = DoRA({"down": down, "up": up}, magnitude=torch.ones(32))
    dora = Adapter({"dit.pooler.q_proj": [patch]}, "d")
    with pytest.raises(LoraError, match=r"d is a DoRA \(dit.pooler.q_proj\)"):
        combine([(dora, 1.0)], block_weights="0.5")
    with pytest.raises(LoraError, match="no strength but 1"):
        weighted(dora, 0.5, BlockWeights())
    assert weighted(dora, 1.0, BlockWeights.parse("decay")).modules == dora.modules
    writing.write(lora(1, 1), tmp_path / "one.safetensors")
    twice = ["combine", *[str(tmp_path / "one.safetensors")] * 3, "-o", str(tmp_path / "out.safetensors")]
    assert main([*twice, "--block-weights", "1", "--block-weights", "1"]) == 2
    assert "--block-weights is given 2 times for 3 LoRAs" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_the_depth_of_known_models() -> None:
    """Curves need none to be given where the dimensions are a known model's."""
    style = reading.read(next((ASSETS / "lora").glob("*.safetensors")))
    done = combine([(style, 1.0)], block_weights="only-late").adapter
    assert {name.split(".")[2] for name in done.modules if ".blocks." in name} == {"3", "4", "5"}
    down, up = torch.ones(1, 1408), torch.ones(1408, 1)
    patch, places = LoRA({"down": down, "up": up}), (3, 7)
    early = Adapter({f"dit.blocks.{i}.attn1.out_proj": [patch] for i in places})
    found = weighted(early, 1.0, BlockWeights.parse("linear"))
    expected = LayerWeights.parse("linear").resolve(40)
    for i in places:
        assert found.modules[f"dit.blocks.{i}.attn1.out_proj"][0].scale == expected[i]


@pytest.mark.parametrize("strength", ["nan", "inf"])
def test_a_strength_is_finite(pair, tmp_path: Path, capsys, strength: str) -> None:
    base, _ = pair
    one, out = tmp_path / "one.safetensors", tmp_path / "out.safetensors"
    writing.write(lora(1, 1), one)
    for command in (["combine"], ["merge", str(base)]):
        assert main([*command, f"{one}:{strength}", "-o", str(out)]) == 2
        assert f"strength {strength} of one: use a finite number" in capsys.readouterr().err
        assert not out.exists()


def test_the_title_of_a_plot_is_not_cut(tmp_path: Path) -> None:
    adapter = lora(1, 1)
    adapter.name = "a long name " * 5
    plot(adapter, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        strip = image.convert("L").crop((0, 0, image.width, 30))
    assert strip.point(lambda value: 255 * (value < 128)).getbbox()[2] < strip.width - 4


def test_the_base_need_not_hold_the_set_that_is_asked_for(pair, tmp_path: Path) -> None:
    """A training's checkpoint with several sets, and what it was trained from, which has one."""
    tuned, base = pair
    module = {key: value.clone() for key, value in dict(bundle(tuned).dit).items()}
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": module, "ema": {key: value + 1 for key, value in module.items()}}, path)
    for name in ("base.pt", "both.pt"):
        start = dict(bundle(base).dit)
        sets = start if name == "base.pt" else {"module": start, "ema": module}
        torch.save(sets, tmp_path / name)
        found = extract(path, tmp_path / name, 4, load_key="module").adapter.modules
        assert found.keys() == extract(tuned, base, 4).adapter.modules.keys()
    with pytest.raises(WeightsError, match="no weights under 'distill'; it has module, ema"):
        extract(path, base, 4, load_key="distill")
