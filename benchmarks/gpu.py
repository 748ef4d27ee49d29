"""Speed and memory at full size on a CUDA device: DiT-g/2, its training, the autoencoder.

    python benchmarks/gpu.py

Random weights. Times are medians after a warm-up, by CUDA events; ours and diffusers' alternate. MiB: the
peak of what PyTorch allocated, weights included. With HYDIT_GPU_DEVICE=cpu everything shrinks, so that the
script itself can be tried; HYDIT_GPU_OUT names a folder for the figures as JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, HunyuanDiT2DModel
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
CONFIG = DiTConfig() if CUDA else SMALL
SIZE = 1024 if CUDA else 128
RUNS = 10 if CUDA else 1


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
    channels = (128, 256, 512, 512) if CUDA else (32, 32, 32, 32)
    for dtype in (torch.bfloat16, torch.float32):
        with torch.device(DEVICE):
            model = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=channels,
                layers_per_block=2,
                latent_channels=4,
            )
        vae = VAE(model.to(dtype).eval().requires_grad_(False))
        picture = torch.rand(1, 3, SIZE, SIZE, device=DEVICE) * 2 - 1
        latents = torch.randn(1, 4, SIZE // 8, SIZE // 8, device=DEVICE)
        calls = {"encode": lambda: vae.encode_moments(picture), "decode": lambda: vae.decode(latents)}  # noqa: B023
        for name, (spent, peak) in zip(calls, measure(*calls.values()), strict=True):
            kind = str(dtype).removeprefix("torch.")
            rows.append([f"VAE {name} {kind}, {SIZE} px", f"{spent:.1f}", f"{peak:.0f}", ""])


def main() -> None:
    rows: list[list[str]] = []
    failures = []
    for part in (drawing, training, autoencoder):
        try:
            with torch.set_grad_enabled(part is training):
                part(rows)
        except Exception as error:  # so that the other figures are still measured
            traceback.print_exc()
            failures.append(f"{part.__name__}: {type(error).__name__}: {str(error)[:300]}")
        if CUDA:
            torch.cuda.empty_cache()
    name = torch.cuda.get_device_name() if CUDA else "CPU, shrunken"
    header = ("what", "ms", "peak MiB", "TFLOP/s")
    print(f"{name}, torch {torch.__version__}\n\n{table(header, rows)}")
    print("\n".join(f"FAILED {line}" for line in failures))
    if folder := os.environ.get("HYDIT_GPU_OUT"):
        figures = {"device": name, "torch": torch.__version__, "rows": rows, "failures": failures}
        (Path(folder) / "speed.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
