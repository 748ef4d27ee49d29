"""Training an IP-Adapter: what is trained, what comes out, and which pictures are the prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_train_distributed import run_two, several_processes
from tiny import TINY, TINY_V11, write_tiny_model
from torch import Tensor
from torch.nn import functional
from train_setup import SHORT_RUN, command_line, records, run_training, write_run
from vision_files import vision_model

import hydit_core
from hydit_core.diffusion.losses import diffusion_loss
from hydit_core.errors import ConfigError, WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.image_prompts.encoder import load_image_encoder
from hydit_core.image_prompts.run import ImagePrompt
from hydit_core.model.attention import Attended, ImageContext
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.train.config import load_config
from hydit_core.train.draws import TrainingDraws
from hydit_core.train.dryrun import describe
from hydit_core.train.launch import open_data, prepare_data
from hydit_core.train.objectives.base import DiffusionObjective
from hydit_core.train.objectives.table import make_objective
from hydit_core.train.parts import build
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors
from hydit_core.weights.load import load_dit, load_ip_adapter
from hydit_core.weights.quantise import quantise
from hydit_core.weights.save import save_ip_adapter
from hydit_core.weights.writer import save_safetensors

EMBED, TOKENS = 12, 3


def write_encoder(path: Path, seed: int = 0, embed_dim: int = EMBED) -> Path:
    save_safetensors(path, dict(vision_model(embed_dim=embed_dim, seed=seed).state_dict()))
    return path


def write_ip_run(folder: Path, model: Path) -> Path:
    """The configuration of an IP-Adapter for the model in ``model``."""
    write_run(folder)
    write_encoder(folder / "encoder.safetensors")
    path = folder / "ip.toml"
    path.write_text(
        f"""
[model]
init_from = "{model.as_posix()}"
[data]
sources = [{{ path = "pictures" }}]
resolution = 64
validation = 2
[objective]
kind = "ip_adapter"
timesteps = "stratified"
dropout_image = 0.0
[ip_adapter]
encoder = "encoder.safetensors"
tokens = {TOKENS}
[optimizer]
lr = 1e-2
{SHORT_RUN}[checkpoint]
export_dtype = "fp32"
metadata = {{ "modelspec.title" = "pictures as prompts" }}
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Path:
    return write_ip_run(tmp_path_factory.mktemp("ip"), tiny_model_file)


@pytest.fixture(scope="module")
def finished(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    picture = config.parent / "pictures" / "0.png"
    assert run_training(
        config,
        f"run.output_dir={folder}",
        "ema.enabled=true",
        "ema.decay=0.5",
        "validation.every=3",
        "samples.every=3",
        'samples.prompts=["cat", "小鸟"]',
        f'samples.image_prompts=["{picture.as_posix()}"]',
        "samples.steps=2",
    )
    return folder


def objective_of(config: Path, *overrides: str) -> tuple[DiffusionObjective, dict[str, object]]:
    """The objective, its adapter shaken so that values count, and the inputs of the first batch."""
    settings = load_config(config, list(overrides))
    data, parts = open_data(settings), build(settings)
    prepare_data(settings, data, parts, _Alone())
    objective = make_objective(settings, parts, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    batch = data.batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    return objective, objective.inputs(batch, draws)


class _Alone:
    """One process."""

    device, is_main = torch.device("cpu"), True

    def barrier(self) -> None:
        pass


# -- what is trained ---------------------------------------------------------------------------------


def test_gradients_reach_the_adapter_and_nothing_else(config: Path) -> None:
    objective, inputs = objective_of(config)
    module = objective.module
    module(**inputs).loss.mean().backward()
    names = set(objective.parameters())
    # As many for each block as the published one has: 164 for 40
    assert len(names) == 4 + 4 * TINY.depth == len(IPAdapter(IPAdapterConfig(32, TINY.depth, 2)).state_dict())
    reached = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == names
    encoder = objective.parts.image_encoder
    assert not any(p.requires_grad for p in [*encoder.parameters(), *objective.parts.dit.parameters()])
    assert not module.dit.training and module.train().dit.training is False


def test_a_new_one_changes_nothing_and_learns_its_values_first(config: Path) -> None:
    settings = load_config(config)
    parts = build(settings)
    module = make_objective(settings, parts, torch.device("cpu")).module
    seen = parts.ip_adapter(torch.ones(1, EMBED))
    assert all(one.values.abs().sum() == 0 and one.keys.abs().sum() > 0 for one in seen)
    assert torch.equal(
        build(settings).ip_adapter.blocks[1].attn2.kv_proj_ip_adapter.weight,
        module.ip_adapter.blocks[1].attn2.kv_proj_ip_adapter.weight,
    )


def written_out(net: IPAdapter, embedding: Tensor) -> list[ImageContext]:
    """Tencent's formula by the names of the file, in float64."""
    w = {name: value.double() for name, value in net.state_dict().items()}
    name = "ip_adapter_clip_len_trans_block"
    wide = embedding.double() @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    tokens = torch.stack([wide[:, j::TOKENS] for j in range(TOKENS)], dim=1)
    norm = "ip_adapter_img_norm_cond"
    tokens = _normed(tokens, w[f"{norm}.weight"], w[f"{norm}.bias"], 1e-5)
    found = []
    for i in range(net.config.depth):
        own = f"blocks.{i}.attn2."
        both = tokens @ w[f"{own}kv_proj_ip_adapter.weight"].T + w[f"{own}kv_proj_ip_adapter.bias"]
        keys, values = (
            part.reshape(len(embedding), TOKENS, net.config.num_heads, -1) for part in both.chunk(2, dim=-1)
        )
        keys = _normed(keys, w[f"{own}k_norm_ip_adapter.weight"], w[f"{own}k_norm_ip_adapter.bias"], 1e-6)
        found.append(ImageContext([Attended(keys, values)]))
    return found


def _normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def test_the_loss_is_that_of_the_formula(config: Path) -> None:
    objective, inputs = objective_of(config)
    parts, schedule = objective.parts, objective.schedule
    dit, _ = load_dit(load_config(config).model.init_from, dtype=torch.float64)
    batch = open_data(load_config(config)).batch(0)
    latents, noise, t = (inputs[name] for name in ("latents", "noise", "t"))
    features = parts.text.encode(batch.captions)
    context = dit.encode_context(
        features.bert.double(), features.bert_mask, features.t5.double(), features.t5_mask
    )
    x_t = schedule.add_noise(latents, noise, t).double()
    with torch.no_grad():
        output = dit(x_t, t, context, images=written_out(parts.ip_adapter, inputs["embedding"])).float()
        plain = dit(x_t, t, context).float()
    expected = diffusion_loss(output, latents, noise, t, schedule).loss
    found = objective.module(**inputs).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert not torch.allclose(found, diffusion_loss(plain, latents, noise, t, schedule).loss, rtol=1e-4)


def test_embeddings_are_those_of_the_prompt_pictures(config: Path) -> None:
    """View 0 is the whole picture, as generate and the nodes encode it."""
    _, inputs = objective_of(config, "data.image_prompt.views=1")
    encoder = load_image_encoder(config.parent / "encoder.safetensors")
    batch = open_data(load_config(config)).batch(0)
    for embedding, key in zip(inputs["embedding"], batch.keys, strict=True):
        picture = Image.open(config.parent / "pictures" / Path(key).name)
        torch.testing.assert_close(embedding[None], encoder.embed(picture), atol=1e-6, rtol=0)


def test_dropped_pictures_are_zeros(config: Path) -> None:
    _, inputs = objective_of(config, "objective.dropout_image=1.0")
    assert inputs["embedding"].abs().sum() == 0
    plain, dropping = (load_config(config, [f"objective.dropout_image={p}"]).objective for p in (0.0, 0.5))
    a, b = (TrainingDraws(o, 3, 64)(0, range(64), (4, 2, 2)) for o in (plain, dropping))
    assert torch.equal(a.noise, b.noise) and a.drop_bert == b.drop_bert
    assert sum(a.drop_image) == 0 and 16 < sum(b.drop_image) < 48


@pytest.mark.parametrize("form", ["int8_convrot", "fp8_scaled"])
def test_a_quantised_base_stays_so(config: Path, tiny_model_file: Path, tmp_path: Path, form: str) -> None:
    small = tmp_path / "small.safetensors"
    quantise(tiny_model_file, small, format=form)
    gradients = []
    for base in (small, tiny_model_file):
        objective, inputs = objective_of(config, f"model.init_from={base}")
        objective.module(**inputs).loss.mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters().values()]))
        if base == small:
            kept = objective.parts.dit.blocks[0].mlp.fc1.weight
            assert kept._qdata.element_size() == 1
    # The same but for what 8 bits lose
    assert functional.cosine_similarity(*gradients, dim=0) > 0.98


# -- the run -----------------------------------------------------------------------------------------


def test_the_export_is_tencents(finished: Path, config: Path) -> None:
    path = finished / "ip_adapter.safetensors"
    kind = detect(open_tensors(path))
    assert kind.kind == "ip_adapter"
    assert set(load_file(path)) == set(IPAdapter(IPAdapterConfig(32, TINY.depth, 2)).state_dict())
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "pictures as prompts"
    assert metadata["modelspec.architecture"].endswith("/ip-adapter")
    net = load_ip_adapter(path)
    assert net.config == IPAdapterConfig.for_dit(TINY, EMBED, TOKENS)
    encoder = load_image_encoder(config.parent / "encoder.safetensors")
    pipe = hydit_core.load(load_config(config).model.init_from, device="cpu")
    shown = ImagePrompt(net, encoder, Image.new("RGB", (40, 30), "red"), 3.0)
    drawn = [pipe("cat", steps=2, width=64, height=64, images=given)[0] for given in ((), (shown,))]
    assert np.asarray(drawn[0]).tolist() != np.asarray(drawn[1]).tolist()


def test_the_averages_are_exported(finished: Path) -> None:
    stored = load_file(finished / "ip_adapter.safetensors")
    folder = finished / "checkpoints" / "step_00000003"
    ema, weights = (load_file(folder / f"{name}.safetensors") for name in ("ema", "weights"))
    assert all(torch.equal(stored[name.removeprefix("ip_adapter.")], value) for name, value in ema.items())
    assert any(not torch.equal(weights[name], value) for name, value in ema.items())


def test_samples_show_the_prompt_picture_beside_each_picture(finished: Path, config: Path) -> None:
    sheets = sorted((finished / "samples").iterdir())
    assert [sheet.name for sheet in sheets] == ["step_00000000.png", "step_00000003.png"]
    sheet = np.asarray(Image.open(sheets[0]))
    shown = np.asarray(Image.open(config.parent / "pictures" / "0.png").resize((64, 64)))
    assert (sheet[:64, :64] == shown).all()
    assert sheet.shape[1] % 128 == 0
    assert len([record for record in records(finished) if "val_loss" in record]) == 2


def test_resuming_gives_the_same_adapter(config: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["run.steps=4", "ema.enabled=true", "objective.dropout_image=0.3"]
    run_training(config, f"run.output_dir={whole}", *options)
    run_training(config, f"run.output_dir={parts}", *options, stop_after_micro=2)
    assert run_training(config, f"run.output_dir={parts}", *options, resume="auto")
    a, b = (load_file(folder / "ip_adapter.safetensors") for folder in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_cached_embeddings_are_those_of_the_pictures(config: Path, tmp_path: Path) -> None:
    options = ["run.steps=2", "data.posterior=mode"]
    run_training(config, f"run.output_dir={tmp_path / 'a'}", *options, "data.crop=center")
    cache = tmp_path / "cache"
    cached = ["data.cache.latents=true", f"data.cache.dir={cache}", "data.cache.dtype=float32"]
    run_training(config, f"run.output_dir={tmp_path / 'b'}", *options, *cached, "data.workers=1")
    a, b = (load_file(tmp_path / name / "ip_adapter.safetensors") for name in ("a", "b"))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3

    def entries() -> int:
        return sum(len(load_file(file)) for file in cache.rglob("images-*/*.safetensors"))

    assert entries() == 6 * 8 + 2  # the held-out pictures in one view
    run_training(config, f"run.output_dir={tmp_path / 'c'}", *options, *cached)
    assert entries() == 6 * 8 + 2
    # Another encoder or other views are other embeddings: nothing stale is used.
    other = write_encoder(tmp_path / "other.safetensors", seed=5)
    run_training(config, f"run.output_dir={tmp_path / 'd'}", *options, *cached, f"ip_adapter.encoder={other}")
    assert entries() == 2 * (6 * 8 + 2)
    narrower = ["data.image_prompt.least=0.5", "data.image_prompt.views=2"]
    run_training(config, f"run.output_dir={tmp_path / 'e'}", *options, *cached, *narrower)
    assert entries() == 2 * (6 * 8 + 2) + 6 * 2 + 2


def test_continuing_an_adapter(config: Path, finished: Path) -> None:
    start = finished / "ip_adapter.safetensors"
    built = build(load_config(config, [f"ip_adapter.init_from={start}", "ip_adapter.tokens=8"])).ip_adapter
    stored = load_file(start)
    assert all(torch.equal(value, stored[name]) for name, value in built.state_dict().items())


def test_the_encoder_beside_an_adapter(config: Path, finished: Path, tmp_path: Path) -> None:
    """As ipa.pt and clip_img_encoder.pt lie; one without an encoder says so."""
    start, text = tmp_path / "ipa.safetensors", config.read_text("utf-8")
    start.write_bytes((finished / "ip_adapter.safetensors").read_bytes())
    path = config.with_name("beside.toml")
    path.write_text(text.replace('encoder = "encoder.safetensors"', f'init_from = "{start}"'), "utf-8")
    with pytest.raises(WeightsError, match="has no image encoder, neither inside nor beside it"):
        list(describe(load_config(path)))
    write_encoder(tmp_path / "image_encoder.safetensors")
    assert build(load_config(path)).image_encoder.config.embed_dim == EMBED
    path.write_text(text.replace('encoder = "encoder.safetensors"', ""), "utf-8")
    with pytest.raises(ConfigError, match=r"ip_adapter\.encoder is needed for a new one"):
        load_config(path)


def test_models_with_sizes_train_too(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "old.safetensors", TINY_V11)
    assert run_training(write_ip_run(tmp_path / "run", model), "run.steps=1", "run.precision=bf16")


@several_processes
def test_two_processes_are_one_with_twice_the_batch(config: Path, tmp_path: Path) -> None:
    common = ["run.steps=2", "validation.every=2", "data.cache.latents=true"]
    common.append(f"data.cache.dir={tmp_path / 'cache'}")
    one, two = (f"run.output_dir={tmp_path / name}" for name in ("one", "two"))
    finished = run_two(config, [*common, two])
    assert [code for code, _ in finished] == [0, 0], finished
    assert run_training(config, *common, one, "run.batch_size=4")
    for mine, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-3, abs=2e-4)


# -- before the run ----------------------------------------------------------------------------------


def test_the_dry_run_tells_of_adapter_and_memory(config: Path, finished: Path) -> None:
    said = "\n".join(describe(load_config(config)))
    count = sum(p.numel() for p in IPAdapter(IPAdapterConfig.for_dit(TINY, EMBED, TOKENS)).parameters())
    assert f"IP-Adapter from scratch: {TOKENS} tokens for embeddings of {EMBED} values" in said
    assert f"trained: {count:,} parameters" in said
    assert "frozen" in said and "activations" in said
    start = finished / "ip_adapter.safetensors"
    said = "\n".join(describe(load_config(config, [f"ip_adapter.init_from={start}"])))
    assert f"IP-Adapter from {start}" in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.train_text_encoders=true", "finished weights"),
        ("objective.kind=full", r"the table ip_adapter needs objective\.kind = 'ip_adapter'"),
        ("samples.every=1", "samples.prompts is empty"),
        ("data.image_prompt.views=0", "greater than or equal to 1"),
        ("data.sources=[{path='pictures', image_prompt_field='x'}]", "kind = 'files'"),
        ("objective.dropout_control=0.5", "need objective.kind = 'controlnet'"),
    ],
)
def test_contradictions_are_told_before_anything_is_loaded(config: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, [override])


@pytest.mark.parametrize("option", ["objective.dropout_image=0.2", "data.image_prompt.views=2"])
def test_others_do_not_take_what_is_its_own(tmp_path: Path, option: str) -> None:
    with pytest.raises(ConfigError, match=r"needs objective\.kind = 'ip_adapter'"):
        load_config(write_run(tmp_path), [option])


def test_wrong_files_are_one_line(config: Path, tiny_model_file: Path, tmp_path: Path) -> None:
    """By the dry run and by training alike."""
    other = IPAdapter(IPAdapterConfig(32, TINY.depth, 2, EMBED, TOKENS, 32))
    other.initialize(torch.Generator().manual_seed(0))
    save_ip_adapter(tmp_path / "narrow.safetensors", other.state_dict(), ModelInfo.published("v1.2"))
    right = IPAdapter(IPAdapterConfig.for_dit(TINY, EMBED + 1, TOKENS))
    right.initialize(torch.Generator().manual_seed(0))
    save_ip_adapter(tmp_path / "wide.safetensors", right.state_dict(), ModelInfo.published("v1.2"))
    encoder = config.parent / "encoder.safetensors"
    cases = {
        f"ip_adapter.encoder={tiny_model_file}": "expected a CLIP image encoder",
        f"ip_adapter.encoder={tmp_path / 'none.pt'}": "none.pt",
        f"ip_adapter.init_from={encoder}": "CLIP image encoder",
        f"ip_adapter.init_from={tmp_path / 'narrow.safetensors'}": r"hidden_size 32 instead of 64",
        f"ip_adapter.init_from={tmp_path / 'wide.safetensors'}": rf"gives {EMBED} .* takes {EMBED + 1}",
    }
    for override, message in cases.items():
        settings = load_config(config, [override])
        with pytest.raises((ConfigError, WeightsError), match=message) as found:
            build(settings)
        with pytest.raises((ConfigError, WeightsError), match=message):
            list(describe(settings))
        assert "\n" not in str(found.value)
    said = command_line(config, "--dry-run", "--set", f"ip_adapter.encoder={tiny_model_file}")
    assert said.returncode == 2 and said.stderr.startswith("error: ") and "Traceback" not in said.stderr


def test_a_sample_picture_that_cannot_be_read(config: Path) -> None:
    options = ["samples.every=1", 'samples.prompts=["cat"]', 'samples.image_prompts=["ip.toml"]']
    options[2] = f'samples.image_prompts=["{config.as_posix()}"]'
    with pytest.raises(ConfigError, match=r"samples\.image_prompts: cannot read"):
        list(describe(load_config(config, options)))
    two = [*options[:1], 'samples.prompts=["cat", "dog", "car"]', 'samples.image_prompts=["a.png", "b.png"]']
    with pytest.raises(ConfigError, match=r"one for each of samples\.prompts \(3\)"):
        load_config(config, two)
