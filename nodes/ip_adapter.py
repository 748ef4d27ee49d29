"""Pictures as prompts: loading IP-Adapters, and applying them to a MODEL."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..hydit_core.errors import HyditError
from ..hydit_core.layer_weights import LayerWeights
from .host import folders
from .loaders import wrong_kind
from .schema import make_schema

IP_ADAPTER = io.Custom("HYDIT_IP_ADAPTER")
_AUTOMATIC = "automatic"
_CATEGORY = "HunyuanDiT/ip_adapter"
_BLOCKS = (
    "How strongly it acts in each block of the model: one number for all, one for each with commas between "
    "them (40 for DiT-g/2), or a curve: uniform(1), decay(0.825), linear(1), ease(1), only-early(1), "
    "only-late(1). HyDiTLayerWeights draws them."
)


class HyDiTIPAdapterLoader(io.ComfyNode):
    """An IP-Adapter with its image encoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTIPAdapterLoader",
            display_name="HunyuanDiT IP-Adapter Loader",
            category=_CATEGORY,
            description="Loads an IP-Adapter for HunyuanDiT and the image encoder that it was trained with: "
            "Tencent's ipa.pt and clip_img_encoder.pt, or what was trained with hydit.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "load ipadapter", "image prompt", "clip vision"],
            inputs=[
                io.Combo.Input(
                    "ip_adapter_name",
                    options=folders.ip_adapter_names(),
                    tooltip="[embedded] comes with these nodes and fits the embedded model. The others are "
                    "in ComfyUI/models/ipadapter. It must be for a model of the same size.",
                ),
                io.Combo.Input(
                    "clip_vision_name",
                    options=[_AUTOMATIC, *folders.image_encoder_names()],
                    default=_AUTOMATIC,
                    tooltip="The CLIP image encoder, from ComfyUI/models/clip_vision or models/ipadapter. "
                    "automatic: the one in the IP-Adapter's file or beside it, else clip_img_encoder.pt.",
                ),
            ],
            outputs=[IP_ADAPTER.Output("IP_ADAPTER", tooltip="For HyDiTIPAdapterApply.")],
        )

    @classmethod
    def validate_inputs(cls, ip_adapter_name: Any = None, clip_vision_name: Any = None) -> bool | str:
        found = folders.check(ip_adapter_name, *folders.IP_ADAPTERS)
        if found is not True or clip_vision_name == _AUTOMATIC:
            return found
        return folders.check(clip_vision_name, *folders.IMAGE_ENCODERS)

    @classmethod
    def fingerprint_inputs(cls, ip_adapter_name: str, clip_vision_name: str) -> str:
        adapter = folders.resolve(ip_adapter_name, *folders.IP_ADAPTERS)
        try:
            encoder = _encoder(clip_vision_name) or folders.encoder_for(adapter)
        except HyditError:  # execute says why
            return folders.fingerprint(adapter)
        return f"{folders.fingerprint(adapter)} {folders.fingerprint(encoder)}"

    @classmethod
    def execute(cls, ip_adapter_name: str, clip_vision_name: str) -> io.NodeOutput:
        from .host.ip_adapter import HostIPAdapter, WrongFile

        path = folders.resolve(ip_adapter_name, *folders.IP_ADAPTERS)
        try:
            adapter = HostIPAdapter(path, _encoder(clip_vision_name))
        except WrongFile as wrong:
            raise wrong_kind(wrong.path, wrong.kind, wrong.expected) from None
        return io.NodeOutput(adapter, ui={"hydit_version": [adapter.describe()]})


def _encoder(name: str) -> Any:
    return None if name == _AUTOMATIC else folders.resolve(name, *folders.IMAGE_ENCODERS)


class HyDiTIPAdapterApply(io.ComfyNode):
    """Pictures that a MODEL attends to beside its prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTIPAdapterApply",
            display_name="HunyuanDiT IP-Adapter Apply",
            category=_CATEGORY,
            description="Lets a picture be a prompt beside the text: what is drawn takes up its content and "
            "style, with a weight for each block, between two points of the sampling, and only where a mask "
            "says. May be chained: the pictures add up.",
            search_aliases=["hydit", "hunyuan", "混元", "ipadapter", "image prompt", "reference", "style"],
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanDiT from HyDiTCheckpointLoader or HyDiTDiTLoader."),
                IP_ADAPTER.Input("ip_adapter", tooltip="From HyDiTIPAdapterLoader."),
                io.Image.Input(
                    "image",
                    tooltip="The picture, of any size; the encoder sees all of it, squeezed into a square. A "
                    "batch counts as several pictures, each with this weight.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly it acts. 1: as trained. 0: off. Usual: 0.3 to 1.",
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
                io.String.Input("block_weights", default="uniform(1)", tooltip=_BLOCKS),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in what is drawn it acts: 1 (white) fully, 0 not at all. Scaled and "
                    "cropped to its size; one for all pictures of a batch, or one for each.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The model with the picture; the one that came in stays.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ip_adapter: Any,
        image: Any,
        weight: float,
        start_percent: float,
        end_percent: float,
        block_weights: str,
        mask: Any = None,
    ) -> io.NodeOutput:
        from .host.ip_adapter import apply_pictures

        shown = apply_pictures(
            model,
            ip_adapter,
            image,
            weight=weight,
            weights=LayerWeights.parse(block_weights),
            start=start_percent,
            end=end_percent,
            mask=mask,
        )
        return io.NodeOutput(shown)
