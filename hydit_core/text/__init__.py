"""BERT and mT5: prompts to the features that a HunyuanDiT is conditioned on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .features import PromptReport, TextFeatures, TokenReport, Tokens

if TYPE_CHECKING:
    from .encoders import TextEncoders
    from .loading import load_text_encoders
    from .tokenizers import Tokenizers

__all__ = [
    "PromptReport",
    "TextEncoders",
    "TextFeatures",
    "TokenReport",
    "Tokenizers",
    "Tokens",
    "load_text_encoders",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: only those who use the encoders pay for it.
    if name == "TextEncoders":
        from .encoders import TextEncoders

        return TextEncoders
    if name == "Tokenizers":
        from .tokenizers import Tokenizers

        return Tokenizers
    if name == "load_text_encoders":
        from .loading import load_text_encoders

        return load_text_encoders
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
