"""Train the second edition's autoencoder: 256 px pictures to 4 x 32 x 32 latents and back.

    python train_vae.py --icons work/icons.zip --out work/vae --seconds 100
    python train_vae.py --icons work/icons.zip --out work/vae --device cpu --steps 4000 --batch 8 --crop 64

It is a plain AutoencoderKL with 64 channels on every level and norms of 32 groups, a shape that ComfyUI's own
VAE class builds too. All pictures stay on the device as bytes; crops are cut, scaled, mirrored and recolored
there. The last third trains the decoder alone, on latents that no longer move.

Plain squared error learns shapes long before colors (green turns grey, red turns orange); the pooled L1, the
chroma L1 and the random permutation of the color channels are there for the colors. The KL weight is small
enough that no latent channel dies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from icons import on_white
from scenes import SIZE, Icons, icon_pool, standard_picture
from things import Thing, read_things
from torch import Tensor, nn

from hydit_core.devices import choose_device
from hydit_core.facts import ModelInfo
from hydit_core.weights.vae_layout import diffusers_to_ldm
from hydit_core.weights.writer import save_safetensors

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


def thing_pictures(things: list[Thing], icons: Path) -> np.ndarray:
    """(N, 256, 256, 3) uint8, each thing as large as training shows it; drawn on every core."""
    with icon_pool(icons) as pool:
        return np.stack(pool.map(standard_picture, things, chunksize=8))


def other_pictures(icons: Icons) -> np.ndarray:
    return np.stack([np.asarray(on_white(icon)) for icon in icons.others()])


def as_input(pictures: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1."""
    return pictures.permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Crops:
    """Random square crops on the device: things three times in four, any other icon else."""

    def __init__(self, pictures: Tensor, things: int, crop: int, seed: int) -> None:
        self.pictures, self.things, self.crop = pictures, things, crop
        self.random = torch.Generator(pictures.device).manual_seed(seed)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random, device=self.pictures.device)

    def batch(self, size: int) -> Tensor:
        """(size, 3, crop, crop) in -1..1."""
        n, others = len(self.pictures), len(self.pictures) - self.things
        index = (self._uniform(size) * self.things).long()
        if others:
            other = self.things + (self._uniform(size) * others).long()
            index = torch.where(self._uniform(size) < 0.25, other, index)
        x = as_input(self.pictures[index.clamp(max=n - 1)])
        # An affine map per sample: how much of the picture a crop shows, where, mirrored or not. Things are
        # shrunk to 0.35 at most, as small things and groups of three are drawn.
        share = self.crop / SIZE
        u = self._uniform(size)
        zoom = torch.where(self._uniform(size) < 0.5, torch.ones_like(u), 1 / (0.35 + 0.65 * u))
        extent = share * zoom
        room = (1 - extent).clamp(min=0.0) * 0.9 + 0.02
        center = (self._uniform(size, 2) * 2 - 1) * room[:, None]
        flip = torch.where(self._uniform(size) < 0.5, -1.0, 1.0)
        zero = torch.zeros_like(extent)
        theta = torch.stack(
            [
                torch.stack([extent * flip, zero, center[:, 0]], 1),
                torch.stack([zero, extent, center[:, 1]], 1),
            ],
            1,
        )
        grid = F.affine_grid(theta, [size, 3, 2 * self.crop, 2 * self.crop], align_corners=False)
        # White outside the picture; twice the pixels and a mean of four, so that shrinking does not alias.
        x = F.grid_sample(x - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + 1
        x = F.avg_pool2d(x, 2)
        order = self._uniform(size, 3).argsort(1)
        plain = torch.arange(3, device=x.device).expand(size, 3)
        order = torch.where(self._uniform(size, 1) < 0.4, order, plain)
        x = x.gather(1, order[:, :, None, None].expand_as(x))
        sign = torch.where(self._uniform(size, 1, 1, 1) < 0.08, -1.0, 1.0)
        return (x * sign).contiguous()


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest semi-orthogonal matrix of each filter bank (Jordan et al. 2024).

    Banks of one shape are orthogonalized together: many small products are slow on a GPU.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), members in by_shape.items():
                gradients = torch.stack([p.grad.flatten(1) for p in members])
                key = self.state[members[0]]
                buffer = key.setdefault("momentum", torch.zeros_like(gradients))
                buffer.lerp_(gradients, 1 - group["momentum"])
                updates = self.orthogonalize(gradients.lerp(buffer, group["momentum"]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, update in zip(members, updates, strict=True):
                    p.mul_(1 - 0.01 * group["lr"]).sub_(update.view_as(p), alpha=scale)

    @staticmethod
    def orthogonalize(matrices: Tensor) -> Tensor:
        """(N, rows, columns)."""
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
        return x.mT if tall else x


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """Errors of pixels, of colors, of color over 8 x 8 pixels, and of edges."""
    error = output - target
    chroma = error - error.mean(1, keepdim=True)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (
        error.abs().mean()
        + 2.0 * error.square().mean()
        + 1.5 * F.avg_pool2d(error, 8).abs().mean()
        + 0.7 * chroma.abs().mean()
        + 0.25 * edges
    )


def autocast(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pictures: Tensor, batch: int = 32) -> tuple[Tensor, Tensor]:
    """(mean, variance) of the posteriors, each (N, 4, h, w) float32."""
    means, variances = [], []
    for part in pictures.split(batch):
        posterior = vae.encode(as_input(part)).latent_dist
        means.append(posterior.mean.float())
        variances.append(posterior.var.float())
    return torch.cat(means), torch.cat(variances)


@torch.no_grad()
def measure(vae: AutoencoderKL, pictures: Tensor, batch: int = 32) -> dict[str, object]:
    """PSNR (dB, pictures in 0..1), the latent channels, and how far mean colors are off (0..1)."""
    values, colors = [], []
    for part in pictures.split(batch):
        x = as_input(part)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.float().clamp(-1, 1)
        values += (-10 * ((x - y) / 2).square().mean((1, 2, 3)).log10()).tolist()
        inside = ((x < 0.9).any(1, keepdim=True)).float()
        off = ((x - y) / 2 * inside).sum((2, 3)) / inside.sum((2, 3)).clamp(min=1)
        colors += off.abs().amax(1).tolist()
    means, variances = latents_of(vae, pictures[:: max(1, len(pictures) // 200)], batch)
    std = means.std((0, 2, 3))
    return {
        "psnr": round(float(np.mean(values)), 2),
        "worst": round(float(np.min(values)), 2),
        "below_22": int((np.array(values) < 22).sum()),
        "worst_color": round(float(np.max(colors)), 4),
        "mean_std": [round(v, 4) for v in (std * SCALE).tolist()],
        "noise_share": [round(v, 4) for v in (variances.mean((0, 2, 3)).sqrt() / std).tolist()],
    }


class Run:
    """The two phases of training, for a number of steps or until the time is over."""

    def __init__(self, args: argparse.Namespace, pictures: Tensor, things: int) -> None:
        self.args, self.device = args, pictures.device
        self.crops = Crops(pictures, things, args.crop, args.seed)
        self.vae = build_vae().to(self.device)
        with torch.no_grad():
            self.vae.quant_conv.bias[
                4:
            ] = -6.0  # little noise from the start: so weak a KL term is slow to lower it
        if self.device.type == "cuda":
            self.vae.to(memory_format=torch.channels_last)
        self.ema = {name: p.detach().clone().float() for name, p in self.vae.state_dict().items()}
        self.started = time.monotonic()
        self.log = open(args.out / "vae.jsonl", "w", encoding="utf-8")  # noqa: SIM115

    def progress(self, step: int) -> float:
        """How much of the training is done, 0 to 1."""
        done = step / self.args.steps
        if self.args.seconds:
            done = max(done, (time.monotonic() - self.started) / self.args.seconds)
        return done

    def train(self) -> AutoencoderKL:
        args = self.args
        optimizers, base = self._optimizers()
        step, frozen = 0, False
        while (done := self.progress(step)) < 1:
            if done > args.decoder_from and not frozen:
                frozen = True
                self._freeze_encoder()
                optimizers, base = self._optimizers()
            self._set_rates(optimizers, base, step, done)
            loss, kl = self._step(optimizers, step)
            step += 1
            if step % args.log == 0:
                self._record(step, done, loss, kl, frozen)
        self._record(step, 1.0, loss, kl, frozen)
        self.log.close()
        self.vae.load_state_dict(self.ema)
        return self.vae.eval()

    def _freeze_encoder(self) -> None:
        """Keep the averaged encoder's latents as they are from here on."""
        self.vae.load_state_dict(self.ema)
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)

    def _optimizers(self) -> tuple[list[torch.optim.Optimizer], list[float]]:
        """Muon for the filter banks inside, AdamW for the rest of what is trained."""
        banks, rest = [], []
        for name, p in self.vae.named_parameters():
            inside = p.ndim == 4 and not any(n in name for n in ("conv_in", "conv_out", "quant_conv"))
            if p.requires_grad:
                (banks if inside else rest).append(p)
        args = self.args
        adam = torch.optim.AdamW(rest, args.lr, (0.9, 0.99), weight_decay=0.01, fused=True)
        optimizers: list[torch.optim.Optimizer] = [Muon(banks, args.muon_lr), adam]
        return optimizers, [group["lr"] for o in optimizers for group in o.param_groups]

    def _set_rates(
        self, optimizers: list[torch.optim.Optimizer], base: list[float], step: int, done: float
    ) -> None:
        """Linear up, constant, linear down before the encoder is frozen to a third, then down to nothing."""
        split = self.args.decoder_from
        if done < split:
            share = min(1.0, (step + 1) / 100) * min(1.0, 0.3 + 0.7 * (split - done) / (0.5 * split))
        else:
            share = 0.5 * (1 - done) / (1 - split)
        for group, lr in zip((g for o in optimizers for g in o.param_groups), base, strict=True):
            group["lr"] = lr * max(share, 0.0)

    def _step(self, optimizers: list[torch.optim.Optimizer], step: int) -> tuple[Tensor, Tensor]:
        x = self.crops.batch(self.args.batch)
        if self.device.type == "cuda":
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast(self.device):
            posterior = self.vae.encode(x).latent_dist
            y = self.vae.decode(posterior.sample()).sample
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(y.float(), x) + self.args.kl * kl
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizers[1].param_groups for p in g["params"]], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            live = [p.float() for p in self.vae.state_dict().values()]
            torch._foreach_lerp_(list(self.ema.values()), live, 1 - decay)
        return loss.detach(), kl.detach()

    def _record(self, step: int, done: float, loss: Tensor, kl: Tensor, frozen: bool) -> None:
        record = {
            "step": step,
            "done": round(done, 3),
            "seconds": round(time.monotonic() - self.started, 1),
            "loss": round(loss.item(), 5),
            "kl": round(kl.item(), 3),
            "phase": "decoder" if frozen else "all",
        }
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        print("vae", record, flush=True)


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the weights.

    Latents times 0.13025 then have zero mean and unit deviation, as samplers and hosts expect.
    """
    latents, variance = latents_of(vae, pictures)
    mean = latents.mean((0, 2, 3))
    # The posterior's own variance counts: a channel that is all noise must not be blown up.
    std = (latents.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt()
    factor = 1 / (std * SCALE)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4] *= factor[:, None, None, None]
    quant.bias[:4] = (quant.bias[:4] - mean) * factor
    quant.bias[4:] += 2 * factor.log()
    # z = z' / factor + mean, so W z + b = (W / factor) z' + (W mean + b)
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight /= factor[None, :, None, None]


@torch.no_grad()
def preview_factors(vae: AutoencoderKL, pictures: Tensor) -> list[list[float]]:
    """Least squares from scaled latents (and 1) to RGB in -1..1: 5 rows of 3, the last one the bias."""
    some = pictures[:: max(1, len(pictures) // 300)]
    latents = latents_of(vae, some)[0] * SCALE
    rgb = F.avg_pool2d(as_input(some), 8).permute(0, 2, 3, 1).reshape(-1, 3)
    flat = latents.permute(0, 2, 3, 1).reshape(-1, 4)
    ones = torch.ones(len(flat), 1, device=flat.device)
    solution = torch.linalg.lstsq(torch.cat([flat, ones], 1), rgb).solution
    return [[round(v, 4) for v in row] for row in solution.tolist()]


def save(vae: AutoencoderKL, pictures: Tensor, path: Path) -> None:
    options = {"norm_num_groups": 32, "scaling_factor": SCALE, "preview_rgb": preview_factors(vae, pictures)}
    info = dataclasses.replace(ModelInfo.published("v1.2"), vae=options)
    tensors = {name: t.cpu().contiguous() for name, t in diffusers_to_ldm(vae.state_dict()).items()}
    save_safetensors(path, tensors, {"hydit.config": info.to_json()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icons", type=Path, required=True, help="what scenes.py icons wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument("--seconds", type=float, default=0, help="at most; 0: by steps alone")
    parser.add_argument(
        "--decoder-from", type=float, default=0.7, help="the share after which only the decoder learns"
    )
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--crop", type=int, default=96, help="pixels, a multiple of 8")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="AdamW: norms, biases, outer layers")
    parser.add_argument("--muon-lr", type=float, default=0.012)
    parser.add_argument("--kl", type=float, default=3e-6)
    parser.add_argument("--things", type=int, default=0, help="only so many things, for a trial")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--log", type=int, default=50)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    own = thing_pictures(read_things()[: args.things or None], args.icons)
    others = own[:0] if args.things else other_pictures(Icons(args.icons))
    print(f"vae: {len(own)} things and {len(others)} other icons", flush=True)
    pictures = torch.from_numpy(np.concatenate([own, others])).to(device)
    run = Run(args, pictures, len(own))
    vae = run.train()
    normalize_latents(vae, pictures[: len(own)])
    save(vae, pictures[: len(own)], args.out / "vae.safetensors")
    report = measure(vae, pictures[: len(own)])
    print("vae", report, flush=True)
    (args.out / "vae_report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
