"""ControlNets: loader, apply node, and the weights of their layers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hydit_core.control import picture_facts
from ..hydit_core.dtypes import dtype_name
from ..hydit_core.layer_weights import LayerWeights
from ..hydit_core.weights.bundle import Bundle, bundle
from ..hydit_core.weights.source import TensorSource
from .host import folders
from .host.control import load_control
from .host.control_apply import apply_control
from .host.quantised import text as quantised_text
from .loaders import AUTO, chosen_key, dtype_input, load_key_input, sets_text, wrong_kind
from .schema import make_schema

_CATEGORY = "HunyuanDiT/controlnet"
_WEIGHTS = (
    "One number for all layers, one for each with commas between them, or a curve: uniform(1), "
    "decay(0.825) (Tencent's: later layers weigh more), linear(1), ease(1), only-early(1), only-late(1)."
)


class HyDiTControlNetLoader(io.ComfyNode):
    """A ControlNet of any version and size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTControlNetLoader",
            display_name="HunyuanDiT ControlNet Loader",
            category=_CATEGORY,
            description="Loads a ControlNet for HunyuanDiT of any version and size: Tencent's .pt, a "
            "diffusers folder, or one that was trained with hydit.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "load controlnet", "canny", "depth", "pose"],
            inputs=[
                io.Combo.Input(
                    "control_net_name",
                    options=folders.control_names(),
                    tooltip="[embedded] comes with these nodes and fits the embedded model. The others are "
                    "in ComfyUI/models/controlnet and models/diffusers; a name that ends in / is a folder.",
                ),
                dtype_input("the ControlNet"),
                load_key_input(),
            ],
            outputs=[
                io.ControlNet.Output("CONTROL_NET", tooltip="For HyDiTControlNetApply, or ComfyUI's own.")
            ],
        )

    @classmethod
    def validate_inputs(cls, control_net_name: Any = None) -> bool | str:
        return folders.check(control_net_name, *folders.CONTROLNETS)

    @classmethod
    def fingerprint_inputs(cls, control_net_name: str, **_: str) -> str:
        return folders.fingerprint(folders.resolve(control_net_name, *folders.CONTROLNETS))

    @classmethod
    def execute(cls, control_net_name: str, weight_dtype: str, load_key: str = AUTO) -> io.NodeOutput:
        path = folders.resolve(control_net_name, *folders.CONTROLNETS)
        opened = bundle(path, only=("controlnet",), load_key=chosen_key(load_key))
        if opened.controlnet is None:
            raise wrong_kind(opened.path, opened.kind, "a HunyuanDiT ControlNet")
        control = load_control(opened, weight_dtype=weight_dtype)
        return io.NodeOutput(control, ui={"hydit_version": [_text(opened, weight_dtype)]})


def _text(opened: Bundle, weight_dtype: str) -> str:
    """For example "HunyuanDiT-g/2 v1.2 ControlNet, canny, fp16"."""
    dtype = opened.controlnet.main_dtype() if opened.controlnet is not None else None
    said = [
        opened.kind.name.removeprefix("a "),
        _picture_kind(opened.source),
        sets_text(opened),
        quantised_text(opened.controlnet, weight_dtype) or (dtype_name(dtype) if dtype else ""),
    ]
    return ", ".join(filter(None, said))


def _picture_kind(source: TensorSource) -> str:
    """The kind of its control pictures, if the file says so."""
    return str(picture_facts(source).get("kind", ""))


class HyDiTLayerWeights(io.ComfyNode):
    """A weight for each layer, drawn or written."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTLayerWeights",
            display_name="HunyuanDiT Layer Weights",
            category=_CATEGORY,
            description="How strongly each layer of a ControlNet acts, or a LoRA or IP-Adapter in each block "
            "of the model: drag the bars, or write numbers or the name of a curve. Early layers shape the "
            "picture coarsely, late ones finely.",
            search_aliases=["hydit", "hunyuan", "controlnet weights", "block weights", "per layer"],
            inputs=[
                io.String.Input("weights", default="uniform(1)", tooltip=_WEIGHTS),
                io.Int.Input(
                    "layers",
                    default=19,
                    min=1,
                    max=64,
                    tooltip="How many layers the weights are meant for: a ControlNet of DiT-g/2 has 19, of "
                    "DiT-XL/2 13, of the embedded model 2; the blocks of these models are 40, 28 and 6. A "
                    "curve fits any number.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "LAYER_WEIGHTS",
                    tooltip="For layer_weights of HyDiTControlNetApply, or block_weights of "
                    "HyDiTIPAdapterApply and the LoRA nodes.",
                )
            ],
        )

    @classmethod
    def execute(cls, weights: str, layers: int) -> io.NodeOutput:
        # Only the node with the ControlNet knows how many are needed
        return io.NodeOutput(str(LayerWeights.parse(weights)))


class HyDiTControlNetApply(io.ComfyNode):
    """A ControlNet with a weight for each layer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTControlNetApply",
            display_name="HunyuanDiT ControlNet Apply",
            category=_CATEGORY,
            description="Lets a ControlNet steer both prompts: with a weight for each layer, between two "
            "points of the sampling, and only where a mask says. May be chained, also with ComfyUI's own "
            "apply node.",
            search_aliases=["hydit", "hunyuan", "混元", "apply controlnet"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input("negative", tooltip="What to steer away from."),
                io.ControlNet.Input(
                    "control_net", tooltip="From HyDiTControlNetLoader, or ComfyUI's own loader."
                ),
                io.Image.Input(
                    "image",
                    tooltip="The control picture itself: edges, depth, a pose. It is scaled and cropped to "
                    "the size of the latent.",
                ),
                io.Vae.Input("vae", tooltip="The model's VAE, which encodes the control picture."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Multiplies every layer's weight. 0: off. Usual: 0.5 to 1.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where it begins to act: 0 is the noise at the start, 1 the end.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.001, tooltip="Where it stops acting."
                ),
                io.String.Input("layer_weights", default="uniform(1)", tooltip=_WEIGHTS),
                io.Mask.Input("mask", optional=True, tooltip="Where it acts: 1 (white) fully, 0 not at all."),
            ],
            outputs=[io.Conditioning.Output("POSITIVE"), io.Conditioning.Output("NEGATIVE")],
        )

    @classmethod
    def execute(
        cls,
        positive: Any,
        negative: Any,
        control_net: Any,
        image: Any,
        vae: Any,
        strength: float,
        start_percent: float,
        end_percent: float,
        layer_weights: str,
        mask: Any = None,
    ) -> io.NodeOutput:
        steered = apply_control(
            positive,
            negative,
            control_net,
            image,
            vae,
            strength=strength,
            weights=LayerWeights.parse(layer_weights),
            start=start_percent,
            end=end_percent,
            mask=mask,
        )
        return io.NodeOutput(*steered)
