"""Large pictures in tiles."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .schema import make_schema

_SIDE = (
    "In pixels; best is the size that the model was made for (1024 for Tencent's, 128 for the embedded one)."
)


class HyDiTTiles(io.ComfyNode):
    """A MODEL that draws large latents in overlapping tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTTiles",
            display_name="HunyuanDiT Tiles",
            category="HunyuanDiT/sampling",
            description=(
                "Lets a MODEL redraw pictures larger than it can draw: in overlapping tiles that are joined "
                "at every step, so that no seams remain. For enlarged pictures, with a low denoise. "
                "ControlNets, masks and areas are cut with the tiles; previews show the whole picture."
            ),
            search_aliases=[
                "hydit",
                "hunyuan",
                "upscale",
                "multidiffusion",
                "tiled diffusion",
                "large",
                "放大",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A HunyuanDiT, with its LoRAs and patches. Goes before the sampler."
                ),
                io.Int.Input(
                    "tile_width", default=1024, min=32, max=8192, step=16, tooltip=f"Of a tile. {_SIDE}"
                ),
                io.Int.Input(
                    "tile_height", default=1024, min=32, max=8192, step=16, tooltip=f"Of a tile. {_SIDE}"
                ),
                io.Int.Input(
                    "overlap",
                    default=256,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Pixels that neighboring tiles share and blend, fewer than a tile has. Usual: a "
                    "quarter of a tile. 0 leaves seams.",
                ),
            ],
            outputs=[io.Model.Output("MODEL", tooltip="For a sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, tile_width: int, tile_height: int, overlap: int) -> io.NodeOutput:
        from .host.tiles import with_tiles

        return io.NodeOutput(with_tiles(model, (tile_width, tile_height), overlap))
