"""Torch's own files and folders of weights: what is taken from them, and that nothing in them is run."""

from __future__ import annotations

import argparse
import json
import os
import pickle

import pytest
import torch

from hydit_core.errors import WeightsError
from hydit_core.weights.bundle import open_model
from hydit_core.weights.files import open_tensors
from hydit_core.weights.writer import save_safetensors

# --- torch files -----------------------------------------------------------------------------------------

WEIGHTS = {"a.weight": torch.randn(3, 4), "b": torch.randn(2, dtype=torch.float16)}


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.ckpt"])
def test_torch_files_of_both_formats(tmp_path, name, old_format):
    torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=not old_format)
    source = open_tensors(tmp_path / name)
    assert source.shapes() == {"a.weight": (3, 4), "b": (2,)}
    assert all(torch.equal(source[key], value) for key, value in WEIGHTS.items())


def test_the_content_decides_and_not_the_suffix(tmp_path):
    torch.save(WEIGHTS, tmp_path / "really_pt.safetensors")
    save_safetensors(tmp_path / "really_safetensors.pt", WEIGHTS)
    for name in ("really_pt.safetensors", "really_safetensors.pt"):
        assert torch.equal(open_tensors(tmp_path / name)["b"], WEIGHTS["b"])


def shifted(by: float) -> dict[str, torch.Tensor]:
    return {key: value + by for key, value in WEIGHTS.items()}


def test_ema_is_taken_unless_another_key_is_asked_for(tmp_path):
    path = tmp_path / "mp_rank_00_model_states.pt"
    checkpoint = {
        "module": shifted(1),
        "ema": shifted(2),
        "optimizer": None,
        "ds_config": {"train_batch_size": 2},
        "param_shapes": [{"a.weight": torch.Size([3, 4])}],
        "steps": 500,
        "args": argparse.Namespace(lr=1e-4, model="DiT-g/2", size=[1024, 1024]),
    }
    torch.save(checkpoint, path)
    assert torch.equal(open_tensors(path)["b"], WEIGHTS["b"] + 2)
    assert torch.equal(open_tensors(path, load_key="module")["b"], WEIGHTS["b"] + 1)
    with pytest.raises(WeightsError, match=r"no weights under 'distill'; it has module, ema"):
        open_tensors(path, load_key="distill")


@pytest.mark.parametrize("key", ["state_dict", "model", "distill", "anything"])
def test_other_nestings_are_found(tmp_path, key):
    torch.save({key: {"inner": shifted(3)}, "epoch": 4}, tmp_path / "w.ckpt")
    assert torch.equal(open_tensors(tmp_path / "w.ckpt")["b"], WEIGHTS["b"] + 3)


def test_the_smallest_safetensors_file_is_one(tmp_path):
    (tmp_path / "w.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    assert list(open_tensors(tmp_path / "w.safetensors")) == []


def test_how_deep_tensors_are_sought(tmp_path):
    torch.save({"a": {"b": {"c": shifted(3)}}}, tmp_path / "w.ckpt")
    assert torch.equal(open_tensors(tmp_path / "w.ckpt")["b"], WEIGHTS["b"] + 3)
    torch.save({"a": {"b": {"c": {"d": shifted(3)}}}}, tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match="holds no tensors"):
        open_tensors(tmp_path / "w.ckpt")


def test_tensors_beside_the_weights_are_not_taken_for_them(tmp_path):
    torch.save({"global_step": torch.tensor(4), "state_dict": shifted(3)}, tmp_path / "w.ckpt")
    assert torch.equal(open_tensors(tmp_path / "w.ckpt")["b"], WEIGHTS["b"] + 3)


def test_a_key_is_refused_in_a_plain_file(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no weights under 'ema'; it is one plain state dict"):
        open_tensors(tmp_path / "w.pt", load_key="ema")


class Bomb:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("old_format", [False, True], ids=["zip", "legacy"])
def test_code_in_a_file_is_named_and_never_run(tmp_path, old_format):
    target = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    content = {"w": torch.ones(1), "x": Bomb(str(target))}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(WeightsError, match=r"evil\.pt holds objects .*posix\.mkdir.*refused.*safetensors"):
        open_tensors(path)
    assert not target.exists()


def test_a_bare_pickle_with_code_is_refused(tmp_path):
    path = tmp_path / "bare.bin"
    path.write_bytes(pickle.dumps(Bomb(str(tmp_path / "ran"))))
    with pytest.raises(WeightsError, match=r"bare\.bin holds objects .*\(posix\.mkdir\)"):
        open_tensors(path)
    assert not (tmp_path / "ran").exists()


# --- folders ---------------------------------------------------------------------------------------------


def write_shards(folder, save, suffix: str) -> None:
    names = [f"model-0000{i}-of-00002{suffix}" for i in (1, 2)]
    for name, key in zip(names, WEIGHTS, strict=True):
        save({key: WEIGHTS[key]}, folder / name)
    index = {"metadata": {"total_size": 52}, "weight_map": dict(zip(WEIGHTS, names, strict=True))}
    (folder / f"model{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_folders(tmp_path, suffix):
    save = torch.save if suffix == ".bin" else lambda tensors, path: save_safetensors(path, tensors)
    write_shards(tmp_path, save, suffix)
    source = open_tensors(tmp_path)
    assert all(torch.equal(source[key], value) for key, value in WEIGHTS.items())
    (tmp_path / f"model-00002-of-00002{suffix}").unlink()
    with pytest.raises(WeightsError, match=rf"lacks 1 of 2 shards: model-00002-of-00002{suffix}"):
        open_tensors(tmp_path)


def test_shards_of_a_variant_are_found_by_its_index(tmp_path):
    write_shards(tmp_path, lambda tensors, path: save_safetensors(path, tensors), ".safetensors")
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.fp16.json")
    assert sorted(open_tensors(tmp_path)) == sorted(WEIGHTS)
    (tmp_path / "model.safetensors.index.fp16.json").unlink()
    with pytest.raises(WeightsError, match=r"holds shards \(model-00001-of-00002\.safetensors, .*no index"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_an_index_whose_shards_were_not_downloaded_gives_way(tmp_path, suffix):
    (tmp_path / f"model{suffix}.index.json").write_text(
        json.dumps({"weight_map": {"b": f"model-00001-of-00002{suffix}"}})
    )
    save_safetensors(tmp_path / "model.fp16.safetensors", shifted(2))
    assert torch.equal(open_tensors(tmp_path)["b"], WEIGHTS["b"] + 2)


def test_of_several_files_the_plain_safetensors_one_is_taken(tmp_path):
    torch.save(shifted(1), tmp_path / "diffusion_pytorch_model.bin")
    save_safetensors(tmp_path / "diffusion_pytorch_model.fp16.safetensors", shifted(2))
    assert torch.equal(open_tensors(tmp_path)["b"], WEIGHTS["b"] + 2)
    save_safetensors(tmp_path / "diffusion_pytorch_model.safetensors", shifted(3))
    assert torch.equal(open_tensors(tmp_path)["b"], WEIGHTS["b"] + 3)


def test_tencents_folder_gives_ema_or_what_is_asked_for(tmp_path):
    folder = tmp_path / "t2i" / "model"
    folder.mkdir(parents=True)
    torch.save(shifted(1), folder / "pytorch_model_module.pt")
    torch.save(shifted(2), folder / "pytorch_model_ema.pt")
    assert torch.equal(open_model(tmp_path)["b"], WEIGHTS["b"] + 2)
    assert torch.equal(open_model(tmp_path, load_key="module")["b"], WEIGHTS["b"] + 1)


@pytest.mark.parametrize("form", ["torch", "safetensors", "shards"])
def test_what_is_asked_for_is_refused_where_there_is_one_set(form, tmp_path):
    """A picture of other weights than those that were asked for would be wrong without a word."""
    path = tmp_path / ("model.pt" if form == "torch" else "model.safetensors")
    if form == "torch":
        torch.save(WEIGHTS, path)
    elif form == "safetensors":
        save_safetensors(path, WEIGHTS)
    else:
        save_safetensors(tmp_path / "model-00001-of-00001.safetensors", WEIGHTS)
        index = {"weight_map": dict.fromkeys(WEIGHTS, "model-00001-of-00001.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        path = tmp_path
    assert len(open_tensors(path)) == 2
    with pytest.raises(WeightsError, match=r"no weights under .module.*(one plain state dict|one set)"):
        open_tensors(path, load_key="module")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_torch_file_that_is_cut_off_says_so(share, tmp_path):
    path = tmp_path / "w.pt"
    torch.save(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=r"the end of the zip file is missing.*Download or save it again"):
        open_tensors(path)


def test_of_a_file_without_tensors_none_can_be_chosen(tmp_path):
    torch.save({"module": {}, "ema": {}}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no weights under 'module'; it holds no tensors"):
        open_tensors(tmp_path / "w.pt", load_key="module")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_is_named_after_its_one_set(suffix, tmp_path):
    path = tmp_path / f"pytorch_model_module.{suffix}"
    torch.save(WEIGHTS, path) if suffix == "pt" else save_safetensors(path, WEIGHTS)
    assert torch.equal(open_tensors(path, load_key="module")["b"], WEIGHTS["b"])
    with pytest.raises(WeightsError, match="no weights under 'ema'"):
        open_tensors(path, load_key="ema")


def test_what_is_inside_counts_more_than_the_name(tmp_path):
    path = tmp_path / "pytorch_model_module.pt"
    torch.save({"module": shifted(1), "ema": shifted(2)}, path)
    assert torch.equal(open_tensors(path, load_key="module")["b"], WEIGHTS["b"] + 1)
    torch.save({"state_dict": shifted(3)}, path)
    assert torch.equal(open_tensors(path, load_key="module")["b"], WEIGHTS["b"] + 3)


def test_a_folder_of_unrelated_files_asks_for_one(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        save_safetensors(tmp_path / name, WEIGHTS)
    with pytest.raises(WeightsError, match=r"holds 2 weights files; name one of them: one\.safetensors, two"):
        open_tensors(tmp_path)
