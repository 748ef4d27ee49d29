"""What torch.compile, FSDP, activation checkpointing and DataParallel put into names of tensors."""

from __future__ import annotations

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"})


def unwrapped(name: str) -> str:
    """``_orig_mod.blocks.0._fsdp_wrapped_module.norm1.weight`` -> ``blocks.0.norm1.weight``.

    HunyuanDiT, its text encoders and its autoencoder have no module of such a name.
    """
    if not any(word in name for word in WRAPPERS):
        return name
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)
