"""Places on the hub: what is downloaded of a repository, and what is said; against a server of our own."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import COMMIT, Hub
from PIL import Image
from published_files import ttplanet
from published_loras import tencents_lora
from safetensors.torch import save_file
from tiny import TINY, randomize, write_tiny_model
from vision_files import clip_names, vision_model

from hydit_core.errors import WeightsError
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.weights.convert import convert
from hydit_core.weights.hub import local, needed, parse

DIFFUSERS = [
    *("model_index.json", "README.md", "LICENSE.txt", "assets/picture.png"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
    *("transformer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors"),
    *("text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    *("text_encoder_2/config.json", "text_encoder_2/model.safetensors.index.json"),
    *(f"text_encoder_2/model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    *(
        "text_encoder_2/model.fp16-00001-of-00002.safetensors",
        "text_encoder_2/model.fp16-00002-of-00002.safetensors",
    ),
    *("tokenizer/vocab.txt", "tokenizer/tokenizer_config.json", "tokenizer_2/spiece.model"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"),
    *("safety_checker/model.safetensors", "feature_extractor/preprocessor_config.json"),
]
TENCENT = [
    *("README.md", "config.json", "dialoggen/model.safetensors"),
    *(f"t2i/model/pytorch_model_{key}.pt" for key in ("ema", "module")),
    *(
        "t2i/clip_text_encoder/config.json",
        "t2i/clip_text_encoder/pytorch_model.bin",
        "t2i/tokenizer/vocab.txt",
    ),
    *("t2i/mt5/config.json", "t2i/mt5/pytorch_model.bin", "t2i/mt5/spiece.model"),
    *("t2i/sdxl-vae-fp16-fix/config.json", "t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors"),
    *("t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.bin", "t2i/sdxl-vae-fp16-fix/sdxl_vae.safetensors"),
]
LORAS = [
    f"{name}/adapter_{file}"
    for name in ("jade", "porcelain")
    for file in ("config.json", "model.safetensors")
]
NETS = [f"t2i/controlnet/pytorch_model_{kind}_distill.pt" for kind in ("canny", "depth", "pose")]


def chosen(names: list[str], *only: str, place: str = "hub:A/B", load_key: str | None = None) -> set[str]:
    return set(needed(parse(place), ["README.md", *names], only, load_key))


def test_of_a_diffusers_pipeline_each_part_once() -> None:
    assert chosen(DIFFUSERS, "dit") == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    }
    assert chosen(DIFFUSERS, "bert", "t5") == {
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
        *("tokenizer/vocab.txt", "tokenizer/tokenizer_config.json", "tokenizer_2/spiece.model"),
        *("text_encoder_2/config.json", "text_encoder_2/model.safetensors.index.json"),
        *(f"text_encoder_2/model-0000{n}-of-00002.safetensors" for n in (1, 2)),
    }
    assert chosen(DIFFUSERS, "vae") == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}
    assert chosen(DIFFUSERS, "dit", place="hub:A/B/transformer") == {
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }


def test_of_tencents_folder_what_the_load_key_says() -> None:
    assert chosen(TENCENT, "dit") == {"t2i/model/pytorch_model_ema.pt"}
    assert chosen(TENCENT, "dit", load_key="module") == {"t2i/model/pytorch_model_module.pt"}
    assert chosen(TENCENT, "bert", "t5", "vae") == {
        *(
            "t2i/clip_text_encoder/config.json",
            "t2i/clip_text_encoder/pytorch_model.bin",
            "t2i/tokenizer/vocab.txt",
        ),
        *("t2i/mt5/config.json", "t2i/mt5/pytorch_model.bin", "t2i/mt5/spiece.model"),
        *("t2i/sdxl-vae-fp16-fix/config.json", "t2i/sdxl-vae-fp16-fix/diffusion_pytorch_model.safetensors"),
    }


def test_one_file_holds_every_part() -> None:
    for part in ("dit", "bert", "vae", "controlnet", "lora"):
        assert chosen(["model.safetensors", "preview.png"], part) == {"model.safetensors"}
    assert chosen(["a.safetensors", "b.safetensors"], "dit", place="hub:A/B/b.safetensors") == {
        "b.safetensors"
    }


def test_a_lora_in_a_folder() -> None:
    assert chosen(LORAS, "lora", place="hub:A/B/jade") == {
        "jade/adapter_config.json",
        "jade/adapter_model.safetensors",
    }
    file = "jade/adapter_model.safetensors"
    assert chosen(LORAS, "lora", place=f"hub:A/B/{file}") == {"jade/adapter_config.json", file}
    both = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "bert/adapter_config.json",
        "bert/adapter_model.bin",
    ]
    assert chosen(both, "lora") == set(both)


@pytest.mark.parametrize(
    ("names", "part", "place", "said"),
    [
        (LORAS, "lora", "hub:A/B", r"name one .*hub:A/B/jade/adapter_model.safetensors"),
        (
            NETS,
            "controlnet",
            "hub:A/B@v1",
            r"3 weights files; .*hub:A/B@v1/t2i/controlnet/\w+_canny_distill.pt, hub",
        ),
        (NETS, "controlnet", "hub:A/B/t2i/controlnet", "3 weights files; name one of them"),
        (
            ["a.safetensors", "b.safetensors"],
            "dit",
            "hub:A/B",
            "2 weights files; name one of them: hub:A/B/a.saf",
        ),
        (["ipa.pt", "clip_img_encoder.pt"], "ip_adapter", "hub:A/B", "name one .*hub:A/B/ipa.pt"),
        (DIFFUSERS, "dit", "hub:A/B/unet", "hub:A/B/unet: there is no such file or folder"),
        ([], "dit", "hub:A/B", "no weights of the wanted kind"),
    ],
)
def test_nothing_is_guessed(names: list[str], part: str, place: str, said: str) -> None:
    with pytest.raises(WeightsError, match=said):
        chosen(names, part, place=place)


@pytest.mark.parametrize(
    "text",
    [
        "hub:",
        "hub:name",
        "hub:A/B@",
        "hub:../B",
        "hub:A/..",
        "hub:A/B/../c",
        "hub:-/B",
        "hub:A/B@x y",
    ],
)
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(WeightsError, match=re.escape(f"{text}: expected hub:ORG/NAME")):
        local(text)


def test_a_name_may_have_a_revision_and_a_place_in_it() -> None:
    assert parse("hub:A/B") == ("A/B", "main", "")
    assert parse("hub:A/B@v1.2/t2i/model") == ("A/B", "v1.2", "t2i/model")
    assert parse("hub:A/B@refs%2Fpr%2F3") == ("A/B", "refs/pr/3", "")


def test_what_is_not_asked_for_by_that_name_is_a_path(tmp_path: Path) -> None:
    for path in ("Tencent-Hunyuan/HunyuanDiT", "./hub:A/B", tmp_path, "https://huggingface.co/A/B"):
        assert local(path) == Path(path)


# --- with a server ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    whole = write_tiny_model(folder / "whole.safetensors")
    for repo in ("org/whole", "org/pipeline", "org/gated"):
        (folder / repo).mkdir(parents=True)
        (folder / repo / "README.md").write_text("words")
    shutil.move(whole, folder / "org/whole/hydit_tiny.safetensors")
    convert(folder / "org/whole/hydit_tiny.safetensors", folder / "made", layout="diffusers")
    shutil.copytree(folder / "made", folder / "org/pipeline", dirs_exist_ok=True)
    (folder / "org/pipeline/transformer/diffusion_pytorch_model.bin").write_bytes(b"not asked for")
    (folder / "org/large").mkdir()
    save_file({"w": torch.zeros(6_000_000)}, folder / "org/large/large.safetensors")
    (folder / "org/eyes").mkdir()
    adapter = randomize(IPAdapter(IPAdapterConfig.for_dit(TINY, 12, 4)), 5)
    torch.save(adapter.state_dict(), folder / "org/eyes/ipa.pt")
    torch.save(clip_names(vision_model()), folder / "org/eyes/clip_img_encoder.pt")
    Image.new("RGB", (20, 20), "red").save(folder / "red.png")
    server = Hub(folder)
    server.cards = {"org/whole": {"license": "other", "license_name": "tencent-hunyuan-community"}}
    server.gated = {"org/gated"}
    yield server
    server.close()


@pytest.fixture(autouse=True)
def forgotten(request: pytest.FixtureRequest) -> None:
    if "hub" in request.fixturenames:
        server: Hub = request.getfixturevalue("hub")
        server.asked.clear()
        server.ranges.clear()
        server.cut = None


DRAW = ("hydit_core.generate", "--device", "cpu", "--prompt", "cat", "--steps", 1)
AWAY = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def inspect(hub: Hub, home: Path, *places: str, **more: str) -> list[tuple[int, str]]:
    """For each place the exit code and what was said, all in one process, whose start takes longest."""
    many = "import sys; from hydit_core.weights.__main__ import main; sys.stderr = sys.stdout\n"
    many += "for place in sys.argv[1:]: print(chr(0), main(['inspect', place]), sep='', end=chr(0))"
    done = hub.run(home, "-c", many, *places, **more)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stderr
    said, codes = done.stdout.split("\0")[:-1:2], done.stdout.split("\0")[1::2]
    return [(int(code), text) for code, text in zip(codes, said, strict=True)]


def test_pictures_of_a_model_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    """What is needed is downloaded once, with its licence, and then used without network."""
    options = ("--model", "hub:org/pipeline", "--text-encoders", "hub:org/whole", "--vae", "hub:org/whole")
    first = hub.run(tmp_path / "home", "-m", *DRAW, *options, "--out", tmp_path / "a.png")
    assert (first.returncode, (tmp_path / "a.png").is_file()) == (0, True), first.stderr
    assert hub.downloaded() == [
        "hydit_tiny.safetensors",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]
    assert first.stderr.count("licence: tencent-hunyuan-community") == 1
    assert first.stderr.count("licence: not said") == 1
    hub.asked.clear()
    for code, said in inspect(hub, tmp_path / "home", "hub:org/pipeline", "hub:org/whole@main"):
        assert code == 0 and "kind        a HunyuanDiT-64x4 v1.2" in said and "licence" not in said
    assert hub.downloaded() == [] and hub.asked
    for code, said in inspect(hub, tmp_path / "home", "hub:org/pipeline", **AWAY):
        assert code == 0 and "hub:org/pipeline: no network; what was downloaded before is taken" in said


def test_an_ip_adapter_and_the_encoder_beside_it(hub: Hub, tmp_path: Path) -> None:
    options = (
        "--model",
        "hub:org/whole",
        "--image-prompt",
        hub.folder / "red.png",
        "--ip-adapter",
        "hub:org/eyes/ipa.pt",
    )
    done = hub.run(tmp_path / "home", "-m", *DRAW, *options, "--out", tmp_path / "a.png")
    assert (done.returncode, (tmp_path / "a.png").is_file()) == (0, True), done.stderr
    assert hub.downloaded() == ["clip_img_encoder.pt", "hydit_tiny.safetensors", "ipa.pt"]


def test_controlnets_loras_and_adapters_of_a_revision(hub: Hub, tmp_path: Path) -> None:
    """Each through the library's own door, and the trainer's base; what the licence is, is said for each."""
    net = hub.folder / "org/net"
    if not net.is_dir():
        net.mkdir()
        torch.save(ttplanet("pytorch_model_tile_ema_module_only.pt")(net).tensors, net / "tile.pt")
        (net / "pytorch_model_tile_ema_module_only.pt").unlink()
        (hub.folder / "org/loras").mkdir()
        for name in ("jade", "porcelain"):
            tencents_lora(name)(hub.folder / "org/loras")
    code = """
import sys
from pathlib import Path
import hydit_core
from hydit_core.train.config import load_config
from hydit_core.train.parts import open_base
at = sys.argv[1]
print(type(hydit_core.load_controlnet(f"hub:org/net@{at}")[0]).__name__)
print(hydit_core.load_lora(f"hub:org/loras@{at}/jade").ranks())
print(type(hydit_core.load_ip_adapter(f"hub:org/eyes@{at}/ipa.pt")).__name__)
Path("run.toml").write_text(
    f'[model]\\ninit_from = "hub:org/whole@{at}"\\n[data]\\nsources = [{{path = "."}}]\\nresolution = 64\\n'
    '[run]\\noutput_dir = "run"\\nsteps = 1\\nbatch_size = 1\\n'
)
print(open_base(load_config(Path("run.toml"))).kind.name)
"""
    done = hub.run(tmp_path / "home", "-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}", COMMIT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        *("ControlNet", "[64]", "IPAdapter", "a HunyuanDiT-64x4 v1.2 all-in-one checkpoint")
    ]
    said = [line for line in done.stderr.splitlines() if "licence: " in line]
    names = ("hub:org/net@", "hub:org/loras@", "hub:org/eyes@", "hub:org/whole@")
    assert [line[: len(name)] for line, name in zip(said, names, strict=True)] == list(names)
    files = ["adapter_config.json", "adapter_model.safetensors"]
    expected = [*(f"jade/{file}" for file in files), "hydit_tiny.safetensors", "ipa.pt", "tile.pt"]
    assert hub.downloaded() == sorted(expected)


def test_progress_is_shown(hub: Hub, tmp_path: Path) -> None:
    """By huggingface_hub's own bars: on a terminal, or where TQDM_POSITION asks for them."""
    done = hub.run(tmp_path, "-m", "hydit_core.weights", "inspect", "hub:org/large", TQDM_POSITION="-1")
    assert done.returncode == 0 and "hub:org/large: 1 files, 24.0 MB" in done.stderr
    assert "large.safetensors: 100%" in done.stderr


def test_what_cannot_be_had_is_one_line(hub: Hub, tmp_path: Path) -> None:
    expected = {
        "hub:org/absent": "there is no such repository, or it is private",
        "hub:org/whole@v9": "there is no such revision",
        "hub:org/gated": "only those get it who have accepted its licence",
        "hub:org/whole/other.safetensors": "there is no such file or folder",
    }
    for (place, words), (code, said) in zip(expected.items(), inspect(hub, tmp_path, *expected), strict=True):
        assert code == 2 and said.startswith(f"error: {place}: ") and words in said and said.count("\n") == 1
    for more in (AWAY, {"HF_HUB_OFFLINE": "1"}):
        [(code, said)] = inspect(hub, tmp_path, "hub:org/whole", **more)
        assert code == 2 and said.startswith(
            "error: hub:org/whole: no network, and it was not downloaded before"
        )


def test_a_download_that_breaks_off_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 1_000_000  # of each answer: less than huggingface_hub writes at once, so that it never gets on
    [(code, said)] = inspect(hub, tmp_path, "hub:org/large")
    assert code == 2 and "error: hub:org/large: the download broke off" in said
    hub.cut = 15_000_000
    [(code, said)] = inspect(hub, tmp_path, "hub:org/large")
    assert code == 0 and "24,000,0" in said
    assert "bytes=10485760-" in hub.ranges


def test_nothing_is_asked_of_the_hub_for_other_places(hub: Hub, tmp_path: Path) -> None:
    [(code, said)] = inspect(hub, tmp_path, "org/whole")
    assert code == 2 and "org/whole does not exist" in said
    assert hub.asked == []
