"""Prompts to CONDITIONING."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..hydit_core.errors import ConfigError
from .schema import make_schema

_MODES = ["exact", "weighted", "long", "long weighted"]


class HyDiTTextEncode(io.ComfyNode):
    """One prompt for both text encoders, or one for each."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return make_schema(
            node_id="HyDiTTextEncode",
            display_name="HunyuanDiT Text Encode",
            category="HunyuanDiT/conditioning",
            description="Encodes a prompt, in English or Chinese, with HunyuanDiT's two text encoders, and "
            "reports how many tokens each of them saw and what was cut off. Works with the CLIP of any "
            "HunyuanDiT loader; empty prompts are allowed.",
            has_intermediate_output=True,  # what the node shows
            search_aliases=["hydit", "hunyuan", "混元", "prompt", "clip text encode", "bert", "mt5"],
            inputs=[
                io.Clip.Input("clip", tooltip="BERT and mT5, from a loader of HunyuanDiT."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt. BERT takes 77 tokens, mT5 256, of the published models.",
                ),
                io.String.Input(
                    "text_mt5",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="Another prompt for mT5 alone, which takes more text. Empty: the same as text.",
                ),
                io.Combo.Input(
                    "mode",
                    options=_MODES,
                    default="exact",
                    tooltip="exact: plain text, cut to the encoders' lengths, as the model was trained; "
                    "parentheses are parentheses. weighted: ComfyUI's (word:1.2) and embedding:name, cut to "
                    "the same lengths. long: plain text of any length in chunks of those lengths, each "
                    "encoded alone; beyond the first chunk the model was not trained on it. long weighted: "
                    "the same with weights and embeddings.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Only models up to v1.1 are told the picture's size, in pixels. 0: that of "
                    "the latent, which is right.",
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="As width, in pixels. Give both or neither.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("CONDITIONING", tooltip="For samplers, as positive or negative."),
                io.String.Output(
                    "report",
                    display_name="report",
                    tooltip="Tokens per encoder, what was cut off, unknown words.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, clip: Any, text: str, text_mt5: str, mode: str, width: int, height: int
    ) -> io.NodeOutput:
        from .host import tokens
        from .host.clip import encode

        if bool(width) != bool(height):
            raise ConfigError(
                f"width is {width}, height {height}: give both in pixels, or 0 for both (the latent's size)"
            )
        tokenize = {
            "exact": tokens.exact_tokens,
            "weighted": tokens.weighted_tokens,
            "long": tokens.long_tokens,
            "long weighted": tokens.long_weighted_tokens,
        }[mode]
        lists, report = tokenize(clip, text, text_mt5 if text_mt5.strip() else None)
        size = {"width": width, "height": height} if width else {}
        conditioning = encode(clip, lists, add_dict=size)
        said = str(report)
        level = logging.WARNING if report.truncated else logging.INFO
        logging.log(level, "HyDiTTextEncode: %s", said.replace("\n", "; "))
        return io.NodeOutput(conditioning, said, ui={"hydit_report": [said]})
