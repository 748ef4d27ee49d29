"""The configuration file: what is accepted, what is refused, and what the user is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_setup import CONFIG, ROOT

from hydit_core.errors import ConfigError
from hydit_core.train.config import differences, load_config


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
        ("optimiser.lr=1", ["optimiser", "did you mean optimizer?"]),
        ("model.from_scratch.hiddensize=64", ["model.from_scratch.hiddensize", "did you mean hidden_size?"]),
        ("model.text_encoders.vocabulary='x'", ["model.text_encoders.vocabulary", "did you mean vocab?"]),
        ("optimizer.groups=[{match='a', lr_sclae=1}]", ["optimizer.groups.0.lr_sclae", "lr_scale?"]),
        ("data.resolutoin=64", ["data.resolutoin", "did you mean resolution?"]),
        ("run.steps=0", ["run.steps", "greater than 0", "got 0"]),
        ("run.precision='fp8'", ["run.precision", "'fp32' or 'bf16'"]),
        ("model.init_from='x.safetensors'", ["model", "exactly one of init_from"]),
        ("data.cache.text=true", ["data.cache.text", "objective.train_text_encoders"]),
        ("samples.every=10", ["samples.every", "samples.prompts is empty"]),
        ("validation.every=5", ["validation.every", "data.validation holds out no pictures"]),
        ("optimizer.groups=[{match='re:('}]", ["optimizer.groups.0.match", "not a regular expression"]),
        ("schedule.warmup_steps=21", ["warmup_steps is larger than run.steps"]),
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


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_templates_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.run.output_dir == ROOT / "runs" / path.stem
