"""Training a ControlNet: what is trained, what comes out, where the control pictures come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import TINY, TINY_V11, write_tiny_model
from train_setup import SHORT_RUN, records, run_training, write_run

from hydit_core.data.config import DataConfig
from hydit_core.data.dataset import open_dataset
from hydit_core.diffusion.losses import diffusion_loss
from hydit_core.errors import ConfigError, DataError
from hydit_core.images import canny
from hydit_core.model.controlnet import ControlNet
from hydit_core.train.config import load_config
from hydit_core.train.draws import TrainingDraws
from hydit_core.train.launch import open_data
from hydit_core.train.objectives.table import make_objective, objective_of
from hydit_core.train.parts import build
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors
from hydit_core.weights.load import load_controlnet, load_dit


def write_control_run(folder: Path, model: Path) -> Path:
    """The configuration of a canny ControlNet for the model in ``model``."""
    write_run(folder)
    path = folder / "control.toml"
    path.write_text(
        f"""
[model]
init_from = "{model.as_posix()}"
[data]
sources = [{{ path = "pictures" }}]
resolution = 64
validation = 2
[data.control]
kind = "canny"
[objective]
kind = "controlnet"
timesteps = "stratified"
[optimizer]
lr = 1e-3
{SHORT_RUN}[checkpoint]
export_dtype = "fp32"
metadata = {{ "modelspec.title" = "edges" }}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Path:
    return write_control_run(tmp_path_factory.mktemp("control"), tiny_model_file)


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    picture = config.parent / "pictures" / "0.png"
    assert run_training(
        config,
        f"run.output_dir={folder}",
        "validation.every=3",
        "samples.every=3",
        'samples.prompts=["cat", "小鸟"]',
        f'samples.control_images=["{picture.as_posix()}"]',
        "samples.steps=2",
    )
    return folder


def test_checkpointing_reaches_both_networks(config: Path) -> None:
    """The frozen base keeps activations too: gradients flow through it to the residuals."""
    settings = load_config(config)
    objective = make_objective(settings, build(settings), torch.device("cpu"))
    networks = (objective.parts.dit, objective.parts.controlnet)
    assert [net.gradient_checkpointing for net in networks] == [0.0, 0.0]
    objective.use_checkpointing(0.5)
    assert [net.gradient_checkpointing for net in networks] == [0.5, 0.5]


def test_the_export_is_a_controlnet_that_says_how_it_is_used(finished: Path, tiny_model_file: Path) -> None:
    path = finished / "model.safetensors"
    assert detect(open_tensors(path)).kind == "controlnet"
    net, info = load_controlnet(path)
    assert net.config == TINY
    assert info.base == tiny_model_file.name
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["hydit.control"]) == {"kind": "canny", "low": 100, "high": 200}
    assert metadata["modelspec.architecture"].endswith("/controlnet")
    assert metadata["modelspec.title"] == "edges"


def test_only_blocks_and_projections_change(finished: Path, tiny_model_file: Path) -> None:
    base = load_dit(tiny_model_file, dtype=torch.float32)[0].state_dict()
    trained = load_file(finished / "model.safetensors")
    changed = {
        name for name, value in trained.items() if name not in base or not torch.equal(value, base[name])
    }
    kept = set(trained) - changed
    # Three steps from zero projections: the projections learn first, then gradients reach the blocks.
    assert any(name.startswith("after_proj_list.") for name in changed)
    assert any(name.startswith("blocks.") for name in changed)
    assert any(name.startswith("before_proj.") for name in changed)
    embedders = {
        name for name in trained if not name.startswith(("blocks.", "before_proj.", "after_proj_list."))
    }
    assert embedders
    assert embedders <= kept


def test_samples_show_the_control_picture_beside_each_picture(finished: Path) -> None:
    sheets = sorted((finished / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_00000000.png", "step_00000003.png"]
    size, edge = 64, np.asarray(Image.open(sheets[0]))
    assert edge.shape[1] % (2 * size) == 0
    control = edge[:size, :size]
    assert set(np.unique(control)) == {0, 255}
    losses = [record["val_loss"] for record in records(finished) if "val_loss" in record]
    assert len(losses) == 2


def test_the_loss_is_that_of_base_plus_controls(config: Path) -> None:
    settings = load_config(config)
    parts, data = build(settings), open_data(settings)
    with torch.no_grad():
        for parameter in parts.controlnet.after_proj_list.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        parts.controlnet.before_proj.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    objective = make_objective(settings, parts, torch.device("cpu"))
    batch = data.batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    terms = objective.module(**objective.inputs(batch, draws))

    moments = parts.vae.encode_moments(batch.pixels)
    mean, log_variance = moments.chunk(2, dim=1)
    latents = (mean + torch.exp(0.5 * log_variance) * draws.posterior_noise) * parts.vae.scaling_factor
    hint = parts.vae.encode_mode(batch.control)
    x_t = objective.schedule.add_noise(latents, draws.noise, draws.t)
    features = parts.text.encode(batch.captions)
    own = parts.controlnet.encode_context(*features)
    controls = parts.controlnet(x_t, draws.t, own, hint)
    output = parts.dit(x_t, draws.t, parts.dit.encode_context(*features), controls)
    expected = diffusion_loss(output, latents, draws.noise, draws.t, objective.schedule)
    assert torch.allclose(terms.loss, expected.loss, rtol=1e-5)
    without = parts.dit(x_t, draws.t, parts.dit.encode_context(*features))
    assert not torch.allclose(output, without)
    terms.loss.mean().backward()
    assert all(p.grad is None for p in parts.dit.parameters())
    for block in parts.controlnet.blocks:
        assert block.mlp.fc1.weight.grad.abs().sum() > 0
    assert parts.controlnet.x_embedder.proj.weight.grad is None


def test_dropped_controls_are_zero_latents(config: Path) -> None:
    settings = load_config(config, ["objective.dropout_control=1.0"])
    objective = make_objective(settings, build(settings), torch.device("cpu"))
    batch = open_data(settings).batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    assert objective.inputs(batch, draws)["hint"].abs().sum() == 0


def test_other_draws_do_not_depend_on_the_control(config: Path) -> None:
    plain, dropping = (load_config(config, [f"objective.dropout_control={p}"]).objective for p in (0.0, 0.5))
    a, b = (TrainingDraws(o, 3, 4)(0, range(4), (4, 2, 2)) for o in (plain, dropping))
    assert torch.equal(a.noise, b.noise) and torch.equal(a.t, b.t)
    assert sorted({*b.drop_control}) == [False, True]


def test_resuming_gives_the_same_controlnet(config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_training(config, f"run.output_dir={whole}", "run.steps=4")
    run_training(config, f"run.output_dir={parts}", "run.steps=4", stop_after_micro=2)
    assert run_training(config, f"run.output_dir={parts}", "run.steps=4", resume="auto")
    a, b = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_cached_latents_are_those_of_the_control_pictures(config: Path, tmp_path: Path) -> None:
    """With caches on and off, a flipped, centered picture has the same control."""
    options = [f"run.output_dir={tmp_path / 'a'}", "data.flip=1.0", "run.steps=2", "data.posterior=mode"]
    run_training(config, *options, "data.crop=center")
    cached = ["data.cache.latents=true", f"data.cache.dir={tmp_path / 'cache'}", "data.cache.dtype=float32"]
    run_training(config, f"run.output_dir={tmp_path / 'b'}", *options[1:], *cached)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-6
    # Other thresholds are other latents: nothing stale is used.
    count = len(list((tmp_path / "cache").rglob("*.safetensors")))
    changed = ["data.control.low=10", "data.control.high=20"]
    run_training(config, f"run.output_dir={tmp_path / 'c'}", *options[1:], *cached, *changed)
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) > count


def test_continuing_a_controlnet(config: Path, finished: Path, tmp_path: Path) -> None:
    start = finished / "model.safetensors"
    settings = load_config(config, [f"objective.controlnet={start}"])
    built = build(settings).controlnet.state_dict()
    stored = load_file(start)
    assert all(torch.equal(built[name], stored[name]) for name in stored)

    both = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {name: value + 1 for name, value in stored.items()}, "ema": stored}, both)
    for key, offset in (("module", 1), ("ema", 0)):
        chosen = [f"objective.controlnet={both}", f"objective.controlnet_load_key={key}"]
        built = build(load_config(config, chosen)).controlnet.state_dict()
        assert all(torch.equal(built[name], stored[name] + offset) for name in stored)


def test_a_controlnet_of_other_dimensions_is_refused(config: Path, tmp_path: Path) -> None:
    net = ControlNet(TINY_V11.__class__(**{**TINY.to_dict(), "hidden_size": 32}))
    net.initialize(torch.Generator().manual_seed(0))
    from hydit_core.facts import ModelInfo
    from hydit_core.weights.save import save_checkpoint

    path = tmp_path / "other.safetensors"
    save_checkpoint(path, dit=net.state_dict(), info=ModelInfo.published("v1.2"))
    with pytest.raises(ConfigError, match="does not fit this HunyuanDiT: hidden_size 32 instead of 64"):
        build(load_config(config, [f"objective.controlnet={path}"]))


def test_models_with_sizes_train_too(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "old.safetensors", TINY_V11)
    assert run_training(write_control_run(tmp_path / "run", model), "run.steps=1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.kind=full", "belong together"),
        ("data.control.low=300", "low = 300 is above high = 200"),
        ("data.control.kind=depth", "folder of a depth-estimation model"),
        ("objective.train_text_encoders=true", "finished weights"),
        ("samples.every=1", "samples.prompts is empty"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(config: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, [override])


def test_ready_made_control_pictures_are_read_beside_the_data(config: Path, tmp_path: Path) -> None:
    write_run(tmp_path)
    pictures = tmp_path / "pictures"
    sources = [{"path": pictures}]
    data = {"sources": sources, "resolution": 64, "control": {"kind": "files"}, "crop": "center"}
    with pytest.raises(DataError, match=r"no folder .*control with control pictures"):
        open_dataset(DataConfig.model_validate(data), seed=0, batch_size=2)
    control = pictures / "control"
    control.mkdir()
    with pytest.raises(DataError, match="cannot read picture"):
        open_dataset(DataConfig.model_validate(data), seed=0, batch_size=2)
    for path in pictures.glob("*.png"):
        # Another size and format than the picture itself
        Image.open(path).resize((36, 32)).convert("RGB").point(lambda v: 255 - v).save(
            control / f"{path.stem}.webp", lossless=True
        )
    opened = open_dataset(DataConfig.model_validate(data), seed=0, batch_size=2)
    assert len(opened.manifest) == 8
    batch = opened.batch(0)
    assert batch.control.shape == batch.pixels.shape
    # The inverted, coarser picture lies where the picture lies.
    assert (batch.control + batch.pixels).abs().mean() < 0.1
    flipped = open_dataset(DataConfig.model_validate({**data, "flip": 1.0}), seed=0, batch_size=2).batch(0)
    assert torch.equal(flipped.control, batch.control.flip(-1))


def test_a_table_names_its_control_pictures(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = [
        {"image": f"pictures/{i}.png", "caption": "cat", "pose": f"pictures/{7 - i}.png"} for i in range(8)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = {"path": tmp_path / "data.jsonl", "control_field": "pose"}
    data = {
        "sources": [source],
        "resolution": 64,
        "control": {"kind": "files", "label": "pose"},
        "crop": "center",
    }
    opened = open_dataset(DataConfig.model_validate(data), seed=0, batch_size=1)
    batch = opened.batch(0)
    number = int(Path(batch.keys[0]).stem)
    other = next(opened.batch(s) for s in range(8) if int(Path(opened.batch(s).keys[0]).stem) == 7 - number)
    assert torch.equal(batch.control, other.pixels)
    del source["control_field"]
    with pytest.raises(DataError, match="needs control_field"):
        open_dataset(DataConfig.model_validate({**data, "sources": [source]}), seed=0, batch_size=1)


def test_canny_is_opencvs_with_the_published_thresholds() -> None:
    import cv2

    noise = np.random.default_rng(0).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    edges = np.asarray(canny(Image.fromarray(noise)))
    assert (edges == cv2.Canny(noise, 100, 200)[..., None]).all()


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("bf16", 2)])
def test_the_base_counts_as_frozen_memory(precision: str, size: int, config: Path) -> None:
    settings = load_config(config, [f"run.precision={precision}"])
    dit, _ = load_dit(settings.model.init_from)
    base = sum(p.numel() for p in dit.parameters())
    trained = ("blocks.", "before_proj.", "after_proj_list.")
    embedders = sum(
        p.numel() for name, p in ControlNet.from_base(dit).named_parameters() if not name.startswith(trained)
    )
    assert embedders > 10_000  # the ControlNet's own, in fp32
    assert objective_of(settings).frozen_bytes(settings, dit) == size * base + 4 * embedders
