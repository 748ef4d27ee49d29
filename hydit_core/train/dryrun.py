"""What a run would do, without doing it: nothing is written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..facts import ModelInfo
from ..model.config import DiTConfig
from ..model.dit import DiT
from ..weights.bundle import Bundle
from ..weights.load import load_dit
from .checks import check_machine, check_parts
from .conditioning import caption_fits
from .config import TrainConfig
from .launch import held_run, open_data
from .memory import estimate, largest
from .objectives.base import parameter_bytes
from .objectives.table import objective_of
from .optim import parameter_groups
from .parts import described, load_text, open_base, open_vae
from .posterior import choose


def describe(config: TrainConfig) -> Iterator[str]:
    """Lines for the terminal: data, captions, model, schedule, memory.

    Raises :class:`HyditError` for anything that training itself would refuse at its start.
    """
    run, objective = config.run, objective_of(config)
    check_machine(config)
    data = open_data(config)
    yield "Data"
    yield from (f"  {line}" for line in data.summary().lines())
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
    samples = run.steps * run.batch_size * run.grad_accumulation
    epochs = samples / max(1, len(data.samples))
    yield (
        f"  {run.steps} steps of {run.batch_size} x {run.grad_accumulation} samples: {epochs:.1f} epochs "
        "in one process"
    )
    yield f"  precision {run.precision}, output to {run.output_dir} (nothing has been written)"
    if held := held_run(run.output_dir):
        yield f"  that folder holds a run already ({held}): it can be continued, not begun anew"
    frozen = objective.frozen_bytes(config, dit)
    dropped = config.data.cache.text and not objective.exports_text(config)
    if not (config.objective.train_text_encoders or dropped):
        frozen += parameter_bytes(text, config.run.precision)
    muon = {name for group in groups if group.muon for name in group.names}
    size = largest([data.sizes[i] for i in np.unique(data.layout.bucket_of_row)])
    yield f"Memory of one process, estimated for batches of {size[0]}x{size[1]}"
    yield from estimate(config, trained, muon, frozen, shape, size).lines()


def _shapes(config: TrainConfig, base: Bundle | None) -> tuple[DiT, ModelInfo]:
    """The DiT without its content: a fresh one on the meta device, or a mapped file, and what that says."""
    if config.model.from_scratch is not None:
        dit = DiT(DiTConfig.from_dict(config.model.from_scratch.model_dump()), device="meta")
        return dit, ModelInfo.published(dit.config.version)
    assert base is not None
    return load_dit(base, **objective_of(config).base_options())


def _count(parameters: object) -> int:
    return sum(p.numel() for p in parameters)  # type: ignore[attr-defined]
