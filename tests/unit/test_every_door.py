"""Every kind of file that people have, at every door: commands, library and trainer."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from published_files import KINDS, is_old, kinds
from published_parts import Written
from safetensors.torch import load_file, save_file
from tiny import TINY_V11, write_tiny_model
from torch import Tensor
from train_setup import run_training, write_run

from hydit_core import load, load_controlnet
from hydit_core.errors import ConfigError, HyditError, WeightsError
from hydit_core.generate.__main__ import main as generate
from hydit_core.lora.__main__ import main as lora
from hydit_core.weights.__main__ import main as weights

pytestmark = pytest.mark.filterwarnings("ignore:.*far (below|above)")

MODELS, CONTROLNETS, LORAS = kinds("model"), kinds("controlnet"), kinds("lora")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    return {name: kind.write(tmp_path_factory.mktemp("published")) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def old_model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("old") / "old.safetensors", TINY_V11)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Written], Path]:
    """The same tensors in the plainest file that there is."""
    folder, known = tmp_path_factory.mktemp("plain"), dict[int, Path]()

    def plain(one: Written) -> Path:
        if id(one.tensors) not in known:
            known[id(one.tensors)] = folder / f"{len(known)}.safetensors"
            save_file(dict(one.tensors), known[id(one.tensors)])
        return known[id(one.tensors)]

    return plain


@pytest.fixture(scope="module")
def drawn(tiny_model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., bytes]:
    """Draws in the smallest size; the same options give the same picture without drawing again."""
    folder, known = tmp_path_factory.mktemp("drawn"), dict[tuple[str, ...], bytes]()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(folder / "hint.png")

    def draw(*options: object, hint: bool = False) -> bytes:
        more = ("--control-image", folder / "hint.png") if hint else ()
        key = tuple(map(str, (*options, *more)))
        if key not in known:
            out = folder / f"{len(known)}.png"
            plain = (
                "--prompt",
                "cat",
                "--device",
                "cpu",
                "--size",
                "64x64",
                "--steps",
                "1",
                "--out",
                str(out),
            )
            assert generate([*key, *plain]) == 0
            known[key] = Image.open(out).tobytes()
        return known[key]

    return draw


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [key for key, value in expected.items() if not torch.equal(found[key].to(value), value)]


def near(found: Mapping[str, Tensor], base: Mapping[str, Tensor], one: Written, within: float) -> None:
    """``found`` is ``base`` with the LoRA's changes, and nothing else has changed."""
    assert one.changes.keys() <= found.keys() <= base.keys()
    for key in found:
        value = base[key]
        if change := one.changes.get(key):
            expected = change(value.double())
            torch.testing.assert_close(found[key].double(), expected, atol=within, rtol=within)
            assert not torch.equal(found[key], value)
        else:
            assert torch.equal(found[key], value), key


def whole(pipe: Any) -> dict[str, Tensor]:
    """Every weight that a LoRA may change."""
    parts = {"dit": pipe.dit, "bert": pipe.text.bert, "t5": pipe.text.t5}
    return {f"{part}.{key}": v.clone() for part, net in parts.items() for key, v in net.state_dict().items()}


@pytest.mark.parametrize("name", KINDS)
def test_inspect_names_it(name: str, written: dict[str, Written], capsys) -> None:
    assert weights(["inspect", str(written[name].place)]) == 0
    assert re.search(KINDS[name].says, capsys.readouterr().out)


# -- models --------------------------------------------------------------------------------------------------


def parts(one: Written, beside: Path) -> dict[str, Path]:
    return {} if one.complete else {"text_encoders": beside, "vae": beside}


def options(one: Written, beside: Path) -> list[object]:
    return [
        *("--model", one.place),
        *(
            item
            for part, path in parts(one, beside).items()
            for item in (f"--{part}".replace("_", "-"), path)
        ),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_loaded_and_drawn(
    name: str, written: dict[str, Written], tiny_model_file: Path, drawn, plain
) -> None:
    one = written[name]
    pipe = load(one.place, device="cpu", **parts(one, tiny_model_file))
    same(pipe.dit.state_dict(), {key: value.float() for key, value in one.tensors.items()})
    assert pipe.info.diffusion.beta_end == (0.03 if is_old(name) else 0.018)
    picture = drawn(*options(one, tiny_model_file))
    if not one.complete:
        assert picture == drawn(*options(Written(plain(one)), tiny_model_file))
    assert len(set(picture)) > 10


def without(one: Written, word: str, folder: Path) -> Written:
    """A LoRA of peft's without some of its modules."""
    shutil.copytree(one.place, folder)
    file = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if word not in key}, file)
    return Written(folder, changes={key: c for key, c in one.changes.items() if word not in key})


@pytest.mark.parametrize("name", MODELS)
def test_a_lora_is_merged_into_a_model(
    name: str, written: dict[str, Written], tmp_path: Path, capsys
) -> None:
    one, jade = written[name], written["jade"]
    if one.place.name.startswith("freeway"):  # its BERT is wider
        jade = without(jade, "kv_proj", tmp_path / "jade")
    out = tmp_path / "merged.safetensors"
    assert lora(["merge", str(one.place), str(jade.place), "-o", str(out), "--layout", "tencent"]) == 0
    found, base = (
        {f"dit.{key}": value for key, value in net.items()} for net in (load_file(out), one.tensors)
    )
    near(found, base, jade, within=2e-3)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", ["tencent", "comfy", "diffusers"])
def test_a_model_is_converted(name: str, layout: str, written: dict[str, Written], tmp_path: Path) -> None:
    one, out = written[name], tmp_path / ("made" if layout == "diffusers" else "made.safetensors")
    assert weights(["convert", str(one.place), "-o", str(out), "--layout", layout]) == 0
    from hydit_core.weights.load import load_dit

    same(load_dit(out)[0].state_dict(), one.tensors)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, for its pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    write_run(folder)
    return folder / "pictures"


def train(
    folder: Path, pictures: Path, objective: str, more: str = "", lr: float = 1e-3, **model: Path | str
) -> Path:
    """One step; gives the file that was exported."""
    lines = "\n".join(
        f'{key} = "{value.as_posix() if isinstance(value, Path) else value}"' for key, value in model.items()
    )
    config = folder / "run.toml"
    config.write_text(f"""
[model]
{lines}
[data]
sources = [{{ path = "{pictures.as_posix()}" }}]
resolution = 64
[objective]
kind = "{objective}"
{more}
[optimizer]
lr = {lr}
[ema]
enabled = false
[run]
output_dir = "run"
steps = 1
batch_size = 2
threads = 1
device = "cpu"
[metrics]
tensorboard = false
[checkpoint]
export_dtype = "fp32"
export_all_in_one = false
""")
    assert run_training(config)
    (out,) = (path for path in (folder / "run").glob("*.safetensors"))
    return out


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_trained(
    name: str, written: dict[str, Written], tiny_model_file: Path, pictures: Path, tmp_path: Path
) -> None:
    one = written[name]
    found = load_file(train(tmp_path, pictures, "full", init_from=one.place, **parts(one, tiny_model_file)))
    assert found.keys() == one.tensors.keys()
    moved = [(found[key] - value.float()).abs().max().item() for key, value in one.tensors.items()]
    # Adam's first step is as long as the learning rate.
    assert 5e-4 < max(moved) < 2e-3


# -- ControlNets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_is_loaded_and_steers(
    name: str, written: dict[str, Written], tiny_model_file: Path, old_model_file: Path, drawn, plain
) -> None:
    one, model = written[name], old_model_file if is_old(name) else tiny_model_file
    same(load_controlnet(one.place)[0].state_dict(), one.tensors)
    picture = drawn("--model", model, "--controlnet", one.place, hint=True)
    assert (
        picture == drawn("--model", model, "--controlnet", plain(one), hint=True) != drawn("--model", model)
    )


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_is_converted(name: str, written: dict[str, Written], tmp_path: Path) -> None:
    one = written[name]
    for layout in ("tencent", "diffusers"):
        out = tmp_path / (layout if layout == "diffusers" else "made.safetensors")
        assert weights(["convert", str(one.place), "-o", str(out), "--layout", layout]) == 0
        same(load_controlnet(out)[0].state_dict(), one.tensors)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_is_trained(
    name: str,
    written: dict[str, Written],
    tiny_model_file: Path,
    old_model_file: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    one, model = written[name], old_model_file if is_old(name) else tiny_model_file
    more = f'controlnet = "{one.place.as_posix()}"\n[data.control]\nkind = "canny"\n'
    found = load_file(train(tmp_path, pictures, "controlnet", more, init_from=model))
    moved = [(found[key] - value.float()).abs().max().item() for key, value in one.tensors.items()]
    assert found.keys() == one.tensors.keys() and 5e-4 < max(moved) < 2e-3


# -- LoRAs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_loaded_and_drawn(
    name: str, written: dict[str, Written], tiny_model_file: Path, drawn
) -> None:
    one, pipe = written[name], load(tiny_model_file, device="cpu")
    before = whole(pipe)
    assert not pipe.load_lora(one.place).unmatched
    near(whole(pipe), before, one, within=1e-4)
    model = ("--model", tiny_model_file)
    assert drawn(*model, "--lora", one.place) != drawn(*model)


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_is_merged_and_converted(
    name: str, written: dict[str, Written], tiny_model_file: Path, tmp_path: Path
) -> None:
    one, out = written[name], tmp_path / "merged.safetensors"
    assert lora(["merge", str(tiny_model_file), str(one.place), "-o", str(out)]) == 0
    before = whole(load(tiny_model_file, device="cpu"))
    near(whole(load(out, device="cpu")), before, one, within=1e-4)
    made = tmp_path / "converted.safetensors"
    assert lora(["convert", str(one.place), "-o", str(made), "--format", "comfy"]) == 0
    pipe = load(tiny_model_file, device="cpu")
    pipe.load_lora(made)
    near(whole(pipe), before, one, within=1e-4)


# Whose ranks of q, k and v add up, and which layers each changes.
CONTINUED = {
    "jade": "rank = 64",
    "T2ITrainer's LoRA": "rank = 12",
    "T2ITrainer's DoRA": "rank = 9\ndora = true",
    "DiffSynth-Studio's LoRA": 'rank = 9\nalpha = 3\ntargets = "all-linear"',
    "kohya's": 'rank = 4\ntargets = "all-linear"\ntrain_bert = true\ntrain_t5 = true',
    "LoHa": 'kind = "loha"\nrank = 4\ntargets = "all-linear"',
    "LoKr": 'kind = "lokr"\nfactor = 4\nrank = 4\ntargets = "all-linear"',
}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_training_of_a_lora_goes_on(
    name: str, written: dict[str, Written], tiny_model_file: Path, pictures: Path, tmp_path: Path
) -> None:
    """After a step that is as good as none, what is exported changes the weights as the file did."""
    one = written[name]
    more = f'[lora]\ninit_from = "{one.place.as_posix()}"\n{CONTINUED[name]}'
    out = train(tmp_path, pictures, "lora", more, lr=1e-9, init_from=tiny_model_file)
    pipe = load(tiny_model_file, device="cpu")
    before = whole(pipe)
    pipe.load_lora(out)
    near({key: value for key, value in whole(pipe).items() if key in one.changes}, before, one, within=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LoHa", r"is a LoHa: set lora\.kind = 'loha'"),
        ("LoKr", r"is a LoKr: set lora\.kind = 'lokr'"),
        ("full and norms", "norm"),
    ],
)
def test_what_the_trainer_does_not_train_is_refused(
    name: str,
    message: str,
    written: dict[str, Written],
    tiny_model_file: Path,
    pictures: Path,
    tmp_path: Path,
) -> None:
    more = f'[lora]\ninit_from = "{written[name].place.as_posix()}"\ntargets = "all-linear"'
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, pictures, "lora", more, init_from=tiny_model_file)


# -- the wrong door ------------------------------------------------------------------------------------------

# What is said of each file at every door that does not take it, and where it belongs.
ELSEWHERE = {
    "Tencent's average": ("a HunyuanDiT-64x4 v1.2 checkpoint", "give it as the model"),
    "diffusers' folder": ("a HunyuanDiT-64x4 v1.2 checkpoint", "give it as the model"),
    "TTPlanet's tile": ("a HunyuanDiT-64x4 v1.2 ControlNet", "give it as a ControlNet"),
    "jade": ("a HunyuanDiT LoRA (PEFT layout)", "give it as a LoRA"),
    "full and norms": ("a HunyuanDiT LoRA (kohya layout)", "give it as a LoRA"),
    "IP-Adapter": ("a HunyuanDiT-64x4 IP-Adapter", "give it as an IP-Adapter"),
    "image encoder": ("a CLIP image encoder", "give it as the image encoder of an IP-Adapter"),
}
# The roles that a door takes, and how it is called.
DOORS: dict[str, tuple[str, str]] = {
    "--model": ("model", "generate"),
    "--controlnet": ("controlnet", "generate"),
    "--lora": ("lora", "generate"),
    "--text-encoders": ("model", "generate"),
    "--vae": ("model", "generate"),
    "merge into": ("model", "lora"),
    "merge": ("lora", "lora"),
    "inspect": ("lora", "lora"),
    "extract": ("model", "lora"),
    "convert": ("model controlnet", "weights"),
    "quantize": ("model controlnet", "weights"),
    "full": ("model", "train"),
    "lora": ("lora", "train"),
    "controlnet": ("controlnet", "train"),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_is_wrong_at_a_door_is_named_and_sent_to_the_right_one(
    door: str, written: dict[str, Written], tiny_model_file: Path, pictures: Path, tmp_path: Path, capsys
) -> None:
    takes, command = DOORS[door]
    out = tmp_path / "out.safetensors"
    for name, (what, where) in ELSEWHERE.items():
        if KINDS[name].role in takes.split():
            continue
        place = written[name].place
        if command == "train":
            more = {
                "full": "",
                "lora": f'[lora]\ninit_from = "{place.as_posix()}"',
                "controlnet": f'controlnet = "{place.as_posix()}"\n[data.control]\nkind = "canny"',
            }[door]
            model = place if door == "full" else tiny_model_file
            beside = {"text_encoders": tiny_model_file, "vae": tiny_model_file}
            with pytest.raises(HyditError) as told:
                train(tmp_path, pictures, door, more, init_from=model, **beside)
            error = f"{told.value}\n"
        else:
            arguments = {
                "--controlnet": ["--controlnet", place, "--control-image", "none.png"],
                "merge into": ["merge", place, written["jade"].place, "-o", out],
                "merge": ["merge", tiny_model_file, place, "-o", out],
                "inspect": ["inspect", place],
                "extract": ["extract", place, tiny_model_file, "--rank", 2, "-o", out],
                "convert": ["convert", place, "-o", out, "--layout", "tencent"],
                "quantize": ["quantize", place, "-o", out, "--format", "int8"],
            }.get(door, [door, place])
            if command == "generate":
                model = [] if door == "--model" else ["--model", tiny_model_file]
                arguments += [*model, "--prompt", "a", "--out", tmp_path / "pictures"]
            assert {"generate": generate, "lora": lora, "weights": weights}[command](
                list(map(str, arguments))
            ) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: ")
        assert error.count("\n") == 1 and place.name in error and what in error, name
        assert where in error or (door in ("--text-encoders", "--vae") and KINDS[name].role == "model"), name
    assert not out.exists() and not (tmp_path / "pictures").exists() and not (tmp_path / "run").exists()


def test_text_encoders_of_another_width_are_refused(
    written: dict[str, Written], tiny_model_file: Path
) -> None:
    with pytest.raises(
        WeightsError, match=r"BERT's features have 64 values, the DiT takes 32.*--text-encoders"
    ):
        load(tiny_model_file, text_encoders=written["Freeway Animation"].place, device="cpu")
