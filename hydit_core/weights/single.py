"""Files that hold only one part, under the names that the part has in :class:`~.bundle.Bundle`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import WeightsError
from . import vae_layout
from .detect import expect
from .source import MemorySource, TensorSource
from .views import rename

# What an encoder's file may contain that this model does not use: heads, a decoder, buffers, a tokenizer.
_SURPLUS = {
    "bert": re.compile(
        r"(^|\.)((pooler|cls|classifier|qa_outputs|lm_head|text_projection|visual\w*)\."
        r"|(position_ids|token_type_ids|logit_scale|text_projection|vocab)$)"
    ),
    "t5": re.compile(
        r"(^|\.)((decoder|lm_head|classification_head|qa_outputs|classifier)\."
        r"|(final_logits_bias|logit_scale|spiece_model)$)"
    ),
}


def check_rest(source: TensorSource, part: str, used: Collection[str]) -> None:
    """Check that all tensors of a text encoder's file besides the ``used`` names are known to be unused.

    Raises:
        WeightsError: there are other tensors, which may change what the used ones mean.
    """
    rest = [key for key in source if key not in used and not _SURPLUS[part].search(key)]
    if rest:
        label = {"bert": "BERT", "t5": "mT5's encoder"}[part]
        more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
        raise WeightsError(
            f"{source.path}: {label} has no place for {len(rest)} tensors: {', '.join(rest[:5])}{more}"
        )


def bert_part(source: TensorSource) -> TensorSource:
    """A file with only BERT, under the names of transformers' BertModel.

    Raises:
        WeightsError: if the file is something else.
    """
    prefix = expect(source, "bert").prefix
    wanted = ("embeddings.", "encoder.")  # not the pooler, which this model does not use

    def name(key: str) -> str | None:
        short = key.removeprefix(prefix)
        inside = key.startswith(prefix) and short.startswith(wanted)
        return short if inside and not short.endswith("position_ids") else None

    check_rest(source, "bert", {key for key in source if name(key)})
    return rename(source, name)


def mt5_part(source: TensorSource) -> TensorSource:
    """A file with only mT5, under the names of transformers' MT5EncoderModel, with its embedding once.

    Raises:
        WeightsError: if the file is something else.
    """
    prefix = expect(source, "t5").prefix
    embedding, copy = f"{prefix}shared.weight", f"{prefix}encoder.embed_tokens.weight"

    def name(key: str) -> str | None:
        if key == copy:
            return None if embedding in source else "shared.weight"
        short = key.removeprefix(prefix)
        return short if key.startswith(prefix) and short.startswith(("shared.", "encoder.")) else None

    check_rest(source, "t5", {copy, *(key for key in source if name(key))})
    return rename(source, name)


def vae_part(source: TensorSource, options: Mapping[str, Any]) -> TensorSource:
    """A file with only a VAE, under LDM or TAESD names; ``options`` may hold a TAESD's scale and shift.

    Raises:
        WeightsError: if the file is something else.
    """
    expect(source, "vae")
    kind = vae_layout.detect_vae(source.keys())
    assert kind is not None  # expect() checked that
    names: Mapping[str, str] = vae_layout.strip_vae_prefix(source.keys(), kind)
    # Views of a mapped file: nothing is read until it is written.
    tensors = {name: source.get(key) for name, key in names.items()}
    if kind.layout == "diffusers":
        if kind.architecture == "kl":
            tensors = vae_layout.diffusers_to_ldm(
                {vae_layout.undeprecate(name): tensor for name, tensor in tensors.items()}
            )
        else:
            vae_scale, vae_shift = vae_layout.taesd_scale(
                options.get("scaling_factor", 1.0), options.get("shift_factor", 0.0)
            )
            tensors = vae_layout.diffusers_to_taesd(tensors, vae_scale=vae_scale, vae_shift=vae_shift)
    return MemorySource(tensors, path=source.path)
