"""The scale of a LoRA: from its alphas, from PEFT's configuration or from the file's metadata."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import LoraError
from ..untrusted import read_json

PEFT_CONFIG = "adapter_config.json"
LARGEST = 1e18
"""Of a scale, and of a strength: their product is still a float32."""
_TYPES = ("LORA", "LOHA", "LOKR")
# Options with effects that the tensors alone do not show: without them, pictures would come out different.
_REFUSED = {
    "fan_in_fan_out": "transposed layers, which HunyuanDiT does not have",
    "layer_replication": "layers that are repeated, which is another model",
    "use_bdlora": "factors in blocks, which are not supported",
    "use_qalora": "factors of groups of columns, which are not supported",
}
_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LITERAL = re.compile(r"(\^?)((?:[A-Za-z0-9_.-]|\\[^A-Za-z0-9\s])*)\$?", re.ASCII)


@dataclass(frozen=True)
class PeftConfig:
    """What PEFT's ``adapter_config.json`` says about the scale.

    Attributes:
        rank, alpha: of modules that no pattern names; None if not given.
        ranks, alphas: of the other modules, by name or end of a name.
        whole: besides the factors there are weights or biases that replace the base's.
    """

    rank: float | None = None
    alpha: float | None = None
    rslora: bool = False
    ranks: Mapping[str, float] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    whole: bool = False

    def of(self, module: str, rank: int) -> float:
        """The scale of a module with factors of this rank."""
        alpha = _matching(self.alphas, module, rank if self.alpha is None else self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def without_factors(self, module: str) -> float:
        """The scale of a Kronecker product of two whole matrices: PEFT uses the configured rank."""
        rank = _matching(self.ranks, module, 1.0 if self.rank is None else self.rank)
        return _matching(self.alphas, module, rank if self.alpha is None else self.alpha) / rank


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first name that is the module's or, without ``^``, its end after a dot."""
    for name, value in patterns.items():
        if module == name.removeprefix("^") or module.endswith(f".{name}"):
            return value
    return default


def read_peft_config(path: Path) -> PeftConfig | None:
    """The configuration in a PEFT folder, or next to a file; None if there is none.

    Raises:
        LoraError: if it is damaged, or asks for something that the tensors alone do not show.
    """
    file = (path if path.is_dir() else path.parent) / PEFT_CONFIG
    if not file.is_file():
        return None
    config: dict[str, Any] = read_json(file, error=LoraError)
    kind = config.get("peft_type", "LORA")
    if kind not in _TYPES:
        raise LoraError(f"{file} is of peft's {kind}; LORA, LOHA and LOKR can be read")
    for name, what in _REFUSED.items():
        if config.get(name):
            raise LoraError(f"{file}: {name} is of {what}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_INIT):
        raise LoraError(
            f"{file}: a LoRA that began as {init} goes with a changed base; save it with peft's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    return PeftConfig(
        rank=_number(file, config, "r", above=0),
        alpha=_number(file, config, "lora_alpha" if kind == "LORA" else "alpha"),
        rslora=config.get("use_rslora") is True,
        ranks=_patterns(file, config, "rank_pattern", above=0) if kind == "LOKR" else {},
        alphas=_patterns(file, config, "alpha_pattern"),
        whole=bool(config.get("modules_to_save")) or config.get("bias") in ("all", "lora_only"),
    )


def _number(file: Path, values: Mapping[str, Any], name: str, above: float = -math.inf) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise LoraError(f"{file}: {name} is {value!r}; expected a number")
    if value <= above:
        raise LoraError(f"{file}: {name} is {value!r}; expected more than {above:g}")
    return float(value)


def _patterns(file: Path, config: Mapping[str, Any], key: str, above: float = -math.inf) -> dict[str, float]:
    """Names with their numbers. To PEFT they are regular expressions; those of a file are never run."""
    given = config.get(key)
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise LoraError(f"{file}: {key} is a {type(given).__name__}; expected names with numbers")
    found: dict[str, float] = {}
    for pattern in given:
        literal = _LITERAL.fullmatch(pattern)
        if literal is None:
            odd = dict.fromkeys(re.sub(r"[A-Za-z0-9_.^$-]|\\[^A-Za-z0-9\s]", "", pattern))
            raise LoraError(
                f"{file}: {key} {pattern[:80]!r} has {' '.join(odd)[:40] or '^ or $ inside'}: regular "
                "expressions of a file are not run; write the names of the modules, or their ends"
            )
        value = _number(file, given, pattern, above)
        if value is None:
            raise LoraError(f"{file}: {key} {pattern[:80]!r} is null; expected a number")
        found.setdefault(literal[1] + re.sub(r"\\(.)", r"\1", literal[2]), value)
    return found


@dataclass(frozen=True)
class Scaling:
    """Where the scale of a module comes from: its ``.alpha``, PEFT's configuration, the file's metadata."""

    config: PeftConfig | None
    metadata: Mapping[str, str]
    gui: bool

    def of(self, module: str, rank: int, alpha: Tensor | None) -> float:
        """The scale of a module with factors of a rank; 1 without factors."""
        if rank == 0:
            return 1.0
        if alpha is not None:
            # ComfyUI's rule for all files: what a trainer means by .alpha is alpha / rank.
            return float(alpha.item()) / rank
        if self.config is not None:
            return self.config.of(module, rank)
        if (value := _metadata_alpha(self.metadata)) is not None:
            return value / rank
        # Tencent's interface divides by the square root where no alpha is given, all others by nothing.
        return 1 / math.sqrt(rank) if self.gui else 1.0


def _metadata_alpha(metadata: Mapping[str, str]) -> float | None:
    for key in ("ss_network_alpha", "lora_alpha"):
        try:
            value = float(metadata[key])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            return value
    return None
