"""hydit_core's DiT as ComfyUI calls a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor

from ...hydit_core.errors import HyditError
from ...hydit_core.model.attention import ImageContext, Options, Rope
from ...hydit_core.model.config import DiTConfig
from ...hydit_core.model.dit import DiT
from ...hydit_core.model.rope import rope_table
from .attention import HostAttention
from .image_prompts import seen_images, with_conditions
from .patches import PatchedBlock, block_options, check_patches


class HostDiT(DiT):
    """A DiT that is called as ComfyUI calls its own, and that nodes can patch where they can patch that one.

    ``config`` and the rest are the model configuration's ``unet_config``; ``attn_precision`` is the dtype of
    the attention scores (:class:`HostAttention`).
    """

    block_class = PatchedBlock

    def __init__(
        self,
        config: DiTConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        operations: Any,
        attn_precision: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        attention = HostAttention(attn_precision)
        super().__init__(config, dtype=dtype, device=device, operations=operations, attention=attention)
        self.in_channels = config.in_channels  # RenormCFG reads it

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        text_embedding_mask: Tensor,
        encoder_hidden_states_t5: Tensor,
        text_embedding_mask_t5: Tensor,
        image_meta_size: Tensor | None = None,
        style: Tensor | None = None,
        control: Mapping[str, Any] | None = None,
        transformer_options: Options = None,
        **conditions: Any,
    ) -> Tensor:
        """``x`` (B, C, H, W), ``t`` (B,) 0..999 -> the prediction, (B, C, H, W). Changes no input.

        ``context`` (B, L, text_dim) and ``encoder_hidden_states_t5`` (B, M, t5_dim) are BERT's and mT5's
        features with their masks (B, L) and (B, M); ``control["output"][i]`` (B, N, D) is added to skip i.

        Raises HyditError if ``control`` is for another model.
        """
        options = with_conditions(transformer_options or {}, conditions)
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        run = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        # Positional, with the options last, where wrappers look for them
        return run.execute(
            x,
            t,
            context,
            text_embedding_mask,
            encoder_hidden_states_t5,
            text_embedding_mask_t5,
            image_meta_size,
            style,
            control,
            options,
        )

    def _forward(
        self,
        x: Tensor,
        t: Tensor,
        bert: Tensor,
        bert_mask: Tensor,
        t5: Tensor,
        t5_mask: Tensor,
        image_meta_size: Tensor | None,
        style: Tensor | None,
        control: Mapping[str, Any] | None,
        transformer_options: Options,
    ) -> Tensor:
        options = transformer_options or {}
        check_patches(options, self.config.depth)
        residuals = _residuals(control, self.config)
        context = self.encode_context(
            bert.to(x.dtype), bert_mask, t5, t5_mask, image_meta_size=image_meta_size, style=style
        )
        height, width = (-(-side // self.config.patch_size) for side in x.shape[-2:])
        shapes = {
            "original_shape": list(x.shape),
            "activations_shape": [len(x), self.config.hidden_size, height, width],
        }
        images = seen_images(options, x, t, depth=self.config.depth, patch=self.config.patch_size)
        out = super().forward(x, t, context, residuals, images=images, options={**options, **shapes})
        return out[:, : self.config.in_channels]

    def _rope(self, th: int, tw: int, device: torch.device, options: Options) -> Rope:
        """As in ComfyUI's other models, ScaleROPE's numbers stretch and move the grid."""
        given = (options or {}).get("rope_options") or {}
        scale = given.get("scale_y", 1.0), given.get("scale_x", 1.0)
        shift = given.get("shift_y", 0.0), given.get("shift_x", 0.0)
        config = self.config
        return rope_table(
            th, tw, config.head_dim, base=config.rope_base, scale=scale, shift=shift, device=device
        )

    def _run_block(
        self,
        index: int,
        x: Tensor,
        text: Tensor,
        vector: Tensor,
        rope: Rope,
        skip: Tensor | None = None,
        options: Options = None,
        images: ImageContext | None = None,
    ) -> Tensor:
        run = super()._run_block
        own = block_options(options or {}, index, self.config.depth)
        replaced = own.get("patches_replace", {}).get("dit", {})
        if ("double_block", index) not in replaced:
            return run(index, x, text, vector, rope, skip, own, images)

        def original(args: Mapping[str, Any]) -> dict[str, Tensor]:
            img, txt, vec, pe, skip = (args[name] for name in ("img", "txt", "vec", "pe", "skip"))
            return {"img": run(index, img, txt, vec, pe, skip, own, images)}

        args = {"img": x, "txt": text, "vec": vector, "pe": rope, "skip": skip, "transformer_options": own}
        return replaced["double_block", index](args, {"original_block": original})["img"]


def _residuals(control: Mapping[str, Any] | None, config: DiTConfig) -> Sequence[Tensor | None] | None:
    """A ControlNet's residuals, one for each skip; None without one."""
    given = {name: values for name, values in (control or {}).items() if values}
    residuals = given.pop("output", None)
    others = [name for name, values in given.items() if any(value is not None for value in values)]
    if residuals is None and not others:
        return None
    wide = [value.shape[-1] for value in residuals or () if value is not None]
    found = ""
    if others:
        found = f"residuals for {others[0]} blocks"
    elif len(residuals) != config.num_controls:
        found = f"{len(residuals)} residuals"
    elif other := next((width for width in wide if width != config.hidden_size), 0):
        found = f"residuals of width {other}"
    if found:
        raise HyditError(
            f"the ControlNet gives {found}, this model of depth {config.depth} takes {config.num_controls} "
            f"of width {config.hidden_size}, one for each skip: it was made for another model; use a "
            "ControlNet for this HunyuanDiT"
        )
    return residuals
