"""What a file is, from its names and shapes alone; and the one line that a wrong file gives."""

from __future__ import annotations

import pytest
import torch
from key_lists import key_list, sparse_safetensors
from tiny_models import randomize, tiny

from hydit_core.errors import WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors
from hydit_core.weights.layouts import from_tencent
from hydit_core.weights.load import load_controlnet, load_dit
from hydit_core.weights.source import MemorySource
from hydit_core.weights.writer import save_safetensors


def kind_of(shapes: dict[str, tuple[int, ...]], metadata: dict[str, str] | None = None):
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return detect(MemorySource(tensors, metadata=metadata))


def behind(prefix: str, name: str) -> dict[str, tuple[int, ...]]:
    return {prefix + key: shape for key, shape in key_list(name).items()}


OURS = {
    "g2_v12": ("dit", "a HunyuanDiT-g/2 v1.2 checkpoint", "v1.2"),
    "g2_v11": ("dit", "a HunyuanDiT-g/2 v1.1 or v1.0 checkpoint", "v1.1"),
    "xl2_v12": ("dit", "a HunyuanDiT-XL/2 v1.2 checkpoint", "v1.2"),
    "xl2_v11": ("dit", "a HunyuanDiT-XL/2 v1.1 or v1.0 checkpoint", "v1.1"),
    "cn_v12": ("controlnet", "a HunyuanDiT-g/2 v1.2 ControlNet", "v1.2"),
    "cn_v11": ("controlnet", "a HunyuanDiT-g/2 v1.1 or v1.0 ControlNet", "v1.1"),
    "diffusers_g2_v12": ("dit", "a HunyuanDiT-g/2 v1.2 checkpoint", "v1.2"),
    "ipa_extra": ("ip_adapter", "a HunyuanDiT-g/2 IP-Adapter", ""),
}


@pytest.mark.parametrize("name", OURS)
def test_every_published_kind(name):
    found = kind_of(key_list(name))
    assert (found.kind, found.name, found.version) == OURS[name]
    assert found.layout == ("diffusers" if name.startswith("diffusers") else "tencent")


def test_dimensions_come_from_the_shapes():
    assert kind_of(key_list("g2_v12")).config == DiTConfig()
    assert kind_of(behind("module.", "xl2_v11")).config == DiTConfig(
        hidden_size=1152, depth=28, mlp_hidden=4608, size_cond=True, style_cond=True
    )
    assert kind_of(key_list("cn_v12")).config == DiTConfig()


def test_all_in_one_files():
    keys = behind("model.", "g2_v12") | {
        "text_encoders.hydit_clip.transformer.bert.embeddings.word_embeddings.weight": (47020, 1024),
        "text_encoders.mt5xl.transformer.shared.weight": (250112, 2048),
        "vae.encoder.conv_in.weight": (128, 3, 3, 3),
    }
    found = kind_of(keys)
    assert (found.kind, found.layout, found.prefix) == ("dit", "comfy", "model.")
    assert found.parts == ("bert", "t5", "vae")
    assert found.name == "a HunyuanDiT-g/2 v1.2 all-in-one checkpoint"


def test_metadata_tells_v10_from_v11():
    metadata = {"hydit.config": ModelInfo.published("v1.0").to_json()}
    assert kind_of(key_list("g2_v11"), metadata).name == "a HunyuanDiT-g/2 v1.0 checkpoint"


LORA_MODULE = "blocks.0.attn1.Wqkv"
LORAS = {
    "PEFT": (f"base_model.model.{LORA_MODULE}.lora_A.weight", "peft"),
    "PEFT, older names": (f"{LORA_MODULE}.lora_B.default.weight", "peft"),
    "kohya": ("lora_unet_blocks_0_attn1_Wqkv.lora_down.weight", "kohya"),
    "LoKr": ("lora_unet_blocks_3_attn2_kv_proj.lokr_w1", "kohya"),
    "BERT": ("lora_te1_encoder_layer_0_attention_self_query.lora_up.weight", "kohya"),
    "PEFT, output layers only": ("base_model.model.blocks.0.attn1.out_proj.lora_A.weight", "peft"),
    "kohya, skips only": ("lora_unet_blocks_4_skip_linear.lora_down.weight", "kohya"),
    "Tencent's GUI": ("unet.blocks.0.attn1.Wqkv.lora.up.weight", "gui"),
    "diffusers names": ("transformer.blocks.0.attn1.to_q.lora_A.weight", "diffusers"),
}


@pytest.mark.parametrize("name", LORAS)
def test_loras(name):
    key, layout = LORAS[name]
    found = kind_of({key: (4, 8)})
    assert (found.kind, found.layout) == ("lora", layout)


BLOCK_2048 = {"input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048)}
OTHERS = {
    "an SDXL checkpoint": {"model.diffusion_model." + k: s for k, s in BLOCK_2048.items()}
    | {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77)},
    "an SDXL UNet": {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048)},
    "an SDXL ControlNet": {"control_model." + k: s for k, s in BLOCK_2048.items()},
    "a Stable Diffusion 1.x checkpoint": {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 768)
    },
    "a Stable Diffusion 2.x checkpoint": {
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 1024)
    },
    "a Stable Diffusion 3 model": {
        "model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight": (4608, 1536)
    },
    "a Flux model": {
        "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        "single_blocks.0.linear1.weight": (21504, 3072),
    },
    "a PixArt model": {"t_block.1.weight": (6912, 1152), "y_embedder.y_proj.fc1.weight": (1152, 4096)},
    "a class-conditional DiT": {
        "y_embedder.embedding_table.weight": (1001, 1152),
        "blocks.0.attn.qkv.weight": (3456, 1152),
    },
    "a HunyuanVideo model": {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (3072,)},
    "a CLIP text encoder": {"text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768)},
    "a language model": {
        "model.layers.0.self_attn.q_proj.weight": (64, 64),
        "model.embed_tokens.weight": (9, 64),
    },
    "a LoRA for Flux, not for HunyuanDiT": {
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 8)
    },
    "a LoRA for SDXL, not for HunyuanDiT": {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": (4, 8)},
    "a LoRA for HunyuanVideo or HunyuanImage 2.1, not for HunyuanDiT": {
        "transformer.double_blocks.0.img_attn_qkv.lora_A.weight": (4, 8)
    },
    "a LoRA for SD1.x, SD2 or SDXL, not for HunyuanDiT": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight": (4, 8)
    },
    "a Stable Diffusion 3 ControlNet": {
        "transformer_blocks.0.attn.add_k_proj.weight": (1536, 1536),
        "pos_embed.pos_embed": (1, 36864, 1536),
        "controlnet_blocks.0.weight": (1536, 1536),
    },
    "a Flux ControlNet": {
        "transformer_blocks.0.attn.add_k_proj.weight": (3072, 3072),
        "controlnet_x_embedder.weight": (3072, 64),
        "controlnet_blocks.0.weight": (3072, 3072),
    },
    "a LoRA of another model": {"layers.0.mlp.lora_A.weight": (4, 8)},
    "an IP-Adapter for Stable Diffusion": {"ip_adapter.1.to_k_ip.weight": (320, 768)},
    "an image encoder without a projection, as CLIPVisionModel and SigLIP are": {
        "embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        "encoder.layers.0.layer_norm1.weight": (1152,),
    },
}


def test_a_lora_for_wan_is_not_taken_for_ours():
    wan = {f"transformer.blocks.0.{name}.lora_A.weight": (4, 8) for name in ("attn1.to_q", "ffn.net.0.proj")}
    assert kind_of(wan).name == "a LoRA of another model"


@pytest.mark.parametrize("name", OTHERS)
def test_other_families(name):
    found = kind_of(OTHERS[name])
    assert (found.kind, found.name) == ("other", name)


BERT = {
    "embeddings.word_embeddings.weight": (47020, 1024),
    "encoder.layer.0.attention.self.query.weight": (1024, 1024),
}
T5 = {
    "shared.weight": (250112, 2048),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (2048, 2048),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (5120, 2048),
}
PARTS = {
    "a BERT text encoder (width 1024, vocabulary 47020)": ("bert", BERT),
    "an mT5 or T5 v1.1 text encoder (width 2048, vocabulary 250112)": ("t5", T5),
    "a VAE (AutoencoderKL, ldm names)": ("vae", {"encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3)}),
    "a VAE (AutoencoderKL, diffusers names)": (
        "vae",
        {"encoder.down_blocks.0.resnets.0.conv1.weight": (128, 128, 3, 3)},
    ),
    "a VAE (AutoencoderTiny (TAESD), taesd names)": ("vae", {"taesd_decoder.1.weight": (64, 4, 3, 3)}),
}


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("name", PARTS)
def test_encoders_and_vaes(name, prefix):
    kind, shapes = PARTS[name]
    if prefix and kind == "vae":
        prefix = "vae."
    found = kind_of({prefix + key: shape for key, shape in shapes.items()})
    assert (found.kind, found.name, found.prefix) == (kind, name, prefix)


def test_the_rest_is_unknown():
    assert kind_of({"linear.weight": (3, 3)}).kind == "unknown"
    assert kind_of({}).kind == "unknown"


# --- errors ----------------------------------------------------------------------------------------------


def write(path, shapes):
    save_safetensors(
        path,
        {key: torch.zeros([min(n, 4) for n in shape[:-1]] + [shape[-1]]) for key, shape in shapes.items()},
    )
    return path


def test_a_wrong_file_gives_one_line_that_names_it(tmp_path):
    path = write(tmp_path / "wrong.safetensors", OTHERS["an SDXL checkpoint"])
    with pytest.raises(WeightsError) as error:
        load_dit(path)
    message = str(error.value)
    assert message.startswith(f"{path} is an SDXL checkpoint; expected a HunyuanDiT (DiT) checkpoint; ")
    assert "\n" not in message


def test_a_lora_and_a_controlnet_say_where_they_belong(tmp_path):
    lora = write(tmp_path / "lora.safetensors", {LORAS["PEFT"][0]: (4, 8)})
    with pytest.raises(
        WeightsError, match=r"is a HunyuanDiT LoRA \(PEFT layout\); expected .*beside the checkpoint"
    ):
        load_dit(lora)
    net = sparse_safetensors(tmp_path / "net.safetensors", key_list("cn_v12"))
    with pytest.raises(
        WeightsError, match=r"is a HunyuanDiT-g/2 v1\.2 ControlNet; expected .*give it as a Con"
    ):
        load_dit(net)
    dit = sparse_safetensors(tmp_path / "dit.safetensors", key_list("g2_v12"))
    with pytest.raises(
        WeightsError, match=r"v1\.2 checkpoint; expected a HunyuanDiT ControlNet; give it as the m"
    ):
        load_controlnet(dit)


def test_missing_and_surplus_tensors_are_listed(tmp_path):
    model = DiT(tiny())
    randomize(model, seed=1)
    tensors = dict(model.state_dict())
    del tensors["blocks.2.mlp.fc2.bias"]
    tensors["blocks.2.mlp.fc3.bias"] = torch.ones(1)
    tensors["blocks.3.norm1.weight"] = torch.ones(7)
    save_safetensors(tmp_path / "odd.safetensors", tensors)
    with pytest.raises(WeightsError) as error:
        load_dit(tmp_path / "odd.safetensors")
    assert "1 missing: blocks.2.mlp.fc2.bias" in str(error.value)
    assert "1 unexpected: blocks.2.mlp.fc3.bias" in str(error.value)
    assert "1 of another shape: blocks.3.norm1.weight (7,) instead of (64,)" in str(error.value)
    assert "odd.safetensors" in str(error.value)


def test_contradicting_dimensions_are_explained(tmp_path):
    shapes = key_list("g2_v12") | {"extra_embedder.0.weight": (5632, 2000)}
    with pytest.raises(WeightsError, match=r"x\.safetensors looks like a HunyuanDiT, but: .*2000 columns"):
        load_dit(sparse_safetensors(tmp_path / "x.safetensors", shapes))


# --- loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout", ["tencent", "diffusers", "comfy", "ema.pt", "module.", "base_model.model."]
)
@pytest.mark.parametrize("old", [False, True], ids=["v1.2", "v1.1"])
def test_a_model_from_every_layout(tmp_path, layout, old):
    model = DiT(tiny(old=old))
    randomize(model, seed=3)
    tensors = model.state_dict()
    path = tmp_path / "file"
    if layout == "ema.pt":
        torch.save({"ema": tensors, "module": {k: v + 1 for k, v in tensors.items()}}, path)
    elif layout.endswith("."):
        save_safetensors(path, {layout + key: value for key, value in tensors.items()})
    else:
        save_safetensors(path, from_tencent(tensors, layout))
    loaded, info = load_dit(path)
    assert loaded.config == model.config
    assert info.diffusion.beta_end == (0.03 if old else 0.018)
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in tensors.items())
    half, _ = load_dit(path, dtype=torch.float16)
    assert half.dtype == torch.float16
    assert all(torch.equal(half.state_dict()[key], value.half()) for key, value in tensors.items())


def test_the_files_own_dtype_is_kept_and_eight_bits_become_bfloat16(tmp_path):
    model = DiT(tiny())
    randomize(model, seed=3)
    for dtype, expected in (
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float8_e4m3fn, torch.bfloat16),
    ):
        save_safetensors(tmp_path / "f", {key: value.to(dtype) for key, value in model.state_dict().items()})
        assert load_dit(tmp_path / "f")[0].dtype == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["g2_v12", "g2_v11", "diffusers_g2_v12", "cn_v12", "cn_v11"])
def test_full_size_files_load(tmp_path, name):
    """Every published key list as a real file of that size, which takes no room on disk."""
    path = sparse_safetensors(tmp_path / "full.safetensors", key_list(name))
    load = load_controlnet if name.startswith("cn") else load_dit
    model, info = load(path)
    assert model.dtype == torch.float16
    assert info.version == ("v1.1" if name.endswith("v11") else "v1.2")
    assert (
        sum(parameter.numel() for parameter in model.parameters())
        == {
            "g2_v12": 1_499_952_032,
            "g2_v11": 1_516_534_048,
            "diffusers_g2_v12": 1_499_952_032,
            "cn_v12": 744_223_296,
            "cn_v11": 760_805_312,
        }[name]
    )
    assert open_tensors(path).main_dtype() == torch.float16
