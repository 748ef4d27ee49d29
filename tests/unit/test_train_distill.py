"""Distillation to few steps: the target against float64 formulas, who learns and who teaches, the file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train_lora import objective_of, shake, write_lora_run
from train_setup import run_training

from hydit_core.diffusion.consistency import Phases
from hydit_core.diffusion.schedule import Schedule
from hydit_core.errors import ConfigError
from hydit_core.facts import DiffusionConfig, ModelInfo, SamplingDefaults
from hydit_core.train.config import load_config
from hydit_core.train.draws import TrainingDraws
from hydit_core.train.dryrun import describe
from hydit_core.train.launch import open_data
from hydit_core.train.objectives.table import objective_of as class_of
from hydit_core.weights.bundle import bundle

DISTILL = ("objective.kind=distill", "distill.guidance=3.5", "distill.phases=2", "distill.teacher_steps=8")

# -- the target, one sample at a time in numpy


def abar() -> np.ndarray:
    root = [math.sqrt(0.00085) + i / 999 * (math.sqrt(0.018) - math.sqrt(0.00085)) for i in range(1000)]
    return np.cumprod(1 - np.array(root) ** 2)


def levels(t: int) -> tuple[float, float]:
    """alpha and sigma; t = -1 is the clean picture."""
    a = 1.0 if t < 0 else abar()[t]
    return math.sqrt(a), math.sqrt(1 - a)


def x0_and_noise(output, x, t: int, prediction: str):
    alpha, sigma = levels(t)
    if prediction == "v":
        return alpha * x - sigma * output, sigma * x + alpha * output
    if prediction == "epsilon":
        return (x - sigma * output) / alpha, output
    return output, (x - alpha * output) / sigma


def ddim(output, x, t: int, s: int, prediction: str):
    """Song et al. 2021, eq. 12 with eta 0."""
    x0, noise = x0_and_noise(output, x, t, prediction)
    alpha, sigma = levels(s)
    return alpha * x0 + sigma * noise


def teacher(x, t: int):
    return np.tanh(1.3 * x) + 0.1 * math.cos(t / 300)


def student(x, t: int):
    return np.sin(x + t / 500) - 0.2 * x


def lands(x, t: int, start: int, stride: int, prediction: str):
    """Where the teacher and then the student lead from x at t."""
    s = max(t - stride, start)
    x = ddim(teacher(x, t), x, t, s, prediction)
    return x if s == start else ddim(student(x, s), x, s, start, prediction)


def rows(function):
    """A function of one sample as a network of torch."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        each = [function(one.double().numpy(), int(s)) for one, s in zip(x, t, strict=True)]
        return torch.from_numpy(np.stack(each)).float()

    return network


@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
@pytest.mark.parametrize("count, starts", [(1, {}), (4, {999: 749, 750: 749, 749: 499, 250: 249, 249: -1})])
def test_the_target_leads_where_teacher_and_student_lead(count: int, starts: dict, prediction: str) -> None:
    schedule = Schedule(DiffusionConfig(prediction=prediction))
    phases = Phases(schedule, count, 16)
    t = torch.tensor([0, 1, 62, 63, 64, 249, 250, 311, 312, 313, 500, 749, 750, 998, 999])
    x = torch.randn(len(t), 4, 3, 2, generator=torch.Generator().manual_seed(1))
    target = phases.target(x, t, rows(teacher), rows(student))
    assert target.dtype == torch.float32
    for one, s, found in zip(x.double().numpy(), t.tolist(), target.double().numpy(), strict=True):
        start = -1 if count == 1 else next(e for e in (749, 499, 249, -1) if e < s)
        assert starts.get(s, start) == start == phases.starts[s]
        expected = lands(one, s, start, 63, prediction)
        assert np.allclose(ddim(found, one, s, start, prediction), expected, atol=2e-5), s
        # A wrong formula is far from it: another phase, another stride, the teacher alone.
        if s == 999:
            assert not np.allclose(lands(one, s, start, 40, prediction), expected, atol=1e-2)
            assert not np.allclose(ddim(teacher(one, s), one, s, start, prediction), expected, atol=1e-2)


def test_phases_end_where_a_run_of_as_many_steps_goes() -> None:
    schedule = Schedule(DiffusionConfig())
    for count in (1, 2, 3, 4, 6, 8):
        phases = Phases(schedule, count, 25)
        visited = [*schedule.timesteps("trailing", count).tolist(), -1]
        for t, end in itertools.pairwise(visited):
            assert phases.starts[t] == end
        assert (phases.earlier >= phases.starts).all()
        assert (phases.earlier < torch.arange(1000)).all()
    with pytest.raises(ConfigError, match="8 phases with 4 steps of the teacher"):
        Phases(schedule, 8, 4)


# -- the objective


ALL = (*DISTILL, "distill.train=all")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> Path:
    return write_lora_run(tmp_path_factory.mktemp("distill"), tiny_model_file)


@pytest.fixture(scope="module")
def without_lora(config: Path) -> Path:
    return without_lora_table(config)


def without_lora_table(config: Path) -> Path:
    """The same configuration without the table of a LoRA."""
    path = config.with_name("all.toml")
    path.write_text(config.read_text("utf-8").replace("[lora]\nrank = 3\nalpha = 6\n", ""), "utf-8")
    return path


def inputs_of(objective: Any, config: Path, *overrides: str) -> dict[str, Any]:
    settings = load_config(config, [*DISTILL, *overrides])
    batch = open_data(settings).batch(0)
    draws = TrainingDraws(settings.objective, 0, 2)(0, [0, 1], objective.latent_shape(batch))
    return objective.inputs(batch, draws)


def predicted(objective: Any, inputs: dict[str, Any], x: torch.Tensor, t: torch.Tensor, text: Any):
    """The module's DiT as it is, called directly."""
    dit = objective.parts.dit
    text = dit.encode_context(text.bert, text.bert_mask, text.t5, text.t5_mask)
    return dit(x, t, text)[:, :4]


@pytest.mark.parametrize("train", ["lora", "all"])
def test_the_loss_is_written_out(config: Path, without_lora: Path, train: str) -> None:
    """With the base as the guided teacher, and the student as it is now, in float64 but for the networks."""
    objective = objective_of(config, *DISTILL) if train == "lora" else objective_of(without_lora, *ALL)
    base = objective_of(config)  # a LoRA that has not begun: the base
    changed = [p for n, p in objective.parameters().items() if not n.endswith("lora_A")]
    with torch.no_grad():
        for number, parameter in enumerate(changed):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.05 * noise)
    inputs = inputs_of(objective, config)
    terms = objective.module(**inputs)

    latents, noise, t, text = (inputs[name] for name in ("latents", "noise", "t", "text"))
    with torch.no_grad():
        alpha, sigma = (torch.tensor([levels(int(s))[i] for s in t]).view(-1, 1, 1, 1) for i in (0, 1))
        x = (alpha * latents + sigma * noise).float()
        empty = type(text)(*(part.expand(len(t), *part.shape[1:]) for part in inputs["empty"]))
        cond, uncond = (predicted(base, inputs, x, t, one).double() for one in (text, empty))
        guided = uncond + 3.5 * (cond - uncond)
        starts = [499 if s > 499 else -1 for s in t.tolist()]
        earlier = [max(s - 125, e) for s, e in zip(t.tolist(), starts, strict=True)]
        x_s = [
            ddim(g, one.double(), s, e, "v")
            for g, one, s, e in zip(guided, x, t.tolist(), earlier, strict=True)
        ]
        x_s = torch.stack(x_s)
        own_v = predicted(objective, inputs, x_s.float(), torch.tensor(earlier).clamp(min=0), text).double()
        expected = []
        output = predicted(objective, inputs, x, t, text).double()
        for row, (s, e, start) in enumerate(zip(t.tolist(), earlier, starts, strict=True)):
            there = x_s[row] if e == start else ddim(own_v[row], x_s[row], e, start, "v")
            # In the angle of alpha and sigma a step is a rotation (Salimans & Ho 2022, appendix D).
            angle = math.atan2(*levels(s)[::-1]) - math.atan2(*levels(start)[::-1])
            v = (math.cos(angle) * x[row].double() - there) / math.sin(angle)
            expected.append((output[row] - v).square().mean())
    assert torch.allclose(terms.mse.double(), torch.stack(expected), rtol=2e-4)
    assert torch.equal(terms.loss, terms.mse) and not terms.vlb.any()


def test_only_the_lora_learns(config: Path) -> None:
    objective = objective_of(config, *DISTILL)
    shake(objective)
    trained = {id(p) for p in objective.parameters().values()}
    before = {name: p.clone() for name, p in objective.module.named_parameters()}
    objective.module(**inputs_of(objective, config)).loss.mean().backward()
    for name, parameter in objective.module.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
        assert parameter.requires_grad == (id(parameter) in trained), name
        assert torch.equal(parameter, before[name])
    # The final layer's rows of variances are no part of the loss.
    assert objective.parts.dit.config.out_channels == 8


def test_the_variances_take_no_part(config: Path) -> None:
    objective = objective_of(config, *DISTILL, "lora.targets=all-linear")
    shake(objective)
    objective.module(**inputs_of(objective, config)).loss.mean().backward()
    grad = objective.parameters()["dit.final_layer.linear.lora_B"].grad
    by_channel = grad.view(-1, 8, grad.shape[1])  # patches' pixels, channels
    assert by_channel[:, :4].abs().sum() > 0
    assert not by_channel[:, 4:].any()


def test_all_weights_learn_from_a_copy(without_lora: Path) -> None:
    objective = objective_of(without_lora, *ALL)
    assert {name.partition(".")[0] for name in objective.parameters()} == {"dit"}
    inputs = inputs_of(objective, without_lora)
    before = objective.module(**inputs)
    before.loss.mean().backward()
    with torch.no_grad():
        for parameter in objective.parameters().values():
            parameter -= 1e-2 * parameter.grad.sign()
    assert not torch.equal(objective.module(**inputs).mse, before.mse)
    teachers = dict(objective.module.teacher.named_parameters())
    fresh = objective_of(without_lora, *ALL).parts.dit.named_parameters()
    assert all(torch.equal(teachers[name], value) for name, value in fresh)
    assert not any(p.requires_grad for p in teachers.values())


# -- the configuration and the file


@pytest.mark.parametrize(
    "changes, message",
    [
        (["objective.dropout_joint=0.1"], "leave objective.dropout_bert, dropout_t5 and dropout_joint at 0"),
        (["lora.train_bert=true"], "leaves the text encoders as they are"),
        (["distill.teacher_steps=1"], "use at least as many"),
        (["distill.train=all"], r"the table lora needs objective\.kind = 'lora'"),
        (["samples.sampler=ddpm"], "variances are not trained"),
        (["model.info.defaults.sampler=ddpm"], "variances are not trained"),
        (["distill.guidance=0.5"], "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_distilled(config: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(config, [*DISTILL, *changes])


def test_the_table_is_for_distillation(config: Path) -> None:
    with pytest.raises(ConfigError, match=r"the table distill needs objective\.kind = 'distill'"):
        load_config(config, ["distill.phases=2"])


def test_a_base_without_guidance_needs_a_word(config: Path) -> None:
    settings = load_config(config, ["objective.kind=distill"])
    info = dataclasses.replace(ModelInfo.published("v1.2"), defaults=SamplingDefaults(cfg=1.0))
    parts = type("Parts", (), {"info": info})()
    with pytest.raises(ConfigError, match=r"give distill\.guidance"):
        class_of(settings).complete(settings, parts)


@pytest.mark.parametrize(
    "changes, settings",
    [
        ([], ("euler", "trailing", 2)),
        (["distill.phases=1"], ("lcm", "trailing", 8)),
        (["distill.phases=1", "model.info.defaults.steps=4"], ("lcm", "trailing", 4)),
        (["model.info.defaults.sampler=ddim", "model.info.defaults.cfg=7"], ("ddim", "trailing", 2)),
    ],
)
def test_what_the_file_recommends(config: Path, changes: list[str], settings: tuple) -> None:
    info = objective_of(config, *DISTILL, *changes).parts.info
    found = info.defaults
    assert (found.sampler, found.spacing, found.steps) == settings
    assert (found.cfg, found.guidance_rescale, info.folded_cfg) == (1, 0, 3.5)


def test_a_run_is_described_resumed_and_exported(config: Path, tmp_path: Path) -> None:
    changes = [
        *DISTILL,
        "data.cache.text=true",
        f"data.cache.dir={tmp_path / 'cache'}",
        "run.grad_accumulation=2",
    ]
    lines = "\n".join(describe(load_config(config, changes)))
    assert "distilled with a guidance of 3.5, from 8 steps to 2 phases" in lines
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes += ["ema.enabled=true", "samples.every=3", 'samples.prompts=["cat"]', "validation.every=3"]
    assert run_training(config, *changes, f"run.output_dir={whole}")
    output = f"run.output_dir={parts}"
    assert not run_training(config, *changes, output, stop_after_micro=3)
    assert run_training(config, *changes, output, resume="auto")
    for part in ("weights", "ema", "optimizer"):
        name = f"checkpoints/step_00000003/{part}.safetensors"
        expected, found = load_file(whole / name), load_file(parts / name)
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), part
    assert (whole / "lora.safetensors").read_bytes() == (parts / "lora.safetensors").read_bytes()
    header = (whole / "lora.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    said = json.loads(json.loads(header[8 : 8 + size])["__metadata__"]["hydit.config"])
    assert said["folded_cfg"] == 3.5 and said["defaults"]["cfg"] == 1


def test_all_weights_are_exported(without_lora: Path, tmp_path: Path) -> None:
    assert run_training(without_lora, *ALL, "run.steps=1", f"run.output_dir={tmp_path / 'run'}")
    info = bundle(tmp_path / "run/model.safetensors", only=("dit",), kinds=("dit",)).info
    assert (info.folded_cfg, info.defaults.sampler, info.defaults.cfg) == (3.5, "euler", 1)
