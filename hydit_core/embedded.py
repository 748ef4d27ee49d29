"""The models that come with hydit."""

from __future__ import annotations

from pathlib import Path

from .errors import WeightsError

ASSETS = Path(__file__).parent / "assets"


def embedded_model() -> Path:
    """The model that comes with hydit: the one ``.safetensors`` file in its ``assets`` folder.

    Raises :class:`WeightsError` if there is none, or more than one.
    """
    found = sorted(ASSETS.glob("*.safetensors"))
    if len(found) != 1:
        raise WeightsError(f"{ASSETS} holds {len(found)} models instead of one: name the model to use")
    return found[0]


def embedded_controlnets() -> list[Path]:
    """The ControlNets that come with hydit, for :func:`embedded_model`; sorted by name."""
    return sorted((ASSETS / "controlnet").glob("*.safetensors"))


def embedded_loras() -> list[Path]:
    """The LoRAs that come with hydit, for :func:`embedded_model`; sorted by name."""
    return sorted((ASSETS / "lora").glob("*.safetensors"))


def embedded_pictures() -> list[Path]:
    """Folders of pictures and captions to train :func:`embedded_model` with; sorted by name."""
    return sorted(path for path in (ASSETS / "pictures").iterdir() if path.is_dir())


def embedded_ip_adapters() -> list[Path]:
    """The IP-Adapters that come with hydit, for :func:`embedded_model`; sorted by name.

    Each has its image encoder in its own file.
    """
    return sorted((ASSETS / "ip_adapter").glob("*.safetensors"))
