"""What quantised weights cost in quality, on the model that comes with hydit, on the CPU.

    python benchmarks/quantise.py
    python benchmarks/quantise.py --write docs/benchmarks.md

The first table shows for each kind of layer how far the DiT's output moves when only layers of that kind
are quantised (relative error, the mean of four noise levels): it decided which layers `quantize` takes. The
second compares whole pictures, each with the one that the fp16 file gives for the same prompt and seed: PSNR
in dB, mean and worst 5 %.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from report import machine, publish, table

import hydit_core
from hydit_core.diffusion.guidance import GuidedDenoiser
from hydit_core.diffusion.samplers import SAMPLERS, draw_noise, start_latents
from hydit_core.embedded import embedded_model
from hydit_core.model.dit import Context
from hydit_core.weights.bundle import bundle
from hydit_core.weights.files import open_tensors
from hydit_core.weights.layouts import COMFY_PREFIX
from hydit_core.weights.load import load_dit
from hydit_core.weights.packing import QuantisingSource
from hydit_core.weights.quantise import FORMATS, quantise, scheme_for
from hydit_core.weights.writer import save_safetensors

PROMPTS = (
    "a red apple", "a dog", "a green car", "a yellow banana", "two cats", "a blue fish", "a tree", "the sun",
    "an airplane", "a house", "a red heart", "a slice of pizza", "红苹果", "一只狗", "绿色的汽车", "香蕉",
    "一只猫", "蓝色的鱼", "一棵树", "太阳", "飞机", "房子", "红色的心", "披萨",
)  # fmt: skip
KINDS = (
    "attn1.Wqkv", "attn2.q_proj", "attn2.kv_proj", "out_proj", "mlp.fc1", "mlp.fc2",
    "default_modulation.1", "skip_linear", "mlp_t5.", "t_embedder.", "pooler.", "final_layer.",
)  # fmt: skip
LEVELS = (981.0, 601.0, 201.0, 21.0)


def matrices(kind: str) -> list[str]:
    """The DiT's matrices whose names hold ``kind``."""
    source = open_tensors(embedded_model())
    return [
        key
        for key in source
        if key.startswith(COMFY_PREFIX)
        and kind in key
        and key.endswith("weight")
        and len(source.shape(key)) == 2
    ]


def write(path: Path, keys: list[str], form: str) -> None:
    source = open_tensors(embedded_model())
    schemes = {key: scheme_for(form, source.shape(key)) for key in keys}
    save_safetensors(path, QuantisingSource(source, schemes), source.metadata)


def output(path: Path) -> torch.Tensor:
    """The DiT's output for random latents and text features of real size, in float32."""
    dit, _ = load_dit(path, dtype=torch.float32, keep_quantised=True)
    config, generator = dit.config, torch.Generator().manual_seed(7)
    rows = len(LEVELS)
    x = torch.randn(rows, config.in_channels, 16, 16, generator=generator)
    bert = torch.randn(rows, config.text_len, config.text_dim, generator=generator)
    t5 = torch.randn(rows, config.t5_len, config.t5_dim, generator=generator) * 0.2
    masks = torch.ones(rows, config.text_len).long(), torch.ones(rows, config.t5_len).long()
    with torch.no_grad():
        context = dit.encode_context(bert, masks[0], t5, masks[1])
        return dit(x, torch.tensor(LEVELS), context)[:, : config.in_channels]


def layer_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    exact = output(embedded_model())
    norm = exact.flatten(1).norm(dim=1)
    dit = bundle(embedded_model()).dit
    assert dit is not None
    total = sum(dit.numel(key) for key in dit)
    for kind in (*KINDS, "blocks."):
        keys = matrices(kind)
        errors = []
        for form in FORMATS:
            write(folder / "kind.safetensors", keys, form)
            moved = (output(folder / "kind.safetensors") - exact).flatten(1).norm(dim=1)
            errors.append(f"{100 * (moved / norm).mean():.2f} %")
        share = sum(dit.numel(key.removeprefix(COMFY_PREFIX)) for key in keys) / total
        name = "all inside the blocks" if kind == "blocks." else kind.strip(".")
        yield name, f"{100 * share:.1f} %", *errors


@torch.no_grad()
def pictures(path: Path) -> np.ndarray:
    """One picture of each prompt, (B, 3, H, W) in 0..255 without rounding, drawn in one batch.

    (Inputs are rounded to 8 bits row by row, so that a picture does not depend on its batch.)
    """
    pipe = hydit_core.load(path, device="cpu", dtype="float32")
    settings, count = pipe.settings(), len(PROMPTS)
    context = pipe.context([settings.negative] * count + list(PROMPTS), settings)
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    side = settings.height // pipe.vae.downscale, settings.width // pipe.vae.downscale
    noise = draw_noise((count, pipe.dit.config.in_channels, *side), generators)
    sigmas = pipe.schedule.sigmas_for(settings.spacing, settings.steps, 1.0)

    def predict(x: torch.Tensor, t: torch.Tensor, *, context: Context) -> torch.Tensor:
        return pipe.dit(x, t, context)

    denoiser = GuidedDenoiser(predict, pipe.schedule, settings.cfg, settings.guidance_rescale)
    start = start_latents(noise, sigmas, None)
    latents = SAMPLERS[settings.sampler](
        denoiser, start, sigmas, extra_args={"context": context}, disable=True
    )
    drawn = torch.cat([pipe.vae.decode(latent[None]) for latent in latents])
    return ((drawn + 1) * 127.5).clamp(0, 255).double().numpy()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * math.log10(255**2 / max(float(((one - other) ** 2).mean()), 1e-3))


def picture_rows(folder: Path) -> Iterator[tuple[str, ...]]:
    exact = pictures(embedded_model())
    yield "fp16", f"{embedded_model().stat().st_size / 1e6:.2f}", "", ""
    cases = {form: {"format": form} for form in ("int8_convrot", "int8", "fp8_scaled")}
    cases |= {f"{form}, text encoders too": {"format": form, "text_encoders": True} for form in FORMATS}
    for name, options in cases.items():
        path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"
        quantise(embedded_model(), path, **options)
        found = [psnr(a, b) for a, b in zip(pictures(path), exact, strict=True)]
        worst = sorted(found)[: max(1, len(found) // 20)]
        yield name, f"{path.stat().st_size / 1e6:.2f}", f"{np.mean(found):.1f}", f"{np.mean(worst):.1f}"
        print(f"{name}: {np.round(found, 1).tolist()}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = table(("quantised alone", "of the weights", *FORMATS), list(layer_rows(folder)))
        drawn = table(("weights", "file, MB", "PSNR, dB", "worst 5 %, dB"), list(picture_rows(folder)))
    text = f"{layers}\n\n{drawn}\n\nMachine: {machine()}."
    publish(args.write, "quantise", "Quantised weights: what they cost", text)


if __name__ == "__main__":
    main()
