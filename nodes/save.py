"""Saving models."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .schema import make_schema


class HyDiTModelSave(io.ComfyNode):
    """Writes a DiT alone, or an all-in-one checkpoint."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTModelSave",
            display_name="HunyuanDiT Save Model",
            category="HunyuanDiT/save",
            description="Saves a model with the LoRAs and merges on it: the DiT alone, or with clip and vae "
            "a checkpoint with everything in it.",
            search_aliases=["save checkpoint", "export", "bake LoRA", "merge"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A HunyuanDiT; LoRAs and merges on it are written into it."),
                io.String.Input(
                    "filename_prefix",
                    default="checkpoints/hydit",
                    tooltip="Name below ComfyUI's output folder; a counter is added. May have sub-folders "
                    "and %year%, %month%, %day%. Loaders list what lies in output/checkpoints and "
                    "output/diffusion_models.",
                ),
                io.Clip.Input(
                    "clip", optional=True, tooltip="Also write the text encoders and their tokenizers."
                ),
                io.Vae.Input("vae", optional=True, tooltip="Also write the VAE."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            outputs=[],
        )

    @classmethod
    def execute(cls, model: Any, filename_prefix: str, clip: Any = None, vae: Any = None) -> io.NodeOutput:
        # Imported only when needed: it imports the text encoders' tokenizers.
        from .host.save import output_name, save_model, save_path

        path = save_path(filename_prefix)
        hidden = cls.hidden
        notes = save_model(path, model, clip, vae, prompt=hidden.prompt, extra_pnginfo=hidden.extra_pnginfo)
        return io.NodeOutput(ui={"hydit_saved": [output_name(path), *notes]})
