"""CLIP's image encoder: every file that holds one, against transformers' own model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vision_files import clip_names, vision_model

from hydit_core.errors import HyditError, WeightsError
from hydit_core.image_prompts.encoder import encoder_beside, load_image_encoder
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors
from hydit_core.weights.vision_layout import VISION_KEY
from hydit_core.weights.writer import save_safetensors


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((130, 90), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def truth(picture: Image.Image) -> Tensor:
    """By transformers' model, normalized."""
    with torch.no_grad():
        embedding = vision_model()(square_pixels(picture)).image_embeds
    return embedding / embedding.norm(dim=-1, keepdim=True)


def square_pixels(picture: Image.Image) -> Tensor:
    """As Tencent prepares pictures, written out: (1, 3, 28, 28)."""
    square = np.asarray(picture.resize((28, 28), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return torch.tensor(((square - mean) / std).transpose(2, 0, 1)[None], dtype=torch.float32)


def chinese_clip(**more: Tensor) -> dict[str, object]:
    """As Tencent's ``clip_img_encoder.pt`` is packed."""
    weights = {f"module.{name}": value for name, value in {**clip_names(vision_model()), **more}.items()}
    return {"epoch": 9, "step": 1234, "name": "clip", "state_dict": weights}


def test_every_layout(picture: Image.Image, truth: Tensor, tmp_path: Path) -> None:
    model = vision_model()
    torch.save(chinese_clip(), tmp_path / "clip_img_encoder.pt")
    rest = {"bert.embeddings.word_embeddings.weight": torch.zeros(9, 8), "logit_scale": torch.zeros(())}
    rest["bert.encoder.layer.0.attention.self.query.weight"] = torch.zeros(8, 8)
    torch.save(chinese_clip(**rest), tmp_path / "whole.pt")
    save_safetensors(tmp_path / "flash.safetensors", clip_names(model, flash=True))
    tower = {name: value.clone() for name, value in model.state_dict().items()}
    save_safetensors(tmp_path / "tower.safetensors", tower)
    inside = {f"image_encoder.{name}": value for name, value in tower.items()}
    save_safetensors(tmp_path / "inside.safetensors", {**inside, "other": torch.zeros(2)})
    clip = {**tower, "vision_model.embeddings.position_ids": torch.arange(17)[None]}
    clip["text_model.embeddings.token_embedding.weight"] = clip["text_projection.weight"] = torch.zeros(3, 3)
    save_safetensors(tmp_path / "clip.safetensors", clip)
    model.save_pretrained(tmp_path / "folder")
    for path in sorted(tmp_path.iterdir()):
        encoder = load_image_encoder(path)
        torch.testing.assert_close(encoder.embed(picture), truth, atol=2e-6, rtol=0, msg=path.name)
        assert encoder.embed(picture).norm() == pytest.approx(1)


def test_pictures_are_squeezed_not_cropped(picture: Image.Image, tmp_path: Path) -> None:
    torch.save(chinese_clip(), tmp_path / "file.pt")
    pixels = load_image_encoder(tmp_path / "file.pt").pixels(picture)
    assert (pixels - square_pixels(picture)[0]).abs().max() < 1e-6


def test_what_shapes_do_not_tell(picture: Image.Image, tmp_path: Path) -> None:
    """Heads and activation: from a config.json, from metadata; and what they are without."""
    model = vision_model(heads=4, activation="gelu")
    with torch.no_grad():
        truth = torch.nn.functional.normalize(model(square_pixels(picture)).image_embeds)
    model.save_pretrained(tmp_path / "folder")
    said = {VISION_KEY: json.dumps({"heads": 4, "activation": "gelu"})}
    save_safetensors(tmp_path / "told.safetensors", dict(model.state_dict()), said)
    for name in ("folder", "told.safetensors", "folder/model.safetensors"):
        torch.testing.assert_close(
            load_image_encoder(tmp_path / name).embed(picture), truth, atol=2e-6, rtol=0
        )
    save_safetensors(tmp_path / "silent.safetensors", dict(model.state_dict()))
    assert load_image_encoder(tmp_path / "silent.safetensors").config.activation == "quick_gelu"
    # LAION's ViT-H in transformers' names has GELU, Tencent's in CLIP's names QuickGELU; both heads of 80
    for names, activation in ((lambda m: dict(m.state_dict()), "gelu"), (clip_names, "quick_gelu")):
        save_safetensors(tmp_path / "wide.safetensors", names(vision_model(width=1280, heads=16)))
        config = load_image_encoder(tmp_path / "wide.safetensors").config
        assert (config.heads, config.activation, config.size) == (16, activation, 28)


def test_in_16_bits(picture: Image.Image, truth: Tensor, tmp_path: Path) -> None:
    torch.save(chinese_clip(), tmp_path / "file.pt")
    for dtype, error in ((torch.float16, 0.01), (torch.bfloat16, 0.05)):
        found = load_image_encoder(tmp_path / "file.pt", dtype=dtype).embed(picture)
        assert found.dtype == torch.float32 and (found - truth).norm() < error


def test_detection_names_it(tmp_path: Path) -> None:
    torch.save(chinese_clip(), tmp_path / "file.pt")
    kind = detect(open_tensors(tmp_path / "file.pt"))
    assert (kind.kind, kind.name) == ("vision", "a CLIP image encoder (width 128, 2 layers, 28 px)")
    rest = {"bert.embeddings.word_embeddings.weight": torch.zeros(9, 8)}
    rest["bert.encoder.layer.0.attention.self.query.weight"] = torch.zeros(8, 8)
    torch.save(chinese_clip(**rest), tmp_path / "file.pt")
    kind = detect(open_tensors(tmp_path / "file.pt"))
    assert kind.name == "a BERT text encoder (width 8, vocabulary 9) with a CLIP image encoder"


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = dict(vision_model().state_dict())
    projection = "visual_projection.weight"
    positions = "vision_model.embeddings.position_embedding.weight"
    first = "vision_model.encoder.layers.0."
    for tensors, said in (
        (
            {"blocks.0.attn2.kv_proj_ip_adapter.weight": torch.zeros(4, 4)},
            "a HunyuanDiT IP-Adapter; expected a",
        ),
        ({key: value for key, value in whole.items() if key != projection}, f"lacks {projection}"),
        ({**whole, positions: torch.zeros(16, 128)}, "16 positions"),
        ({**whole, f"{first}mlp.fc2.weight": torch.zeros(3, 3)}, "1 of another shape"),
        (
            {**whole, f"{first}more.weight": torch.zeros(3)},
            "1 unexpected: vision_model.encoder.layers.0.more",
        ),
        ({key: v for key, v in whole.items() if "self_attn.q" not in key}, "4 missing"),
    ):
        save_safetensors(tmp_path / "file.safetensors", tensors)
        with pytest.raises(WeightsError, match=re.escape(said)) as caught:
            load_image_encoder(tmp_path / "file.safetensors")
        assert "\n" not in str(caught.value) and "file.safetensors" in str(caught.value)
    for value in ('{"heads": 5}', '{"heads": 0}', '{"heads": "2"}', '{"activation": "relu"}', "[]", "{"):
        save_safetensors(tmp_path / "file.safetensors", whole, {VISION_KEY: value})
        with pytest.raises(WeightsError, match=r"heads|relu|JSON|expected"):
            load_image_encoder(tmp_path / "file.safetensors")


def test_values_that_overflow(picture: Image.Image, tmp_path: Path) -> None:
    weights = dict(vision_model().state_dict())
    weights["visual_projection.weight"] = torch.full_like(weights["visual_projection.weight"], 6e4)
    save_safetensors(tmp_path / "file.safetensors", weights)
    with pytest.raises(HyditError, match=r"not finite in torch.float16; try dtype"):
        load_image_encoder(tmp_path / "file.safetensors", dtype=torch.float16).embed(picture)


def test_where_it_is_looked_for(tmp_path: Path) -> None:
    """In the adapter's own file, and beside it as Tencent's and others' folders have it."""
    name = "ip_adapter_img_norm_cond.weight"
    adapter = tmp_path / "model" / "ipa.pt"
    adapter.parent.mkdir()
    torch.save({name: torch.zeros(3)}, adapter)
    with pytest.raises(WeightsError, match=r"ipa.pt has no image encoder, neither inside nor beside"):
        encoder_beside(adapter)
    places = [
        tmp_path / "clip_img_encoder" / "clip_img_encoder.pt",
        adapter.parent / "clip_img_encoder" / "clip_img_encoder.pt",
        adapter.parent / "clip_img_encoder.pt",
    ]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        torch.save(chinese_clip(), place)
        found = encoder_beside(adapter)
        assert found in (place, place.parent)
        assert load_image_encoder(found).config.embed_dim == 12
    inside = {f"image_encoder.{key}": value for key, value in vision_model().state_dict().items()}
    torch.save({name: torch.zeros(3), **inside}, adapter)
    assert encoder_beside(adapter) == adapter
