"""The device to compute on, by name."""

from __future__ import annotations

import torch

from .errors import ConfigError


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is CUDA, then Apple's MPS, then the CPU. Raises ConfigError for a device that is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
        if chosen.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used here ({reason}); try cpu") from error
    return chosen
