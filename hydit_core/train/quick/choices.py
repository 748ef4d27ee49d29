"""The rules: what each key of the configuration is set to, and why.

benchmarks/quick.py compares them with settings by hand.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...facts import ModelInfo
from ...model.config import DiTConfig
from .survey import Survey, common_caption, mixed_shapes
from .wish import Wish

FILE = "quick.toml"
_BATCH = 4
_MEASURES = 24
"""So many noisy pictures a validation looks at, at least."""
_EVERY = 15
"""No validation before so many more steps: it takes as long as several of them."""
_PATIENCE = 3
_HALF = 0.5
"""Less of a validation: epochs are counted with the base's own pictures, whose number is rounded."""
_FEW = 5
_EPOCHS = {"subject": 60, "style": 35, "concept": 35}
"""How often each picture is shown at most; the steps of a run that no validation can end are half of it."""
_STEPS = (80, 3000)
_RATE, _WIDTH, _FALL = 5e-4, 1408, 1.25
"""A learning rate for DiT-g/2, 1408 wide with 40 blocks, and how it falls with the width of models.

So that it is 6e-3 for 192 with 6 blocks, with which the runs in examples/quick come to their best soon.
"""
_IMPROVEMENT = 0.025
KNOWN = ("a cat", "a red apple", "a house", "一棵树", "a blue car", "the sun")
"""What every model can draw."""
KEPT = (
    "a dog", "a flower", "a boat", "a bird", "a fish", "a star", "a yellow banana", "a bicycle", "a clock",
    "a green leaf", "一只兔子", "一把伞",
)  # fmt: skip
"""The same, and none of :data:`KNOWN`: they are to keep the rest, too, from being forgotten."""
_KEPT_SHARE = 0.25
"""Known things are then forgotten a fifth as much, and the subject is learned as well (docs/training.md)."""


@dataclass(frozen=True)
class Choice:
    """One key of a configuration, and why it has this value; without a reason, it follows from another."""

    table: str
    key: str
    value: Any
    reason: str = ""


@dataclass(frozen=True)
class Base:
    """The model that a LoRA is for."""

    path: Path
    dit: DiTConfig
    info: ModelInfo

    @property
    def side(self) -> int:
        """That of a square with as many pixels as it draws by default, in steps of 16."""
        defaults = self.info.defaults
        return max(16, round(math.sqrt(defaults.width * defaults.height) / 16) * 16)


@dataclass(frozen=True)
class Fit:
    """How a step fits into memory."""

    batch: int
    accumulation: int
    precision: str
    checkpointing: bool
    base_precision: str | None
    reason: str


def held_out(pictures: int) -> int:
    """How many pictures are kept from training: none of few, else a tenth, at least one, at most 16."""
    return 0 if pictures < _FEW else min(16, max(1, pictures // 10))


def batch_size(pictures: int) -> int:
    return max(1, min(_BATCH, pictures - held_out(pictures)))


def steps_of(wish: Wish, pictures: int) -> tuple[int, str]:
    """The most steps of a run, with the reason."""
    trained, batch = pictures - held_out(pictures), batch_size(pictures)
    if wish.steps is not None:
        return wish.steps, "as asked for"
    epochs = _EPOCHS[wish.kind]
    if not held_out(pictures):
        steps = min(_STEPS[1], max(_STEPS[0], math.ceil(epochs / 2 * trained / batch)))
        return steps, (
            f"a fixed rule, since of fewer than {_FEW} pictures none is kept to say when it is enough: "
            f"each is shown {round(steps * shown(wish, pictures))} times, in at least {_STEPS[0]} steps"
        )
    steps = min(_STEPS[1], max(_STEPS[0], math.ceil(epochs * trained / batch)))
    return steps, f"at most; each picture would be shown {round(steps * shown(wish, pictures))} times"


def keeps(wish: Wish) -> bool:
    """Whether the base's own pictures are mixed in; not where a style is to change whatever is drawn."""
    return bool(wish.trigger) or wish.kind != "style"


def shown(wish: Wish, pictures: int) -> float:
    """How often a step shows each picture that is trained, on average."""
    share = _KEPT_SHARE if keeps(wish) else 0.0
    return batch_size(pictures) * (1 - share) / (pictures - held_out(pictures))


def validation_every(steps: int) -> int:
    return max(_EVERY, round(steps / 10 / 5) * 5)


def model_choices(base: Base) -> Iterator[Choice]:
    yield Choice("model", "init_from", str(base.path), "stays as it is")


def data_choices(wish: Wish, found: Survey, base: Base) -> Iterator[Choice]:
    """Of the tables data, data.sources, data.buckets and data.cache."""
    side = base.side
    yield Choice("data", "resolution", side, "as the model draws by default")
    if mixed_shapes(found.sizes):
        step = max(16, side // 16 // 16 * 16)
        yield Choice("data.buckets", "enabled", True, "the pictures have several shapes, or none is square")
        yield Choice("data.buckets", "step", step)
    if kept := held_out(len(found)):
        yield Choice("data", "validation", kept, "not trained: they say when it is enough")
    if found.unreadable:
        yield Choice("data", "on_unreadable", "skip", f"{found.unreadable} pictures cannot be read")
    yield Choice("[data.sources]", "path", str(wish.pictures.resolve()))
    yield Choice("[data.sources]", "kind", "folder")
    if found.caption_lines:
        yield Choice("[data.sources]", "caption_lines", True, "every .txt has several: each is a caption")
    if found.uncaptioned:
        whose = "no picture has" if not found.captions else f"for the {found.uncaptioned} pictures without"
        reason = f"{whose} a caption of its own (a .txt of the same name)"
        yield Choice("[data.sources]", "caption", common_caption(wish), reason)
    if wish.trigger:
        reason = "put before captions without it" if found.without_trigger else "in all captions"
        yield Choice("[data.sources]", "trigger", wish.trigger, reason)
    if keeps(wish):
        reason = "of each step: pictures that the base draws first, so that it forgets little of the rest"
        yield Choice("data.prior", "share", _KEPT_SHARE, reason)
        yield Choice("data.prior", "prompts", list(KEPT))
    yield Choice("data.cache", "latents", True, "each picture is encoded once")
    yield Choice("data.cache", "text", True, "so the text encoders take no memory while training")
    yield Choice("data.cache", "dir", "cache", "can be deleted afterwards")


def training_choices(wish: Wish, found: Survey, base: Base) -> Iterator[Choice]:
    """Of the tables objective, lora, optimizer, ema."""
    yield Choice("objective", "kind", "lora")
    yield Choice("objective", "timesteps", "stratified", "all noise levels in each step, so fewer are needed")
    yield Choice("objective", "dropout_joint", 0.1, "so that guidance goes on working")
    rank = rank_of(wish, base)
    yield Choice("lora", "rank", rank, _RANKS[wish.kind][1])
    yield Choice("lora", "targets", "attention+mlp", "learns more than attention alone, for little memory")
    if wish.trigger:
        yield Choice("lora", "trigger", wish.trigger, "for the exported file")
    yield from optimizer_choices(base, steps_of(wish, len(found))[0])


_RANKS = {
    "subject": (16, "enough for one subject; a larger one learns the backgrounds too"),
    "style": (32, "a style changes everything, and needs more room than a subject"),
    "concept": (16, "enough for one concept"),
}


def rank_of(wish: Wish, base: Base) -> int:
    """As the kind wants it; of a narrow model at most a tenth of its width, rounded to a power of two."""
    return min(_RANKS[wish.kind][0], 2 ** round(math.log2(max(4, base.dit.hidden_size / 10))))


def optimizer_choices(base: Base, steps: int) -> Iterator[Choice]:
    rate = float(f"{_RATE * (_WIDTH / base.dit.hidden_size) ** _FALL:.1g}")
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        yield Choice("optimizer", "name", "prodigy", "finds the learning rate by itself")
        yield Choice("optimizer", "args", {"d0": rate}, "where it begins to look, by the model's width")
        yield Choice("schedule", "kind", "constant")
    else:
        reason = (
            f"AdamW's, by the model's width of {base.dit.hidden_size}; for one that finds it itself: "
            "pip install pytorch-optimizer"
        )
        yield Choice("optimizer", "lr", rate, reason)
        yield Choice("schedule", "warmup_steps", min(10, steps // 4))
    yield Choice("ema", "decay", 0.98, "averages take the place of a falling learning rate")


def run_choices(wish: Wish, found: Survey, fit: Fit) -> Iterator[Choice]:
    """Of the tables run, validation and checkpoint."""
    steps, why = steps_of(wish, len(found))
    yield Choice("run", "output_dir", ".", "this file's folder")
    yield Choice("run", "steps", steps, why)
    if wish.minutes is not None:
        yield Choice("run", "minutes", wish.minutes, "as asked for")
    yield Choice("run", "batch_size", fit.batch, fit.reason)
    if fit.accumulation > 1:
        yield Choice(
            "run", "grad_accumulation", fit.accumulation, "so a step sees as many as with more memory"
        )
    yield Choice("run", "precision", fit.precision)
    if fit.checkpointing:
        yield Choice("run", "gradient_checkpointing", True, "slower by a third, for a fraction of the memory")
    if fit.base_precision is not None:
        yield Choice("lora", "base_precision", fit.base_precision, "the only way to fit")
    yield Choice("run", "device", wish.device)
    kept, every = held_out(len(found)), validation_every(steps)
    if kept:
        draws = math.ceil(_MEASURES / kept)
        yield Choice("validation", "every", every)
        yield Choice("validation", "draws", draws, "noise levels of each: at one, few pictures say little")
        epochs = shown(wish, len(found))
        yield Choice(
            "validation",
            "patience",
            round((_PATIENCE - _HALF) * every * epochs, 2),
            "epochs, which are three validations: then it only learns the pictures by heart",
        )
        yield Choice("validation", "min_improvement", _IMPROVEMENT, "less is chance, and not waited for")
        yield Choice("validation", "min_epochs", round(steps / 4 * epochs, 2))
        reason = "the model draws these at the start: their loss grows as far as it forgets them"
        yield Choice("validation", "prior", list(KNOWN), reason)
        yield Choice("checkpoint", "keep_best", True, "best.safetensors is the one to use")
    yield Choice("checkpoint", "every", max(every, 10))
    yield Choice("checkpoint", "keep_last", 1)


def sample_choices(wish: Wish, found: Survey, base: Base) -> Iterator[Choice]:
    steps, _ = steps_of(wish, len(found))
    yield Choice("samples", "every", max(1, math.ceil(steps / 4)))
    yield Choice("samples", "prompts", sample_prompts(wish, found), "see RUN/samples")
    yield Choice("samples", "seed", 1)


def sample_prompts(wish: Wish, found: Survey) -> list[str]:
    """Two captions as they are trained."""
    texts = list(found.captions[: 1 if found.uncaptioned else 2])
    if found.uncaptioned:
        texts.append(common_caption(wish))
    lacks = wish.trigger and (lambda text: wish.trigger.casefold() not in text.casefold())
    return [f"{wish.trigger}, {text}" if lacks and lacks(text) else text for text in texts]
