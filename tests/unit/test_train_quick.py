"""`train quick`: what is chosen for a folder of pictures, and a whole run of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_setup import paint
from tiny import write_tiny_model

from hydit_core.data.gathering import Findings
from hydit_core.errors import ConfigError, DataError, HyditError
from hydit_core.facts import ModelInfo, SamplingDefaults
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.train import __main__ as command_line
from hydit_core.train.config import checked, load_config
from hydit_core.train.distributed import Processes
from hydit_core.train.dryrun import describe
from hydit_core.train.launch import open_data, train
from hydit_core.train.prior_pictures import with_prior_pictures
from hydit_core.train.quick import choices, command, fitting
from hydit_core.train.quick import plan as planning
from hydit_core.train.quick.plan import plan
from hydit_core.train.quick.survey import Survey, common_caption, survey
from hydit_core.train.quick.wish import Wish
from hydit_core.untrusted import parse_toml


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    return write_tiny_model(path, defaults=SamplingDefaults(width=64, height=64, steps=2))


def folder(path: Path, count: int, captions: bool = True, size: tuple[int, int] = (64, 64)) -> Path:
    for i in range(count):
        picture = paint(path / f"{i:02}.png", i, size)
        if captions:
            picture.with_suffix(".txt").write_text(f"ohwx number {i}", encoding="utf-8")
    return path


def test_a_folder_with_captions(tmp_path: Path, model: Path) -> None:
    made = plan(Wish(folder(tmp_path / "dog", 8), "ohwx", model, out=tmp_path / "run", device="cpu"))
    config = made.config
    assert made.path == tmp_path / "run" / "quick.toml" and not made.path.exists()
    assert config.run.output_dir == tmp_path / "run" and config.data.sources[0].path == tmp_path / "dog"
    assert config.data.resolution == 64 and not config.data.buckets.enabled
    assert config.data.validation == 1 and config.validation.draws == 24 and config.checkpoint.keep_best
    assert config.run.batch_size == 4 and config.data.sources[0].caption is None
    assert config.samples.prompts == ("ohwx number 0", "ohwx number 1")
    assert not made.notes
    told = [choice for choice in made.choices if choice.reason]
    assert len(told) > 15 and all(choice.reason in made.toml for choice in told)


@pytest.mark.parametrize("name", ["dog", "a 'b' \"c\" #d", "狗 = [x]", "back\\slash"])
@pytest.mark.parametrize("trigger", ["ohwx", 'o"h\\w#x', "[狗]", "a, b = {c}"])
def test_names_and_triggers_of_any_kind(tmp_path: Path, model: Path, name: str, trigger: str) -> None:
    wish = Wish(folder(tmp_path / name, 2, captions=False), trigger, model, out=tmp_path / "r", device="cpu")
    made = plan(wish)
    source = made.config.data.sources[0]
    assert source.path == tmp_path / name and source.trigger == made.config.lora.trigger == trigger
    assert source.caption is not None and trigger in source.caption
    marked = next(line for line in made.toml.splitlines() if line.startswith("# asked: "))
    assert json.loads(marked[9:])["trigger"] == trigger


@pytest.mark.parametrize(
    ("name", "trigger", "kind", "caption"),
    [
        ("robot", "ohwx", "subject", "ohwx robot"),
        ("my_little_dog", "", "subject", "my little dog"),
        ("10_ohwx dog", "ohwx", "concept", "ohwx dog"),
        ("pictures", "ohwx", "subject", "ohwx"),
        ("My Images 2", "ohwx", "subject", "ohwx"),
        ("2024", "ohwx", "style", "ohwx style"),
        ("water colors", "ohwx", "style", "ohwx water colors style"),
        ("Ukiyo Style", "", "style", "Ukiyo Style"),
        ("水墨", "", "style", "水墨 style"),
    ],
)
def test_the_caption_of_pictures_without_one(
    tmp_path: Path, name: str, trigger: str, kind: str, caption: str
) -> None:
    assert common_caption(Wish(tmp_path / name, trigger, kind=kind)) == caption


def test_a_name_of_digits_takes_no_time() -> None:
    assert common_caption(Wish(Path("1" * 200 + "x"), "ohwx")) == "ohwx " + "1" * 200 + "x"


def test_captions_get_the_trigger_that_they_lack(tmp_path: Path) -> None:
    from hydit_core.data.config import DataConfig
    from hydit_core.data.gathering import gather

    path = folder(tmp_path / "dog", 2)
    (path / "01.txt").write_text("a dog on grass", encoding="utf-8")
    paint(path / "02.png", 2)
    source = {"path": path, "caption": "a dog", "trigger": "OHWX"}
    manifest, findings = gather(DataConfig(sources=[source], resolution=64))
    assert [record.captions for record in manifest] == [
        ("ohwx number 0",),
        ("OHWX, a dog on grass",),
        ("OHWX, a dog",),
    ]
    assert not findings.missing_captions.count


@pytest.mark.parametrize("all_of_them", [True, False])
def test_lines_are_captions_where_every_file_has_several(tmp_path: Path, all_of_them: bool) -> None:
    path = folder(tmp_path / "dog", 3)
    for i in range(3 if all_of_them else 2):
        (path / f"{i:02}.txt").write_text(f"dog {i}\n狗 {i}\n", encoding="utf-8")
    found = survey(Wish(path))
    assert found.caption_lines is all_of_them
    assert len(found.captions) == (6 if all_of_them else 3) and found.captions[0][:5] == "dog 0"


def test_what_is_missing_is_told(tmp_path: Path, model: Path) -> None:
    path = folder(tmp_path / "dog", 6)
    (path / "03.txt").unlink()
    (path / "04.png").write_bytes(b"no picture")
    made = plan(Wish(path, "ohwx", model, out=tmp_path / "run", device="cpu"))
    notes = "\n".join(made.notes)
    assert "1 of 5 pictures have no caption, while others have one: 03.png" in notes
    assert "1 pictures cannot be read and are left out" in notes and "04.png" in notes
    assert made.config.data.sources[0].caption == "ohwx dog" and made.config.data.on_unreadable == "skip"


def test_of_few_pictures_none_is_held_out_and_a_rule_says_when_to_stop(tmp_path: Path, model: Path) -> None:
    for count in (1, 4):
        wish = Wish(
            folder(tmp_path / f"dogs{count}", count), "ohwx", model, out=tmp_path / "run", device="cpu"
        )
        made = plan(wish)
        assert made.config.data.validation == 0 and not made.config.validation.every
        assert not made.config.checkpoint.keep_best and "a fixed rule" in made.toml
        assert any("one picture only" in note for note in made.notes) == (count == 1)
        assert made.config.run.batch_size == count


def test_shapes_that_differ_are_trained_as_they_are(tmp_path: Path, model: Path) -> None:
    path = folder(tmp_path / "dogs", 3)
    paint(path / "wide.png", 9, (96, 64))
    config = plan(Wish(path, "ohwx", model, out=tmp_path / "run", device="cpu")).config
    assert config.data.buckets.enabled and config.data.buckets.step == 16


def _empty(path: Path) -> Path:
    path.mkdir()
    return path


def _all_broken(path: Path) -> Path:
    path.mkdir()
    (path / "a.png").write_bytes(b"x")
    return path


def _latin(path: Path) -> Path:
    folder(path, 2)
    (path / "01.txt").write_bytes("für".encode("latin-1"))
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "does not exist: give the folder"),
        (lambda path: paint(path.with_suffix(".png"), 0), "is a file: give the folder"),
        (_empty, "no pictures found"),
        (_all_broken, "none of its pictures can be read"),
        (_latin, r"01\.txt.*UTF-8"),
    ],
)
def test_folders_to_learn_nothing_from(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        survey(Wish(make(tmp_path / "dog"), "ohwx"))


def test_more_pictures_than_quick_is_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydit_core.data.prepared.FEW", 3)
    with pytest.raises(ConfigError, match="no matter of quick"):
        survey(Wish(folder(tmp_path / "dog", 4), "ohwx"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "person"}, "use one of subject, style, concept"),
        ({"trigger": "oh\nwx"}, "characters that nobody sees"),
        ({"trigger": "x" * 101}, "at most 100"),
        ({"steps": 0}, "above 0"),
        ({"minutes": -1.0}, "above 0"),
    ],
)
def test_wishes_that_nobody_can_mean(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Wish(Path("dog"), **change)


def test_without_words_nothing_can_be_called_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --trigger"):
        common_caption(Wish(tmp_path / "images", ""))


GIB = 2**30


def test_published_weights_fit_as_memory_allows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """DiT-g/2 without content, on a GPU with 24 GiB free."""
    with torch.device("meta"):
        dit = DiT(DiTConfig())
    found = Survey(np.full((20, 2), 1024), [], False, 20, ["0.png"], 0, 0, [], Findings())
    monkeypatch.setattr(planning, "bundle", lambda *_, **__: None)
    monkeypatch.setattr(planning, "survey", lambda wish: found)
    monkeypatch.setattr(planning, "load_dit", lambda *_, **__: (dit, ModelInfo.published("v1.2")))
    monkeypatch.setattr(planning, "find_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(planning, "memory_of", lambda device: 24 * GIB)
    hub = "hub:Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers"
    made = plan(Wish(tmp_path / "dog", "ohwx", Path(hub), out=tmp_path / "run"))
    run, config = made.config.run, made.config
    assert config.data.resolution == 1024 and run.precision == "bf16" and config.lora.rank == 16
    assert str(config.model.init_from) == hub and config.data.validation == 2
    assert (run.batch_size, run.batch_size * run.grad_accumulation) == (1, 4)
    assert run.gradient_checkpointing is False and config.lora.base_precision is None
    assert not made.notes


def test_a_smaller_way_is_taken_only_where_it_must() -> None:
    """By what each way needs, in the order of their speed."""
    ways = list(fitting.candidates(4, torch.device("cpu")))
    for number, way in enumerate(ways):
        need = {str(other): 100 * GIB if i < number else GIB for i, other in enumerate(ways)}
        found, fits = fitting.fit(4, torch.device("cpu"), 10 * GIB, lambda way, need=need: need[str(way)])
        assert fits and found.batch == way["batch"] and found.checkpointing == way["checkpointing"]
        assert found.batch * found.accumulation == 4
    found, fits = fitting.fit(4, torch.device("cpu"), 10 * GIB, lambda way: 20 * GIB)
    assert not fits and found.base_precision == "fp8"
    assert found.reason == "takes about 21.5 GiB, but only 10.0 GiB are free on this computer"


def test_without_the_library_a_fixed_rate_of_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    base = choices.Base(Path("x"), DiTConfig(), ModelInfo.published("v1.2"))
    monkeypatch.setattr(choices.importlib.util, "find_spec", lambda name: None)
    found = {choice.key: choice for choice in choices.optimizer_choices(base, 100)}
    small = choices.Base(Path("x"), DiTConfig(hidden_size=192, num_heads=4), ModelInfo.published("v1.2"))
    rates = {choice.key: choice.value for choice in choices.optimizer_choices(small, 100)}
    assert rates["lr"] == 6e-3  # the embedded model's
    assert found["lr"].value == 5e-4 and "pip install pytorch-optimizer" in found["lr"].reason


def quick(*arguments: object) -> int:
    return command_line.main(["quick", *map(str, arguments)])


def test_a_whole_run_and_again(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, run = folder(tmp_path / "dog", 6), tmp_path / "run"
    asked = [pictures, "--trigger", "ohwx", "--model", model, "--out", run, "--steps", 4, "--device", "cpu"]
    assert quick(*asked, "--dry-run") == 0 and not run.exists()
    assert quick(*asked) == 0
    said = capsys.readouterr().out
    assert "rank = " in said and f"the LoRA: {run / 'best.safetensors'}" in said
    assert f"--model {model} --lora {run / 'best.safetensors'} --prompt 'ohwx number 0'" in said
    written = (run / "quick.toml").read_bytes()
    assert parse_toml(written.decode("utf-8"), "")["run"]["steps"] == 4
    first = (run / "best.safetensors").read_bytes()

    # The file alone trains the same.
    config = load_config(run / "quick.toml", [f"run.output_dir={tmp_path / 'again'}"])
    assert train(config)
    assert (tmp_path / "again" / "best.safetensors").read_bytes() == first

    # The same command changes nothing; another wish is refused.
    assert quick(*asked) == 0
    assert (run / "quick.toml").read_bytes() == written and (run / "best.safetensors").read_bytes() == first
    capsys.readouterr()
    assert quick(*asked, "--kind", "style") == 2
    assert "was chosen for something else (kind was subject)" in capsys.readouterr().err
    (run / "quick.toml").unlink()
    assert quick(*asked) == 2
    assert "holds another run" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(tmp_path: Path, model: Path) -> None:
    pictures, run = folder(tmp_path / "dog", 6), tmp_path / "run"
    wish = Wish(pictures, "ohwx", model, out=run, steps=4, device="cpu")
    asked = [pictures, "--trigger", "ohwx", "--model", model, "--out", run, "--steps", 4, "--device", "cpu"]
    made = plan(wish)
    made.path.parent.mkdir()
    made.path.write_text(made.toml, encoding="utf-8")
    assert not train(load_config(made.path), stop_after_micro=2)
    with pytest.raises(HyditError, match="no LoRA there yet"):
        command.result(tmp_path)
    assert quick(*asked) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4


def test_what_the_base_knew_is_drawn_once_and_measured(tmp_path: Path, model: Path) -> None:
    pictures, run = folder(tmp_path / "dog", 6), tmp_path / "run"
    made = plan(Wish(pictures, "ohwx", model, out=run, steps=2, device="cpu"))
    raw = parse_toml(made.toml, "")
    raw["validation"] |= {"prior": ["a cat", "a  red\napple", "a cat"], "every": 1}
    del raw["data"]["prior"]
    raw["samples"]["every"] = 0
    config = checked(raw, made.path)
    assert not train(config, stop_after_micro=1)
    (known,) = run.glob("prior-*")
    assert sorted(path.name for path in known.iterdir()) == ["0000.png", "0000.txt", "0001.png", "0001.txt"]
    assert (known / "0001.txt").read_text("utf-8") == "a red apple"
    drawn = (known / "0000.png").read_bytes()
    (known / "0000.png").unlink()
    (known / "0000.txt").unlink()
    assert train(config, resume="auto")
    assert (known / "0000.png").read_bytes() == drawn, "the same, whenever it is drawn"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {r["step"] for r in records if "val_prior_loss" in r} == {0, 1, 2}

    # It changes nothing of what is learned.
    raw["validation"]["prior"], raw["run"]["output_dir"] = [], str(tmp_path / "other")
    assert train(checked(raw, made.path))
    best = [(path / "best.safetensors").read_bytes() for path in (run, tmp_path / "other")]
    assert best[0] == best[1]


def test_what_the_base_draws_is_trained_with_the_rest(tmp_path: Path, model: Path) -> None:
    pictures, run = folder(tmp_path / "dog", 7), tmp_path / "run"
    made = plan(Wish(pictures, "ohwx", model, out=run, device="cpu"))
    assert made.config.data.prior.share == 0.25 and len(made.config.data.prior.prompts) == 12
    assert not {*made.config.data.prior.prompts} & {*made.config.validation.prior}
    # 90 steps of 4, of which 3 are of the six that are trained
    assert "each picture would be shown 45 times" in made.toml
    raw = parse_toml(made.toml, "")
    raw["data"]["prior"]["prompts"] = raw["validation"]["prior"] = ["a cat", "a dog"]
    config = checked(raw, made.path)
    text = "\n".join(describe(config))
    assert "and 2 pictures that the base draws at the start, 25% of what is trained" in text
    assert "90 steps of 4 x 1 samples: 45.0 epochs in one process" in text
    config = with_prior_pictures(config, Processes(0, 1, torch.device("cpu")))
    trained, held_out = config.data.sources[1:]
    assert (trained.prior, trained.validation, held_out.prior, held_out.validation) == (
        True,
        False,
        True,
        True,
    )
    for name in ("0000.png", "0001.png"):
        assert (trained.path / name).read_bytes() != (held_out.path / name).read_bytes()
    data = open_data(config)
    shown = Counter(key for step in range(20) for key in data.batch(step).keys)  # 10 epochs of 8
    assert [shown[f"{trained.path.name}/{number:04}.png"] for number in (0, 1)] == [10, 10]

    raw["data"]["prior"]["prompts"] = []  # as who wants none says it
    assert checked(raw, made.path).data.prior.prompts == ()
    raw["data"]["prior"] = {"share": 0.25}
    with pytest.raises(ConfigError, match=r"data\.prior needs prompts, or a source with prior = true"):
        checked(raw, made.path)


def test_a_style_without_a_trigger_is_to_change_everything(tmp_path: Path, model: Path) -> None:
    pictures = folder(tmp_path / "dog", 7)
    for trigger, count in (("", 0), ("ohwx", 12)):
        made = plan(Wish(pictures, trigger, model, "style", tmp_path / "run", device="cpu"))
        assert len(made.config.data.prior.prompts) == count


def test_a_run_ends_when_its_minutes_are_over(tmp_path: Path, model: Path) -> None:
    pictures, run = folder(tmp_path / "dog", 3), tmp_path / "run"
    assert quick(pictures, "--trigger", "ohwx", "--model", model, "--out", run, "--minutes", 1e-6) == 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]
