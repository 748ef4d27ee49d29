"""``python -m hydit_core.weights``: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import warm_commands
from key_lists import key_list, sparse_safetensors
from tiny import TINY, bert_vocab, spiece_model, write_tiny_model
from tiny_models import randomize, tiny
from vision_files import clip_names, vision_model

from hydit_core.facts import METADATA_KEY, ModelInfo
from hydit_core.model.config import DiTConfig
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.weights.__main__ import main
from hydit_core.weights.bundle import bundle
from hydit_core.weights.convert import convert
from hydit_core.weights.files import SafetensorsSource, open_tensors
from hydit_core.weights.load import load_dit
from hydit_core.weights.save import save_checkpoint
from hydit_core.weights.writer import save_safetensors


def run(capsys, *args: object) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def rows(text: str) -> dict[str, str]:
    """``name  value`` lines; metadata lines ``  name: value``."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.strip().partition(": " if line.startswith("  ") else "  ")
        found[name] = value.strip()
    return found


@pytest.fixture
def dit(tmp_path) -> Path:
    """A small v1.1 DiT with unusual metadata, under Tencent's names."""
    model = DiT(tiny(old=True))
    randomize(model, seed=21)
    path = tmp_path / "dit.safetensors"
    info = ModelInfo(version="v1.0", variant="distill", base="something")
    save_checkpoint(path, dit=model.state_dict(), info=info, metadata={"note": "by hand"})
    return path


@pytest.fixture(scope="module")
def all_in_one(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "all.safetensors")


def same_tensors(left: Path, right: Path) -> bool:
    a, b = open_tensors(left), open_tensors(right)
    return sorted(a) == sorted(b) and all(torch.equal(a[key], b[key]) for key in a)


# --- inspect ---------------------------------------------------------------------------------------------


def test_inspect_prints_the_facts_from_the_header_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SafetensorsSource, "get", None)  # no tensor can be read
    path = sparse_safetensors(tmp_path / "pytorch_model_ema.safetensors", key_list("g2_v12"))
    code, out, _ = run(capsys, "inspect", path)
    found = rows(out)
    assert code == 0
    assert found["file"] == str(path)
    assert found["kind"] == "a HunyuanDiT-g/2 v1.2 checkpoint"
    assert found["version"] == "v1.2, ema"
    assert found["layout"] == "tencent"
    assert found["dimensions"].startswith(
        "hidden 1408, depth 40, heads 16 x 88, MLP 6144, channels 4 in 8 out"
    )
    assert found["diffusion"] == "v-prediction, betas 0.00085 to 0.018"
    assert found["dtype"] == "fp16"
    assert found["size"] == f"{path.stat().st_size:,} bytes"
    assert found["tensors"] == "1,304"
    assert found["parameters"] == "1,499,952,032"
    assert "metadata" not in out


def test_inspect_shows_metadata_and_what_only_metadata_tells(dit, capsys):
    _, out, _ = run(capsys, "inspect", dit)
    found = rows(out)
    assert found["version"] == "v1.0, distill"
    assert found["dimensions"].endswith("conditions size and style")
    assert found["note"] == "by hand"
    assert found["modelspec.architecture"] == "hunyuan-dit-v1_0"
    assert found["modelspec.prediction_type"] == "v"
    assert json.loads(found[METADATA_KEY])["base"] == "something"


def test_inspect_shows_the_parts_of_an_all_in_one(all_in_one, capsys):
    _, out, _ = run(capsys, "inspect", all_in_one)
    found = rows(out)
    assert found["layout"] == "comfy, names behind 'model.diffusion_model.'"
    assert "uint8" in found["dtype"]
    assert {"part DiT", "part BERT", "part mT5", "part VAE"} <= found.keys()


def test_inspect_knows_older_names_of_the_parts(all_in_one, tmp_path, capsys):
    older = {"text_encoders.": "cond_stage_model.", "vae.": "first_stage_model."}
    tensors = dict(open_tensors(all_in_one))
    for new, old in older.items():
        tensors = {key.replace(new, old) if key.startswith(new) else key: v for key, v in tensors.items()}
    save_safetensors(tmp_path / "older.safetensors", tensors)
    _, out, _ = run(capsys, "inspect", tmp_path / "older.safetensors")
    names = {name for name in rows(out) if name.startswith("part ")}
    assert names == {"part DiT", "part BERT", "part mT5", "part VAE"}


def test_inspect_a_torch_file_with_several_sets_of_weights(dit, tmp_path, capsys):
    tensors = dict(open_tensors(dit))
    torch.save({"ema": tensors, "module": {k: v.half() for k, v in tensors.items()}}, tmp_path / "w.pt")
    _, out, _ = run(capsys, "inspect", tmp_path / "w.pt")
    assert rows(out)["version"] == "v1.1 or v1.0, ema"
    assert rows(out)["hydit.load_keys"] == "ema, module"
    _, out, _ = run(capsys, "inspect", tmp_path / "w.pt", "--load-key", "module")
    assert rows(out)["version"] == "v1.1 or v1.0, module"
    assert rows(out)["dtype"] == "fp16"


def test_inspect_says_what_is_not_ours(tmp_path, capsys):
    save_safetensors(tmp_path / "x.safetensors", {"ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)})
    code, out, _ = run(capsys, "inspect", tmp_path / "x.safetensors")
    assert code == 0 and rows(out)["kind"] == "an IP-Adapter for Stable Diffusion"


# --- convert ---------------------------------------------------------------------------------------------


def test_every_layout_in_a_circle_gives_the_same_file_and_metadata(dit, tmp_path, capsys):
    folder, comfy, back = tmp_path / "folder", tmp_path / "comfy.safetensors", tmp_path / "back.safetensors"
    for source, target, layout in (
        (dit, folder, "diffusers"),
        (folder, comfy, "comfy"),
        (comfy, back, "tencent"),
    ):
        code, out, err = run(capsys, "convert", source, "-o", target, "--layout", layout)
        assert code == 0, err
        assert str(target) in out and layout in out
    assert same_tensors(dit, back)
    assert all(key.startswith("model.diffusion_model.") for key in open_tensors(comfy))
    before, after = open_tensors(dit).metadata, open_tensors(back).metadata
    assert after.pop("hydit.source") == "comfy.safetensors"
    assert after == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "back.safetensors",
        "comfy.safetensors",
        "dit.safetensors",
        "folder",
    ]


def test_a_folder_is_in_diffusers_own_terms(dit, tmp_path, capsys):
    run(capsys, "convert", dit, "-o", tmp_path / "folder", "--layout", "diffusers")
    config = json.loads((tmp_path / "folder" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "HunyuanDiT2DModel"
    assert config["use_style_cond_and_image_meta_size"] is True
    assert (config["num_layers"], config["hidden_size"], config["attention_head_dim"]) == (8, 64, 32)
    assert (tmp_path / "folder" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
    assert (tmp_path / "folder" / "scheduler" / "scheduler_config.json").is_file()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "fp8"])
def test_dtypes(dit, tmp_path, capsys, dtype):
    out = tmp_path / "out.safetensors"
    code, _, _ = run(capsys, "convert", dit, "-o", out, "--layout", "tencent", "--dtype", dtype)
    assert code == 0
    before, after = open_tensors(dit), open_tensors(out)
    matrix, norm, embedder = "blocks.0.mlp.fc1.weight", "blocks.0.norm1.weight", "x_embedder.proj.weight"
    wanted = {
        "fp32": torch.float32,
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp8": torch.float8_e4m3fn,
    }
    assert after.dtype(matrix) == wanted[dtype]
    assert torch.equal(after[matrix].float(), before[matrix].to(wanted[dtype]).float())
    others = torch.float16 if dtype == "fp8" else wanted[dtype]
    assert after.dtype(norm) == after.dtype(embedder) == others


def test_an_all_in_one_keeps_its_parts_in_layout_comfy_only(all_in_one, tmp_path, capsys):
    half, alone = tmp_path / "half.safetensors", tmp_path / "alone.safetensors"
    code, out, _ = run(capsys, "convert", all_in_one, "-o", half, "--layout", "comfy", "--dtype", "fp16")
    assert code == 0 and "kept as they are" in out
    before, after = open_tensors(all_in_one), open_tensors(half)
    assert sorted(before) == sorted(after)
    for key in before:
        is_dit = key.startswith("model.diffusion_model.")
        assert torch.equal(after[key], before[key].half() if is_dit else before[key]), key
    assert ModelInfo.from_metadata(after.metadata, version="") == ModelInfo.from_metadata(
        before.metadata, version=""
    )
    assert bundle(half).bert_vocab == bert_vocab()

    code, out, _ = run(capsys, "convert", all_in_one, "-o", alone, "--layout", "tencent")
    assert code == 0 and "left out: BERT, mT5, the VAE (the layout comfy keeps them)" in out
    assert not any(key.startswith(("text_encoders.", "vae.")) for key in open_tensors(alone))


def test_a_pipelines_folder_becomes_an_all_in_one_that_loads(tmp_path, capsys):
    from diffusers import AutoencoderKL
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

    from hydit_core.text.loading import load_text_encoders
    from hydit_core.vae import load_vae

    folder = tmp_path / "pipeline"
    spiece = spiece_model()
    bert_config = BertConfig(
        vocab_size=bert_vocab().count(b"\n"),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=16,
        max_position_embeddings=12,
    )
    bert = BertModel(bert_config)
    t5 = MT5EncoderModel(MT5Config(vocab_size=90, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    vae = AutoencoderKL(block_out_channels=(32,), scaling_factor=0.5)
    bert.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    vae.save_pretrained(folder / "vae")
    for name, content in (("tokenizer/vocab.txt", bert_vocab()), ("tokenizer_2/spiece.model", spiece)):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(content)
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    model = DiT(TINY)
    randomize(model, seed=22)
    path, out = folder / "model" / "pytorch_model_ema.pt", tmp_path / "all.safetensors"
    path.parent.mkdir()
    torch.save(model.state_dict(), path)

    code, printed, err = run(capsys, "convert", folder, "-o", out, "--layout", "comfy")
    assert code == 0, err
    assert "put in from the folder: BERT, mT5, VAE, BERT's vocabulary, mT5's tokenizer" in printed
    found = bundle(out)
    assert found.info is not None and found.info.bert["num_attention_heads"] == 4
    assert found.info.bert["do_lower_case"] is False
    assert found.spiece_model == spiece
    encoders = load_text_encoders(out, dtype=torch.float32, device="cpu", text_len=12, t5_len=16)
    for ours, theirs in ((encoders.bert, bert), (encoders.t5, t5)):
        expected = theirs.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    loaded = load_vae(out, dtype=torch.float32, device="cpu")
    assert loaded.scaling_factor == 0.5
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        pictures, expected = loaded.decode(latents * 0.5), vae.decode(latents).sample
    assert torch.allclose(pictures, expected, atol=1e-5)


def test_what_stands_beside_a_transformer_keeps_its_facts(tmp_path):
    """A tokenizer as transformers 5 writes it, the shift of a VAE, the scale of a TAESD."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    from hydit_core.vae import load_vae

    words = bert_vocab().decode().splitlines()
    tokenizer = {"model": {"type": "WordPiece", "vocab": {word: i for i, word in enumerate(words)}}}
    tiny_vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, scaling_factor=0.5
    )
    for vae in (AutoencoderKL(block_out_channels=(32,), scaling_factor=0.5, shift_factor=0.25), tiny_vae):
        folder = tmp_path / type(vae).__name__
        vae.save_pretrained(folder / "vae")
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
        model = DiT(TINY)
        (folder / "model").mkdir()
        torch.save(model.state_dict(), folder / "model" / "pytorch_model_ema.pt")
        convert(folder, folder / "all.safetensors", layout="comfy")
        written, stood = load_vae(folder / "all.safetensors"), load_vae(folder / "vae")
        assert written.scaling_factor == pytest.approx(stood.scaling_factor, rel=1e-6)
        assert written.shift_factor == pytest.approx(stood.shift_factor, rel=1e-6)
        found = bundle(folder / "all.safetensors").bert_vocab
        assert found is not None and found.decode().splitlines() == words


def test_what_no_longer_holds_of_other_tensors_is_dropped(dit, tmp_path):
    path = tmp_path / "hashed.safetensors"
    stale = {"modelspec.hash_sha256": "0xab", "sshs_model_hash": "cd", "total_size": "7"}
    save_safetensors(path, open_tensors(dit), {**open_tensors(dit).metadata, **stale})
    convert(path, tmp_path / "out.safetensors", layout="tencent", dtype=torch.float16)
    metadata = open_tensors(tmp_path / "out.safetensors").metadata
    assert metadata["note"] == "by hand" and not metadata.keys() & stale.keys()


def test_a_controlnet_has_no_prefix_in_any_file(tmp_path, capsys):
    net = ControlNet(tiny())
    randomize(net, seed=23)
    save_checkpoint(tmp_path / "net.safetensors", dit=net.state_dict(), info=ModelInfo.published("v1.2"))
    code, _, _ = run(
        capsys, "convert", tmp_path / "net.safetensors", "-o", tmp_path / "o.safetensors", "--layout", "comfy"
    )
    assert code == 0 and same_tensors(tmp_path / "net.safetensors", tmp_path / "o.safetensors")
    assert open_tensors(tmp_path / "o.safetensors").metadata["modelspec.architecture"].endswith("/controlnet")


# --- refusals --------------------------------------------------------------------------------------------


def refused(capsys, *args: object) -> str:
    """The one line of an error; the exit code is 2."""
    code, out, err = run(capsys, *args)
    assert code == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_output_that_makes_no_sense_is_refused(dit, tmp_path, capsys):
    to = ("--layout", "tencent")
    assert "is the input itself; choose another name" in refused(capsys, "convert", dit, "-o", dit, *to)
    assert "give it that suffix" in refused(capsys, "convert", dit, "-o", tmp_path / "out.pt", *to)
    assert "holds the input" in refused(capsys, "convert", dit, "-o", tmp_path, *to)
    (tmp_path / "other").mkdir()
    assert "is a folder; the layout tencent" in refused(capsys, "convert", dit, "-o", tmp_path / "other", *to)
    assert "cannot write" in refused(capsys, "convert", dit, "-o", dit / "out.safetensors", *to)
    to = ("--layout", "diffusers")
    taken = tmp_path / "other" / "taken"
    taken.write_text("")
    assert "exists and is not empty" in refused(capsys, "convert", dit, "-o", taken.parent, *to)
    assert "is a file" in refused(capsys, "convert", dit, "-o", taken, *to)
    assert "leave out .safetensors" in refused(capsys, "convert", dit, "-o", tmp_path / "o.safetensors", *to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit.safetensors", "other"]


def test_a_model_that_diffusers_cannot_hold_is_refused(tmp_path, capsys):
    config = DiTConfig(hidden_size=64, depth=4, num_heads=4, mlp_hidden=64, text_dim=8, text_len=3, t5_dim=24,
                       t5_len=5, t5_hidden=40, pooled_dim=8, pooler_heads=2)  # fmt: skip
    info = ModelInfo(version="v1.2", pooler_heads=2)
    save_checkpoint(tmp_path / "odd.safetensors", dit=DiT(config).state_dict(), info=info)
    odd, out = tmp_path / "odd.safetensors", tmp_path / "out"
    line = refused(capsys, "convert", odd, "-o", out, "--layout", "diffusers")
    assert "mT5 projection is not 4 times as wide" in line and "the pooler does not have 8 heads" in line
    assert "odd.safetensors: " in line and "use the layout tencent or comfy" in line
    assert not (tmp_path / "out").exists()


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo ran > {self.path}",)


def bad_files(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    """Each bad input and what its error says."""
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:-100])
    sdxl = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    save_safetensors(folder / "sdxl.safetensors", {sdxl: torch.ones(640, 2048)})
    lora = "base_model.model.blocks.0.attn1.Wqkv.lora_A.weight"
    save_safetensors(folder / "lora.safetensors", {lora: torch.ones(4, 8)})
    (folder / "code.pt").write_bytes(pickle.dumps(Bomb(folder / "ran"), protocol=2))
    return {
        "truncated": (folder / "truncated.safetensors", "is truncated: "),
        "SDXL": (
            folder / "sdxl.safetensors",
            "is an SDXL checkpoint; expected a HunyuanDiT (DiT) checkpoint",
        ),
        "LoRA": (folder / "lora.safetensors", "is a HunyuanDiT LoRA (PEFT layout); expected"),
        "code": (folder / "code.pt", "system"),
        "missing": (folder / "missing.safetensors", "does not exist"),
    }


def test_bad_input_is_refused_in_one_line_and_the_next_run_succeeds(dit, tmp_path, capsys):
    for path, message in bad_files(tmp_path, dit).values():
        line = refused(capsys, "convert", path, "-o", tmp_path / "out.safetensors", "--layout", "comfy")
        assert message in line and str(path) in line
        assert not (tmp_path / "out.safetensors").exists()
    assert not (tmp_path / "ran").exists()
    code, _, _ = run(capsys, "convert", dit, "-o", tmp_path / "out.safetensors", "--layout", "comfy")
    assert code == 0
    model, info = load_dit(tmp_path / "out.safetensors")
    assert info.version == "v1.0" and model.config == tiny(old=True)


def test_the_real_command_line(dit, tmp_path):
    """One process each: success, and an error without traceback."""
    good = warm_commands.start("-m", "hydit_core.weights", "inspect", dit).wait()
    assert good.returncode == 0 and "v1.0, distill" in good.stdout and not good.stderr
    (tmp_path / "cut.safetensors").write_bytes(dit.read_bytes()[:-1])
    bad = warm_commands.start("-m", "hydit_core.weights", "inspect", tmp_path / "cut.safetensors").wait()
    assert bad.returncode == 2 and "is truncated" in bad.stderr and "Traceback" not in bad.stderr


def test_usage_is_an_error(dit, capsys):
    for line in (["convert", str(dit)], ["convert", str(dit), "-o", "out", "--layout", "flux"], ["melt"]):
        with pytest.raises(SystemExit) as stop:
            main(line)
        assert stop.value.code == 2
    assert "invalid choice" in capsys.readouterr().err


def test_inspect_tells_what_an_ip_adapter_is_for(capsys, tmp_path) -> None:
    """And which image encoder gives what it takes; also where both are in one file."""
    both = {**clip_names(vision_model(embed_dim=1024)), "logit_scale": torch.zeros(())}
    torch.save(both, tmp_path / "eyes.pt")
    path = sparse_safetensors(tmp_path / "ipa.safetensors", key_list("ipa_extra"))
    code, out, _ = run(capsys, "inspect", path)
    adapter = (
        "for a DiT of hidden 1408, depth 40, heads 16 x 88; 8 tokens x 1024 of an image encoder's 1024 values"
    )
    assert code == 0 and rows(out)["dimensions"] == adapter and "image encoder  " not in out
    code, out, _ = run(capsys, "inspect", tmp_path / "eyes.pt")
    encoder = "width 128, 2 layers, heads 2 x 64, MLP 256, quick_gelu; "
    encoder += "28 x 28 px in patches of 7 become 1024 values"
    assert code == 0 and rows(out)["image encoder"] == encoder
    shapes = {name: tuple(tensor.shape) for name, tensor in both.items()}
    path = sparse_safetensors(tmp_path / "both.safetensors", {**key_list("ipa_extra"), **shapes})
    code, out, _ = run(capsys, "inspect", path)
    found = rows(out)
    assert (found["dimensions"], found["image encoder"]) == (adapter, encoder)
    # What cannot be is told when it is to be loaded
    key = "ip_adapter_img_norm_cond.weight"
    path = sparse_safetensors(tmp_path / "odd.safetensors", {**key_list("ipa_extra"), key: (1000,)})
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0 and "dimensions" not in rows(out)
