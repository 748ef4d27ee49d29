"""Parts of a model in the host's memory, whose blocks are gathered on the device: one process, all parts."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from on_device import CUDA, DEVICE, assert_close
from PIL import Image
from train_setup import write_run

from hydit_core.train.config import TrainConfig, load_config
from hydit_core.train.distributed import Processes
from hydit_core.train.launch import open_data
from hydit_core.train.loop import Trainer
from hydit_core.train.objectives.table import make_objective
from hydit_core.train.parallel.copies import is_part, own
from hydit_core.train.parts import build
from hydit_core.train.samples import draw_samples

Figure = Callable[[str, float], None]
STEPS = 4
pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")


@pytest.fixture
def group() -> Iterator[None]:
    """A group of one process, with both kinds of exchange, as a training of several starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if CUDA else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=60),
    )
    yield
    dist.destroy_process_group()


def trained(config: TrainConfig, *, split: bool) -> tuple[list[float], Trainer, bytes]:
    """The losses, what trained, and a sample sheet."""
    from hydit_core.train.parallel.sharded import Sharded

    assert DEVICE is not None
    processes = Processes(0, 1, DEVICE)
    parallel = Sharded(processes, half=config.run.precision == "bf16", offload=True) if split else None
    parts = build(config, deferred=split)
    parts.split = split
    objective = make_objective(config, parts, DEVICE)
    trainer = Trainer(config, objective, open_data(config), processes, parallel)
    batches, losses = trainer._batches(), []
    for step in range(STEPS):
        with trainer.parallel.accumulating(True), trainer._autocast():
            inputs = trainer.encoding.inputs(next(batches))
            loss = trainer.model(**inputs).loss.mean()
            loss.backward()
        trainer.parallel.clip(trainer.trained.values(), 1.0)
        trainer.optimizer.step(1.0)
        for parameter in trainer.trained.values():
            parameter.grad = None if step + 1 < STEPS else parameter.grad
        losses.append(float(loss.detach()))
    batches.close()
    sheet = trainer.parallel.drawing(lambda: draw_samples(parts, config.samples, DEVICE))
    return losses, trainer, sheet


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offloaded_parts_train_as_the_whole_does(
    group: None, tmp_path: Path, precision: str, figure: Figure
) -> None:
    """The same losses and, of an untrained model, the same picture; nothing of the states on the device."""
    sets = [f"run.precision={precision}", "ema.enabled=true", "objective.train_text_encoders=false"]
    sets += ["run.grad_accumulation=1", "optimizer.lr=1e-3", f"run.device={DEVICE}"]
    sets += ['samples.prompts=["cat"]', "samples.every=9", "samples.steps=2"]
    config = load_config(write_run(tmp_path / "run"), sets)
    whole, _, drawn = trained(config, split=False)
    parts, trainer, sheet = trained(config, split=True)
    assert len(set(whole)) == STEPS
    tolerance = {"fp32": 1e-3 if CUDA else 1e-6, "bf16": 2e-2}[precision]
    assert_close(torch.tensor(parts), torch.tensor(whole), tolerance, figure, "losses")
    assert trainer.ema is not None
    held = [*trainer.trained.values(), *trainer.ema.average.values(), *trainer.optimizer.state().values()]
    held += [p.grad for p in trainer.trained.values() if p.grad is not None]
    assert any(is_part(tensor) for tensor in held)
    assert {own(tensor).device.type for tensor in held if tensor.ndim} == {"cpu"}
    pictures = [np.asarray(Image.open(io.BytesIO(file)), np.int16) for file in (sheet, drawn)]
    apart = np.abs(pictures[0] - pictures[1]).mean()
    figure("samples, levels apart", float(apart))
    assert pictures[0].std() > 1 and apart < (1 if precision == "fp32" else 8)
