"""The one form that every LoRA file is read into, and what it does to a weight."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LoraError
from ..weights.source import cast
from .patch import Patch

PART_NAMES = {"dit": "the DiT", "bert": "BERT", "t5": "mT5"}
"""What can be adapted, as messages call it."""

PARTS = tuple(PART_NAMES)
"""The first words of modules' keys."""

TRIGGER_KEYS = ("hydit.trigger", "modelspec.trigger_phrase")
"""Metadata with the trigger words: ours, and the metadata standard's."""

PARTIAL_HELP = "accept a LoRA of which more than a tenth is for layers that the model does not have"
"""Of the option, wherever a command has it."""


@dataclass(frozen=True)
class Match:
    """Which modules of an adapter a model has; both in the adapter's order."""

    matched: list[str]
    unmatched: list[str]

    def __str__(self) -> str:
        text = f"{len(self.matched)} of {len(self.matched) + len(self.unmatched)} modules"
        return text + (f", not {_some(self.unmatched)}" if self.unmatched else "")


@dataclass
class Adapter:
    """A LoRA: the changes of each module, by its canonical name behind its part.

    Names: ``dit.blocks.0.attn1.Wqkv`` (Tencent's), ``bert.encoder.layer.0.attention.self.query`` and
    ``t5.encoder.block.0.layer.0.SelfAttention.q`` (transformers').

    Attributes:
        files: the files and folders it was made from, which no output may replace.
    """

    modules: dict[str, list[Patch]]
    name: str = "LoRA"
    format: str = "peft"
    metadata: dict[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def parts(self) -> set[str]:
        """The parts it changes, of ``dit``, ``bert`` and ``t5``."""
        return {key.partition(".")[0] for key in self.modules}

    def part(self, part: str) -> dict[str, list[Patch]]:
        """The changes of one part, by module names without the part."""
        return {key[len(part) + 1 :]: p for key, p in self.modules.items() if key.startswith(part + ".")}

    def patches(self) -> Iterator[Patch]:
        """The changes of all modules."""
        return itertools.chain.from_iterable(self.modules.values())

    def ranks(self) -> list[int]:
        """The ranks that occur, smallest first."""
        return sorted({patch.rank for patch in self.patches() if patch.rank})

    def require_finite(self) -> None:
        """Raise :class:`LoraError` if a number is infinite or NaN, naming the first such module."""
        for module, patches in self.modules.items():
            if count := sum(patch.not_finite() for patch in patches):
                raise LoraError(
                    f"{self.name}: {module} has {count:,} numbers that are not finite; it is damaged"
                )

    def trigger(self) -> str:
        """Its trigger words, from the metadata; empty if there are none."""
        for key in TRIGGER_KEYS:
            if self.metadata.get(key):
                return self.metadata[key]
        return ""

    def describe(self) -> str:
        """One line that says what this is."""
        counts = [(len(self.part(part)), name) for part, name in PART_NAMES.items()]
        kinds = sorted({patch.plain.label for patch in self.patches() if patch.tensors})
        kinds += sorted({patch.label for patch in self.patches() if patch.plain is not patch})
        where = [f"{count} of {name}" for count, name in counts if count]
        if where:
            word = "module" if where[0].startswith("1 ") else "modules"
            where[0] = where[0].replace(" ", f" {word} ", 1)
        ranks = ", ".join(map(str, self.ranks()))
        kind = f"{'+'.join(kinds) or 'bias'}{f' of rank {ranks}' if ranks else ''}"
        return f"{self.format} {kind}: {', '.join(where)}"

    def matched(self, shapes: Mapping[str, Sequence[int]]) -> Match:
        """Which modules are among ``shapes`` (see :func:`module_shapes`), whether they fit or not."""
        found = [key for key in self.modules if key in shapes]
        return Match(found, [key for key in self.modules if key not in shapes])

    def require(self, shapes: Mapping[str, Sequence[int]], *, base: str, partial: bool = False) -> Match:
        """As :meth:`matched`, but what cannot be applied is an error.

        Args:
            shapes: of the weights, by module key.
            base: what the weights are, for the message.
            partial: more than a tenth of the modules that it has for a part of the base may be missing there.

        Raises:
            LoraError: if no module matches, too few do, or one has another size.
        """
        match = self.matched(shapes)
        if not match.matched:
            raise LoraError(
                f"{self.name} ({self.describe()}) has nothing for {base}: none of its modules is there,"
                f" such as {_some(match.unmatched)}"
            )
        if not partial:
            self._check_share(match, {key.partition(".")[0] for key in shapes}, base)
        wrong = [text for key in match.matched if (text := self._misfit(key, shapes[key]))]
        if wrong:
            raise LoraError(
                f"{self.name} ({self.describe()}) is for a model of other dimensions than {base}:"
                f" {len(wrong)} of {len(match.matched)} modules do not fit, such as {wrong[0]}"
            )
        return match

    def _check_share(self, match: Match, parts: set[str], base: str) -> None:
        """Raise if a part of the base lacks too many of the modules that this changes in it."""
        for part in PARTS:
            missing = [key for key in match.unmatched if key.startswith(f"{part}.")]
            addressed = len(missing) + sum(key.startswith(f"{part}.") for key in match.matched)
            if part in parts and len(missing) * 10 > addressed:
                raise LoraError(
                    f"{self.name} ({self.describe()}): {len(missing)} of its {addressed} modules for "
                    f"{PART_NAMES[part]} are not in {base}, such as {_some(missing)}; it seems to be of "
                    "another model. To use the rest of it: --partial, or partial on the node"
                )

    def _misfit(self, key: str, shape: Sequence[int]) -> str:
        out, columns = shape[0], math.prod(shape[1:])
        for patch in self.modules[key]:
            start, stop = patch.span(out)
            if patch.shape is not None and (stop > out or patch.shape != (stop - start, columns)):
                rows = f"rows {start} to {stop} of " if patch.rows else ""
                there = " x ".join(map(str, patch.shape))
                return f"{key}: {there} for {rows}a weight of {' x '.join(map(str, shape))}"
        return ""


def module_shapes(shapes: Mapping[str, Sequence[int]], part: str = "dit") -> dict[str, tuple[int, ...]]:
    """A state dict's shapes by an adapter's module keys: ``mlp_t5.0.weight`` becomes ``dit.mlp_t5.0``.

    Parameters outside of layers (``text_embedding_padding``) keep their names; biases have no key.
    """
    return {
        f"{part}.{name.removesuffix('.weight')}": tuple(shape)
        for name, shape in shapes.items()
        if not name.endswith(".bias")
    }


def changed(
    weight: Tensor, patches: Iterable[Patch], strength: float = 1.0, *, dtype: torch.dtype | None = None
) -> Tensor:
    """A weight with patches at a strength: W + s * delta, in float32, as a new tensor.

    With DoRA the full change is m * (W + delta) / ||W + delta|| - W, of which ``strength`` is taken. The
    result has the weight's device and shape, and its dtype unless another is given; ``weight`` is not
    written to. Several patches are applied one after another: a DoRA normalizes what those before it have
    left.
    """
    result = weight.detach().to(torch.float32, copy=True)
    matrix = result.view(result.shape[0], -1)
    for patch in patches:
        if patch.tensors:
            start, stop = patch.span(len(matrix))
            patch.add_to(matrix[start:stop], strength)
    return cast(result, dtype or weight.dtype)


def changed_bias(bias: Tensor, patches: Iterable[Patch], strength: float = 1.0) -> Tensor:
    """A bias with what patches add to it at a strength, as a new tensor of the same dtype."""
    result = bias.detach().to(torch.float32, copy=True)
    for patch in patches:
        if patch.bias is not None:
            start, stop = patch.span(len(result))
            bias = patch.bias.detach().to(result).reshape(-1)
            change = bias - result[start:stop] if patch.bias_whole else bias
            result[start:stop] += strength * change
    return cast(result, bias.dtype)


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
