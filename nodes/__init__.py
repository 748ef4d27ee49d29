"""The nodes, one file per family."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .control import HyDiTControlNetApply, HyDiTControlNetLoader, HyDiTLayerWeights
from .forecast import HyDiTForecast
from .host.templates import serve_workflows
from .ip_adapter import HyDiTIPAdapterApply, HyDiTIPAdapterLoader
from .latent import HyDiTEmptyLatent
from .loaders import HyDiTCheckpointLoader, HyDiTDiTLoader, HyDiTTextEncoderLoader
from .lora import HyDiTLoraLoader, HyDiTLoraMerge, HyDiTLoraSave
from .sampling import HyDiTKSampler, HyDiTSampler, HyDiTScheduler
from .save import HyDiTModelSave
from .text import HyDiTTextEncode
from .tiles import HyDiTTiles
from .train import HyDiTDatasetCheck, HyDiTTrainLoRA, HyDiTTrainMonitor

NODES: list[type[io.ComfyNode]] = [
    HyDiTCheckpointLoader,
    HyDiTDiTLoader,
    HyDiTTextEncoderLoader,
    HyDiTTextEncode,
    HyDiTEmptyLatent,
    HyDiTKSampler,
    HyDiTSampler,
    HyDiTScheduler,
    HyDiTForecast,
    HyDiTTiles,
    HyDiTControlNetLoader,
    HyDiTLayerWeights,
    HyDiTControlNetApply,
    HyDiTIPAdapterLoader,
    HyDiTIPAdapterApply,
    HyDiTLoraLoader,
    HyDiTLoraMerge,
    HyDiTLoraSave,
    HyDiTModelSave,
    HyDiTDatasetCheck,
    HyDiTTrainLoRA,
    HyDiTTrainMonitor,
]


class HyDiTExtension(ComfyExtension):
    """The object that ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> HyDiTExtension:
    """Called by ComfyUI once, when it loads the pack."""
    serve_workflows()
    return HyDiTExtension()
