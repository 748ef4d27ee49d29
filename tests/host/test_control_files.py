"""The ControlNet loader: what it lists and loads, dtypes, and weights that are streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from control_models import (
    STEERED,
    STEERED_V11,
    STOCK,
    control_calls,
    control_weights,
    native_control,
    open_control,
    save_control,
    steered,
)
from graphs import Graph, text_to_image
from loader_files import version
from model_runs import error
from safetensors.torch import save_file
from sampling_models import our_model
from torch import Tensor

from hydit_core.weights.layouts import from_tencent

LOADER = "HyDiTControlNetLoader"


def names(host: Any) -> list[str]:
    return host.input_types(LOADER)["required"]["control_net_name"][1]["options"]


def loader(name: str, **widgets: Any) -> Graph:
    g = Graph()
    node = g.add(LOADER, _defaults=True, control_net_name=name, **widgets)
    g.add("HyDiTTestCapture", value=node.out(0))
    return g


def load(host: Any, name: str, **widgets: Any) -> Any:
    return host.values(loader(name, **widgets), ("1", 0))[0]


def text(host: Any, name: str) -> str:
    (shown,) = host.run(loader(name)).check().outputs["1"]["hydit_version"]
    return shown


def diffusers_weights() -> dict[str, Tensor]:
    tensors = from_tencent(control_weights(), "diffusers")
    return {key: value.contiguous() for key, value in dict(tensors).items()}


@pytest.fixture(scope="module")
def models(host):
    """Every form of a ControlNet, in the host's folders."""
    before = set(host.models_dir.rglob("*"))
    folder = host.models_dir / "controlnet"
    save_control(folder / "ours.safetensors")
    save_control(folder / "sub" / "old.safetensors", STEERED_V11)
    torch.save(control_weights(), folder / "pytorch_model_canny_ema.pt")
    torch.save({"module": control_weights()}, folder / "deepspeed.pt")
    tensors = diffusers_weights()
    for path in ("HunyuanDiT-ControlNet-Canny", "pipe/controlnet"):
        place = host.models_dir / "diffusers" / path
        place.mkdir(parents=True)
        save_file(tensors, place / "diffusion_pytorch_model.safetensors")
        (place / "config.json").write_text(json.dumps({"_class_name": "HunyuanDiT2DControlNetModel"}))
    save_file(tensors, folder / "converted.safetensors")
    # Other parts of a pipeline are no ControlNets
    for path in ("pipe/transformer", "pipe/vae"):
        (host.models_dir / "diffusers" / path).mkdir()
        save_file(
            {"x": torch.zeros(1)},
            host.models_dir / "diffusers" / path / "diffusion_pytorch_model.safetensors",
        )
    host.refresh()
    yield host.models_dir
    for path in sorted(set(host.models_dir.rglob("*")) - before, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    host.refresh()


@pytest.fixture(scope="module")
def model(host, tmp_path_factory):
    return our_model(host, tmp_path_factory.mktemp("dit"), STEERED)


FORMS = [
    "ours.safetensors",
    "pytorch_model_canny_ema.pt",
    "deepspeed.pt",
    "converted.safetensors",
    "HunyuanDiT-ControlNet-Canny/",
    "pipe/",
]


def test_what_is_listed(host, models):
    listed = names(host)
    assert set(FORMS) <= set(listed) and "sub/old.safetensors" in [name.replace("\\", "/") for name in listed]
    assert [name for name in listed if name.endswith("/")] == ["HunyuanDiT-ControlNet-Canny/", "pipe/"]
    own = [name for name in listed if name.startswith("[embedded] ")]
    assert own == listed[: len(own)]
    assets = host.module("hydit_core.embedded").ASSETS / "controlnet"
    assert own == [f"[embedded] {path.stem}" for path in sorted(assets.glob("*.safetensors"))]


@pytest.mark.parametrize("name", [*FORMS, "sub/old.safetensors", r"sub\old.safetensors"])
def test_every_layout(host, models, name):
    control = load(host, name)
    old = "old" in name
    expected = control_weights(STEERED_V11 if old else STEERED)
    found = control.control_model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    # The class that other packs look for, not a child of it
    assert type(control) is host.comfy_module("comfy.controlnet").ControlNet
    version = "v1.1" if old else "v1.2"
    assert text(host, name).startswith(f"HunyuanDiT-64x8 {version} ControlNet") and "fp32" in text(host, name)


def test_the_embedded_controlnet_is_found_by_its_name(host, monkeypatch, tmp_path):
    """Whatever lies in the folder of assets, first in the list, and drawn with."""
    import hydit_core

    pipeline = hydit_core.load(device="cpu")
    net = hydit_core.model.ControlNet.from_base(pipeline.dit)
    path = tmp_path / "controlnet" / "some-canny.safetensors"
    path.parent.mkdir()
    shown = json.dumps({"kind": "canny", "low": 100, "high": 200})
    hydit_core.save_checkpoint(
        path, dit=net.state_dict(), info=pipeline.info, metadata={"hydit.control": shown}
    )
    monkeypatch.setattr(host.module("hydit_core.embedded"), "ASSETS", tmp_path)
    name = "[embedded] some-canny"
    assert names(host)[0] == name
    assert text(host, name) == f"{version()} ControlNet, canny, fp32"
    assert len(load(host, name).control_model.after_proj_list) == 2
    result = host.run(loader("[embedded] another"))
    assert name in result.error.node_errors["1"]["errors"][0]["details"]


def test_a_fresh_install_shows_the_node(host, monkeypatch, tmp_path):
    """No folders at all; the list has what is embedded, and other graphs run."""
    paths = host.folder_paths.folder_names_and_paths
    for kind in ("controlnet", "diffusers"):
        monkeypatch.setitem(paths, kind, ([str(tmp_path / kind)], paths[kind][1]))
    host.refresh()
    assert all(name.startswith("[embedded] ") for name in names(host))
    host.run(text_to_image(steps=1, width=64, height=64)).check()
    monkeypatch.undo()
    host.refresh()


def test_a_retrained_file_of_the_same_name_is_loaded_again(host, models):
    path = save_control(host.model_path("controlnet", "again.safetensors"))
    host.refresh()
    before = load(host, path.name)
    assert "1" in host.run(loader(path.name), keep_cache=True).check().cached
    save_control(path, seed=6)
    (after,) = host.values(loader(path.name), ("1", 0), keep_cache=True)
    key = "before_proj.weight"
    found = [net.control_model.state_dict()[key] for net in (before, after)]
    assert torch.equal(found[0], control_weights()[key])
    assert torch.equal(found[1], control_weights(seed=6)[key])


def test_the_file_is_not_needed_afterwards(host, tmp_path):
    """Copies of the weights, not views of the mapped file."""
    path = save_control(tmp_path / "net.safetensors")
    control = open_control(host, path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    found = control.control_model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in control_weights().items())
    assert not any(parameter.requires_grad for parameter in control.control_model.parameters())


# -- dtypes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_dtype", "stored", "tolerance"),
    [
        ("fp32", torch.float32, 0.0),
        ("fp16", torch.float16, 0.01),
        ("bf16", torch.bfloat16, 0.05),
        ("fp8_e4m3fn", torch.float8_e4m3fn, 0.4),
        ("fp8_e5m2", torch.float8_e5m2, 0.8),
    ],
)
def test_weight_dtypes(host, models, model, weight_dtype, stored, tolerance):
    """The CPU computes in float32, whatever the weights are kept in."""
    control, reference = (
        load(host, "ours.safetensors", weight_dtype=weight_dtype),
        load(host, "ours.safetensors"),
    )
    assert control.control_model.blocks[0].attn1.Wqkv.weight.dtype == stored
    assert control.control_model.compute == torch.float32
    with control_calls(control) as calls:
        steered(host, model, control, sampling={"steps": 1})
    with control_calls(reference) as expected:
        steered(host, model, reference, sampling={"steps": 1})
    for layer, other in zip(calls[0]["out"], expected[0]["out"], strict=True):
        assert layer.dtype == torch.float32
        difference = float((layer - other).std() / other.std())
        assert difference <= tolerance and (tolerance == 0) == (difference == 0)


def test_a_short_file_computes_in_float32_as_the_native_network_cannot(host, model, tmp_path):
    """ "default" keeps the file's float16; results are those of the same values in float32."""
    path = save_control(tmp_path / "short.safetensors", dtype=torch.float16)
    short = open_control(host, path)
    assert short.control_model.before_proj.weight.dtype in (torch.float16, torch.float32)
    rounded = {key: value.half().float() for key, value in control_weights().items()}
    native = native_control(host, tensors=rounded)
    for weight_dtype in ("default", "fp16"):
        found = steered(host, model, open_control(host, path, weight_dtype))
        assert error(found, steered(host, model, native, STOCK)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computing_in_16_bits_keeps_timesteps_and_sizes(host, dtype):
    """In bfloat16, 999 would be 1000 and a size of 1083 would be 1080."""
    module = host.module("nodes.host.control")
    config = host.module("hydit_core.model.config").DiTConfig(**STEERED_V11.to_dict())
    operations = host.comfy_module("comfy.ops").disable_weight_init
    nets = {}
    for compute in (dtype, torch.float32):
        net = module.HostControlNet(
            config, dtype=compute, compute=compute, device="cpu", operations=operations
        )
        net.load_state_dict({k: v.to(dtype) for k, v in control_weights(STEERED_V11).items()})
        nets[compute] = net.eval()
    assert nets[dtype].dtype == torch.float32, "ComfyUI casts timesteps to it"
    g = torch.Generator().manual_seed(3)
    given = {
        "x": torch.randn(1, 4, 8, 8, generator=g), "hint": torch.randn(1, 4, 8, 8, generator=g),
        "context": torch.randn(1, 12, 32, generator=g), "text_embedding_mask": torch.ones(1, 12),
        "encoder_hidden_states_t5": torch.randn(1, 16, 64, generator=g),
        "text_embedding_mask_t5": torch.ones(1, 16),
        "image_meta_size": torch.tensor([[1024, 1024, 1083, 999, 0, 0]]),
    }  # fmt: skip
    outs = {}
    with torch.no_grad():
        for t in (999.0, 1000.0):
            for compute, net in nets.items():
                outs[compute, t] = net(timesteps=torch.tensor([t]), **given)["output"][2].float()
    near = (outs[dtype, 999.0] - outs[torch.float32, 999.0]).std()
    assert near < 0.05 * outs[torch.float32, 999.0].std()
    assert not torch.equal(outs[dtype, 999.0], outs[dtype, 1000.0])


def test_streamed_weights(host, model, tmp_path):
    """Low memory: layers keep their place and are cast at use; parameters of no layer are, too."""
    path = save_control(tmp_path / "net.safetensors")
    whole = open_control(host, path)
    expected = steered(host, model, whole)
    for weight_dtype in ("default", "bf16"):
        control = open_control(host, path, weight_dtype)
        patcher = control.control_model_wrapped
        patcher.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=1)
        try:
            assert control.control_model.blocks[0].attn1.Wqkv.comfy_cast_weights
            found = steered(host, model, control)
        finally:
            patcher.unpatch_model(torch.device("cpu"))
        assert torch.equal(found, expected) if weight_dtype == "default" else error(found, expected) < 0.5
