"""The configuration file: what is accepted, what is refused, and what the user is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from train_setup import CONFIG, ROOT

from hydit_core.errors import ConfigError
from hydit_core.train.__main__ import main
from hydit_core.train.config import differences, load_config, up_to_date
from hydit_core.train.sections import SamplesSection


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def test_paths_start_at_the_file_but_overrides_at_the_current_folder(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load_config(config_file, ["data.cache.dir=cache"])
    assert config.run.output_dir == tmp_path / "run"
    assert config.model.vae == tmp_path / "vae.safetensors"
    assert config.data.sources[0].path == tmp_path / "pictures"
    assert config.data.cache.dir == elsewhere / "cache"
    config = load_config(config_file, ["run.output_dir=other"])
    assert config.run.output_dir == elsewhere / "other"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.step=5", ["run.step", "unknown key", "did you mean steps?"]),
        ("rank=16", ["rank", "it belongs to the table lora"]),
        ("run.clip_skip=2", ["run.clip_skip", "used to their last layer"]),
        ("optimizer.learning_rate=1e-4", ["optimizer.learning_rate", "here it is optimizer.lr"]),
        ("optimiser.lr=1", ["optimiser", "did you mean optimizer?"]),
        ("model.from_scratch.hiddensize=64", ["model.from_scratch.hiddensize", "did you mean hidden_size?"]),
        ("model.text_encoders.vocabulary='x'", ["model.text_encoders.vocabulary", "did you mean vocab?"]),
        ("optimizer.groups=[{match='a', lr_sclae=1}]", ["optimizer.groups.0.lr_sclae", "lr_scale?"]),
        ("data.resolutoin=64", ["data.resolutoin", "did you mean resolution?"]),
        ("run.steps=0", ["run.steps", "greater than 0", "got 0"]),
        ("run.precision='fp8'", ["run.precision", "'fp32' or 'bf16'"]),
        ("model.load_key='module'", ["model", "load_key chooses among the weights of init_from"]),
        ("objective.controlnet_load_key='ema'", ["objective", "weights of objective.controlnet"]),
        ("model.init_from='x.safetensors'", ["model", "exactly one of init_from"]),
        ("data.cache.text=true", ["data.cache.text", "objective.train_text_encoders"]),
        ("samples.every=10", ["samples.every", "samples.prompts is empty"]),
        ("validation.every=5", ["validation.every", "data.validation holds out no pictures"]),
        ("optimizer.groups=[{match='re:('}]", ["optimizer.groups.0.match", "not a regular expression"]),
        ("schedule.warmup_steps=21", ["warmup_steps is larger than run.steps"]),
        ("objective.kind='lora'", ["a LoRA is trained for finished weights", "model.init_from"]),
        ("lora.rank=4", ["the table lora needs objective.kind = 'lora'"]),
    ],
)
def test_faults_are_named_with_their_place(config_file: Path, override: str, words: list[str]) -> None:
    overrides = ["data.validation=0", override] if "holds out" in words[-1] else [override]
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, overrides)
    message = str(caught.value)
    assert str(config_file) in message
    for word in words:
        assert word in message


def test_defaults_are_those_of_the_documentation(config_file: Path) -> None:
    config = load_config(config_file)
    assert config.run.answer_within == 240
    assert config.objective.dropout_control == 0
    assert config.ema.power == pytest.approx(2 / 3)
    with pytest.raises(ValidationError, match="frozen"):
        config.run.steps = 3


def test_the_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    usage, _, rest = " ".join(capsys.readouterr().out.split()).partition(" CONFIG.toml ")
    assert usage.startswith("usage: python -m hydit_core.train [-h]")
    further = "quick PICTURES, import FILE, prepare CONFIG.toml, cache CONFIG.toml, export RUN, report RUN."
    assert f"Train HunyuanDiT. Further commands: {further}" in rest


def test_all_steps_may_be_warm_up(config_file: Path) -> None:
    config = load_config(config_file, ["run.steps=20", "schedule.warmup_steps=20"])
    assert config.schedule.warmup_steps == config.run.steps


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.steps=true", "run.steps: expected a number (got True)"),
        ("run.steps=5.0", "run.steps: expected a whole number"),
        ("run.steps='5'", "run.steps: expected a number, not a text"),
        ("run.steps=1000000001", "run.steps: Input should be less than or equal to 1000000000 "),
        ("run.gradient_checkpointing=5", "use true, false, or a fraction of the blocks from 0 to 1"),
        ("run.gradient_checkpointing=-0.5", "use true, false, or a fraction of the blocks from 0 to 1"),
        ("run.gradient_checkpointing='half'", "expected a number, not a text"),
        ("run.seed=-1", "run.seed: Input should be greater than or equal to 0"),
        ("run.output_dir=''", "run.output_dir: an empty path"),
        ("run.clip_norm=inf", "run.clip_norm"),
        ("objective.vlb=1", "objective.vlb: expected true or false (got 1)"),
        ("objective.dropout_joint=false", "objective.dropout_joint: expected a number (got False)"),
        ("optimizer.lr=nan", "optimizer.lr"),
        ("optimizer.lr=30", "optimizer.lr: Input should be less than or equal to 1"),
        ("optimizer.betas=[0.9, 1.5]", "optimizer.betas.1: Input should be less than 1"),
        ("optimizer.betas=[0.9, true]", "optimizer.betas: expected a number"),
        ("optimizer.eps=0", "optimizer.eps"),
        ("lora.rank=100000", "lora.rank"),
        ("samples.sampler='dpmp_2m'", "samples.sampler: unknown sampler: use one of ddpm, "),
        ("samples.spacing='even'", "samples.spacing: unknown spacing: use one of leading, "),
        ("samples.width=60", "samples.width"),
        ("samples.seed=18446744073709551616", "samples.seed"),
        ("data.flip=true", "data.flip: expected a number (got True)"),
        ("data.resolution=64.0", "data.resolution: expected a whole number"),
        ("data.resolution=1000000", "multiples of 8, from 16 to 16384"),
        ("data.sources=[{path='a', repeats=1000000000}]", "data.sources.0.repeats"),
        ("data.sources=[{path=''}]", "data.sources.0.path: an empty path"),
        ("data.cache.latents='true'", "data.cache.latents: expected true or false, not a text"),
        ("data.resolution=8", "multiples of 8, from 16 to 16384"),
        ("model.from_scratch.text_len=1", "text_len = 1: use 4 to"),
        ("model.from_scratch.depth=3", "depth 3: must be even"),
        ("model.from_scratch.depth=100000000", "depth = 100000000: use 1 to 512"),
        ("model.from_scratch.num_heads=0", "num_heads = 0: use 1 to"),
        ("model.from_scratch.num_heads=3", "model.from_scratch: hidden_size 64 with 3 heads"),
        ("model.from_scratch.size_cond=1", "model.from_scratch.size_cond: expected true or false"),
        ("model.info.version='v9'", "model.info"),
        ("model.info.verson='v1.2'", "did you mean version?"),
        ("model.info.defaults.steps=true", "model.info.defaults.steps: expected a number"),
        ("model.info.diffusion.prediction='banana'", "model.info.diffusion.prediction"),
        ("data.sources=[]", "data.sources: expected at least 1 in the list"),
        ("data.sources='pictures'", "data.sources: expected a list (got 'pictures')"),
        ("ema=0.9", "ema: expected a table"),
        ("data.sources=[{caption='a'}]", "data.sources.0.path: is needed and not there"),
        ("checkpoint.metadata={'hydit.config' = '{}'}", "hydit.config: written by the trainer itself"),
    ],
)
def test_what_training_would_refuse_is_refused_at_once(config_file: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, [override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        r'path = "C:\Users\me\pictures"',
        r'path = "D:\data\pictures"',
        r'path = "D:\new\table"',
        r'path = "D:\"',
        r'path = "E:\temp"',
        r'path = "\\server\share"',
        r'path = "pictures\old"',
    ],
)
def test_backslashes_in_double_quotes_are_explained(tmp_path: Path, line: str) -> None:
    path = tmp_path / "windows.toml"
    text = '[run]\noutput_dir = "r"\nsteps = 1\nbatch_size = 1\n[model]\ninit_from = "m"\n[[data.sources]]\n'
    path.write_text(text + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="in single quotes"):
        load_config(path)
    good = line.replace('"', "'")
    path.write_text(text + good + "\n", encoding="utf-8")
    assert str(load_config(path).data.sources[0].path).endswith(good.split("'")[1])


def test_backslashes_that_are_no_fault_are_not_blamed(config_file: Path) -> None:
    text = CONFIG + '\n[samples]\nprompts = ["a \\"b\\" \\u0041"]\nsteps = 1 1\n'
    config_file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(config_file)
    assert "not valid TOML" in str(caught.value) and "single quotes" not in str(caught.value)


def test_what_only_follows_from_another_fault_is_not_told(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["data.sources=[{pth='a'}]"])
    assert "did you mean path?" in str(caught.value) and "at least 1" not in str(caught.value)


def test_all_faults_are_told_at_once(config_file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file, ["run.step=5", "ema.decays=0.9", "run.batch_size='many'"])
    message = str(caught.value)
    assert "run.step" in message and "ema.decays" in message and "run.batch_size" in message


def test_files_that_are_no_toml(config_file: Path, tmp_path: Path) -> None:
    config_file.write_text("[run\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(config_file)
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml"):
        load_config(tmp_path / "absent.toml")


def test_a_byte_order_mark_is_no_fault(config_file: Path) -> None:
    config_file.write_text(CONFIG, encoding="utf-8-sig")
    assert load_config(config_file).run.steps == 20


def test_paths_inside_an_override_start_at_the_current_folder_too(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    overrides = [
        'data.sources=[{path="more", mask_dir="masks", image_field="more"}, {path="/dogs", prior=true}]',
        'data.mask={kind = "files"}',
        'data.cache={dir = "kept"}',
        'samples.prompts=["more"]',
    ]
    config = load_config(config_file, overrides)
    first, second = config.data.sources
    assert (first.path, first.mask_dir, first.image_field) == (folder / "more", folder / "masks", "more")
    assert second.path == Path("/dogs") and config.data.cache.dir == folder / "kept"
    assert config.samples.prompts == ("more",)


def test_override_values_are_toml_or_text(config_file: Path) -> None:
    config = load_config(
        config_file, ["run.steps=7", "schedule.warmup_steps=0", "run.device=cuda", "optimizer.lr=2e-5"]
    )
    assert (config.run.steps, config.run.device, config.optimizer.lr) == (7, "cuda", 2e-5)
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(config_file, ["run.steps"])
    with pytest.raises(ConfigError, match="steps is not a table"):
        load_config(config_file, ["run.steps.x=1"])


def test_differences_name_what_changed(config_file: Path) -> None:
    old = load_config(config_file).model_dump(mode="json")
    new = load_config(config_file, ["optimizer.lr=5e-4", "run.seed=3"]).model_dump(mode="json")
    assert differences(old, new) == ["optimizer.lr: 0.001 -> 0.0005", "run.seed: 0 -> 3"]


def test_what_an_earlier_release_did_not_know_is_no_change_of_the_users(config_file: Path) -> None:
    new = load_config(config_file, ["data.cache.dtype=float32"]).model_dump(mode="json")
    old = json.loads(json.dumps(new))
    del old["checkpoint"]["keep_every"], old["run"]["answer_within"]
    old["data"]["cache"]["dtype"] = "float32"
    assert differences(old, new) and not differences(up_to_date(old), new)
    changed = load_config(config_file, ["checkpoint.keep_every=5"]).model_dump(mode="json")
    assert "checkpoint.keep_every: 0 -> 5" in differences(up_to_date(old), changed)
    assert up_to_date({"run": 3}) == {"run": 3}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_templates_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.run.output_dir == ROOT / "runs" / path.stem


def test_sample_pictures_may_be_forecast() -> None:
    assert SamplesSection().forecast == "off"
    assert (
        SamplesSection(forecast="safe").forecast == "safe" and SamplesSection(forecast=0.02).forecast == 0.02
    )
    for wrong in ("quick", -1, 3.0):
        with pytest.raises(ValueError, match="use off, safe, fast, or a tolerance"):
            SamplesSection(forecast=wrong)


def test_names_of_other_trainers_lead_to_keys_that_exist() -> None:
    from hydit_core.train.config import _known_keys
    from hydit_core.train.other_names import HINTS

    named = {key for hint in HINTS.values() for key in re.findall(r"\b[a-z]+(?:\.[a-z_0-9]+)+", hint)}
    assert len(named) > 40
    for dotted in named:
        *tables, last = dotted.split(".")
        assert last in _known_keys(tables), dotted
    assert all(name.isidentifier() for name in HINTS)
    for theirs, said in {
        "class_prompt": "here it is data.prior.prompts",
        "flow_shift": "HunyuanDiT is no flow model",
        "resume_from_checkpoint": "--resume goes on",
        "additional_embeddings": "embeddings are not trained",
        "conv_alpha": "no convolutions",
    }.items():
        assert said in HINTS[theirs]
