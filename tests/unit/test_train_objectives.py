"""An objective is one file and one line in a table: nobody else knows its name."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from train_setup import ROOT, run_training, write_run

from hydit_core.errors import ConfigError
from hydit_core.train.config import TrainConfig, load_config
from hydit_core.train.dryrun import describe
from hydit_core.train.export import export
from hydit_core.train.launch import held_run
from hydit_core.train.objectives.base import DiffusionModule, DiffusionObjective, rehearse_dit
from hydit_core.train.objectives.table import OBJECTIVES
from hydit_core.train.parts import build
from hydit_core.train.sections import TrainSections

TRAIN = ROOT / "hydit_core" / "train"
OWN = TRAIN / "objectives"


def elsewhere(source: str) -> Iterator[str]:
    """Where a file knows which objectives there are, or asks which one is trained."""
    classes = {objective.__name__ for objective in OBJECTIVES.values()}
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(ast.Name("objective") | ast.Attribute(attr="objective"), "kind"):
                yield ast.unparse(node)
            case ast.Subscript(ast.Subscript(_, ast.Constant("objective")), ast.Constant("kind")):
                yield ast.unparse(node)
            case ast.Name(name) | ast.alias(name) if name in classes:
                yield name


def test_nobody_else_knows_the_objectives() -> None:
    files = [path for path in ROOT.glob("hydit_core/**/*.py") if OWN not in path.parents]
    assert len(files) > 100
    found = {path: sorted(set(elsewhere(path.read_text("utf-8")))) for path in files}
    assert {path: names for path, names in found.items() if names} == {
        TRAIN / "config.py": ["self.objective.kind"],
        # It trains nothing but LoRAs.
        TRAIN / "quick" / "plan.py": ["LoraObjective"],
        TRAIN / "quick" / "command.py": ["LoraObjective"],
    }
    constants = {
        node.value
        for node in ast.walk(ast.parse((TRAIN / "config.py").read_text("utf-8")))
        if isinstance(node, ast.Constant)
    }
    assert not constants & set(OBJECTIVES)


def test_one_who_knows_would_be_found() -> None:
    assert list(elsewhere("x = config.objective.kind == 'lora'")) == ["config.objective.kind"]
    assert list(elsewhere("from .objectives.full import FullObjective")) == ["FullObjective"]
    assert list(elsewhere("before['objective']['kind']")) == ["before['objective']['kind']"]
    assert not list(elsewhere("if config.schedule.kind == 'linear': patch.kind"))


def test_objectives_have_their_own_tables() -> None:
    own = {name for name, objective in OBJECTIVES.items() if objective.section is not None}
    assert own == {"lora", "distill", "ip_adapter"}
    assert set(TrainConfig.model_fields) == {*TrainSections.model_fields, *own}


def test_every_objective_is_in_the_docs() -> None:
    for page in ("docs/configuration.md", "docs/zh/configuration.md"):
        line = next(
            x
            for x in (ROOT / page).read_text("utf-8").splitlines()
            if x.startswith("| `kind` | ") and "DiT" in x
        )
        assert re.findall(r"`(\w+)`", line.rpartition(" | ")[2]) == list(OBJECTIVES)


def test_a_configuration_is_checked_without_transformers() -> None:
    code = (
        "import sys, hydit_core.train.config\n"
        "heavy = {'transformers', 'diffusers', 'peft', 'tokenizers', 'torchao'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class ToyObjective(DiffusionObjective):
    """Trains the DiT's last layer and nothing else."""

    export_name = "toy.safetensors"
    start_key = "toy.start"

    @classmethod
    def check(cls, config: TrainSections) -> None:
        if config.objective.noise_offset > 0.5:
            raise ValueError("a toy takes no large noise_offset")

    @classmethod
    def check_unused(cls, config: TrainSections) -> None:
        if config.objective.snr_gamma == 7:
            raise ValueError("snr_gamma = 7 is the toy's")

    @classmethod
    def check_machine(cls, config: TrainSections) -> None:
        if config.run.seed == 13:
            raise ConfigError("a toy needs luck")

    @classmethod
    def warnings(cls, config: TrainSections, captions: Any) -> Iterator[str]:
        yield f"a toy is trained on {len(list(captions()))} captions"

    @classmethod
    def shapes(cls, config: TrainSections, dit: Any, text: Any) -> dict[str, torch.Tensor]:
        return {f"toy.{name}": p for name, p in dit.final_layer.named_parameters()}

    @classmethod
    def lines(cls, config: TrainSections, shapes: Any) -> Iterator[str]:
        yield f"a toy of {len(shapes)} tensors"

    @classmethod
    def frozen_bytes(cls, config: TrainSections, dit: nn.Module) -> int:
        return 3 << 30

    @classmethod
    def rehearsal(cls, config: TrainSections, dit: Any, **how: Any) -> Any:
        return rehearse_dit(dit, **how)._replace(blocks=1)

    def _module(self, config: Any) -> nn.Module:
        module = DiffusionModule(self.parts.dit, None, self.schedule, config)
        module.requires_grad_(False)
        return module

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"toy.{name}": p for name, p in self.parts.dit.final_layer.named_parameters()}

    def export(self, path: Path, *, dtype: torch.dtype, all_in_one: bool, extra: dict[str, str]) -> None:
        save_file({n: p.detach().to(dtype).contiguous() for n, p in self.parameters().items()}, path, extra)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A configuration and what in it asks for the toy."""
    monkeypatch.setitem(OBJECTIVES, "toy", ToyObjective)
    changes = ["objective.kind=toy", "objective.train_text_encoders=false", "schedule.warmup_steps=0"]
    return write_run(tmp_path), [*changes, f"run.output_dir={tmp_path / 'run'}", "run.steps=2"]


def test_a_toy_is_checked(toy: tuple[Path, list[str]]) -> None:
    config, changes = toy
    assert load_config(config, changes).objective.kind == "toy"
    with pytest.raises(ConfigError, match="a toy takes no large noise_offset"):
        load_config(config, [*changes, "objective.noise_offset=0.9"])
    with pytest.raises(ConfigError, match="snr_gamma = 7 is the toy's"):
        load_config(config, ["objective.snr_gamma=7"])
    with pytest.raises(ConfigError, match=r"the table lora needs objective\.kind = 'lora'"):
        load_config(config, [*changes, "lora.rank=4"])
    with pytest.raises(ConfigError, match="use one of full, controlnet, lora, distill, ip_adapter, toy"):
        load_config(config, ["objective.kind=toi"])


def test_a_toy_is_described(toy: tuple[Path, list[str]]) -> None:
    config, changes = toy
    lines = "\n".join(describe(load_config(config, changes)))
    count = len(ToyObjective.shapes(load_config(config), _dit(config), None))
    assert f"  a toy of {count} tensors" in lines
    assert re.search(r"frozen: 3\.\d\d GiB", lines)
    with pytest.raises(ConfigError, match="a toy needs luck"):
        list(describe(load_config(config, [*changes, "run.seed=13"])))


def _dit(config: Path) -> nn.Module:
    return build(load_config(config)).dit


def test_a_toy_is_trained_and_exported(
    toy: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    config, changes = toy
    before = _dit(config).final_layer.state_dict()
    assert run_training(config, *changes, "checkpoint.export_dtype=fp32", "ema.enabled=false")
    assert "warning: a toy is trained on 8 captions" in capsys.readouterr().err
    run = config.parent / "run"
    trained = load_file(run / "toy.safetensors")
    assert set(trained) == {f"toy.{name}" for name in before}
    assert any(not torch.equal(trained[f"toy.{name}"], value) for name, value in before.items())
    assert export(run, out=config.parent / "again.safetensors").endswith("of step 2")
    again = load_file(config.parent / "again.safetensors")
    assert all(torch.equal(again[name], value) for name, value in trained.items())


def test_a_run_of_a_toy_is_found(toy: tuple[Path, list[str]], tmp_path: Path) -> None:
    (tmp_path / "toy.safetensors").touch()
    assert held_run(tmp_path) == "toy.safetensors"
