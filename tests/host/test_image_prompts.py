"""IP-Adapters in ComfyUI: what the DiT sees of pictures, whoever samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from image_prompt_models import (
    Truth,
    drawn,
    open_adapter,
    photo,
    save_adapter,
    save_encoder,
)
from model_runs import error, ksampler, network_calls
from sampling_models import our_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("image-prompts")


@pytest.fixture(scope="module")
def files(folder):
    return save_adapter(folder / "ipa.pt"), save_encoder(folder / "clip_img_encoder.pt")


@pytest.fixture(scope="module")
def model(host, folder):
    return our_model(host, folder)


@pytest.fixture(scope="module")
def adapter(host, files):
    return open_adapter(host, *files)


@pytest.fixture(scope="module")
def truth(files):
    return Truth(*files)


def calls_of(host: Any, model: Any, *pictures: dict[str, Any], **sampling: Any) -> list[dict[str, Any]]:
    with network_calls(host) as calls:
        drawn(host, model, *pictures, **sampling)
    assert calls
    return calls


def negative_rows(call: dict[str, Any]) -> list[bool]:
    kinds = call["transformer_options"]["cond_or_uncond"]
    return [kind == 1 for kind in kinds for _ in range(len(call["x"]) // len(kinds))]


# -- what the network computes -------------------------------------------------------------------------------


def test_each_call_is_the_formula(host, model, adapter, truth):
    """Two pictures, weights of the picture and by block, in batches with a negative prompt."""
    image, other = photo(3), photo(4, (11, 40))
    given = [
        {"adapter": adapter, "image": image, "weight": 0.7, "block_weights": "1, 0, -0.5, 2"},
        {"adapter": adapter, "image": other, "weight": 1.2},
    ]
    expected = [{"image": image, "weight": 0.7, "blocks": [1, 0, -0.5, 2]}, {"image": other, "weight": 1.2}]
    for call in calls_of(host, model, *given, latent_image=torch.zeros(2, 4, 8, 12), steps=2):
        found = truth.forward(call, negative_rows(call), expected)
        assert error(call["out"], found) < 1e-4
        assert error(call["out"], truth.forward(call, [False] * len(call["x"]), expected)) > 1e-3
        assert error(call["out"], truth.forward(call, negative_rows(call), expected[:1])) > 1e-3


def test_a_weight_of_zero_is_no_adapter_to_the_bit(host, model, adapter):
    plain = ksampler(host, model)
    given = {"adapter": adapter, "image": photo()}
    assert error(drawn(host, model, given), plain) > 0.01
    for nothing in (
        {"weight": 0.0},
        {"block_weights": "0"},
        {"start_percent": 0.999, "end_percent": 0.999},
        {"mask": torch.zeros(1, 9, 9)},
    ):
        assert torch.equal(drawn(host, model, {**given, **nothing}), plain), nothing
    assert torch.equal(ksampler(host, model), plain)  # the MODEL that was given is as it was
