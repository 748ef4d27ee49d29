"""The device to compute on, by name."""

from __future__ import annotations

import os

import torch

from .errors import ConfigError


def named_device(name: str | torch.device, *, mps: bool = True) -> torch.device:
    """The device that a name means here. It is not used yet and need not exist.

    "auto" is CUDA, then Apple's MPS (unless ``mps`` is False), then the CPU. In each process that torchrun
    starts, "cuda" is the GPU with the process's local rank.

    Raises:
        RuntimeError: torch's own, for what does not name a device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and mps and torch.backends.mps.is_available():
            name = "mps"
    device = torch.device(name)
    if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
        return torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
    return device


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """As :func:`named_device`. Raises :class:`ConfigError` for a device that cannot be used."""
    try:
        chosen = named_device(device)
        torch.empty(0, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); try cpu") from error
    return chosen
