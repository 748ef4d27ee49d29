"""Our MODEL: the same as ComfyUI's own, in every size and dtype, loaded without waste."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graphs import Graph
from memory import STATUS, Peak
from model_runs import error, ksampler, network_calls
from sampling_models import CONFIG, CONFIG_V11, INFO, conditioning, features, native_model, our_model, weights
from tiny_models import randomize
from torch import Tensor, nn

from hydit_core.diffusion.denoiser import predict_x0
from hydit_core.dtypes import FP8_DTYPES
from hydit_core.facts import DiffusionConfig, ModelInfo
from hydit_core.model.config import DIT_G2_V11, DIT_G2_V12, DiTConfig
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.weights.load import load_dit
from hydit_core.weights.save import save_checkpoint

SIZES = {"v1.1": [(8, 8), (9, 4)], "v1.2": [(6, 10), (7, 9)]}


# -- the same as the native model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stock(host):
    """For each version both models, of published widths and 4 blocks, on the same random weights."""
    old = replace(DIT_G2_V11, depth=4)
    dit = DiT(old)
    randomize(dit, 7)
    state = {key: value.detach() for key, value in dit.state_dict().items()}
    # The pooled text comes first in what the sizes and the style are added to
    new_state = {key: value for key, value in state.items() if key != "style_embedder.weight"}
    new_state["extra_embedder.0.weight"] = state["extra_embedder.0.weight"][:, : old.pooled_dim].clone()
    found = {}
    for config, tensors in ((old, state), (replace(DIT_G2_V12, depth=4), new_state)):
        source = host.module("hydit_core.weights.source").MemorySource(tensors)
        parts = host.module("hydit_core.weights.bundle").Bundle(source)
        ours = host.module("nodes.host.model").load_model(parts)
        found[config.version] = SimpleNamespace(
            config=config, ours=ours, native=native_model(host, config, tensors)
        )
    return found


def forward_inputs(config: DiTConfig, size: tuple[int, int]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    first, second = features(1, config, words=5), features(2, config, words=9)
    text = {name: torch.cat((first[name], second[name])) for name in first}
    return {
        "x": torch.randn(2, 4, *size, generator=g),
        "t": torch.tensor([801.0, 37.5]),
        "context": text["bert"],
        "text_embedding_mask": text["bert_mask"],
        "encoder_hidden_states_t5": text["t5"],
        "text_embedding_mask_t5": text["t5_mask"],
        "image_meta_size": torch.tensor([[1024.0, 1024, 8 * size[1], 8 * size[0], 0, 0]] * 2),
    }


@pytest.mark.parametrize(("version", "size"), [(key, size) for key, sizes in SIZES.items() for size in sizes])
def test_forward_is_the_native_one(stock, version, size):
    pair = stock[version]
    given = forward_inputs(pair.config, size)
    before = {name: value.clone() for name, value in given.items()}
    with torch.no_grad():
        ours = pair.ours.model.diffusion_model(**given)
        assert all(torch.equal(value, before[name]) for name, value in given.items())
        native = pair.native.model.diffusion_model(**given)  # overwrites its context
    assert error(ours, native) <= 1e-5


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("version", "cfg", "size"),
    [
        ("v1.2", 1.0, (8, 6)),
        ("v1.1", 1.0, (6, 8)),
        pytest.param("v1.2", 6.0, (8, 6), marks=slow),
        pytest.param("v1.2", 6.0, (8, 8), marks=slow),
        pytest.param("v1.1", 1.0, (8, 8), marks=slow),
        pytest.param("v1.1", 6.0, (8, 6), marks=slow),
        pytest.param("v1.1", 6.0, (7, 7), marks=slow),
    ],
)
def test_ten_steps_are_the_native_ones(host, stock, version, cfg, size):
    pair = stock[version]
    prompts = [features(1, pair.config), features(2, pair.config, words=9)]
    ours = [conditioning(prompt) for prompt in prompts]
    native = [conditioning(prompt) for prompt in prompts]
    if version == "v1.1":
        # Its size condition has height before width, and its original size is the one that is asked for
        sizes = {"width": 1024, "height": 1024, "target_width": 8 * size[0], "target_height": 8 * size[1]}
        for prompt in native:
            prompt[0][1].update(sizes)
    results = [
        ksampler(
            host, model, latent_image=torch.zeros(1, 4, *size), positive=positive, negative=negative, cfg=cfg,
            steps=10,
        )
        for model, (positive, negative) in ((pair.ours, ours), (pair.native, native))
    ]  # fmt: skip
    assert error(*results) <= 1e-4


# -- conditioning --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(host, folder):
    return our_model(host, folder)


@pytest.fixture(scope="module")
def tiny_old(host, folder):
    return our_model(host, folder, CONFIG_V11)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, (48, 32)),
        ({"width": 1083, "height": 700}, (1083, 700)),
        ({"width": 512, "height": 512, "target_width": 1283, "target_height": 771}, (1283, 771)),
    ],
)
def test_sizes_that_the_model_is_told(host, folder, extra, expected):
    """Width before height, of the latent unless the conditioning says otherwise; exact in bfloat16."""
    our_model(host, folder, CONFIG_V11)
    path = folder / "tiny-v1.1.safetensors"
    model = host.module("nodes.host.model").load_model(path, weight_dtype="bf16")
    model.model.manual_cast_dtype = torch.bfloat16  # as on a machine that computes in it
    prompt = conditioning(features(1))
    prompt[0][1].update(extra)
    with network_calls(host) as calls:
        ksampler(host, model, latent_image=torch.zeros(1, 4, 4, 6), positive=prompt, cfg=1.0, steps=1)
    (call,) = calls
    assert call["x"].dtype == torch.bfloat16 and call["t"].dtype == torch.float32
    assert call["image_meta_size"].tolist() == [[1024, 1024, *expected, 0, 0]]


def test_conditioning_is_not_altered(host, tiny):
    prompt, negative = conditioning(features(1)), conditioning(features(2, words=9))
    before = [{k: v.clone() for k, v in {"bert": c[0][0], **c[0][1]}.items()} for c in (prompt, negative)]
    ksampler(host, tiny, positive=prompt, negative=negative, steps=2)
    for given, kept in zip((prompt, negative), before, strict=True):
        assert all(torch.equal({"bert": given[0][0], **given[0][1]}[name], kept[name]) for name in kept)


def test_rows_without_a_mask_count(host, tiny):
    """ConditioningConcat joins features, not masks."""
    g = Graph()
    both = [host.give(g, conditioning(features(i))) for i in (1, 2)]
    joined = g.add("ConditioningConcat", conditioning_to=both[0], conditioning_from=both[1])
    (value,) = host.values(g, joined)
    with network_calls(host) as calls:
        plain = ksampler(host, tiny, cfg=1.0, steps=1)
        longer = ksampler(host, tiny, positive=value, cfg=1.0, steps=1)
    assert calls[1]["text_embedding_mask"].tolist() == [[1] * 5 + [0] * 7 + [1] * 12]
    assert error(longer, plain) > 0.01


def refused(host: Any, model: Any, prompt: Any) -> str:
    g = Graph()
    given = host.give(g, prompt)
    node = g.add(
        "KSampler", _defaults=True, model=host.give(g, model), positive=given, negative=given, steps=1,
        latent_image=host.give(g, {"samples": torch.zeros(1, 4, 8, 8)}),
    )  # fmt: skip
    g.add("HyDiTTestCapture", value=node.out(0))
    result = host.run(g)
    assert not result.ok and result.error.node_id == node.id
    assert "HyditError" in result.error.exception_type, result.error.traceback
    return result.error.exception_message


def test_other_models_conditioning_is_refused(host, tiny):
    message = refused(host, tiny, [[torch.zeros(1, 77, 768), {"pooled_output": torch.zeros(1, 768)}]])
    assert "(1, 77, 768)" in message and "(batch, 12, 32)" in message and "HyDiTTextEncode" in message
    message = refused(host, tiny, [[torch.zeros(1, 12, 32), {}]])
    assert "no mT5 features" in message and len(message.splitlines()) == 1
    assert ksampler(host, tiny, steps=1).any()


# -- what a file says ----------------------------------------------------------------------------------------


def test_model_info(host, tiny, tiny_old):
    module = host.module("nodes.host.model")
    assert module.model_info(tiny).version == "v1.2" and module.model_info(tiny).defaults.steps == 10
    assert module.model_info(tiny.clone()) is module.model_info(tiny)
    assert module.model_info(tiny_old).diffusion.beta_end == 0.03
    for config, version, beta_end in ((CONFIG, "v1.2", 0.018), (CONFIG_V11, "v1.1", 0.03)):
        info = module.model_info(native_model(host, config))
        assert (info.version, info.diffusion.beta_end) == (version, beta_end)
    with pytest.raises(host.module("hydit_core.errors").HyditError, match="Flux, not HunyuanDiT"):
        module.model_info(SimpleNamespace(model=type("Flux", (nn.Module,), {})()))


def test_schedule_is_the_files(host, folder, tiny_old):
    assert float(tiny_old.get_model_object("model_sampling").sigma_max) == pytest.approx(419.9, abs=0.05)
    info = replace(INFO, diffusion=DiffusionConfig(num_train_timesteps=500, beta_end=0.02))
    sigmas = our_model(host, folder / "other", CONFIG, info).get_model_object("model_sampling").sigmas
    betas = torch.linspace(0.00085**0.5, 0.02**0.5, 500, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(0)
    assert torch.allclose(sigmas.double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-5)


@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
def test_prediction_type(host, folder, prediction):
    info = replace(INFO, diffusion=DiffusionConfig(prediction=prediction))
    model = our_model(host, folder / prediction, CONFIG, info).model
    prompt = features(1)
    x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([2.5])
    given = {
        "c_crossattn": prompt["bert"],
        "text_embedding_mask": prompt["bert_mask"],
        "encoder_hidden_states_t5": prompt["t5"],
        "text_embedding_mask_t5": prompt["t5_mask"],
    }
    with torch.no_grad():
        denoised = model.apply_model(x, sigma, **given)
    dit, _ = load_dit(folder / prediction / "tiny-v1.2.safetensors")
    alpha = (sigma**2 + 1).rsqrt()
    with torch.no_grad():
        context = dit.encode_context(*(prompt[name] for name in ("bert", "bert_mask", "t5", "t5_mask")))
        out = dit(x * alpha, model.model_sampling.timestep(sigma).float(), context)[:, :4]
    assert error(denoised, predict_x0(out, x * alpha, alpha, sigma * alpha, prediction)) < 1e-5


# -- dtypes --------------------------------------------------------------------------------------------------

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
CLOSE = {"fp32": 0.0, "fp16": 0.005, "bf16": 0.04, "fp8_e4m3fn": 0.2, "fp8_e5m2": 0.4}


@pytest.mark.parametrize("name", DTYPES)
def test_weight_dtypes(host, folder, tiny_old, name):
    """What is kept in which dtype, and that the picture is nearly that of float32."""
    path = folder / "tiny-v1.1.safetensors"
    model = host.module("nodes.host.model").load_model(path, weight_dtype=name)
    found = {key: value.dtype for key, value in model.model.diffusion_model.named_parameters()}
    assert not any(value.requires_grad for value in model.model.parameters())
    assert not any(module.training for module in model.model.diffusion_model.modules())
    if DTYPES[name] in FP8_DTYPES:
        matrices = {k for k, v in model.model.diffusion_model.named_parameters() if v.ndim == 2}
        expected = {
            k: DTYPES[name] if k.startswith("blocks.") and k in matrices else torch.float32 for k in found
        }
        assert found == expected and DTYPES[name] in found.values()
    else:
        assert set(found.values()) == {DTYPES[name]}
    expected = ksampler(host, tiny_old, steps=4, cfg=3.0)
    picture = ksampler(host, model, steps=4, cfg=3.0)
    difference = float((picture - expected).std() / expected.std())
    assert difference <= CLOSE[name]
    assert name == "fp32" or difference > 0


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "fp8_e4m3fn"])
def test_default_keeps_the_files_dtype_on_a_cpu(host, folder, tiny, name):
    """Never wider than the file; what a CPU cannot compute in is cast at use."""
    path = folder / f"{name}.safetensors"
    save_checkpoint(path, dit=weights(), info=INFO, dtype=DTYPES[name])
    model = host.module("nodes.host.model").load_model(path)
    assert model.model.diffusion_model.blocks[0].mlp.fc1.weight.dtype == DTYPES[name]
    assert model.model.manual_cast_dtype == (None if name == "fp32" else torch.float32)


def test_low_memory_casts_the_bare_parameters(host, folder):
    """ComfyUI streams layers in low memory and leaves the other parameters where and what they are."""
    model = host.module("nodes.host.model").load_model(folder / "tiny-v1.1.safetensors", weight_dtype="fp32")
    expected = ksampler(host, model, steps=1)
    network = model.model.diffusion_model
    network.text_embedding_padding.data = network.text_embedding_padding.half()
    network.pooler.positional_embedding.data = network.pooler.positional_embedding.half()
    for module in network.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
            module.to(torch.bfloat16)
    assert 0 < error(ksampler(host, model, steps=1), expected) < 0.2


# -- files ---------------------------------------------------------------------------------------------------


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(found) == set(expected) and all(torch.equal(found[k], v) for k, v in expected.items())


def test_other_files_are_refused(host, folder, tmp_path):
    module, errors = host.module("nodes.host.model"), host.module("hydit_core.errors")
    net = ControlNet(CONFIG)
    randomize(net, 1)
    save_checkpoint(tmp_path / "control.safetensors", dit=net.state_dict(), info=INFO)
    with pytest.raises(
        errors.WeightsError, match=r"control\.safetensors is a HunyuanDiT.* ControlNet; expected"
    ):
        module.load_model(tmp_path / "control.safetensors")
    state = weights()
    del state["blocks.2.mlp.fc1.bias"]
    save_checkpoint(tmp_path / "part.safetensors", dit=state, info=INFO)
    with pytest.raises(errors.WeightsError, match=r"1 missing: blocks\.2\.mlp\.fc1\.bias"):
        module.load_model(tmp_path / "part.safetensors")


def test_file_is_not_needed_afterwards(host, tmp_path):
    model = our_model(host, tmp_path)
    path = tmp_path / "tiny-v1.2.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert same(model.model.diffusion_model.state_dict(), weights())


def test_loading_into_layers_that_wait_for_their_weights(host, folder, tiny_old, monkeypatch):
    """The newest host makes layers without tensors where it streams weights to a GPU."""
    memory = pytest.importorskip("comfy.memory_management")
    if not hasattr(memory, "aimdo_enabled"):
        pytest.skip("this host always makes tensors")
    monkeypatch.setattr(memory, "aimdo_enabled", True)
    load = host.module("nodes.host.model").load_model
    model = load(folder / "tiny-v1.1.safetensors", weight_dtype="fp8_e4m3fn")
    network = model.model.diffusion_model
    assert {key: value.shape for key, value in network.state_dict().items()} == {
        key: value.shape for key, value in tiny_old.model.diffusion_model.state_dict().items()
    }
    # What it streams them in: our plan, not the one dtype that the layers were made with
    assert network.blocks[0].mlp.fc1.weight_comfy_model_dtype == torch.float8_e4m3fn
    assert network.mlp_t5[0].weight_comfy_model_dtype == torch.float32


def test_second_copy_of_a_model(host, tiny):
    """What the newest host asks of a loader for a second GPU."""
    if not hasattr(tiny, "deepclone_multigpu"):
        pytest.skip("this host has no such clones")
    copy = tiny.deepclone_multigpu()
    assert copy.model is not tiny.model
    assert same(copy.model.diffusion_model.state_dict(), tiny.model.diffusion_model.state_dict())


def test_saved_by_comfyui(host, tiny, tmp_path):
    """With ComfyUI's own prefix and Tencent's names, which we read again."""
    path = tmp_path / "saved.safetensors"
    host.comfy_module("comfy.sd").save_checkpoint(str(path), tiny)
    dit, _ = load_dit(path)
    assert dit.dtype == torch.float32 and same(dit.state_dict(), weights())


def test_stock_loader_reads_what_was_saved(host, tmp_path):
    """With published text dimensions, 16 heads and an MLP of 4 x width, which it takes for granted."""
    config = replace(DIT_G2_V12, hidden_size=128, depth=4, mlp_hidden=512)
    state = weights(config)
    source = host.module("hydit_core.weights.source").MemorySource(state)
    parts = host.module("hydit_core.weights.bundle").Bundle(source)
    ours = host.module("nodes.host.model").load_model(parts, weight_dtype="fp16")
    sd = host.comfy_module("comfy.sd")
    sd.save_checkpoint(str(tmp_path / "saved.safetensors"), ours)
    native = sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    assert type(native.model).__module__ == "comfy.model_base"
    found = {key: value.float() for key, value in native.model.diffusion_model.state_dict().items()}
    assert same(found, {key: value.half().float() for key, value in state.items()})


# -- memory --------------------------------------------------------------------------------------------------


def random_file(path: Path, config: DiTConfig, version: str) -> Path:
    """A float16 file of random weights, without ever holding them in float32."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in DiT(config).state_dict().items()}
    state = {}
    block = torch.randn(2**22).half()
    for key, shape in shapes.items():
        state[key] = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)
    save_checkpoint(path, dit=state, info=ModelInfo.published(version))
    return path


@pytest.mark.skipif(not STATUS.exists(), reason="reads Linux's /proc")
def test_loading_holds_nothing_twice(host, tmp_path):
    """Whole files: tests/host/test_full_size.py."""
    path = random_file(tmp_path / "cut.safetensors", replace(DIT_G2_V12, depth=4), "v1.2")
    load = host.module("nodes.host.model").load_model
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before would be filled without growing
    with Peak() as peak:
        model = load(path)
    size = path.stat().st_size
    print(f"{size / 1e9:.2f} GB, peak {peak.grown / size:.2f} x the file")
    assert 0.9 * model.model_size() <= peak.grown <= 1.2 * size
