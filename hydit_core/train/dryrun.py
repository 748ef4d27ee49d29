"""What a run would do, without doing it: nothing is written."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..facts import ModelInfo
from ..lora import reading
from ..model.config import DiTConfig
from ..model.controlnet import ControlNet
from ..model.dit import DiT
from ..weights.frozen import stored_bytes
from ..weights.load import load_dit
from .adapters import adapted_parts, find_targets, parameter_shapes, scale_of, starting_values
from .checks import check_machine, check_parts
from .conditioning import caption_fits
from .config import TrainConfig
from .launch import held_run, open_data
from .memory import estimate, largest
from .objectives import control_parameters
from .optim import parameter_groups
from .parts import described, load_text, open_controlnet, open_vae
from .posterior import choose


def describe(config: TrainConfig) -> Iterator[str]:
    """Lines for the terminal: data, captions, model, schedule, memory.

    Raises :class:`HyditError` for anything that training itself would refuse at its start.
    """
    run = config.run
    check_machine(config)
    data = open_data(config)
    yield "Data"
    yield from (f"  {line}" for line in data.summary().lines())
    dit, info = _shapes(config)
    text, vae = load_text(config, dit.config, like_file=True), open_vae(config)
    check_parts(config, dit.config, text, vae, described(config, info, text, vae))
    yield "Captions"
    for fit in caption_fits(data.captions(), text.tokenizers):
        yield from (f"  {line}" for line in fit.lines())

    kind = config.objective.kind
    if kind == "controlnet":
        if config.objective.controlnet is not None:
            open_controlnet(config.objective.controlnet, dit.config)
        everything: dict[str, torch.Tensor] = dict(control_parameters(ControlNet(dit.config, device="meta")))
    elif kind == "lora":
        parts = adapted_parts(config.lora, dit, text)
        everything = parameter_shapes(find_targets(parts, config.lora), config.lora)
        if (before := config.lora.init_from) is not None:
            starting_values(everything, config.lora, reading.read(before), str(before))
    else:
        everything = {f"dit.{name}": p for name, p in dit.named_parameters()}
    if config.objective.train_text_encoders:
        everything |= {f"text.{name}": p for name, p in text.named_parameters()}
    groups = parameter_groups(everything, config.optimizer)
    trained = {name: everything[name] for group in groups for name in group.names}
    yield "Model"
    origin = f"from {config.model.init_from}" if config.model.init_from else "from scratch"
    shape = dit.config
    yield (
        f"  DiT {shape.version}, {origin}: width {shape.hidden_size}, depth {shape.depth}, "
        f"{_count(dit.parameters()):,} parameters"
    )
    state = "trained too" if config.objective.train_text_encoders else "frozen"
    state += ", with adapters" if config.lora.trains_text else ""
    yield f"  text encoders: {_count(text.parameters()):,} parameters, {state}"
    if kind == "lora":
        yield (
            f"  LoRA of rank {config.lora.rank} on {sum(n.endswith('.lora_A') for n in everything)} layers, "
            f"strength {scale_of(config.lora):g}; the DiT's matrices are stored in {config.base_precision}"
        )
        if config.lora.init_from is not None:
            yield f"  it starts from {config.lora.init_from}"
    if kind == "controlnet":
        start = config.objective.controlnet or "the first half of the DiT, which is frozen"
        yield f"  ControlNet from {start}"
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
    dropped = config.data.cache.text and not config.exports_text
    frozen = 0 if config.objective.train_text_encoders or dropped else _bytes(text, run.precision)
    if kind == "controlnet":
        frozen += _bytes(dit, run.precision)
    elif kind == "lora":
        frozen += stored_bytes(dit, config.base_precision)
    muon = {name for group in groups if group.muon for name in group.names}
    size = largest([data.sizes[i] for i in set(data.bucket_of_row.tolist())])
    yield f"Memory of one process, estimated for batches of {size[0]}x{size[1]}"
    yield from estimate(config, trained, muon, frozen, shape, size).lines()


def _shapes(config: TrainConfig) -> tuple[DiT, ModelInfo]:
    """The DiT without its content: a fresh one on the meta device, or a mapped file, and what that says."""
    if config.model.from_scratch is not None:
        dit = DiT(DiTConfig.from_dict(config.model.from_scratch.model_dump()), device="meta")
        return dit, ModelInfo.published(dit.config.version)
    assert config.model.init_from is not None
    return load_dit(config.model.init_from)  # type: ignore[return-value]


def _count(parameters: object) -> int:
    return sum(p.numel() for p in parameters)  # type: ignore[attr-defined]


def _bytes(module: torch.nn.Module, precision: str) -> int:
    return _count(module.parameters()) * (2 if precision == "bf16" else 4)
