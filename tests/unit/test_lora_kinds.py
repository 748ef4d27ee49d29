"""Kinds of changes: what files call them, and what a change keeps when it becomes one of another kind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hydit_core.errors import LoraError
from hydit_core.lora.adapter import Adapter, changed, changed_bias
from hydit_core.lora.extract import combine
from hydit_core.lora.kinds import KINDS, DoRA, LoKr, LoRA
from hydit_core.lora.reading import from_tensors
from hydit_core.lora.writing import to_tensors

WQKV, FC1 = "dit.blocks.0.attn1.Wqkv", "diffusion_model.blocks.0.mlp.fc1"


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


FILES = {
    "lora": {"lora_up.weight": (6, 2), "lora_down.weight": (2, 4)},
    "loha": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 4), "hada_w2_a": (6, 3), "hada_w2_b": (3, 4)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (1, 2)},
    "diff": {"diff": (6, 4)},
    "set": {"set_weight": (6, 4)},
    "dora": {"lora_up.weight": (6, 2), "lora_down.weight": (2, 4), "dora_scale": (6, 1)},
}


def test_every_kind_has_names_of_its_own() -> None:
    names = [name for kind in KINDS for name in kind.names]
    assert len(set(names)) == len(names)
    assert {kind.kind for kind in KINDS} == FILES.keys()


@pytest.mark.parametrize("kind", FILES)
def test_what_is_written_is_read_as_the_same_kind(kind: str) -> None:
    file = {f"{FC1}.{name}": rand(*shape) for name, shape in FILES[kind].items()}
    adapter = from_tensors(file)
    ((patch,),) = adapter.modules.values()
    assert patch.kind == kind and patch.shape == (6, 4)
    found = to_tensors(adapter)
    assert {name for name in found if not name.endswith(".alpha")} == file.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in file.items())
    ((again,),) = from_tensors(found).modules.values()
    assert type(again) is type(patch) and again.scale == patch.scale


@pytest.mark.parametrize("kind", FILES)
def test_swapped_halves(kind: str) -> None:
    """Diffusers' norm_out has shift and scale the other way round than the model."""
    file = {f"{FC1}.{name}": rand(*shape) for name, shape in FILES[kind].items()}
    file[f"{FC1}.diff_b"] = rand(6)
    ((patch,),) = from_tensors(file).modules.values()
    weight, bias = rand(6, 4), rand(6)
    order = [3, 4, 5, 0, 1, 2]
    swapped = patch.swapped()
    torch.testing.assert_close(
        changed(weight[order], [swapped], 0.7), changed(weight, [patch], 0.7)[order], rtol=0, atol=1e-6
    )
    found, expected = (changed_bias(b, [p]) for b, p in ((bias[order], swapped), (bias, patch)))
    assert torch.equal(found, expected[order])


@pytest.mark.parametrize("rows", [1, 3])
def test_a_kronecker_product_that_becomes_a_difference_keeps_its_bias(rows: int) -> None:
    """The halves of three rows cannot be swapped in a factor."""
    patch = LoKr({"w1": rand(rows, 2), "w2": rand(6 // rows, 2)}, 0.5, bias=rand(6), bias_whole=True)
    swapped = patch.swapped()
    assert swapped.bias_whole and swapped.bias is not None
    assert torch.equal(swapped.bias, patch.bias[[3, 4, 5, 0, 1, 2]])  # type: ignore[index]
    torch.testing.assert_close(swapped.delta(), patch.delta()[[3, 4, 5, 0, 1, 2]], rtol=0, atol=1e-6)


def test_a_dora_of_some_rows_beside_a_whole_lora_cannot_be_combined() -> None:
    """As a plain LoRA it would do something else."""
    dora = DoRA({"down": rand(2, 4), "up": rand(2, 2)}, rows=(0, 2), magnitude=torch.ones(2))
    whole = LoRA({"down": rand(2, 4), "up": rand(6, 2)})
    with pytest.raises(LoraError, match=r"d is a DoRA \(dit.blocks.0.attn1.Wqkv\)"):
        combine([(Adapter({WQKV: [dora]}, "d"), 1.0), (Adapter({WQKV: [whole]}, "w"), 1.0)])


def test_whole_weights_have_no_magnitude() -> None:
    file = {f"{FC1}.set_weight": rand(6, 4), f"{FC1}.dora_scale": rand(6, 1)}
    with pytest.raises(LoraError, match=r"fc1 has whole weights and a magnitude, which do not go together"):
        from_tensors(file)
