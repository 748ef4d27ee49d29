"""Speed and memory at full size on a CUDA device: DiT-g/2 eager, compiled, in 8 bits, its training, the VAE.

    python benchmarks/gpu.py                     # all rows
    python benchmarks/gpu.py --only offload

Random weights. Times are medians after a warm-up, by CUDA events; ours and diffusers' alternate. MiB: the
peak of what PyTorch allocated, weights included. With HYDIT_GPU_DEVICE=cpu or HYDIT_GPU_TINY everything
shrinks, so that the script itself can be tried; HYDIT_GPU_OUT names a folder for the figures as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from forward import flops
from report import table
from torch import Tensor

from hydit_core.diffusion.losses import diffusion_loss
from hydit_core.diffusion.schedule import Schedule
from hydit_core.facts import ModelInfo
from hydit_core.model.attention import training_attention
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import Context, DiT
from hydit_core.model.rope import rope_table
from hydit_core.train.memory import activation_bytes
from hydit_core.vae import VAE
from hydit_core.weights.diffusers_config import transformer_config
from hydit_core.weights.layouts import from_tencent

DEVICE = torch.device(os.environ.get("HYDIT_GPU_DEVICE") or "cuda")
CUDA = DEVICE.type == "cuda"
FULL = CUDA and not os.environ.get("HYDIT_GPU_TINY")
SMALL = DiTConfig(
    hidden_size=176,
    depth=4,
    num_heads=2,
    mlp_hidden=768,
    text_dim=64,
    t5_dim=128,
    t5_hidden=512,
    pooled_dim=64,
)
CONFIG = DiTConfig() if FULL else SMALL
SIZE = 1024 if FULL else 128
RUNS = 10 if FULL else 1


def measure(*calls: Callable[[], Any]) -> list[tuple[float, float]]:
    """Milliseconds (median) and peak MiB of each call; they take turns."""
    times: list[list[float]] = [[] for _ in calls]
    peaks = []
    for call in calls:
        call()
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        call()
        peaks.append(torch.cuda.max_memory_allocated() / 2**20 if CUDA else 0.0)
    for _ in range(RUNS):
        for call, found in zip(calls, times, strict=True):
            found.append(milliseconds(call))
    return [(statistics.median(found), peak) for found, peak in zip(times, peaks, strict=True)]


def milliseconds(call: Callable[[], Any]) -> float:
    if not CUDA:
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def random_dit(dtype: torch.dtype, **options: Any) -> DiT:
    """Random values in every tensor, including those that start as zeros."""
    model = DiT(CONFIG, device=DEVICE, dtype=dtype, **options)
    generator = torch.Generator(DEVICE).manual_seed(0)
    model.initialize(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02, generator=generator)
    return model


def inputs(batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=DEVICE, generator=generator).to(dtype)

    masks = [torch.ones(batch, length, device=DEVICE) for length in (CONFIG.text_len, CONFIG.t5_len)]
    masks[0][:, 20:] = masks[1][:, 25:] = 0
    return {
        "x": draw(4, SIZE // 8, SIZE // 8),
        "bert": draw(CONFIG.text_len, CONFIG.text_dim),
        "bert_mask": masks[0],
        "t5": draw(CONFIG.t5_len, CONFIG.t5_dim),
        "t5_mask": masks[1],
    }


def context_of(model: DiT, values: dict[str, Tensor]) -> Context:
    return model.encode_context(values["bert"], values["bert_mask"], values["t5"], values["t5_mask"])


def drawing(rows: list[list[str]]) -> None:
    """A forward of DiT-g/2, batch 2 (one picture with guidance), beside diffusers' on the same weights."""
    from diffusers import HunyuanDiT2DModel

    dtype, batch = torch.bfloat16, 2
    ours = random_dit(dtype).eval().requires_grad_(False)
    values = inputs(batch, dtype)
    t = torch.full((batch,), 500.0, device=DEVICE)
    side = SIZE // 8 // CONFIG.patch_size
    context = context_of(ours, values)

    options = transformer_config(CONFIG, ModelInfo.published(CONFIG.version))
    options.pop("_class_name")
    with torch.device("meta"):
        theirs = HunyuanDiT2DModel(**options).eval().requires_grad_(False)
    view = from_tencent(ours.state_dict(), "diffusers")
    theirs.load_state_dict({key: view[key] for key in view}, strict=True, assign=True)
    rope = rope_table(side, side, CONFIG.head_dim, base=CONFIG.rope_base, device=DEVICE)

    def run_theirs() -> Tensor:
        return theirs(
            values["x"],
            t.to(dtype),
            encoder_hidden_states=values["bert"],
            text_embedding_mask=values["bert_mask"],
            encoder_hidden_states_t5=values["t5"],
            text_embedding_mask_t5=values["t5_mask"],
            image_rotary_emb=rope,
            return_dict=False,
        )[0]

    calls = {
        "ours": lambda: ours(values["x"], t, context),
        "ours with text": lambda: ours(values["x"], t, context_of(ours, values)),
        "diffusers with text": run_theirs,
    }
    one, other = calls["ours"]().float(), run_theirs().float()
    difference = ((one - other).norm() / other.norm()).item()
    rows.append(["difference from diffusers", f"{difference:.1e}", "", ""])
    work = flops(CONFIG, side**2, batch)
    for (name, _), (spent, peak) in zip(calls.items(), measure(*calls.values()), strict=True):
        speed = f"{work / spent / 1e9:.0f}"
        rows.append([f"forward bf16, batch 2, {SIZE} px: {name}", f"{spent:.1f}", f"{peak:.0f}", speed])


def training(rows: list[list[str]]) -> None:
    """A full step (AdamW, bf16 autocast, every block checkpointed), and the estimate of its memory."""
    model = random_dit(torch.float32, attention=training_attention).train()
    model.gradient_checkpointing = 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    schedule, values = Schedule(ModelInfo.published("v1.2").diffusion), inputs(1, torch.float32)
    noise, t = torch.randn_like(values["x"]), torch.tensor([300], device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            text = {key: values[key].to(torch.bfloat16) for key in ("bert", "t5")}
            output = model(schedule.add_noise(values["x"], noise, t), t, context_of(model, values | text))
        diffusion_loss(output, values["x"], noise, t, schedule).loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    ((spent, peak),) = measure(step)
    state = 16 * sum(p.numel() for p in model.parameters())
    thought = (state + activation_bytes(CONFIG, 1, (SIZE, SIZE), torch.bfloat16, 1.0)) / 2**20
    rows.append([f"training step, batch 1, {SIZE} px, checkpointed", f"{spent:.0f}", f"{peak:.0f}", ""])
    rows.append(["   as --dry-run estimates it", "", f"{thought:.0f}", ""])


def autoencoder(rows: list[list[str]]) -> None:
    """SDXL's architecture, from a picture to latents and back."""
    from whole import sdxl_vae

    for dtype in (torch.bfloat16, torch.float32):
        with torch.device(DEVICE):
            model = sdxl_vae(full=FULL)
        vae = VAE(model.to(dtype).eval().requires_grad_(False))
        picture = torch.rand(1, 3, SIZE, SIZE, device=DEVICE) * 2 - 1
        latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, device=DEVICE)
        calls = {"encode": lambda: vae.encode_moments(picture), "decode": lambda: vae.decode(latents)}  # noqa: B023
        for name, (spent, peak) in zip(calls, measure(*calls.values()), strict=True):
            kind = str(dtype).removeprefix("torch.")
            rows.append([f"VAE {name} {kind}, {SIZE} px", f"{spent:.1f}", f"{peak:.0f}", ""])


def forward_call(model: DiT) -> Callable[[], Tensor]:
    """A forward for one picture with guidance, in bf16."""
    values = inputs(2, torch.bfloat16)
    t = torch.full((2,), 500.0, device=DEVICE)
    context = context_of(model, values)
    return lambda: model(values["x"], t, context)


def forward_row(rows: list[list[str]], name: str, spent: float, peak: float) -> None:
    work = flops(CONFIG, (SIZE // 8 // CONFIG.patch_size) ** 2, 2)
    rows.append(
        [
            f"forward bf16, batch 2, {SIZE} px: {name}",
            f"{spent:.1f}",
            f"{peak:.0f}",
            f"{work / spent / 1e9:.0f}",
        ]
    )


def compiled(rows: list[list[str]]) -> None:
    """The same blocks eager and compiled; the first call of the compiled ones is told apart."""
    from hydit_core.model.compiled import compile_blocks

    model = random_dit(torch.bfloat16).eval().requires_grad_(False)
    call = forward_call(model)
    ((before, peak),) = measure(call)
    expected = call().float()
    compile_blocks(model, backend="inductor" if FULL else "eager")
    start = time.perf_counter()
    found = call().float()
    first = time.perf_counter() - start
    ((after, after_peak),) = measure(call)
    rows.append(
        ["difference of compiled", f"{((found - expected).norm() / expected.norm()).item():.1e}", "", ""]
    )
    rows.append(["first call of compiled", f"{1000 * first:.0f}", "", ""])
    forward_row(rows, "eager", before, peak)
    forward_row(rows, "compiled", after, after_peak)


def quantised(rows: list[list[str]]) -> None:
    """Matrices of the blocks in 8 bits, as ComfyUI stores them."""
    from hydit_core.weights import kitchen
    from hydit_core.weights.packed import INT8, Scheme, group_for, pack

    if not kitchen.is_available():
        rows.append(["in 8 bits: comfy-kitchen is not installed", "", "", ""])
        return
    for name, form in (("int8", INT8), ("int8_convrot", INT8), ("fp8", "float8_e4m3fn")):
        model = random_dit(torch.bfloat16).eval().requires_grad_(False)
        for module in model.blocks.modules():
            if isinstance(module, torch.nn.Linear):
                group = group_for(module.in_features) if name == "int8_convrot" else 0
                scheme = Scheme(form, rows=form == INT8, group=group)
                kept = kitchen.keep(pack(module.weight, scheme), torch.bfloat16, DEVICE)
                module.weight = torch.nn.Parameter(kept, requires_grad=False)
        ((spent, peak),) = measure(forward_call(model))
        forward_row(rows, name, spent, peak)


def forecast(rows: list[list[str]]) -> None:
    """Fifty steps, with every call real and with forecasts."""
    from hydit_core.diffusion.denoiser import Denoiser
    from hydit_core.diffusion.forecast import FORECASTS, Forecaster
    from hydit_core.diffusion.samplers import sample_dpmpp_2m

    model = random_dit(torch.bfloat16).eval().requires_grad_(False)
    values = inputs(2, torch.bfloat16)
    context = context_of(model, values)
    schedule = Schedule(ModelInfo.published("v1.2").diffusion)
    sigmas = schedule.sigmas_for("linspace", 50 if FULL else 6)
    denoiser = Denoiser(lambda x, t: model(x.to(torch.bfloat16), t, context), schedule)
    for name, tolerance in FORECASTS.items():
        watched = Forecaster(denoiser, sigmas, tolerance)
        spent = milliseconds(lambda: sample_dpmpp_2m(watched, values["x"].float(), sigmas, disable=True))  # noqa: B023
        calls = f"{watched.real} of {watched.calls} calls real"
        rows.append([f"{len(sigmas) - 1} steps, forecast {name}: {calls}", f"{spent:.0f}", "", ""])


def offload(rows: list[list[str]]) -> None:
    """Two pictures of two steps in each mode, with encoders and VAE of the published sizes; and the plan."""
    import whole

    from hydit_core.offload.placement import MODES
    from hydit_core.plan import TILE, Choice, for_pipeline

    needed = for_pipeline(whole.pipeline(CONFIG, torch.device("meta"), full=FULL), whole.settings(SIZE))
    for mode, tile in (*((mode, None) for mode in MODES), ("blocks", TILE if FULL else 8)):
        placement = Choice(mode, tile, 0, True).placement(DEVICE)
        pipe = whole.pipeline(CONFIG, placement.home(DEVICE), full=FULL)
        pipe.placement = placement
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        spent = milliseconds(lambda: [*pipe.pictures(["a", "b"], whole.settings(SIZE))])  # noqa: B023
        peak = torch.cuda.max_memory_allocated() / 2**20 if CUDA else 0.0
        name = f"offload {mode}" + (", VAE in tiles" if tile else "")
        rows.append([f"{name}: 2 prompts, 2 steps each", f"{spent:.0f}", f"{peak:.0f}", ""])
        rows.append(["   as --plan has it", "", f"{needed.of(mode, tiles=tile is not None) / 2**20:.0f}", ""])


def adapters(rows: list[list[str]]) -> None:
    """A training step of a LoRA of rank 64 and of a ControlNet, on a base in bf16 that is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    from hydit_core.model.controlnet import ControlNet

    values = inputs(1, torch.bfloat16)
    for name in ("LoRA of rank 64", "ControlNet"):
        model = random_dit(torch.bfloat16, attention=training_attention).requires_grad_(False)
        net = None
        if name == "ControlNet":
            net = ControlNet.from_base(model, attention=training_attention).float().requires_grad_(True)
            trained = list(net.parameters())
        else:
            names = ["Wqkv", "q_proj", "kv_proj", "out_proj"]
            inject_adapter_in_model(LoraConfig(r=64, target_modules=names), model)
            trained = [p for p in model.parameters() if p.requires_grad]
        for network in (model, net):
            if network is not None:
                network.gradient_checkpointing = 1.0
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
        t = torch.tensor([300.0], device=DEVICE)

        def step() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                control = None
                if net is not None:  # noqa: B023
                    control = net(values["x"], t, context_of(net, values), values["x"])  # noqa: B023
                output = model(values["x"], t, context_of(model, values), control)  # noqa: B023
            output.float().square().mean().backward()
            optimizer.step()  # noqa: B023
            optimizer.zero_grad()  # noqa: B023

        ((spent, peak),) = measure(step)
        rows.append(
            [f"training step, {name}, batch 1, {SIZE} px, checkpointed", f"{spent:.0f}", f"{peak:.0f}", ""]
        )


ROWS: dict[str, Callable[[list[list[str]]], None]] = {
    "drawing": drawing,
    "offload": offload,
    "compiled": compiled,
    "quantised": quantised,
    "forecast": forecast,
    "training": training,
    "adapters": adapters,
    "vae": autoencoder,
}
"""What is measured, the most valuable first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--only", action="append", choices=ROWS, default=[], help="a row; may be given several times"
    )
    chosen = parser.parse_args().only or list(ROWS)
    rows: list[list[str]] = []
    failures = []
    for name in chosen:
        try:
            with torch.set_grad_enabled(name in ("training", "adapters")):
                ROWS[name](rows)
        except Exception as error:  # so that the other figures are still measured
            traceback.print_exc()
            failures.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
        if CUDA:
            torch.cuda.empty_cache()
    device = torch.cuda.get_device_name() if CUDA else "CPU"
    device += "" if FULL else ", shrunken"
    header = ("what", "ms", "peak MiB", "TFLOP/s")
    print(f"{device}, torch {torch.__version__}\n\n{table(header, rows)}")
    print("\n".join(f"FAILED {line}" for line in failures))
    if folder := os.environ.get("HYDIT_GPU_OUT"):
        figures = {"device": device, "torch": torch.__version__, "rows": rows, "failures": failures}
        name = f"speed-{chosen[0]}.json" if len(chosen) == 1 else "speed.json"
        (Path(folder) / name).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
