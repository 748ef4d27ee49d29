"""How many bytes a computation holds at its peak, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


@torch.no_grad()
def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that are alive at once of all that ``run`` makes.

    Its tensors may be on the meta device, where nothing is computed. Attention counts as a fused kernel.
    What libraries take for themselves while they compute is not in it.
    """
    with _Fused(), _Alive() as alive:
        run()
    return alive.peak


class _Fused(TorchFunctionMode):
    """Attention that makes its output and nothing else."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as anything uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = {_key(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        out = func(*args, **kwargs)
        made = out if isinstance(out, tuple | list) else (out,)
        for value in made:
            if isinstance(value, Tensor) and (key := _key(value)) not in known:
                storage = value.untyped_storage()
                self._storages[key] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {key: held for key, held in self._storages.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return out


def _key(value: Tensor) -> int:
    key: int = value.untyped_storage()._cdata
    return key
