"""What a run would do, without doing it: nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..facts import ModelInfo
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..weights.bundle import Bundle
from ..weights.load import load_dit
from .checks import check_machine, check_parts
from .conditioning import caption_fits
from .config import TrainConfig
from .distributed import find_device
from .launch import held_run, open_data
from .memory import largest, of_run
from .objectives.table import objective_of
from .optim import parameter_groups
from .parallel.fit import memory_of, plan
from .parts import described, load_text, open_base, open_vae
from .posterior import choose


def describe(
    config: TrainConfig, *, ranks: int | None = None, device_memory: int | None = None
) -> Iterator[str]:
    """Lines for the terminal: data, captions, model, schedule, memory.

    ``ranks`` processes on devices with ``device_memory`` bytes are planned for; by default those that run
    now, and the device that is there.

    Raises :class:`HyditError` for anything that training itself would refuse at its start.
    """
    run, objective = config.run, objective_of(config)
    check_machine(config)
    data = open_data(config)
    yield "Data"
    yield from (f"  {line}" for line in data.summary().lines())
    drawn = config.data.prior.prompts
    if drawn:
        share = f"{config.data.prior.share:.0%} of what is trained"
        yield f"  and {len(drawn)} pictures that the base draws at the start, {share}"
    if known := config.validation.prior:
        yield f"  and {len(known)} pictures to see what is forgotten, which the base draws at the start"
    base = open_base(config)
    dit, info = _shapes(config, base)
    text, vae = load_text(config, dit.config, base, like_file=True), open_vae(config, base)
    check_parts(config, dit.config, text, vae, described(config, info, text, vae))
    yield "Captions"
    for fit in caption_fits(data.captions(), text.tokenizers):
        yield from (f"  {line}" for line in fit.lines())
    yield from (f"  warning: {line}" for line in objective.warnings(config, data.captions))

    everything = objective.shapes(config, dit, text)
    groups = parameter_groups(everything, config.optimizer)
    trained = {name: everything[name] for group in groups for name in group.names}
    yield "Model"
    key = f" ({config.model.load_key})" if config.model.load_key else ""
    origin = f"from {config.model.init_from}{key}" if config.model.init_from else "from scratch"
    shape = dit.config
    yield (
        f"  DiT {shape.version}, {origin}: width {shape.hidden_size}, depth {shape.depth}, "
        f"{_count(dit.parameters()):,} parameters"
    )
    yield f"  text encoders: {_count(text.parameters()):,} parameters, {objective.text_state(config)}"
    yield from (f"  {line}" for line in objective.lines(config, everything))
    yield f"  {choose(config, info, data, vae).line}"
    yield f"  trained: {_count(trained.values()):,} parameters in {len(groups)} groups"
    yield "Run"
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    samples = run.steps * run.batch_size * run.grad_accumulation * ranks
    if drawn and not data.samples.prior:  # then they are not counted yet
        samples = round(samples * (1 - config.data.prior.share))
    epochs = samples / max(1, len(data.samples))
    yield (
        f"  {run.steps} steps of {run.batch_size} x {run.grad_accumulation} samples: {epochs:.1f} epochs "
        f"in {'one process' if ranks == 1 else f'{ranks} processes'}"
    )
    yield f"  precision {run.precision}, output to {run.output_dir} (nothing has been written)"
    if held := held_run(run.output_dir):
        yield f"  that folder holds a run already ({held}): it can be continued, not begun anew"
    size = largest([data.sizes[i] for i in np.unique(data.layout.bucket_of_row)])
    of_all = "" if ranks == 1 else f" of {ranks}"
    yield f"Memory of one process{of_all}, estimated for batches of {size[0]}x{size[1]}"
    if device_memory is None:
        device_memory = memory_of(find_device(run.device))
    yield from plan(config, ranks, device_memory, partial(of_run, config, dit, text, size)).lines()


def _shapes(config: TrainConfig, base: Bundle | None) -> tuple[DiT, ModelInfo]:
    """The DiT without its content: a fresh one on the meta device, or a mapped file, and what that says."""
    if config.model.from_scratch is not None:
        dit = DiT(DiTConfig.from_dict(config.model.from_scratch.model_dump()), device="meta")
        return dit, ModelInfo.published(dit.config.version)
    assert base is not None
    return load_dit(base, **objective_of(config).base_options())


def _count(parameters: object) -> int:
    return sum(p.numel() for p in parameters)  # type: ignore[attr-defined]
