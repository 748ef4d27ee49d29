"""What a process holds of a model that many share, counted, against the estimate of the dry run."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lora_setup import write_lora_run
from test_train_control import write_control_run
from test_train_distill import DISTILL, without_lora_table
from test_train_ip_adapter import write_ip_run
from train_setup import write_run

from hydit_core.errors import ConfigError
from hydit_core.train.__main__ import main
from hydit_core.train.config import TrainConfig, load_config
from hydit_core.train.distributed import Processes
from hydit_core.train.launch import open_data
from hydit_core.train.loop import Trainer
from hydit_core.train.memory import MemoryEstimate, of_run
from hydit_core.train.objectives.table import make_objective
from hydit_core.train.parallel.choice import make
from hydit_core.train.parallel.copies import own
from hydit_core.train.parallel.fit import plan
from hydit_core.train.parts import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory, tiny_model_file: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("memory")
    return {
        "full": write_run(folder / "full"),
        "lora": write_lora_run(folder / "lora", tiny_model_file),
        "control": write_control_run(folder / "control", tiny_model_file),
        "prompts": write_ip_run(folder / "prompts", tiny_model_file),
        "weights": without_lora_table(write_lora_run(folder / "weights", tiny_model_file)),
    }


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[int]:
    """This process as the first of so many, which exchange nothing: sizes are all that is asked for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def size(tensors: object) -> int:
    return sum(own(tensor).nbytes for tensor in tensors if tensor.ndim)  # type: ignore[attr-defined]


def counted(config: TrainConfig, world: int, kind: str) -> MemoryEstimate:
    """What the first of ``world`` processes holds after a step."""
    processes = Processes(0, world, CPU)
    parts = build(config)
    objective = make_objective(config, parts, CPU)
    parallel = make(config.run, kind, processes) if world > 1 and kind != "ddp" else None  # type: ignore[arg-type]
    # A whole copy is the same in every process: DDP needs no others to be counted.
    alone = Processes(0, 1, CPU) if parallel is None else processes
    trainer = Trainer(config, objective, open_data(config), alone, parallel)
    for parameter in trainer.trained.values():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step(1.0)
    trained = {id(p) for p in trainer.trained.values()}
    frozen = [p for p in objective.module.parameters() if id(p) not in trained]
    if not config.objective.train_text_encoders:
        frozen += list(parts.text.parameters())
    if parts.image_encoder is not None:
        frozen += list(parts.image_encoder.parameters())
    return MemoryEstimate(
        weights=size(trainer.trained.values()),
        gradients=size(p.grad for p in trainer.trained.values()),
        optimizer=size(trainer.optimizer.state().values()),
        average=0 if trainer.ema is None else size(trainer.ema.average.values()),
        frozen=size(frozen),
        activations=0,
    )


WAYS = [
    *((ranks, kind, "fp32") for ranks, kind in ((1, "ddp"), (2, "fsdp"), (8, "fsdp"), (4, "hsdp"))),
    (2, "fsdp", "bf16"),
]


CELLS = [
    *((name, *way) for name in ("full", "lora", "control") for way in WAYS),
    *((name, 2, "fsdp", "fp32") for name in ("prompts", "weights")),
]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")
@pytest.mark.parametrize(("name", "group", "kind", "precision"), CELLS, indirect=["group"])
def test_every_cell_is_what_is_held(
    configs: dict[str, Path], name: str, group: int, kind: str, precision: str
) -> None:
    sets = [f"run.parallel={kind}", f"run.precision={precision}", "ema.enabled=true"]
    sets += ["run.parallel_replicas=2"] if kind == "hsdp" else []
    sets += [*DISTILL, "distill.train=all"] if name == "weights" else []
    config = load_config(configs[name], sets)
    held, parts = counted(config, group, kind), build(config)
    split = {"ddp": 1, "fsdp": group, "hsdp": group // 2}[kind]
    expected = of_run(config, parts.dit, parts.text, (64, 64), split)
    for purpose in ("weights", "gradients", "optimizer", "average"):
        assert getattr(expected, purpose) == getattr(held, purpose), purpose
    # Rows that cannot be dealt out evenly add a little to the first process's share.
    assert expected.frozen == pytest.approx(held.frozen, rel=0.03)
    assert bool(expected.gathered) == (split > 1)
    assert expected.copied == held.weights + held.optimizer + held.average


def test_what_is_offloaded_is_not_on_the_device(configs: dict[str, Path]) -> None:
    """Everything that is split; whole blocks, activations and what stays whole are left."""
    sets = ["run.parallel=fsdp", "ema.enabled=true"]
    for name in ("full", "lora"):
        usual, less = (
            load_config(configs[name], [*sets, *more]) for more in ([], ["run.parallel_offload=true"])
        )
        parts = build(usual)
        here, there = (of_run(config, parts.dit, parts.text, (64, 64), 2) for config in (usual, less))
        split = sum(p.nbytes for p in parts.dit.parameters()) // 2 if name == "lora" else 0
        state = here.weights + here.gradients + here.optimizer + here.average
        assert there.offloaded == pytest.approx(state + split, rel=0.01)
        assert there.total == here.total - there.offloaded
        assert there.copied == here.copied


def test_what_is_gathered_is_written_out(configs: dict[str, Path]) -> None:
    """Two blocks with the gradients of one, and what is in no block, in fp32; gradients are there twice."""
    config = load_config(configs["full"], ["objective.train_text_encoders=false"])
    parts = build(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in parts.dit.blocks]
    rest = sum(p.numel() for p in parts.dit.parameters()) - sum(blocks)
    found = of_run(config, parts.dit, parts.text, (64, 64), 2)
    assert found.gathered == max(blocks) * (2 * 4 + 4 + 4) + rest * (4 + 4 + 4)
    half = of_run(
        load_config(configs["full"], ["run.precision=bf16", "objective.train_text_encoders=false"]),
        parts.dit,
        parts.text,
        (64, 64),
        2,
    )
    assert half.gathered == max(blocks) * (2 * 2 + 2 + 4) + rest * (2 + 2 + 4)


def test_auto_is_ddp_where_it_fits(configs: dict[str, Path]) -> None:
    config = load_config(configs["full"])
    estimates = {n: MemoryEstimate(80 // n << 30, 0, 0, 0, 0, 0) for n in (1, 2, 4)}

    def chosen(config: TrainConfig, ranks: int, free: int | None) -> tuple[str, bool]:
        found = plan(config, ranks, free, estimates.__getitem__)
        return found.kind, found.fits

    assert chosen(config, 4, None) == ("ddp", True)
    assert chosen(config, 4, 81 << 30) == ("ddp", True)
    assert chosen(config, 4, 80 << 30) == ("fsdp", True)  # 1 GiB is for what is not estimated
    assert chosen(config, 4, 20 << 30) == ("fsdp", False)
    assert chosen(config, 1, 20 << 30) == ("ddp", False)
    whole = load_config(configs["full"], ["optimizer.name=came"])
    assert chosen(whole, 4, 40 << 30) == ("ddp", False)
    forced = load_config(configs["full"], ["run.parallel=ddp"])
    assert chosen(forced, 4, 40 << 30) == ("ddp", False)


LARGE = (
    "model.from_scratch.hidden_size=4096",
    "model.from_scratch.depth=38",
    "model.from_scratch.num_heads=32",
    "model.from_scratch.mlp_hidden=16384",
    "objective.train_text_encoders=false",
    "checkpoint.export_all_in_one=false",
    "data.resolution=1024",
    "run.precision=bf16",
    "run.gradient_checkpointing=true",
)


def test_ten_billion_parameters_are_planned_without_any(
    configs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight devices of 80 GB: copies need far more, parts fit."""
    sets = [argument for value in LARGE for argument in ("--set", value)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    command = [str(configs["full"]), "--dry-run", "--ranks", "8", "--device-memory", "80GB", *sets]
    assert main(command) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB
    said = capsys.readouterr().out
    assert "10,299,735,712 parameters" in said and "in 8 processes" in said
    assert "fsdp: 31.4" in said and "taken: a whole copy takes" in said and "a device has 74.51 GiB" in said
    assert "fits into 74.51 GiB" in said and "does not fit" not in said


def test_flags_of_a_plan_are_checked(configs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = str(configs["full"])
    assert main([config, "--ranks", "8"]) == 2
    assert "use --dry-run" in capsys.readouterr().err
    for wrong in (["--ranks", "0"], ["--ranks", "-1"], ["--device-memory", "80XB"], ["--device-memory", "0"]):
        with pytest.raises(SystemExit) as stopped:
            main([config, "--dry-run", *wrong])
        assert stopped.value.code == 2
    assert "expected a size, such as 80GiB" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"does not divide 9 processes"):
        plan(
            load_config(Path(config), ["run.parallel=hsdp", "run.parallel_replicas=2"]),
            9,
            None,
            lambda _: MemoryEstimate(1, 0, 0, 0, 0, 0),
        )
