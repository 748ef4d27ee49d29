"""HyDiTEmptyLatent."""

from __future__ import annotations

from comfy_api.latest import io

from .host import sampling
from .schema import make_schema

_SIZE = (
    "Pixels, in steps of 16; multiples of 8 work too. HunyuanDiT was trained on 1024x1024, 1280x1280, "
    "1024x768, 1152x864, 1280x960, 768x1024, 864x1152, 960x1280, 1280x768 and 768x1280."
)


class HyDiTEmptyLatent(io.ComfyNode):
    """Empty latents, to be sampled from noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTEmptyLatent",
            display_name="HunyuanDiT Empty Latent",
            category="HunyuanDiT/latent",
            description="Empty latents of the size of the picture.",
            search_aliases=["hunyuan", "hydit", "empty latent", "size", "resolution"],
            inputs=[
                io.Int.Input("width", default=1024, min=16, max=8192, step=16, tooltip=_SIZE),
                io.Int.Input("height", default=1024, min=16, max=8192, step=16, tooltip=_SIZE),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="How many pictures to draw at once."
                ),
            ],
            outputs=[io.Latent.Output("LATENT")],
        )

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput(sampling.empty_latent(width, height, batch_size))
