"""One function opens whatever place holds a model: each kind of place gives the same parts."""

from __future__ import annotations

import json
import mmap
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from tiny import TINY, bert_vocab, randomize, spiece_model
from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

from hydit_core import load
from hydit_core.errors import WeightsError
from hydit_core.facts import DiffusionConfig
from hydit_core.lora.extract import extract
from hydit_core.lora.merge import merge_files
from hydit_core.model.dit import DiT
from hydit_core.weights.bundle import Bundle, bundle
from hydit_core.weights.convert import convert
from hydit_core.weights.detect import FileKind
from hydit_core.weights.files import open_tensors
from hydit_core.weights.info import model_info
from hydit_core.weights.load import load_controlnet
from hydit_core.weights.mapped import MappedSource
from hydit_core.weights.source import MemorySource, TensorSource
from hydit_core.weights.vae_layout import diffusers_to_ldm

SPIECE = spiece_model()
ALL = ("dit", "bert", "mt5", "vae", "bert_vocab", "spiece_model")


def write_part(folder: Path, name: str) -> Path:
    """Save one part with its config.json, as diffusers and transformers do."""
    torch.manual_seed(0)
    if name == "bert":
        config = BertConfig(
            vocab_size=bert_vocab().count(b"\n"), hidden_size=32, num_hidden_layers=1,
            num_attention_heads=4, intermediate_size=16, max_position_embeddings=12,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder)
    elif name == "t5":
        t5 = MT5Config(
            vocab_size=90, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
            relative_attention_max_distance=77,
        )  # fmt: skip
        MT5EncoderModel(t5).save_pretrained(folder)
    elif name == "vae":
        AutoencoderKL(block_out_channels=(32,), scaling_factor=0.5).save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        torch.save(randomize(DiT(TINY), 22).state_dict(), folder / "pytorch_model_ema.pt")
    return folder


def write_tokenizers(vocab: Path, spiece: Path) -> None:
    for file, content in ((vocab, bert_vocab()), (spiece, SPIECE)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    (vocab.parent / "tokenizer_config.json").write_text('{"do_lower_case": false}')


@pytest.fixture(scope="module")
def tencent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("HunyuanDiT")
    for part, folder in (
        ("dit", "model"), ("bert", "clip_text_encoder"), ("t5", "mt5"), ("vae", "sdxl-vae-fp16-fix"),
    ):  # fmt: skip
        write_part(root / "t2i" / folder, part)
    write_tokenizers(root / "t2i" / "tokenizer" / "vocab.txt", root / "t2i" / "mt5" / "spiece.model")
    return root


@pytest.fixture(scope="module")
def pipeline(tencent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("diffusers") / "pipeline"
    weights = tencent / "t2i" / "model" / "pytorch_model_ema.pt"
    convert(weights, root, layout="diffusers")
    for part, folder in (("bert", "text_encoder"), ("t5", "text_encoder_2"), ("vae", "vae")):
        write_part(root / folder, part)
    write_tokenizers(root / "tokenizer" / "vocab.txt", root / "tokenizer_2" / "spiece.model")
    return root


def check_whole(found: Bundle) -> None:
    assert all(getattr(found, name) is not None for name in ALL)
    info = found.info
    assert info is not None
    assert (info.bert["num_attention_heads"], info.bert["do_lower_case"]) == (4, False)
    assert info.t5["relative_attention_max_distance"] == 77
    assert info.vae["scaling_factor"] == 0.5


def assert_same(one: TensorSource | None, other: Mapping[str, torch.Tensor] | TensorSource | None) -> None:
    assert one is not None and other is not None and sorted(one) == sorted(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_place_gives_the_same_parts(tencent: Path, pipeline: Path, tmp_path: Path) -> None:
    file = tmp_path / "all.safetensors"
    convert(tencent, file, layout="comfy")
    reference = bundle(file)
    check_whole(reference)
    for place in (tencent, tencent / "t2i", pipeline, tmp_path):
        found = bundle(place)
        check_whole(found)
        for name in ("dit", "bert", "mt5", "vae"):
            assert_same(getattr(found, name), getattr(reference, name))
        assert (found.bert_vocab, found.spiece_model) == (bert_vocab(), SPIECE)
        assert found.path == (file if place == tmp_path else place)
        assert found.kind.config == TINY


def test_a_scheduler_is_read_too(pipeline: Path, tmp_path: Path) -> None:
    root = tmp_path / "pipeline"
    shutil.copytree(pipeline, root)
    scheduler = root / "scheduler" / "scheduler_config.json"
    values = json.loads(scheduler.read_text()) | {"beta_end": 0.025, "prediction_type": "epsilon"}
    scheduler.write_text(json.dumps(values))
    # What is in hydit.config goes first: take it away, as a transformer of others has none.
    weights = root / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(dict(open_tensors(weights)), weights)
    info = bundle(root).info
    assert info is not None
    assert (info.diffusion.beta_end, info.diffusion.prediction) == (0.025, "epsilon")
    assert info.t5["relative_attention_max_distance"] == 77


SCHEDULERS = {
    "zero SNR": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True; this library has False"),
    "linear": ({"beta_schedule": "linear"}, "beta_schedule is 'linear'; this library has 'scaled_linear'"),
    "own betas": ({"trained_betas": [0.1, 0.2]}, "trained_betas is"),
    "thresholding": ({"thresholding": True}, "thresholding is True"),
    "flow": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is of FlowMatchEuler.*; HunyuanDiT"),
    "prediction": ({"prediction_type": "flow"}, "diffusion.prediction is 'flow'; expected one of v, epsilon"),
    "no name": ({"prediction_type": ["v"]}, "not a scheduler configuration of diffusers"),
    "betas": ({"beta_start": 0}, "diffusion.beta_start is 0; expected a number from"),
    "text": ({"beta_end": "0.02"}, "diffusion.beta_end is '0.02'"),
    "steps": ({"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000; expected"),
}


@pytest.mark.parametrize("values, message", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_that_is_not_ours_is_refused(values: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    scheduler = tmp_path / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"beta_schedule": "scaled_linear", **values}))
    source = MemorySource({}, path=tmp_path)
    with pytest.raises(WeightsError, match=message) as error:
        model_info(source, FileKind("dit", "a DiT", version="v1.2"))
    assert str(error.value).startswith(str(scheduler))


def test_what_a_scheduler_says_of_steps_is_followed(tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    values = {"num_train_timesteps": 500, "clip_sample": False, "trained_betas": None, "steps_offset": 1}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    info = model_info(MemorySource({}, path=tmp_path), FileKind("dit", "a DiT", version="v1.2"))
    assert info.diffusion == DiffusionConfig(num_train_timesteps=500)


@pytest.mark.parametrize("name", ["pytorch_model_distill.pt", "HunyuanDiT-Diffusers-Distilled/transformer"])
def test_distilled_weights_recommend_25_steps(name: str, tmp_path: Path) -> None:
    kind = FileKind("dit", "a DiT", version="v1.2")
    info = model_info(MemorySource({}, path=tmp_path / name), kind)
    assert (info.variant, info.defaults.steps) == ("distill", 25)
    assert model_info(MemorySource({}, path=tmp_path / "pytorch_model_ema.pt"), kind).defaults.steps == 50


@pytest.mark.parametrize("place", ["folder", "file"])
def test_one_part_alone(place: str, tmp_path: Path) -> None:
    for part, name, options in (
        ("bert", "bert", {"num_attention_heads": 4}),
        ("t5", "mt5", {"relative_attention_max_distance": 77}),
        ("vae", "vae", {"scaling_factor": 0.5, "norm_num_groups": 32}),
    ):
        path = write_part(tmp_path / part, part)
        if place == "file":
            path = next(path.glob("*.safetensors"))
        found = bundle(path)
        assert [n for n in ALL if getattr(found, n) is not None] == [name]
        assert found.info is not None
        assert options.items() <= getattr(found.info, part).items()
        assert found.kind.kind == part
    assert_same(
        bundle(tmp_path / "vae").vae,
        diffusers_to_ldm(AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()),
    )
    assert "encoder.layer.0.attention.self.query.weight" in (bundle(tmp_path / "bert").bert or {})
    assert "shared.weight" in (bundle(tmp_path / "t5").mt5 or {})


def test_a_config_of_something_else_is_not_taken_for_the_files(tmp_path: Path) -> None:
    write_part(tmp_path, "vae")
    values: dict[str, Any] = {"_class_name": "UNet2DConditionModel", "norm_num_groups": 8}
    (tmp_path / "config.json").write_text(json.dumps(values))
    info = bundle(tmp_path).info
    assert info is not None and info.vae == {}


def test_the_scale_of_a_taesd_folder_goes_into_its_tensors(tmp_path: Path) -> None:
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, scaling_factor=0.26
    )
    tiny.save_pretrained(tmp_path)
    vae = bundle(tmp_path).vae
    assert vae is not None and float(vae["vae_scale"]) == pytest.approx(0.13025 / 0.26)
    assert torch.equal(vae["taesd_decoder.1.weight"], tiny.state_dict()["decoder.layers.0.weight"])


def test_only_what_is_wanted_is_looked_into(pipeline: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pipeline, broken)
    pointer = "version https://git-lfs.github.com/spec/v1\n"
    for weights in (broken / "text_encoder_2").glob("*.safetensors"):
        weights.write_text(pointer)
    with pytest.raises(WeightsError, match=r"text_encoder_2.*Git LFS pointer"):
        bundle(broken)
    found = bundle(broken, only=("dit", "vae"))
    assert [name for name in ALL if getattr(found, name) is not None] == ["dit", "vae"]
    encoders = bundle(pipeline, only=("bert", "t5"))
    assert encoders.dit is None and encoders.vae is None and encoders.spiece_model == SPIECE
    assert encoders.path == pipeline


def test_places_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent.safetensors does not exist"):
        bundle(tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match=r"holds no HunyuanDiT and no BERT.*transformer.*text_encoder"):
        bundle(tmp_path)
    with pytest.raises(WeightsError, match=r"holds no VAE: .*nor in vae, sdxl-vae-fp16-fix$"):
        bundle(tmp_path, only=("vae",))
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors", metadata={"hydit.config": "{"})
    with pytest.raises(WeightsError, match=r"w.safetensors: metadata"):
        bundle(tmp_path)


# -- opened once, and handed on -----------------------------------------------------------------------------


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weights file was opened."""
    counted: Counter[str] = Counter()
    original = MappedSource.__init__

    def count(self: MappedSource, path: Path, *rest: Any) -> None:
        counted[str(path)] += 1
        original(self, path, *rest)

    monkeypatch.setattr(MappedSource, "__init__", count)
    return counted


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One module of the DiT."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    name = "base_model.model.blocks.0.attn1.Wqkv"
    rows, columns = DiT(TINY).blocks[0].attn1.Wqkv.weight.shape
    tensors = {
        f"{name}.lora_A.weight": torch.ones(1, columns),
        f"{name}.lora_B.weight": torch.ones(rows, 1),
    }
    save_file(tensors, path)
    return path


def files(*folders: Path) -> dict[str, int]:
    """Each weights file in these places, once."""
    found = [place for folder in folders for place in ([folder] if folder.is_file() else folder.rglob("*"))]
    return {str(path): 1 for path in found if path.suffix in (".safetensors", ".pt")}


@pytest.mark.parametrize("layout", ["comfy", "tencent", "diffusers"])
@pytest.mark.parametrize("base", ["file", "folder"])
def test_a_merge_opens_each_file_once(
    layout: Any,
    base: str,
    opens: Counter[str],
    pipeline: Path,
    tiny_model_file: Path,
    lora: Path,
    tmp_path: Path,
) -> None:
    place = tiny_model_file if base == "file" else pipeline
    out = tmp_path / ("out" if layout == "diffusers" else "out.safetensors")
    merge_files(place, [(lora, 1.0)], out, layout=layout)
    needed = place if base == "file" or layout == "comfy" else pipeline / "transformer"
    assert opens == files(needed, lora)


def test_an_extraction_opens_each_file_once(
    opens: Counter[str], pipeline: Path, tiny_model_file: Path, lora: Path, tmp_path: Path
) -> None:
    merge_files(tiny_model_file, [(lora, 1.0)], tmp_path / "tuned.safetensors")
    opens.clear()
    extract(tmp_path / "tuned.safetensors", tiny_model_file, 1)
    assert opens == files(tmp_path / "tuned.safetensors", tiny_model_file)


def test_a_conversion_opens_each_file_once(opens: Counter[str], pipeline: Path, tmp_path: Path) -> None:
    convert(pipeline, tmp_path / "all.safetensors", layout="comfy")
    assert opens == files(pipeline)


def test_loading_opens_each_file_once(opens: Counter[str], tiny_model_file: Path) -> None:
    load(tiny_model_file, device="cpu")
    assert opens == files(tiny_model_file)


def test_an_open_place_is_taken_for_its_path(
    opens: Counter[str], pipeline: Path, tiny_model_file: Path, lora: Path, tmp_path: Path
) -> None:
    """At each door; what stands beside the transformer is looked for when it is needed."""
    merge_files(pipeline, [(lora, 1.0)], tmp_path / "path.safetensors", layout="comfy")
    opens.clear()
    opened = bundle(pipeline, only=("dit",))
    assert opened.vae is None
    assert_same(bundle(opened).vae, bundle(pipeline).vae)
    merge_files(opened, [(lora, 1.0)], tmp_path / "opened.safetensors", layout="comfy")
    assert opens[str(next((pipeline / "transformer").glob("*.safetensors")))] == 2  # bundle(pipeline) has one
    path, handed_on = (tmp_path / f"{name}.safetensors" for name in ("path", "opened"))
    assert path.read_bytes() == handed_on.read_bytes()
    with pytest.raises(WeightsError, match=r"tiny.safetensors is the input itself"):
        merge_files(bundle(tiny_model_file), [(lora, 1.0)], tiny_model_file, overwrite=True)
    with pytest.raises(WeightsError, match=r"is a HunyuanDiT-.*; expected a HunyuanDiT ControlNet"):
        load_controlnet(bundle(tiny_model_file))


def test_a_second_look_brings_no_change_back(tmp_path: Path) -> None:
    """A model's weights are views of the file; who trains them writes into those pages."""
    size = 4 * mmap.PAGESIZE
    save_file({"w": torch.zeros(size, dtype=torch.uint8)}, tmp_path / "w.safetensors")
    source = open_tensors(tmp_path / "w.safetensors")
    mine = source.get("w")
    source.release("w")
    mine += 1
    source.release("w")
    assert int(mine.sum()) == size
