"""Train the embedded model's autoencoder: icons of 128 px to 4 x 16 x 16 latents and back.

    python train_vae.py --twemoji node_modules/@iconify-json/twemoji --out work/vae

It is a plain AutoencoderKL with 64 channels on every level and norms of 32 groups, a shape that
ComfyUI's own VAE class builds too. Interrupt it when you like: the same command goes on from the last
checkpoint.

Plain squared error learns shapes long before colors (green turns grey, red turns orange); the pooled L1, the
chroma L1 and the random permutation of the color channels are there for the colors.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from icons import Concept, IconSet, on_white, read_concepts, render
from PIL import Image
from torch import Tensor, nn

from hydit_core.config import ModelInfo
from hydit_core.weights.vae_layout import diffusers_to_ldm
from hydit_core.weights.writer import save_safetensors

SIZE, CROP = 128, 64
SCALE = 0.13025


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(64, 64, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
        sample_size=SIZE,
        scaling_factor=SCALE,
    )


def concept_pictures(icons: IconSet, concepts: list[Concept]) -> np.ndarray:
    """(N, 128, 128, 3) uint8, every concept over white."""
    return np.stack([np.asarray(on_white(render(concept, icons, SIZE))) for concept in concepts])


class Crops:
    """Random 64 px crops: concepts half of the time, any other icon else; scaled, mirrored, recolored."""

    def __init__(self, icons: IconSet, concepts: np.ndarray, seed: int, cache: Path) -> None:
        self.concepts = concepts
        self.others = self._others(icons, cache)
        self.random = random.Random(seed)

    @staticmethod
    def _others(icons: IconSet, cache: Path) -> np.ndarray:
        if cache.exists():
            return np.load(cache, mmap_mode="r")
        from icons import rasterize

        names = sorted(name for name in icons.icons if not name.startswith("flag"))
        pictures = np.stack([np.asarray(on_white(rasterize(icons.named(name), SIZE))) for name in names])
        np.save(cache, pictures)
        return pictures

    def _crop(self) -> np.ndarray:
        r = self.random
        pool = self.concepts if r.random() < 0.5 else self.others
        picture = pool[r.randrange(len(pool))]
        if r.random() < 0.4:
            side = r.randint(CROP, SIZE)
            small = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
            canvas = np.full((SIZE, SIZE, 3), 255, np.uint8)
            top, left = r.randint(0, SIZE - side), r.randint(0, SIZE - side)
            canvas[top : top + side, left : left + side] = small
            picture = canvas
        for _ in range(4):  # an empty corner teaches little
            top, left = r.randint(0, SIZE - CROP), r.randint(0, SIZE - CROP)
            crop = picture[top : top + CROP, left : left + CROP]
            if (crop < 250).mean() > 0.15:
                break
        if r.random() < 0.5:
            crop = crop[:, ::-1]
        if r.random() < 0.5:
            crop = crop[..., r.sample(range(3), 3)]
        if r.random() < 0.1:
            crop = 255 - crop
        return np.ascontiguousarray(crop)

    def batches(self, size: int) -> Iterator[Tensor]:
        while True:
            crops = np.stack([self._crop() for _ in range(size)])
            yield torch.from_numpy(crops).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix of each filter bank (Jordan et al. 2024).

    Small convolution nets learn in far fewer steps with it than with AdamW.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonalize(p.grad.lerp(buffer, group["momentum"]).flatten(1))
                rows, columns = update.shape
                p.mul_(1 - 0.01 * group["lr"])
                p.add_(update.view_as(p), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    @staticmethod
    def orthogonalize(matrix: Tensor) -> Tensor:
        x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        return x.T if matrix.shape[0] > matrix.shape[1] else x


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    error = output - target
    chroma = error - error.mean(1, keepdim=True)
    return (
        error.abs().mean()
        + error.square().mean()
        + 2.0 * F.avg_pool2d(error, 8).abs().mean()
        + 0.7 * chroma.abs().mean()
    )


def psnr(vae: nn.Module, pictures: np.ndarray) -> tuple[float, float]:
    """Mean and worst PSNR (dB, pictures in 0..1) of reconstructions from the latent mode."""
    values = []
    with torch.no_grad():
        for start in range(0, len(pictures), 16):
            x = torch.from_numpy(pictures[start : start + 16]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
            mse = ((x - y) / 2).square().mean((1, 2, 3))
            values += (-10 * mse.log10()).tolist()
    return float(np.mean(values)), float(np.min(values))


def train(args: argparse.Namespace) -> AutoencoderKL:
    """All of the autoencoder, then its decoder alone, for sharper pictures of settled latents."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    icons = IconSet(args.twemoji)
    concepts = concept_pictures(icons, read_concepts())
    crops = Crops(icons, concepts, args.seed, args.out / "icons.npy")
    vae = build_vae()
    run_phase(vae, "all", args.steps, 1.0, crops, concepts, args)
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    run_phase(vae, "decoder", args.decoder_steps, 0.5, crops, concepts, args)
    return vae.eval()


def make_optimizers(vae: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the filter banks inside, AdamW for the rest of what is trained."""
    banks, rest = [], []
    for name, p in vae.named_parameters():
        inside = p.ndim == 4 and "conv_in" not in name and "conv_out" not in name
        if p.requires_grad:
            (banks if inside else rest).append(p)
    return [Muon(banks, args.muon_lr), torch.optim.AdamW(rest, args.lr, (0.9, 0.99), weight_decay=0.01)]


def run_phase(
    vae: AutoencoderKL,
    phase: str,
    steps: int,
    rate: float,
    crops: Crops,
    concepts: np.ndarray,
    args: argparse.Namespace,
) -> None:
    """Train what requires gradients; ``vae`` holds the averaged weights afterwards. Resumes by itself."""
    ema = {name: p.detach().clone() for name, p in vae.state_dict().items()}
    optimizers = make_optimizers(vae, args)
    base = [group["lr"] * rate for o in optimizers for group in o.param_groups]
    first, checkpoint = 0, args.out / f"{phase}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(saved["model"])
        ema, first = saved["ema"], saved["step"]
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    crops.random.seed(f"{args.seed} {phase} {first}")
    batches, started = crops.batches(args.batch), time.time()
    for step in range(first, steps):
        share = min(1, (step + 1) / 100) * min(1, (steps - step) / (0.5 * steps))
        for group, lr in zip((g for o in optimizers for g in o.param_groups), base, strict=True):
            group["lr"] = lr * share
        x = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(y.float(), x) + args.kl * kl
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizers[1].param_groups for p in g["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, p in vae.state_dict().items():
                ema[name].lerp_(p, 1 - decay)
        last = step + 1 == steps
        if (step + 1) % args.log == 0 or last:
            speed = (time.time() - started) / (step + 1 - first)
            print(
                f"{phase} {step + 1} loss {loss.item():.4f} kl {kl.item():.2f} {speed:.2f} s/step", flush=True
            )
        if (step + 1) % args.save == 0 or last:
            averaged = build_vae()
            averaged.load_state_dict(ema)
            quality = psnr(averaged, concepts[:: args.eval_stride])
            print("psnr mean {:.2f} worst {:.2f} dB".format(*quality), flush=True)
            state = {"model": vae.state_dict(), "ema": ema, "step": step + 1}
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({**state, "optimizers": [o.state_dict() for o in optimizers]}, temporary)
            temporary.replace(checkpoint)
    vae.load_state_dict(ema)


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Fold each latent channel's mean and deviation into the weights.

    Latents times 0.13025, drawn from the posterior, then have zero mean and unit deviation, as samplers and
    hosts expect. The posterior's own variance counts: a channel that the decoder learned to do without is
    nearly all noise, and must not be blown up to the size of the others.
    """
    posteriors = []
    for start in range(0, len(pictures), 16):
        x = torch.from_numpy(pictures[start : start + 16]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        posteriors.append(vae.encode(x).latent_dist)
    latents, variance = torch.cat([p.mean for p in posteriors]), torch.cat([p.var for p in posteriors])
    mean = latents.mean((0, 2, 3))
    std = (latents.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt()
    print("deviation of each channel's mean, relative to the whole:", (latents.std((0, 2, 3)) / std).tolist())
    factor = 1 / (std * SCALE)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= factor[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * factor
    quant.bias[4:] += 2 * factor.log()
    # z = z' / factor + mean, so W z + b = (W / factor) z' + (W mean + b)
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= factor[None, :, None, None]


@torch.no_grad()
def preview_factors(vae: AutoencoderKL, pictures: np.ndarray) -> list[list[float]]:
    """Least squares from scaled latents (and 1) to RGB in -1..1: 5 rows of 3, the last one the bias."""
    x = torch.from_numpy(pictures[::4]).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    latents = vae.encode(x).latent_dist.mode() * SCALE
    rgb = F.avg_pool2d(x, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    solution = torch.linalg.lstsq(torch.cat([flat, torch.ones(len(flat), 1)], 1), rgb).solution
    return [[round(v, 4) for v in row] for row in solution.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--twemoji", type=Path, required=True, help="the unpacked @iconify-json/twemoji package"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--lr", type=float, default=1.5e-3, help="AdamW: norms, biases, first and last layers"
    )
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--kl", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--log", type=int, default=50)
    parser.add_argument("--save", type=int, default=200)
    parser.add_argument("--eval-stride", type=int, default=8)
    args = parser.parse_args()
    vae = train(args)
    concepts = concept_pictures(IconSet(args.twemoji), read_concepts())
    before = psnr(vae, concepts)
    normalize_latents(vae, concepts)
    after = psnr(vae, concepts)
    print(
        "all concepts: mean {:.2f} worst {:.2f} dB; with normalized latents {:.2f}".format(*before, after[0])
    )
    options = {"norm_num_groups": 32, "scaling_factor": SCALE, "preview_rgb": preview_factors(vae, concepts)}
    info = dataclasses.replace(ModelInfo.published("v1.2"), vae=options)
    save_safetensors(
        args.out / "vae.safetensors", diffusers_to_ldm(vae.state_dict()), {"hydit.config": info.to_json()}
    )


if __name__ == "__main__":
    main()
