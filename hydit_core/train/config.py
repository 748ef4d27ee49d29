"""The training configuration: one TOML file, checked completely before any model is loaded.

Unknown keys are refused with the nearest known name. Relative paths in the file are relative to the
file's own folder; relative paths given by ``--set`` are relative to the current folder.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError, create_model, field_validator, model_validator

from ..data.remote import is_url
from ..data.section import leaves
from ..errors import ConfigError
from ..untrusted import parse_toml, read_toml
from .objectives.table import OBJECTIVES, objective_of
from .optimizer_kinds import KINDS, Kind, with_one_average
from .other_names import HINTS
from .sections import ObjectiveSection, TrainSections


class KnownObjective(ObjectiveSection):
    """The table ``objective``, with a ``kind`` that exists."""

    @field_validator("kind")
    @classmethod
    def _in_the_table(cls, kind: str) -> str:
        if kind not in OBJECTIVES:
            raise ValueError(f"unknown objective: use one of {', '.join(OBJECTIVES)}")
        return kind


_own: dict[str, Any] = {
    name: (objective.section, objective.section())
    for name, objective in OBJECTIVES.items()
    if objective.section is not None
}
_OwnTables = create_model("_OwnTables", __base__=TrainSections, **_own)


class TrainConfig(_OwnTables, TrainSections):  # type: ignore[valid-type,misc]
    """The whole training configuration: the objectives' own tables too, and whether all of them agree."""

    objective: KnownObjective = KnownObjective()

    @model_validator(mode="before")
    @classmethod
    def _one_average(cls, raw: Any) -> Any:
        return with_one_average(raw)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.samples.every and not self.samples.prompts:
            raise ValueError("samples.every is set but samples.prompts is empty")
        apart = [source for source in self.data.sources if source.validation]
        if self.validation.every and not (self.data.validation or apart or self.validation.prior):
            raise ValueError(
                "validation.every is set but data.validation holds out no pictures: say how many, "
                "for example data.validation = 16"
            )
        if self.data.cache.text and (option := objective_of(self).text_option(self)):
            raise ValueError(
                f"data.cache.text keeps the outputs of the text encoders, but {option} "
                "changes them at every step: turn one of the two off"
            )
        if self.validation.prior and not self.validation.every:
            raise ValueError("validation.prior is measured with the validation loss: set validation.every")
        if self.validation.prior and self.model.init_from is None:
            raise ValueError("validation.prior is drawn by the base, and model.from_scratch has none")
        if self.data.prior.prompts and self.model.init_from is None:
            raise ValueError("data.prior.prompts are drawn by the base, and model.from_scratch has none")
        if self.checkpoint.keep_best and not self.validation.every:
            raise ValueError("checkpoint.keep_best goes by the validation loss: set validation.every")
        if self.checkpoint.keep_best and not (self.data.validation or any(not s.prior for s in apart)):
            raise ValueError(
                "checkpoint.keep_best goes by pictures of what is learned, and only prior ones are held out: "
                "set data.validation"
            )
        if self.validation.patience and not self.checkpoint.keep_best:
            raise ValueError("validation.patience keeps the best of the run: set checkpoint.keep_best = true")
        self._check_objectives()
        self._check_optimizer()
        if self.schedule.warmup_steps > self.run.steps:
            raise ValueError("schedule.warmup_steps is larger than run.steps")
        return self

    def _check_objectives(self) -> None:
        chosen = objective_of(self)
        for name, objective in OBJECTIVES.items():
            if name == self.objective.kind:
                chosen.check(self)
                continue
            changed = objective.section is not None and self.own_table(name) != objective.section()
            if changed and name not in chosen.shares:
                raise ValueError(f"the table {name} needs objective.kind = {name!r}")
            objective.check_unused(self)

    def _check_optimizer(self) -> None:
        name, kind = self.optimizer.name, KINDS[self.optimizer.name]
        if self.run.parallel in ("fsdp", "hsdp") and not kind.splits:
            able = ", ".join(other for other, entry in KINDS.items() if entry.splits)
            raise ValueError(
                f"optimizer.name = {name!r} looks at whole tensors, run.parallel = {self.run.parallel!r} "
                f"splits them: use one of {able}, or run.parallel = 'ddp'"
            )
        if self.run.weights == "bf16":
            self._check_bf16_weights(kind)
        if self.run.parallel_replicas is not None and self.run.parallel != "hsdp":
            raise ValueError("run.parallel_replicas needs run.parallel = 'hsdp'")
        if self.run.parallel_offload and self.run.parallel not in ("fsdp", "hsdp"):
            raise ValueError("run.parallel_offload needs run.parallel = 'fsdp' or 'hsdp'")
        if self.optimizer.args and not kind.library:
            raise ValueError(f"optimizer.args is for optimizers of libraries; {name} has keys of its own")
        if kind.averages and self.ema.enabled:
            raise ValueError(
                f"optimizer.name = {name!r} averages the weights itself: leave ema.enabled out or set it to "
                "false"
            )
        if kind.averages and self.schedule.kind != "constant":
            raise ValueError(
                f"optimizer.name = {name!r} takes the place of a schedule: leave schedule.kind out, or set "
                "it to 'constant' (a warm-up is fine)"
            )
        if self.optimizer.loraplus_lr_ratio != 1 and (kind.one_rate or name == "muon"):
            why = "finds one learning rate" if kind.one_rate else "makes all steps of one size"
            raise ValueError(
                f"optimizer.loraplus_lr_ratio: {name} {why} for all matrices: leave the ratio out, or use "
                "another optimizer"
            )
        if kind.one_rate and any(g.lr_scale != 1 and not g.freeze for g in self.optimizer.groups):
            raise ValueError(
                f"optimizer.name = {name!r} finds one learning rate for all parameters: leave lr_scale out "
                "of optimizer.groups"
            )

    def _check_bf16_weights(self, kind: Kind) -> None:
        if not kind.rounds:
            able = " or ".join(repr(name) for name, entry in KINDS.items() if entry.rounds)
            raise ValueError(
                f"run.weights = 'bf16' needs an optimizer that rounds its updates at random, "
                f"optimizer.name = {able}: with {self.optimizer.name!r} small updates would be lost"
            )
        if self.run.precision != "bf16":
            raise ValueError("run.weights = 'bf16' is computed with in bf16: set run.precision = 'bf16', too")
        if self.run.parallel in ("fsdp", "hsdp"):
            raise ValueError(
                f"run.weights = 'bf16': run.parallel = {self.run.parallel!r} splits parameters of one dtype "
                "only: use run.parallel = 'ddp', or leave run.weights out"
            )


def load_config(path: Path, overrides: list[str] | None = None) -> TrainConfig:
    """Read and check a TOML file; ``overrides`` are ``dotted.key=value`` with TOML values.

    Raises :class:`ConfigError` with every fault found, each with its dotted path.
    """
    raw = read_toml(path)
    for override in overrides or []:
        _apply(raw, override)
    return checked(raw, path)


def checked(raw: dict[str, Any], path: Path) -> TrainConfig:
    """What the content of the TOML file ``path`` means, whether or not it is written yet.

    Raises :class:`ConfigError` as :func:`load_config`.
    """
    base = path.resolve().parent
    try:
        config = TrainConfig.model_validate(raw, context={"base": base})
    except ValidationError as error:
        raise ConfigError(f"{path}:", *map(_explain, _faults(error))) from None
    return config.model_copy(update={"data": config.data.resolved(base)})


def _apply(raw: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"--set {override}: expected key=value, for example run.steps=500")
    try:
        value = parse_toml(f"value = {text}", "--set")["value"]
    except ConfigError:
        value = text
    *parents, last = key.strip().split(".")
    table = raw
    for name in parents:
        child = table.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {name} is not a table")
        table = child
    table[last] = _from_here(value, parents, last)


def _from_here(value: Any, parents: Sequence[str], last: str) -> Any:
    """``value`` with all paths in it, in tables and lists too, made to start at the current folder."""
    if isinstance(value, dict):
        return {key: _from_here(inner, [*parents, last], key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_from_here(inner, parents, last) for inner in value]
    if isinstance(value, str) and value and not is_url(value) and _is_path(parents, last):
        return str(Path.cwd() / Path(value).expanduser())
    return value


# In the words of TOML, not of Python.
_WORDS = {
    "missing": "is needed and not there",
    "model_type": "expected a table",
    "dict_type": "expected a table",
    "tuple_type": "expected a list",
}


def _faults(error: ValidationError) -> list[Any]:
    """Leave out faults that only follow from others: a list whose entries are wrong is not also too short."""
    found = error.errors()
    inside = {one["loc"][:-n] for one in found for n in range(1, len(one["loc"]))}
    return [one for one in found if one["type"] != "too_short" or one["loc"] not in inside]


def _explain(error: Any) -> str:
    loc = [part for part in error["loc"] if part not in ("table", "path") or part is error["loc"][-1]]
    dotted = ".".join(str(part) for part in loc) or "(whole file)"
    if error["type"] == "extra_forbidden":
        return f"  {dotted}: unknown key; {_hint(loc)}"
    message = _WORDS.get(error["type"]) or error["msg"].removeprefix("Value error, ")
    if error["type"] == "too_short":
        message = f"expected at least {error['ctx']['min_length']} in the list"
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"  {dotted}: {message}{shown}"


def _hint(loc: Sequence[Any]) -> str:
    """What may be meant by a key that does not exist."""
    key, known = str(loc[-1]), _known_keys(loc[:-1])
    if key in HINTS:
        return HINTS[key]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    elsewhere = [table for table in TrainConfig.model_fields if key in _known_keys([table])]
    if len(elsewhere) == 1 and not difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return f"it belongs to the table {elsewhere[0]}"
    return f"did you mean {near[0]}?" if near else "known here: " + ", ".join(sorted(known))


def _section_at(loc: Sequence[Any]) -> type[BaseModel] | None:
    section: type[BaseModel] | None = TrainConfig
    for part in loc:
        if isinstance(part, int):
            continue
        field = None if section is None else section.model_fields.get(str(part))
        inside = [] if field is None else leaves(field.annotation)
        section = next((leaf for leaf in inside if issubclass(leaf, BaseModel)), None)
    return section


def _known_keys(loc: Sequence[Any]) -> list[str]:
    section = _section_at(loc)
    return [] if section is None else list(section.model_fields)


def _is_path(parents: Sequence[str], last: str) -> bool:
    section = _section_at(parents)
    field = None if section is None else section.model_fields.get(last)
    return field is not None and Path in list(leaves(field.annotation))


def up_to_date(dumped: dict[str, Any]) -> dict[str, Any]:
    """A dumped configuration of an earlier release as this one dumps it: with keys and spellings of today.

    As it is, where it means nothing to this release.
    """
    try:
        config = TrainConfig.model_validate(dumped, context={"base": Path()})
    except (ValidationError, TypeError):
        return dumped
    return config.model_dump(mode="json")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` for each value that differs between two dumped configurations."""
    found: list[str] = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return found
