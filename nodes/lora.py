"""LoRAs: applying them to a model, merging several into one, and saving them."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .host import folders
from .schema import make_schema

_CATEGORY = "HunyuanDiT/lora"
_NAME = (
    "[embedded] comes with these nodes and fits the embedded model. The others are in ComfyUI/models/loras: "
    "PEFT, kohya, ComfyUI, diffusers or Tencent's format. A name that ends in / is a folder of PEFT's."
)
_BLOCKS = (
    "How strongly each block of the model takes it: one number for all, one for each with commas between "
    "them (40 for DiT-g/2), or a curve: uniform(1), decay(0.825), linear(1), ease(1), only-early(1), "
    "only-late(1)."
)


def _name_input() -> io.Combo.Input:
    return io.Combo.Input("lora_name", options=folders.lora_names(), tooltip=_NAME)


def _strength_input(name: str, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-10.0, max=10.0, step=0.01, tooltip=tooltip)


def _partial_input() -> io.Boolean.Input:
    # Older workflows lack this input; web/js/lora_report.js and execute's default let them run as before.
    return io.Boolean.Input(
        "partial",
        optional=True,
        default=False,
        tooltip="Use a LoRA of which more than a tenth is for layers that the model does not have. Off: that "
        "is an error, because such a LoRA is probably for another model.",
    )


class _FromFile(io.ComfyNode):
    """The common part of nodes with ``lora_name``."""

    @classmethod
    def validate_inputs(cls, lora_name: Any = None) -> bool | str:
        return folders.check(lora_name, *folders.LORAS)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        return folders.fingerprint(folders.resolve(lora_name, *folders.LORAS))


class HyDiTLoraLoader(_FromFile):
    """Applies a LoRA of any format to MODEL and CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTLoraLoader",
            display_name="HunyuanDiT LoRA Loader",
            category=_CATEGORY,
            description="Loads a LoRA for HunyuanDiT of any common format at its true strength, with a "
            "weight for each block, and says what it is and what of it fits the model.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "load lora", "dora", "loha", "lokr", "lycoris"],
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanDiT. Loaders may be chained."),
                io.Clip.Input(
                    "clip", optional=True, tooltip="For LoRAs that change the text encoders as well."
                ),
                _name_input(),
                _strength_input(
                    "strength_model", "How strongly it changes the model. 1: as trained. Usual: 0.5 to 1.2."
                ),
                _strength_input("strength_clip", "The same for the text encoders, if it changes them."),
                io.String.Input("block_weights", default="uniform(1)", tooltip=_BLOCKS),
                _partial_input(),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The model with the LoRA; the one that came in stays."),
                io.Clip.Output("CLIP", tooltip="The text encoders with the LoRA."),
                io.String.Output("report", tooltip="What the node shows: format, rank, what fits."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        block_weights: str,
        clip: Any = None,
        partial: bool = True,
    ) -> io.NodeOutput:
        from .host.lora import apply_lora, open_lora

        adapter = open_lora(folders.resolve(lora_name, *folders.LORAS))
        model, clip, report = apply_lora(
            adapter,
            model,
            clip,
            strength_model=strength_model,
            strength_clip=strength_clip,
            block_weights=block_weights,
            partial=partial,
        )
        return io.NodeOutput(model, clip, report, ui={"hydit_lora": [report]})


class HyDiTLoraMerge(_FromFile):
    """Merges one more LoRA into a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTLoraMerge",
            display_name="HunyuanDiT LoRA Merge",
            category=_CATEGORY,
            description="Makes one LoRA of several: chain one node for each file. With model (and clip) "
            "connected to the last one, all of them are applied.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "combine loras", "merge loras", "lora stack"],
            inputs=[
                _name_input(),
                _strength_input("strength", "How strongly this one counts. 1: as trained."),
                io.String.Input("block_weights", default="uniform(1)", tooltip=_BLOCKS),
                io.LoraModel.Input(
                    "lora", optional=True, tooltip="The LoRA so far: from another of these nodes, or trained."
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="A model with none of these LoRAs yet; gets all of them."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The same for the text encoders."),
                _partial_input(),
            ],
            outputs=[
                io.LoraModel.Output("LORA_MODEL", tooltip="All of them in one, strengths included."),
                io.Model.Output("MODEL", tooltip="model with all of them."),
                io.Clip.Output("CLIP", tooltip="clip with all of them."),
                io.String.Output("report", tooltip="What the node shows: what is in it, and what fits."),
            ],
        )

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength: float,
        block_weights: str,
        lora: Any = None,
        model: Any = None,
        clip: Any = None,
        partial: bool = True,
    ) -> io.NodeOutput:
        from .host.lora import open_lora
        from .host.lora_file import merge_lora

        adapter = open_lora(folders.resolve(lora_name, *folders.LORAS))
        merged, model, clip, report = merge_lora(
            adapter, strength, block_weights, lora=lora, model=model, clip=clip, partial=partial
        )
        return io.NodeOutput(merged, model, clip, report, ui={"hydit_lora": [report]})


class HyDiTLoraSave(io.ComfyNode):
    """Writes a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTLoraSave",
            display_name="HunyuanDiT Save LoRA",
            category=_CATEGORY,
            description="Writes a LoRA, in the format of your choice and at a smaller rank if you like.",
            search_aliases=["hydit", "hunyuan", "混元", "export lora", "convert lora", "resize lora"],
            is_output_node=True,
            inputs=[
                io.LoraModel.Input("lora", tooltip="From HyDiTLoraMerge, or trained in ComfyUI."),
                io.String.Input(
                    "filename_prefix",
                    default="loras/hydit",
                    tooltip="Name below ComfyUI's output folder; a counter is added. May have sub-folders "
                    "and %year%, %month%, %day%. The LoRA loaders list what lies in output/loras.",
                ),
                io.Combo.Input(
                    "format",
                    options=["comfy", "kohya", "peft"],
                    tooltip="comfy: one file for ComfyUI's loaders and ours. kohya: one file with kohya's "
                    "names. peft: a folder for Python's peft.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="0: exactly what came in; its rank is the sum of all. Another number: the best "
                    "LoRA of at most that rank; the node says how much of it is kept.",
                ),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[],
        )

    @classmethod
    def execute(cls, lora: Any, filename_prefix: str, format: str, rank: int) -> io.NodeOutput:
        from .host.lora_file import save_lora

        hidden = cls.hidden
        graph = {"prompt": hidden.prompt, "extra_pnginfo": hidden.extra_pnginfo}
        return io.NodeOutput(ui={"hydit_saved": save_lora(lora, filename_prefix, format, rank, **graph)})
