"""Files of other models are refused by name, with what to do, at every door that takes a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from key_lists import sparse_safetensors
from PIL import Image
from torch import nn

from hydit_core.generate.__main__ import main as generate
from hydit_core.lora.__main__ import main as lora
from hydit_core.train.__main__ import main as train
from hydit_core.weights.__main__ import main as weights
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors

Shapes = dict[str, tuple[int, ...]]


def of_class(name: str, **options: object) -> Callable[[], Shapes]:
    """The names and shapes that a class of diffusers has; nothing if it is older than the class."""

    def shapes() -> Shapes:
        import diffusers

        if not hasattr(diffusers, name):
            return {}
        with torch.device("meta"):
            return shapes_of(getattr(diffusers, name)(**options))

    return shapes


def shapes_of(net: nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in net.state_dict().items()}


def named(*names: str, prefix: str = "", width: int = 8, **shapes: tuple[int, ...]) -> Callable[[], Shapes]:
    """Some names, as those models have that diffusers does not."""
    return lambda: {prefix + key: shapes.get(key, (width, width)) for key in names}


def llava() -> Shapes:
    """As LLaVA's own program saves it, on which Tencent's HunyuanCaptioner and DialogGen are built."""
    layers = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = [f"model.layers.{n}.self_attn.{layer}.weight" for n in range(2) for layer in layers]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    names += [f"model.mm_projector.{n}.{kind}" for n in (0, 2) for kind in ("weight", "bias")]
    return dict.fromkeys(names, (8, 8))


def llava_of_transformers() -> Shapes:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=28, patch_size=14), text_config=text
    )
    with torch.device("meta"):
        return shapes_of(LlavaForConditionalGeneration(config))


_ONE = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
_REFINED = "txt_in.individual_token_refiner.blocks.0.norm1.weight"
_PATCH = "img_in.proj.weight"
_NET = "controlnet_blocks.0.weight"
_VIDEO = "a HunyuanVideo model"
_IMAGE = "a HunyuanImage 2.1 model"
_LLAVA = "a LLaVA model, as HunyuanCaptioner and DialogGen are"

FAMILIES: dict[str, tuple[str, Callable[[], Shapes]]] = {
    "HunyuanImage 2.1 of diffusers": (_IMAGE, of_class("HunyuanImageTransformer2DModel", **_ONE)),
    "HunyuanImage 2.1 of Tencent": (_IMAGE, named(_REFINED, _PATCH, **{_PATCH: (3584, 64, 1, 1)})),
    "HunyuanImage 2.1 in ComfyUI's file": (
        _IMAGE,
        lambda: {f"model.diffusion_model.{_REFINED}": (8,), f"model.diffusion_model.{_PATCH}": (8, 64, 1, 1)},
    ),
    "HunyuanImage 2.1's refiner": (
        "HunyuanImage 2.1's refiner",
        named(_REFINED, _PATCH, **{_PATCH: (8, 128, 1, 1, 1)}),
    ),
    "HunyuanImage 3.0": (
        "a HunyuanImage 3.0 model",
        named(
            *(
                "model.wte.weight",
                "model.layers.0.self_attn.qkv_proj.weight",
                "model.layers.0.mlp.gate.wg.weight",
            ),
            *("patch_embed.model.0.weight", "timestep_emb.mlp.0.weight", "vae.encoder.conv_in.weight"),
            *("vae.encoder.down.0.block.0.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
        ),
    ),
    "HunyuanVideo of diffusers": (_VIDEO, of_class("HunyuanVideoTransformer3DModel", **_ONE)),
    "HunyuanVideo 1.5 of diffusers": (
        _VIDEO,
        of_class("HunyuanVideo15Transformer3DModel", num_layers=1, num_refiner_layers=1),
    ),
    "HunyuanVideo of Tencent": (
        _VIDEO,
        named(_REFINED, _PATCH, "vector_in.in_layer.weight", **{_PATCH: (8, 16, 1, 2, 2)}),
    ),
    "HunyuanVideo 1.5 of Tencent": (
        _VIDEO,
        named(_REFINED, _PATCH, "vision_in.proj.0.weight", **{_PATCH: (8, 65, 1, 1, 1)}),
    ),
    "LLaVA": (_LLAVA, llava),
    "LLaVA of transformers": (_LLAVA, llava_of_transformers),
    "Hunyuan3D 2.0": (
        "a Hunyuan3D model",
        named("latent_in.weight", "cond_in.weight", "double_blocks.0.img_attn.qkv.weight", prefix="model."),
    ),
    "Hunyuan3D 2.1": (
        "a Hunyuan3D model",
        named(
            "x_embedder.weight", "t_embedder.mlp.2.weight", "blocks.0.attn1.k_norm.weight", prefix="model."
        ),
    ),
    "a ControlNet of SDXL": (
        "an SDXL ControlNet",
        of_class(
            "ControlNetModel",
            cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            block_out_channels=(32, 64, 64),
        ),
    ),
    "a small ControlNet of SDXL, without attention": (
        "a ControlNet for Stable Diffusion",
        of_class("ControlNetModel", down_block_types=("DownBlock2D",), block_out_channels=(32,)),
    ),
    "a ControlNet of Flux": (
        "a Flux ControlNet",
        of_class("FluxControlNetModel", num_layers=1, num_single_layers=1),
    ),
    "XLabs' ControlNet of Flux": (
        "a Flux ControlNet",
        named(_NET, "double_blocks.0.img_attn.norm.key_norm.scale", "input_hint_block.0.weight"),
    ),
    "MistoLine of Flux": ("a Flux ControlNet", named("controlnet_blocks.0.linear.weight")),
    "a ControlNet of SD3": ("a Stable Diffusion 3 ControlNet", of_class("SD3ControlNetModel", num_layers=1)),
    "Stability's ControlNet of SD3.5": (
        "a Stable Diffusion 3 ControlNet",
        named(_NET, "pos_embed_input.proj.weight", "transformer_blocks.0.adaLN_modulation.1.bias"),
    ),
    "a ControlNet of Qwen-Image": (
        "a Qwen-Image ControlNet",
        of_class("QwenImageControlNetModel", num_layers=1, num_attention_heads=2),
    ),
    "a ControlNet of a model to come": ("a ControlNet of another model", named(_NET, "new.0.weight")),
    "Control-LoRA": (
        "a Control-LoRA for Stable Diffusion",
        named("lora_controlnet", "input_blocks.1.0.in_layers.2.up"),
    ),
    "T2I-Adapter": ("a T2I-Adapter for Stable Diffusion", of_class("T2IAdapter", channels=(16,))),
    "the VAE of HunyuanVideo": (
        "a video model's VAE",
        of_class("AutoencoderKLHunyuanVideo", block_out_channels=(32, 32, 32, 32)),
    ),
}


@pytest.mark.parametrize("what", FAMILIES)
def test_every_family_is_named(what: str) -> None:
    name, shapes = FAMILIES[what]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes().items()}
    if not tensors:
        pytest.skip("this diffusers does not have it yet")
    found = detect(tensors)
    assert (found.kind, found.name) == ("other", name)


CONTROLNETS = [what for what, (name, _) in FAMILIES.items() if "Control" in name]


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("strangers")
    return {
        what: sparse_safetensors(folder / f"{index}.safetensors", found)
        for index, (what, (_, shapes)) in enumerate(FAMILIES.items())
        if (found := shapes())
    }


def refused(command: Callable[[list[str]], int], arguments: list[object], capsys) -> str:
    """The one line of an error that a command ends with."""
    assert command([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    error = printed.err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


RUN = """
[model]
init_from = "{model}"
[data]
sources = [{{ path = "{pictures}" }}]
resolution = 64
[objective]
kind = "full"
[run]
output_dir = "run"
steps = 1
batch_size = 1
"""
DOORS = (
    "model",
    "controlnet",
    "lora",
    "text-encoders",
    "vae",
    "merge",
    "base",
    "extract",
    "convert",
    "train",
)


@pytest.mark.parametrize("door", DOORS)
def test_every_door_says_what_was_given(
    door: str, strangers: dict[str, Path], tiny_model_file: Path, tmp_path: Path, capsys
) -> None:
    out, photos = tmp_path / "out.safetensors", tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (64, 64), "red").save(photos / "a.png")
    (photos / "a.txt").write_text("a")
    common = ["--prompt", "a", "--out", tmp_path / "pictures"]
    for what, path in strangers.items():
        config = tmp_path / "run.toml"
        config.write_text(RUN.format(model=path.as_posix(), pictures=photos.as_posix()))
        command, arguments = {
            "model": (generate, [*common, "--model", path]),
            "controlnet": (
                generate,
                [*common, "--model", tiny_model_file, "--controlnet", path, "--control-image", "none.png"],
            ),
            "lora": (generate, [*common, "--model", tiny_model_file, "--lora", path]),
            "text-encoders": (generate, [*common, "--model", tiny_model_file, "--text-encoders", path]),
            "vae": (generate, [*common, "--model", tiny_model_file, "--vae", path]),
            "merge": (lora, ["merge", path, path, "-o", out]),
            "base": (lora, ["merge", tiny_model_file, path, "-o", out]),
            "extract": (lora, ["extract", path, tiny_model_file, "--rank", 2, "-o", out]),
            "convert": (weights, ["convert", path, "-o", out, "--layout", "tencent"]),
            "train": (train, [config, "--dry-run"]),
        }[door]
        error = refused(command, arguments, capsys)
        assert path.name in error, what
        # HunyuanImage 3.0 has its VAE in the same file.
        assert FAMILIES[what][0] in error or (door == "vae" and "expected a convolution's" in error), what
    assert not out.exists() and not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("what", CONTROLNETS)
def test_another_models_controlnet_says_what_to_use(what: str, strangers: dict[str, Path], capsys) -> None:
    arguments = ["--prompt", "a", "--controlnet", strangers[what], "--control-image", "none.png"]
    error = refused(generate, arguments, capsys)
    assert "a ControlNet goes with the model that it was made for" in error
    assert "published: Tencent-Hunyuan/HYDiT-ControlNet-v1.2" in error


def test_inspect_says_what_to_do_with_it(strangers: dict[str, Path], capsys) -> None:
    assert weights(["inspect", str(strangers["LLaVA"])]) == 0
    printed = capsys.readouterr().out
    assert _LLAVA in printed and "give its text as the prompt" in printed


def test_the_name_of_a_file_of_another_model_does_not_matter(tmp_path: Path) -> None:
    """Tencent's HunyuanVideo comes under the name of DeepSpeed's files, as HunyuanDiTs do."""
    path = tmp_path / "mp_rank_00_model_states.pt"
    name, shapes = FAMILIES["HunyuanVideo of Tencent"]
    torch.save({"module": {key: torch.zeros(shape) for key, shape in shapes().items()}}, path)
    assert detect(open_tensors(path)).name == name


FORMATS = {
    "a GGUF file": ("model.gguf", b"GGUF\x03\0\0\0"),
    "an engine of TensorRT": ("model_onnx.plan", b"ftrt\0\0\0\0"),
    "an engine of TensorRT,": ("unet.engine", b"ptrt\0\0\0\0"),
    "an ONNX graph": ("model.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:"),
}


@pytest.mark.parametrize("what", FORMATS)
@pytest.mark.parametrize("place", ["file", "folder", "transformer", "under another name"])
def test_other_formats_say_what_to_take_instead(what: str, place: str, tmp_path: Path, capsys) -> None:
    name, content = FORMATS[what]
    folder = tmp_path / "transformer" if place == "transformer" else tmp_path
    folder.mkdir(exist_ok=True)
    path = folder / ("model.safetensors" if place == "under another name" else name)
    path.write_bytes(content + b"\0" * 600)
    given = {"folder": tmp_path, "transformer": tmp_path}.get(place, path)
    for option in ("--model", "--vae", "--text-encoders", "--lora"):
        if place == "transformer" and option != "--model":
            continue
        error = refused(generate, ["--prompt", "a", option, given, "--out", tmp_path / "out"], capsys)
        assert str(path) in error and what in error and "take " in error, option
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_pipeline_is_named(tmp_path: Path, capsys) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    error = refused(generate, ["--prompt", "a", "--model", tmp_path], capsys)
    assert "it is the folder of a StableDiffusionXLPipeline" in error
