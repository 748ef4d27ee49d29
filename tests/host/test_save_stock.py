"""Between ComfyUI's own loaders and our save node, in both directions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from graphs import Graph, text_to_image
from loader_files import EMBEDDED
from safetensors.torch import load_file, save_file
from sampling_models import native_model, weights
from text_models import PUBLISHED_ROWS, SPIECE, bert_model, data, grown_spiece, t5_model, t5_tensors

from hydit_core.facts import METADATA_KEY, ModelInfo
from hydit_core.model.config import DIT_XL2_V12
from hydit_core.model.dit import DiT
from hydit_core.weights.bundle import bundle


def native_clip(host, bert, t5):
    config = t5.config.to_dict() | {"dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True}
    hydit = host.comfy_module("comfy.text_encoders.hydit")
    clip = host.comfy_module("comfy.sd").CLIP(
        host.comfy_module("comfy.supported_models_base").ClipTarget(hydit.HyditTokenizer, hydit.HyditModel),
        embedding_directory=None,
        tokenizer_data={"mt5xl.spiece_model": data(SPIECE)},
        model_options={
            "dtype": torch.float32,
            "hydit_clip_model_config": bert.config.to_dict(),
            "mt5xl_model_config": config,
        },
    )
    for tensors in ({f"bert.{k}": v for k, v in bert.state_dict().items()}, t5_tensors(t5)):
        clip.load_sd(tensors)
    return clip


def test_comfyuis_own_models_are_saved_for_all(host):
    bert = bert_model(
        rows=PUBLISHED_ROWS, hidden_size=32, intermediate_size=48, num_attention_heads=4, layer_norm_eps=1e-5
    )
    t5 = t5_model(d_model=64)
    clip, model = native_clip(host, bert, t5), native_model(host)
    g = Graph()
    given = host.give(g, clip)
    save = g.add(
        "HyDiTModelSave", model=host.give(g, model), clip=given, filename_prefix="checkpoints/native"
    )
    path = host.output_dir / host.run(g).check().outputs[save.id]["hydit_saved"][0]
    found = load_file(path)
    found.pop("v_pred")  # ComfyUI's own mark
    expected = {f"model.diffusion_model.{key}": value for key, value in weights().items()}
    expected |= {f"text_encoders.hydit_clip.transformer.bert.{k}": v for k, v in bert.state_dict().items()}
    expected |= {f"text_encoders.mt5xl.transformer.{k}": v for k, v in t5_tensors(t5).items()}
    tokenizers = {name for name in found if name.endswith((".vocab", ".spiece_model"))}
    assert found.keys() - tokenizers == expected.keys() and len(tokenizers) == 2
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # With the vocabulary that only ComfyUI had, everybody can read the prompts.
    opened = bundle(path)
    vocabulary = host.module("nodes.host.tokens").shipped_vocabulary().decode().rstrip("\n").split("\n")
    differing = {
        expected
        for expected, line in zip(vocabulary, opened.bert_vocab.decode().split("\n"), strict=True)
        if line != expected
    }
    assert differing <= {"\u2028", "##\u2028"}  # transformers 5 takes it for white space
    assert opened.spiece_model == SPIECE
    assert (opened.info.bert["num_attention_heads"], opened.info.bert["layer_norm_eps"]) == (4, 1e-5)

    host.refresh()
    g = Graph()
    ours = g.add(
        "HyDiTTextEncoderLoader", bert_name=path.name, mt5_name="same as bert_name", weight_dtype="default"
    )
    encoded = [
        g.add("CLIPTextEncode", clip=c, text="红苹果, a red apple") for c in (host.give(g, clip), ours)
    ]
    (native, stock), (again, read) = (value[0] for value in host.values(g, *encoded))
    # Ours is padded to the lengths of the DiT in its file, ComfyUI's to 77 and 256.
    for one, other in ((native, again), (stock["conditioning_mt5xl"], read["conditioning_mt5xl"])):
        torch.testing.assert_close(other, one[:, : other.shape[1]], rtol=1e-4, atol=1e-4)


def random_half(*shape, start):
    """float16 values, finite and all over the tensor, made faster than random ones."""
    count = torch.Size(shape).numel()
    bits = torch.arange(start, start + count, dtype=torch.int32).mul_(-1640531527) >> 16
    return (bits.to(torch.int16) & 0x3BFF).view(torch.float16).reshape(shape)


def published(spiece):
    """A file of published widths, with the fewest layers: DiT-XL/2, BERT, mT5-XL and the SDXL VAE."""
    from diffusers import AutoencoderKL
    from transformers import BertConfig, BertModel, MT5Config, MT5EncoderModel

    from hydit_core.weights.vae_layout import diffusers_to_ldm

    sizes = (128, 256, 512, 512)
    with torch.device("meta"):
        dit = DiT(replace(DIT_XL2_V12, depth=2))
        bert = BertModel(
            BertConfig(
                vocab_size=PUBLISHED_ROWS, hidden_size=1024, num_hidden_layers=1, num_attention_heads=16,
                intermediate_size=4096, max_position_embeddings=512,
            ),
            add_pooling_layer=False,
        )  # fmt: skip
        t5 = MT5EncoderModel(
            MT5Config(
                vocab_size=250112, d_model=2048, d_kv=64, d_ff=5120, num_layers=1, num_heads=32,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=sizes, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        )  # fmt: skip
    names = {f"model.diffusion_model.{key}": value for key, value in dit.state_dict().items()}
    names |= {f"text_encoders.hydit_clip.transformer.bert.{k}": v for k, v in bert.state_dict().items()}
    names |= {f"text_encoders.mt5xl.transformer.{k}": v for k, v in t5_tensors(t5).items()}
    names |= {f"vae.{key}": value for key, value in diffusers_to_ldm(vae.state_dict()).items()}
    tensors = {key: random_half(*value.shape, start=i) for i, (key, value) in enumerate(names.items())}
    tensors["text_encoders.mt5xl.spiece_model"] = data(spiece)
    return tensors


@pytest.mark.slow
def test_the_stock_loader_opens_what_was_saved(host):
    """2 GB: published widths, all that stock loaders take for granted."""
    tensors = published(grown_spiece(250100))
    source = host.model_path("checkpoints", "published.safetensors")
    info = ModelInfo.published("v1.2")
    save_file(tensors, source, {METADATA_KEY: info.to_json()})
    host.refresh()
    g = Graph()
    ckpt = g.add("HyDiTCheckpointLoader", ckpt_name=source.name, weight_dtype="default")
    save = g.add(
        "HyDiTModelSave", model=ckpt.out(0), clip=ckpt.out(1), vae=ckpt.out(2),
        filename_prefix="checkpoints/published",
    )  # fmt: skip
    (name,) = host.run(g).check().outputs[save.id]["hydit_saved"]
    path = host.output_dir / name
    source.unlink()
    host.forget()
    host.refresh()
    g = Graph()
    stock = g.add("CheckpointLoaderSimple", ckpt_name=path.name)
    model, clip, vae = host.values(g, *(stock.out(i) for i in range(3)))
    assert type(model.model).__name__ == "HunyuanDiT"
    found = {f"model.diffusion_model.{k}": v for k, v in model.model.diffusion_model.state_dict().items()}
    found |= {f"text_encoders.{key}": value for key, value in clip.get_sd().items()}
    found |= {f"vae.{key}": value for key, value in vae.get_sd().items()}
    spiece = tensors.pop("text_encoders.mt5xl.spiece_model")
    for key, value in tensors.items():
        assert torch.equal(found[key].to(value.dtype), value), key
    assert clip.tokenizer.mt5xl.tokenizer.tokenizer.get_piece_size() == 250100
    opened = bundle(path)
    assert opened.spiece_model == spiece.numpy().tobytes()
    assert opened.bert_vocab == host.module("nodes.host.tokens").shipped_vocabulary()
    assert len(load_file(path)) == len(tensors) + 2
    path.unlink()


def test_comfyuis_own_node_keeps_what_the_file_says_of_itself(host):
    """Betas, recommended steps and preview colors: the picture drawn from the copy is the same."""
    g = text_to_image(save=False, steps=0, cfg=0.0)
    g.add("CheckpointSave", model=["1", 0], clip=["1", 1], vae=["1", 2], filename_prefix="checkpoints/stock")
    (picture,) = host.values(g, ("6", 0))
    path = max((host.output_dir / "checkpoints").glob("stock_*"))
    opened = bundle(path)
    assert opened.info == bundle(EMBEDDED).info and METADATA_KEY not in opened.dit
    host.refresh()
    again = text_to_image(ckpt=path.name, save=False, steps=0, cfg=0.0)
    (found,) = host.values(again, ("6", 0))
    assert (found - picture).abs().max() < 1e-3
    path.unlink()
    host.refresh()
