"""Choosing the dtypes of a network's weights, and copying the weights into it tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.model_management
import torch
from torch import Tensor, nn

from ...hydit_core.dtypes import FP8_DTYPES, dtype_of
from ...hydit_core.weights.save import dtypes_for
from ...hydit_core.weights.source import TensorSource
from ...hydit_core.weights.views import rename
from . import quantised


def choose_dtypes(
    source: TensorSource,
    weight_dtype: str,
    device: torch.device,
    supported: Sequence[torch.dtype],
    *,
    packed: bool = False,
) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype to keep weights in, and the dtype to cast them to for each use (None if it is the same).

    Args:
        source: a DiT or ControlNet in Tencent's names.
        weight_dtype: one of :data:`~hydit_core.dtypes.HOST`, or "default": ComfyUI's choice for this device
            and model, but nothing wider than the file.
        supported: the dtypes that the network can compute in, the best first.
        packed: quantised layers stay so; they compute in what ComfyUI prefers here, whatever is beside them.
    """
    management = comfy.model_management
    if weight_dtype == "default":
        blocks = rename(source, lambda key: key if key.startswith("blocks.") else None)
        in_file = blocks.main_dtype() or torch.float32
        numel = sum(source.numel(key) for key in source)
        stored = management.unet_dtype(
            model_params=numel, supported_dtypes=list(supported), weight_dtype=in_file
        )
        if stored.itemsize > in_file.itemsize:
            stored = in_file
    else:
        stored = dtype_of(weight_dtype)
    given = None if packed else stored
    return stored, management.unet_manual_cast(given, device, list(supported))


def plan_dtypes(
    source: TensorSource, stored: torch.dtype, compute: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Each tensor's dtype. Only the matrices inside the blocks are kept in an 8-bit float."""
    if stored not in FP8_DTYPES:
        return dict.fromkeys(source.keys(), stored)
    short = {key for key, dtype in dtypes_for(source, stored).items() if dtype == stored}
    return {key: stored if key in short else compute or torch.float16 for key in source}


def fill(
    network: nn.Module,
    source: TensorSource,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    *,
    packed: bool = False,
) -> None:
    """Fill a network, whose own tensors were never used, with copies of those of ``source`` on ``device``.

    With ``packed`` it has ComfyUI's layers for quantised weights, which stay as they are.
    """
    state: dict[str, Tensor] = {}
    if packed:
        quantised.place(network, device)
    for key, dtype in dtypes.items():
        if packed and source.scheme(key):
            state |= quantised.entries(source, key, device)
            source.release(key)
            continue
        tensor = source.get(key, dtype)
        if source.dtype(key) == dtype:
            tensor = tensor.clone()  # it may be a view of the file
        state[key] = tensor.to(device)
        source.release(key)
    network.load_state_dict(state, assign=True)
    network.requires_grad_(False).eval()
    # ComfyUI noted the dtypes of the empty network, which were all the same
    if archive := vars(comfy.model_management).get("archive_model_dtypes"):
        archive(network)
