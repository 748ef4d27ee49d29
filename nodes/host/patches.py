"""Other nodes' patches of a MODEL's attention, in the convention of ComfyUI's UNets.

In it a patch gets tokens (B, N, D), a replacement queries, keys and values (B, N, heads * head_dim). Both
also get ``extra_options``: ``transformer_options`` with the attention's ``n_heads`` and ``dim_head``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from ...hydit_core.errors import HyditError
from ...hydit_core.model.attention import ImageContext, Options, Rope
from ...hydit_core.model.blocks import Block

log = logging.getLogger(__name__)

REPLACEMENT = "hydit_replacement"
"""The key of an attention's options with the function to call instead: (q, k, v) -> out, as tokens."""

_KINDS = ("attn1", "attn2")
_HONOURED = {f"{kind}_{what}" for kind in _KINDS for what in ("patch", "output_patch")}
# Arguments that Flux and similar models give their patches by name
_FOREIGN = {"pe", "attn_mask"}


class PatchedBlock(Block):
    """A block whose attentions run the patches in its options."""

    def _attend(self, x: Tensor, rope: Rope, options: Options) -> Tensor:
        def run(n: Tensor, context: Tensor, value: Tensor, options: Options) -> Tensor:
            return self.attn1(n, rope, options, keys=context, values=value)

        if not _concerned("attn1", options):
            return super()._attend(x, rope, options)
        return _patched("attn1", run, self.attn1, x, x, options or {})

    def _attend_text(
        self, x: Tensor, text: Tensor, rope: Rope, options: Options, images: ImageContext | None
    ) -> Tensor:
        def run(n: Tensor, context: Tensor, value: Tensor, options: Options) -> Tensor:
            return self.attn2(n, context, rope, options, values=value, images=own)

        if not _concerned("attn2", options):
            return super()._attend_text(x, text, rope, options, images)
        # What replaces the attention to the text does not replace that to pictures
        own = images and images._replace(options=options)
        return _patched("attn2", run, self.attn2, x, text, options or {})


def block_options(options: Mapping[str, Any], index: int, depth: int) -> dict[str, Any]:
    """The options of one block, which say where in the model it is."""
    return {
        **options,
        "block": ("double_block", index),
        "block_index": index,
        "block_type": "double",
        "total_blocks": depth,
    }


def check_patches(options: Mapping[str, Any], depth: int) -> None:
    """Raise HyditError for a replacement in a block that does not exist; log patches without effect."""
    for name in options.get("patches", {}):
        if name not in _HONOURED:
            _warn(name)
    blocks = {key for index in range(depth) for key in _names(index, depth)}
    for kind in _KINDS:
        for key in options.get("patches_replace", {}).get(kind, {}):
            if key not in blocks:
                raise HyditError(
                    f"a node replaces {kind} of block {key}, and this HunyuanDiT has no such block: it has "
                    f"('double_block', 0 to {depth - 1}), or by a UNet's names ('input', 0 to "
                    f"{depth // 2 - 1}), ('middle', 0) and ('output', 0 to {depth - depth // 2 - 2}); "
                    "choose one of them in that node"
                )


@cache  # once is enough
def _warn(name: str) -> None:
    log.warning(
        "hydit: a node patches the model's %s, which HunyuanDiT does not have: this has no effect", name
    )


def _names(index: int, depth: int) -> Iterator[tuple[Any, ...]]:
    """Nodes' names for a block: its number, or its place in a UNet, which has skips like HunyuanDiT's."""
    middle = depth // 2
    if index == middle:
        place: tuple[str, int] = ("middle", 0)
    else:
        place = ("input", index) if index < middle else ("output", index - middle - 1)
    for name, number in (("double_block", index), place):
        yield from ((name, number, index), (name, number, 0), (name, number))


def _concerned(kind: str, options: Options) -> bool:
    given = options or {}
    patches = given.get("patches", {})
    return bool(
        patches.get(f"{kind}_patch")
        or patches.get(f"{kind}_output_patch")
        or given.get("patches_replace", {}).get(kind)
    )


def _patched(
    kind: str,
    run: Callable[..., Tensor],
    attention: Any,
    x: Tensor,
    context: Tensor,
    options: Mapping[str, Any],
) -> Tensor:
    """``run(x, context, value, options)`` with the patches of ``kind`` before, inside and after it."""
    extra = _extra_options(attention, x, options)
    patches, value = options.get("patches", {}), context
    for patch in patches.get(f"{kind}_patch", ()):
        given = (x, context, value)
        changed = _call(patch, f"{kind}_patch", "(tokens, context, value, extra_options)", *given, extra)
        if not isinstance(changed, tuple | list) or len(changed) != 3:
            raise _foreign(patch, f"{kind}_patch", "three tensors back: tokens, context, value")
        x, context, value = changed
        if context.shape[:2] != value.shape[:2]:  # PyTorch's attention would read out of bounds
            raise _foreign(patch, f"{kind}_patch", "as many values as keys")
    if replacement := _replacement(kind, options):

        def replace(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = _call(replacement, kind, "(q, k, v, extra_options)", q, k, v, extra)
            return _like(q, out, replacement, kind)

        options = {**options, REPLACEMENT: replace}
    out = run(x, context, value, options)
    for patch in patches.get(f"{kind}_output_patch", ()):
        name = f"{kind}_output_patch"
        out = _like(out, _call(patch, name, "(tokens, extra_options)", out, extra), patch, name)
    return out


def _extra_options(attention: Any, x: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in options.items() if key not in ("patches", "patches_replace")}
    heads = {"n_heads": attention.num_heads, "dim_head": x.shape[-1] // attention.num_heads}
    return {**kept, **heads, "attn_precision": attention.attention.precision}


def _replacement(kind: str, options: Mapping[str, Any]) -> Callable[..., Any] | None:
    replaced = options.get("patches_replace", {}).get(kind, {})
    names = _names(options["block_index"], options["total_blocks"])
    return next((replaced[name] for name in names if name in replaced), None)


def _call(patch: Callable[..., Any], kind: str, convention: str, *arguments: Any) -> Any:
    try:
        signature = inspect.signature(patch)
        signature.bind(*arguments)
    except TypeError:
        raise _foreign(patch, kind, convention) from None
    except ValueError:  # built in: its signature is unknown
        return patch(*arguments)
    if _FOREIGN & signature.parameters.keys():
        raise _foreign(patch, kind, convention)
    return patch(*arguments)


def _like(expected: Tensor, found: Any, patch: Callable[..., Any], kind: str) -> Tensor:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        raise _foreign(patch, kind, f"a tensor {tuple(expected.shape)} back")
    return found.to(expected.dtype)


def _foreign(patch: Callable[..., Any], kind: str, expected: str) -> HyditError:
    name = getattr(patch, "__qualname__", type(patch).__qualname__)
    module = getattr(patch, "__module__", type(patch).__module__)
    return HyditError(
        f"{name} of {module} patches {kind} as other models have it; HunyuanDiT's attention has the "
        f"convention of ComfyUI's UNets: {expected}. Take out the node that brings it"
    )
