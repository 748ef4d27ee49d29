"""Pictures as prompts on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import TINY, randomize
from vision_files import clip_names, vision_model

import hydit_core
from hydit_core.compare.__main__ import main as compare
from hydit_core.generate.__main__ import main
from hydit_core.image_prompts.encoder import load_image_encoder
from hydit_core.image_prompts.run import ImagePrompt
from hydit_core.images import load_picture
from hydit_core.layer_weights import LayerWeights
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.offload.guests import Whole
from hydit_core.pictures.png import read_parameters
from hydit_core.weights.load import load_dit, load_ip_adapter
from hydit_core.weights.quantise import quantise

pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)", "ignore:.*words")

ADAPTER = ("--ip-adapter", "@ipa.pt")
ONE = ("--image-prompt", "@a.png", *ADAPTER)


def write_adapter(path: Path, config: DiTConfig = TINY, embed_dim: int = 12, seed: int = 5) -> None:
    net = randomize(IPAdapter(IPAdapterConfig.for_dit(config, embed_dim, 4)), seed, 0.5)
    torch.save(net.state_dict(), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictured")
    write_adapter(folder / "ipa.pt")
    write_adapter(folder / "wide.pt", DiTConfig(**{**TINY.to_dict(), "hidden_size": 96}))
    write_adapter(folder / "narrow.pt", embed_dim=10)
    torch.save({"state_dict": clip_names(vision_model())}, folder / "clip_img_encoder.pt")
    torch.save(clip_names(vision_model(seed=1)), folder / "other_eyes.pt")
    for seed, name in enumerate("ab"):
        noise = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    half = Image.new("L", (128, 128))
    half.paste(255, (0, 0, 64, 128))
    half.save(folder / "half.png")
    Image.new("L", (64, 20), 255).save(folder / "flat.png")
    layer = "lora_unet_blocks_0_attn1_Wqkv"
    noise = torch.Generator().manual_seed(3)
    shapes = {f"{layer}.lora_down.weight": (2, 64), f"{layer}.lora_up.weight": (192, 2)}
    lora = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    save_file(lora, folder / "lora.safetensors")
    mask = Image.new("L", (30, 20))
    mask.paste(255, (8, 4, 30, 20))
    mask.save(folder / "part.png")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "weights.json").write_text("[1, 0, 0.5, 1]", encoding="utf-8")
    text = {
        "embeddings.word_embeddings.weight": torch.zeros(9, 8),
        "encoder.layer.0.attention.self.query.weight": torch.zeros(8, 8),
    }
    torch.save(text, folder / "bert.pt")
    other = {
        "image_proj": {"proj.weight": torch.zeros(4, 4)},
        "ip_adapter": {"1.to_k_ip.weight": torch.ones(4)},
    }
    torch.save(other, folder / "sd15.bin")
    return folder


@pytest.fixture
def draw(folder: Path, tiny_model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def draw(*options: str, steps: int = 2) -> tuple[int, str, Path]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.png"
        base = ["--model", str(tiny_model_file), "--prompt", "cat", "--steps", str(steps), "--device", "cpu"]
        code = main([*base, "--out", str(out), *(option.replace("@", f"{folder}/") for option in options)])
        return code, capsys.readouterr().err, out

    return draw


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_it_draws_what_the_library_draws(draw, folder: Path, tiny_model_file: Path) -> None:
    """Every option reaches the picture that it is given for."""
    adapter = load_ip_adapter(folder / "ipa.pt").requires_grad_(False)
    encoder = load_image_encoder(folder / "clip_img_encoder.pt")
    pipe = hydit_core.load(tiny_model_file, device="cpu")
    first, second, half = (Image.open(folder / f"{name}.png") for name in ("a", "b", "half"))
    images = [
        ImagePrompt(adapter, encoder, first, 0.5, LayerWeights.parse("decay(0.9)"), 0.0, 0.6),
        ImagePrompt(adapter, encoder, second, -1, LayerWeights.parse("1, 0, 0.5, 1"), 0.2, 1, half),
    ]
    expected = np.asarray(pipe("cat", steps=4, images=images)[0]).astype(int)
    Image.new("L", (9, 9), 255).save(folder / "white.png")
    given = {
        "--image-prompt": ("@a.png:0.5", "@b.png:-1"),
        "--image-prompt-blocks": ("decay(0.9)", "@weights.json"),
        "--image-prompt-range": (":0.6", "0.2:"),
        "--image-prompt-mask": ("@white.png", "@half.png"),
    }
    other = {
        "--image-prompt": ("@a.png:0.5", "@a.png:-1"),
        "--image-prompt-blocks": ("0.9",),
        "--image-prompt-range": ("0.2:1",),
        "--image-prompt-mask": ("@half.png",),
    }

    def drawn(options: dict[str, tuple[str, ...]]) -> np.ndarray:
        words = [word for option, values in options.items() for value in values for word in (option, value)]
        code, err, path = draw(*words, *ADAPTER, steps=4)
        assert code == 0, err
        return pixels(path)

    assert np.abs(drawn(given) - expected).max() <= 1
    for option, values in other.items():
        assert (np.abs(drawn({**given, option: values}) - expected) > 1).any(), option


def test_a_weight_of_zero_is_no_adapter(draw) -> None:
    plain, with_one = draw()[2], draw(*ONE)[2]
    none = draw("--image-prompt", "@a.png:0", *ADAPTER)[2]
    assert (pixels(none) == pixels(plain)).all() and (pixels(with_one) != pixels(plain)).any()


def test_the_picture_remembers(draw) -> None:
    two = ["--image-prompt", "@a.png:0.5", "--image-prompt", "@b.png", *ADAPTER]
    more = ["--image-prompt-blocks", "only-late", "--image-prompt-range", "0:0.6"]
    code, err, path = draw(*two, *more, "--image-prompt-mask", "@half.png")
    assert code == 0, err
    shared = {"ip_adapter": "ipa.pt", "image_encoder": "clip_img_encoder.pt", "blocks": "only-late(1)"}
    shared |= {"start": 0.0, "end": 0.6, "mask": "half.png"}
    facts = read_parameters(path)["image_prompts"]
    (mask,) = {fact.pop("mask_picture") for fact in facts}
    assert mask.startswith("half-mask-") and (pixels(path.with_name(mask))[:, 64:] == 0).all()
    assert facts == [
        {**shared, "image": "a.png", "weight": 0.5},
        {**shared, "image": "b.png", "weight": 1.0},
    ]
    assert "image_prompts" not in read_parameters(draw()[2])


def test_the_graph_that_draws_it_again(draw, folder: Path) -> None:
    """What is transparent is written as it is used: ComfyUI's nodes would show what is below."""
    picture = Image.open(folder / "a.png")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(folder / "glass.png")
    options = ["--image-prompt", "@glass.png:-0.5", *ADAPTER, "--image-encoder", "@other_eyes.pt"]
    code, err, path = draw(*options, "--image-prompt-range", "0.1:0.8", "--image-prompt-mask", "@half.png")
    assert code == 0, err
    (fact,) = read_parameters(path)["image_prompts"]
    used = pixels(path.with_name(fact["picture"]))
    assert (used == np.asarray(load_picture(folder / "glass.png"))).all()
    assert err.count("\n") == 2 and f"image prompt: {path.with_name(fact['picture'])}" in err
    with Image.open(path) as drawn:
        prompt = json.loads(drawn.text["prompt"])
    (apply,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "HyDiTIPAdapterApply")
    assert {name: value for name, value in apply.items() if not isinstance(value, list)} == {
        "weight": -0.5,
        "start_percent": 0.1,
        "end_percent": 0.8,
        "block_weights": "uniform(1)",
    }
    assert prompt[apply["image"][0]]["inputs"]["image"] == fact["picture"]
    assert prompt[apply["mask"][0]]["inputs"]["image"] == fact["mask_picture"]
    loader = prompt[apply["ip_adapter"][0]]["inputs"]
    assert loader == {"ip_adapter_name": "ipa.pt", "clip_vision_name": "other_eyes.pt"}


def test_which_image_encoder(draw) -> None:
    """The one that is named, else the one beside the adapter."""
    found = [pixels(draw(*ONE, *more)[2]) for more in ((), ("--image-encoder", "@clip_img_encoder.pt"))]
    assert (found[0] == found[1]).all()
    assert (found[0] != pixels(draw(*ONE, "--image-encoder", "@other_eyes.pt")[2])).any()


@pytest.mark.parametrize("mode", ["encoders", "blocks"])
def test_offloaded_it_is_the_same_picture(draw, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Encoder and adapter are there while pictures are encoded, and have left when sampling begins."""
    here: list[str] = []
    seen: list[set[str]] = []
    enter, leave, forward = Whole.enter, Whole.leave, DiT.forward

    def entered(self: Whole) -> None:
        self.name = "vision" if any(p.ndim == 4 for p in self._guest.tensors) else "other"
        here.append(self.name)
        enter(self)

    def left(self: Whole) -> None:
        here.remove(self.name)
        leave(self)

    def step(self, *args, **kwargs):
        seen.append(set(here))
        return forward(self, *args, **kwargs)

    expected = pixels(draw(*ONE)[2])
    monkeypatch.setattr(Whole, "enter", entered)
    monkeypatch.setattr(Whole, "leave", left)
    monkeypatch.setattr(DiT, "forward", step)
    code, err, path = draw(*ONE, "--offload", mode)
    assert code == 0, err
    assert (pixels(path) == expected).all()
    # The DiT's own patch embedding is a convolution, too
    assert seen == [{"vision"} if mode == "encoders" else set()] * 2


@pytest.mark.parametrize(
    "options",
    [
        ("--forecast", "fast", "--steps", "6"),
        ("--batch", "2"),
        ("--init-image", "@b.png", "--strength", "0.7"),
        ("--init-image", "@b.png", "--inpaint", "@part.png"),
        ("--upscale", "2", "--tile", "64x64", "--strength", "0.7"),
        ("--init-image", "@a.png", "--upscale", "2", "--tile", "64x64", "--strength", "0.7"),
        ("--lora", "@lora.safetensors"),
        ("--dtype", "bf16"),
        ("--dtype", "fp16"),
    ],
    ids=" ".join,
)
def test_with_every_other_way_to_draw(draw, options: tuple[str, ...]) -> None:
    """The image prompt acts there, on each tile and each picture of a batch, and nothing overflows."""
    (code, err, path), (_, _, other) = draw(*ONE, *options), draw(*options)
    assert code == 0, err
    names = [""] if "--batch" not in options else ["-1", "-2"]
    for name in names:
        one, two = (pixels(each.with_stem(each.stem + name)) for each in (path, other))
        assert one.std() > 1
        changed = (one != two).any(-1)
        if "--inpaint" in options:
            assert not changed[:2].any() and changed[2:].any()
        else:  # everywhere, in the last tile as in the first
            assert all(
                part.any() for half in np.array_split(changed, 2) for part in np.array_split(half, 2, 1)
            )


def test_one_inside_the_models_file(draw, folder: Path, tiny_model_file: Path, tmp_path: Path) -> None:
    """It is taken from the set of weights that the model is taken from."""
    dit = load_dit(tiny_model_file)[0].state_dict()
    write_adapter(tmp_path / "other.pt", seed=6)
    inside = {
        name: {**dit, **torch.load(path)}
        for name, path in (("ema", tmp_path / "other.pt"), ("module", folder / "ipa.pt"))
    }
    torch.save(inside, tmp_path / "both.pt")
    both = str(tmp_path / "both.pt")
    parts = ["--text-encoders", str(tiny_model_file), "--vae", str(tiny_model_file)]
    parts += ["--image-prompt", "@a.png", "--image-encoder", "@clip_img_encoder.pt", "--ip-adapter"]
    for key, alone in (("module", str(folder / "ipa.pt")), ("ema", str(tmp_path / "other.pt"))):
        (code, err, path), (_, _, expected) = (
            draw("--model", both, "--load-key", key, *parts, adapter) for adapter in (both, alone)
        )
        assert code == 0, err
        assert (pixels(path) == pixels(expected)).all()


def test_with_a_quantised_model(tiny_model_file: Path, tmp_path: Path, draw) -> None:
    quantise(tiny_model_file, tmp_path / "small.safetensors", format="int8_convrot")
    options = ("--model", str(tmp_path / "small.safetensors"))
    (code, err, path), (_, _, plain) = draw(*ONE, *options), draw(*options)
    assert code == 0, err
    assert (pixels(path) != pixels(plain)).any()


def test_the_plan_counts_both_networks(
    folder: Path, tiny_model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--plan", "--device", "cpu", "--dtype", "fp32", "--model", str(tiny_model_file)]
    pictures = [option.replace("@", f"{folder}/") for option in (*ONE, "--image-prompt", "@b.png")]

    def plan(*more: str) -> dict[str, str]:
        assert main([*options, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        return dict(line.strip().split(": ", 1) for line in lines if ": " in line)

    with_pictures, without = plan(*pictures), plan()
    adapter = sum(p.numel() for p in load_ip_adapter(folder / "ipa.pt").parameters()) * 4
    assert with_pictures["IP-Adapter"] == f"{adapter / 1e6:.1f} MB"
    assert "image encoder" in with_pictures and "IP-Adapter" not in without


def test_compare_takes_them_as_a_side(folder: Path, tiny_model_file: Path, tmp_path: Path) -> None:
    base = f"--model {tiny_model_file} --steps 2 --device cpu"
    pictured = f"{base} --image-prompt {folder}/a.png --ip-adapter {folder}/ipa.pt"
    out = tmp_path / "out"
    assert compare(["--a", base, "--b", pictured, "--prompt", "cat", "--seed", "1", "--out", str(out)]) == 0
    (plain,), (other,) = ((out / "pictures" / letter).glob("*.png") for letter in "ab")
    assert (pixels(plain) != pixels(other)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ADAPTER, "--ip-adapter needs --image-prompt FILE"),
        (("--image-prompt", "@a.png"), "--image-prompt needs --ip-adapter FILE, such as Tencent's ipa.pt"),
        (("--image-encoder", "@other_eyes.pt"), "--image-encoder needs --image-prompt FILE"),
        (("--image-prompt-mask", "@half.png"), "--image-prompt-mask needs --image-prompt FILE"),
        (("--image-prompt", "@a.png:high", *ADAPTER), "'high' after the colon is not a number"),
        (("--image-prompt", "@a.png:nan", *ADAPTER), "weight nan: use -10 to 10"),
        (("--image-prompt", "@a.png:11", *ADAPTER), "weight 11: use -10 to 10"),
        (("--image-prompt", "@none.png:0.5", *ADAPTER), "cannot read picture {}/none.png: no such file"),
        (("--image-prompt", r"C:\x.png:0.5", *ADAPTER), r"cannot read picture C:\x.png: no such file"),
        (("--image-prompt", "@broken.png", *ADAPTER), "cannot read picture {}/broken.png"),
        (("--image-prompt", "@", *ADAPTER), "cannot read picture {}"),
        (("--image-prompt", "@a.png", "--ip-adapter", "@none.pt"), "{}/none.pt does not exist"),
        (
            ("--image-prompt", "@a.png", "--ip-adapter", "@bert.pt"),
            "{}/bert.pt is a BERT text encoder (width 8, vocabulary 9); expected a HunyuanDiT IP-Adapter",
        ),
        (
            ("--image-prompt", "@a.png", "--ip-adapter", "@a.png"),
            "{}/a.png",
        ),
        (
            ("--image-prompt", "@a.png", "--ip-adapter", "@sd15.bin"),
            "{}/sd15.bin is an IP-Adapter for Stable Diffusion; expected a HunyuanDiT IP-Adapter",
        ),
        (
            ("--image-prompt", "@a.png", "--ip-adapter", "@wide.pt"),
            "{}/wide.pt does not fit this HunyuanDiT: hidden_size 96 instead of 64",
        ),
        (
            ("--image-prompt", "@a.png", "--ip-adapter", "@narrow.pt"),
            "the image encoder gives 12 values, the IP-Adapter takes 10: use the encoder that it was trained",
        ),
        ((*ONE, "--image-encoder", "@bert.pt"), "{}/bert.pt is a BERT text encoder"),
        ((*ONE, "--image-encoder", "@none"), "{}/none does not exist"),
        (
            (*ONE, "--image-prompt-mask", "@flat.png"),
            "--image-prompt-mask {}/flat.png is 64x20, what is drawn 64x64",
        ),
        ((*ONE, "--image-prompt-mask", "@broken.png"), "cannot read picture {}/broken.png"),
        (
            (*ONE, "--image-prompt-mask", "@half.png", "--image-prompt-mask", "@half.png"),
            "is given 2 times for 1 ",
        ),
        ((*ONE, "--image-prompt-blocks", "1,2,3"), "3 weights of an image prompt for a model with 4 blocks"),
        ((*ONE, "--image-prompt-blocks", "steep"), "decay(0.825)"),
        (
            (*ONE, "--image-prompt-blocks", "1", "--image-prompt-blocks", "1"),
            "is given 2 times for 1 --image-prompt",
        ),
        ((*ONE, "--image-prompt-range", "0.5"), "--image-prompt-range 0.5: expected START:END, as in 0:0.6"),
        ((*ONE, "--image-prompt-range", "a:b"), "expected START:END"),
        (
            (*ONE, "--image-prompt-range", "0.6:0.5"),
            "image prompt from 0.6 to 0.5: use 0 <= start <= end <= 1",
        ),
        ((*ONE, "--image-prompt-range=-1:0.5"), "image prompt from -1 to 0.5"),
        ((*ONE, "--image-prompt-range", "0:nan"), "image prompt from 0 to nan"),
    ],
)
def test_mistakes_are_told_in_a_line(draw, folder: Path, options: tuple[str, ...], message: str) -> None:
    code, err, path = draw(*options)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message.replace("{}", str(folder)) in err
    assert not path.exists()


def test_the_encoder_has_to_be_somewhere(draw, tmp_path: Path, folder: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "ipa.pt").write_bytes((folder / "ipa.pt").read_bytes())
    code, err, _ = draw("--image-prompt", "@a.png", "--ip-adapter", str(alone / "ipa.pt"))
    assert code == 2 and "ipa.pt has no image encoder, neither inside nor beside it" in err


def test_a_picture_is_not_written_over(draw, folder: Path, tiny_model_file: Path, capsys) -> None:
    before = (folder / "a.png").read_bytes()
    base = ["--model", str(tiny_model_file), "--prompt", "cat", "--device", "cpu", "--overwrite"]
    pictured = ["--image-prompt", f"{folder}/a.png:0.5", "--ip-adapter", f"{folder}/ipa.pt"]
    assert main([*base, *pictured, "--out", str(folder / "a.png")]) == 2
    assert "error: " in capsys.readouterr().err and (folder / "a.png").read_bytes() == before
