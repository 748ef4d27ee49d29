"""From a checked configuration to a running training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from ..data.cache.latents import cache_folder
from ..data.dataset import TrainData, open_dataset
from ..data.mapped import MappedManifest
from ..data.prepared import (
    FEW,
    find_prepared,
    gather_few,
    open_many,
    prepared_layout,
    unchanged,
)
from ..errors import ConfigError
from ..model.compiled import compile_networks
from . import checkpoint as checkpoints
from . import distributed, lock, saving
from .caches import prepare_data, progress_of, require_caches
from .checks import check_machine
from .conditioning import caption_fits
from .config import TrainConfig
from .distributed import Processes
from .loop import Trainer
from .memory import largest, of_run
from .networks import ModelParts
from .objectives.table import export_names, make_objective, objective_of
from .parallel.choice import Kind
from .parallel.choice import make as make_parallel
from .parallel.copies import Copies
from .parallel.fit import memory_of, plan
from .parts import build
from .posterior import Choice, choose
from .prior_pictures import with_prior_pictures
from .restoring import picture_stamps, require_same_data, restore, shared_checkpoint
from .stopping import cause_of, ending_at_once, tell


def train(config: TrainConfig, *, resume: str | None = None, stop_after_micro: int | None = None) -> bool:
    """Run or continue a training; True when it reached its last step, False when it was interrupted.

    ``resume`` is a run's folder, a checkpoint's folder, or "auto": ``run.output_dir`` if it holds a
    checkpoint, else a fresh start.
    """
    run = config.run
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    if run.device != "cpu":
        torch.set_float32_matmul_precision("high")
    check_machine(config)
    with ending_at_once() as over, processes_of(config) as processes, ExitStack() as held:
        held.callback(over.set)
        processes.from_main(partial(_claim, config, resume, held))
        say = tell if processes.is_main else _silent
        config = with_prior_pictures(config, processes)
        data = open_together(config, processes)
        require_same_data(data.fingerprint(), processes)
        parts = build(config, deferred=processes.world > 1 and run.parallel != "ddp")
        if processes.is_main:
            for line in data.findings.passed_over.lines():
                say(line if line.startswith(" ") else f"warning: {line}")
            _warn_of_cut_captions(data, parts)
            for line in objective_of(config).warnings(config, data.captions):
                tell(f"warning: {line}")
        prepare_data(config, data, parts, processes)
        config = with_posterior(config, data, parts, processes, say)
        parallel = _parallel(config, data, parts, processes, say)
        parts.split = parallel.sharded
        if parts.deferred and not parts.split:
            parts.read()
        objective = make_objective(config, parts, processes.device)
        objective.use_checkpointing(float(run.gradient_checkpointing))
        if run.compile:
            compile_networks(objective.module)
        trainer = Trainer(config, objective, data, processes, parallel)
        if processes.is_main:
            trainer.pictures = picture_stamps(data)
        if resume is not None:
            _resume(trainer, run.output_dir if resume == "auto" else Path(resume), resume == "auto", say)
        return trainer.run(stop_after_micro=stop_after_micro)


def _parallel(
    config: TrainConfig,
    data: TrainData,
    parts: ModelParts,
    processes: Processes,
    say: Callable[[str], None],
) -> Copies:
    """How the processes share the model; where ``run.parallel`` leaves that open, the first one decides."""
    kind: Kind = "ddp" if config.run.parallel == "auto" else config.run.parallel
    if config.run.parallel == "auto" and processes.world > 1:

        def decide() -> tuple[Kind, str]:
            need = partial(of_run, config, parts.dit, parts.text, largest(data.sizes))
            chosen = plan(config, processes.world, memory_of(processes.device), need)
            return chosen.kind, "" if chosen.kind == "ddp" and chosen.fits else chosen.line()

        kind, line = processes.from_main(decide)
        if line:
            say(line)
    return make_parallel(config.run, kind, processes)


@contextmanager
def processes_of(config: TrainConfig) -> Iterator[Processes]:
    """This process and those that run beside it, which are told if it fails."""
    processes = distributed.start(config.run.device, config.run.answer_within)
    try:
        yield processes
    except Exception as error:
        processes.fail(cause_of(error))
        raise
    finally:
        processes.close()


def open_data(config: TrainConfig) -> TrainData:
    """The data of one process; nothing is written. What is prepared and did not change is mapped."""
    run, data = config.run, config.data
    found = find_prepared(data)
    if found is None or len(found) <= FEW or not unchanged(data, found):
        return open_dataset(data, seed=run.seed, batch_size=run.batch_size)
    return TrainData(data, found, found.findings, seed=run.seed, batch_size=run.batch_size)


def open_together(config: TrainConfig, processes: Processes) -> TrainData:
    """The data of this process among all of them.

    What is small, each gathers for itself. What is large, one process of each machine prepares, unless that
    has been done, and all map it.
    """
    run, data = config.run, config.data

    def is_large() -> bool:
        found = find_prepared(data)
        return found is not None and len(found) > FEW

    few = None if processes.from_main(is_large) else gather_few(data)
    processes.barrier()
    layout = None
    if processes.any(few is None) or few is None:
        mapped = _map_together(config, processes)
        few, layout = (mapped, mapped.findings), prepared_layout(data, mapped)
    return TrainData(
        data,
        *few,
        seed=run.seed,
        batch_size=run.batch_size,
        world_size=processes.world,
        rank=processes.rank,
        layout=layout,
    )


def _map_together(config: TrainConfig, processes: Processes) -> MappedManifest:
    """The first process prepares what all map, then one of each other machine, if it sees another disk."""
    data = config.data
    mapped: MappedManifest | None = None
    for is_now in (processes.is_main, processes.first_here):
        if is_now and mapped is None:
            with progress_of("preparing", processes) as progress:
                say = tell if processes.is_main else _silent
                mapped = open_many(data, lambda rows: progress(rows, rows), say)
            prepared_layout(data, mapped)
        processes.barrier()
    return mapped or find_prepared(data) or open_many(data)


def with_posterior(
    config: TrainConfig,
    data: TrainData,
    parts: ModelParts,
    processes: Processes,
    say: Callable[[str], None],
) -> TrainConfig:
    """``config`` with ``data.posterior`` decided, for the loop and for what the exported file says."""
    if config.data.posterior == "auto" and not config.data.cache.latents:
        parts.vae.to(processes.device)
    choice = Choice(*processes.from_main(lambda: (*choose(config, parts.info, data, parts.vae),)))
    say(choice.line)
    parts.info = dataclasses.replace(parts.info, posterior=choice.kind)
    return config.model_copy(update={"data": config.data.model_copy(update={"posterior": choice.kind})})


def _warn_of_cut_captions(data: TrainData, parts: ModelParts) -> None:
    """Tell of captions whose ends are cut off, as far as the first ones show."""
    for fit in caption_fits(islice(data.captions(), 10_000), parts.text.tokenizers):
        if fit.cut:
            tell(
                f"warning: {fit.cut} of {fit.captions} captions are longer than the {fit.limit} tokens that "
                f"{fit.encoder} takes; their ends are not trained, for example of: {fit.example[:120]!r}"
            )


def build_caches(config: TrainConfig) -> None:
    """Encode everything that the configuration wants cached, without training."""
    require_caches(config)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    check_machine(config)
    with ending_at_once(), processes_of(config) as processes:
        data = open_together(config, processes)
        prepare_data(config, data, build(config), processes)
    if processes.is_main:
        tell(f"the caches of {len(data.manifest)} pictures are complete, in {cache_folder(config.data)}")


def held_run(folder: Path) -> str | None:
    """The name of what an earlier run left in ``folder``: its newest checkpoint, or else its export."""
    return saving.held_run(folder, export_names())


def _claim(config: TrainConfig, resume: str | None, held: ExitStack) -> None:
    """Take the run's folder for this run, until ``held`` is closed.

    Raises :class:`ConfigError` if it is another run's, at this moment or for good, or cannot be written to.
    """
    folder = config.run.output_dir
    if name := lock.holder(folder):
        raise ConfigError(lock.in_use(folder, name))
    _require_own(folder, resume)
    try:
        made = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.touch()
        probe.unlink(missing_ok=True)  # another training that begins may have been faster
        held.enter_context(lock.hold(folder))
        held.callback(_take_back, made)
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {folder}: {error.strerror}") from error
    _require_own(folder, resume)  # another run may have begun and ended in between


def _take_back(made: list[Path]) -> None:
    """Remove the folders made for a run, the innermost first, that was refused before it kept anything."""
    with suppress(OSError):  # Windows removes no file that is open
        if made and os.listdir(made[0]) == [lock.FILE]:
            (made[0] / lock.FILE).unlink()
            for folder in made:
                folder.rmdir()


def _require_own(folder: Path, resume: str | None) -> None:
    found = held_run(folder)
    continuable = found is not None and not found.endswith(".safetensors")
    if resume is None or resume == "auto":
        own = resume == "auto" and continuable
    else:
        own = Path(resume).resolve().is_relative_to(folder.resolve())
    if not own and found:
        raise ConfigError(
            f"{folder} already holds a run ({found}): "
            + ("continue it with --resume auto, or " if continuable else "")
            + "choose another run.output_dir"
        )


def _resume(trainer: Trainer, where: Path, may_be_new: bool, say: Callable[[str], None]) -> None:
    parameters = trainer.objective.parameters()
    found = shared_checkpoint(where, trainer.processes, say, parameters, trainer.parallel)
    if found is None:
        if not may_be_new:
            raise ConfigError(
                f"--resume {where}: no checkpoint there; give the folder of a run, or 'auto' to start afresh "
                "when there is none"
            )
        say("no checkpoint yet: starting from step 0")
        return
    for line in restore(trainer, found):
        say(f"changed since the checkpoint: {line}")
    trainer.processes.barrier()  # all have read theirs
    own = trainer.folder.resolve() / "checkpoints"
    if trainer.processes.is_main and found.path is not None and found.path.resolve().parent == own:
        for path in checkpoints.set_aside_newer(found.path.resolve()):
            say(f"newer than the checkpoint that is continued, so set aside: {path}")
    micro = f", micro-batch {found.progress.micro}" if found.progress.micro else ""
    if found.progress.step >= trainer.config.run.steps:
        steps = trainer.config.run.steps
        say(f"all {steps} steps are done: the model is exported; raise run.steps to train on")
    say(f"continuing from {found.path}: step {found.progress.step}{micro}")


def _silent(text: str) -> None:
    pass
