"""Train the small image encoder of the embedded model's IP-Adapter.

    python vision.py --icons work/icons.zip --out work/vision

It is a CLIP vision transformer like the published one, only narrower, shallower and for 60 px pictures. What
makes its embedding say what a picture shows: from the embedding of any view of an icon (smaller, elsewhere,
on another ground), a linear layer has to draw the icon itself, 16 x 16 pixels large. Every tenth icon that
has no name is held out and measures it. After an interruption the same command goes on. The icons are what
``scenes.py icons`` wrote.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import Icons
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hydit_core.image_prompts.encoder import ImageEncoder
from hydit_core.image_prompts.pixels import MEAN, STD
from hydit_core.weights.vision_layout import VISION_KEY, VisionConfig
from hydit_core.weights.writer import save_safetensors

CONFIG = VisionConfig(width=128, layers=3, heads=4, mlp_hidden=384, patch=12, size=60, embed_dim=128)
STORED, LOOK = 64, 16
"""Sides in pixels: of the icons in memory, of what is drawn from an embedding."""
SAVED_EVERY = 25


class Pictures(NamedTuple):
    """Icons (N, 4, 64, 64) in 0..1, the colors multiplied by the last channel, which is the coverage."""

    trained: Tensor
    held_out: Tensor


def read_pictures(path: Path) -> Pictures:
    """All icons, in the order of their names."""
    icons = Icons(path)
    trained, held_out = [], []
    for number, name in enumerate(sorted(icons.archive.namelist())):
        small = icons.read(name).resize((STORED, STORED), Image.Resampling.LANCZOS)
        rgba = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        unnamed = name.startswith("other/")
        (held_out if unnamed and number % 10 == 0 else trained).append(rgba)
    return Pictures(*(_premultiplied(torch.stack(group)) for group in (trained, held_out)))


def _premultiplied(rgba: Tensor) -> Tensor:
    values = rgba.float() / 255
    return torch.cat([values[:, :3] * values[:, 3:], values[:, 3:]], 1)


def looks(icons: Tensor) -> Tensor:
    """What is to be drawn from the embedding: (N, 3, 16, 16) in 0..1, on white."""
    return F.adaptive_avg_pool2d(icons[:, :3] + 1 - icons[:, 3:], LOOK)


class Views:
    """Random views, a function of seed and step."""

    def __init__(self, seed: int, step: int) -> None:
        self.random = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.random)

    def choose(self, icons: Tensor, count: int) -> Tensor:
        """Different icons; half of them mirrored, two of five in other colors."""
        chosen = icons[torch.randperm(len(icons), generator=self.random)[:count]]
        mirrored = self.uniform(count) < 0.5
        chosen[mirrored] = chosen[mirrored].flip(3)
        order = self.uniform(count, 3).argsort(1)
        order[self.uniform(count) > 0.4] = torch.arange(3)
        order = torch.cat([order, torch.full((count, 1), 3)], 1)
        return chosen.gather(1, order[:, :, None, None].expand_as(chosen))

    def view(self, icons: Tensor, size: int) -> Tensor:
        """Icons smaller and elsewhere, on white or, one in six, on another color: (N, 3, size, size)."""
        count = len(icons)
        side = 0.7 + 0.35 * self.uniform(count)
        room = (1 - side).abs()
        middle = (self.uniform(count, 2) * 2 - 1) * room[:, None]
        zero = torch.zeros(count)
        rows = [[1 / side, zero, -middle[:, 0] / side], [zero, 1 / side, -middle[:, 1] / side]]
        theta = torch.stack([torch.stack(row, 1) for row in rows], 1)
        grid = F.affine_grid(theta, [count, 4, size, size], align_corners=False)
        seen = F.grid_sample(icons, grid, align_corners=False)
        ground = torch.ones(count, 3)
        other = self.uniform(count) < 1 / 6
        ground[other] = self.uniform(count, 3)[other]
        return seen[:, :3] + (1 - seen[:, 3:]) * ground[:, :, None, None]


class Trained(nn.Module):
    """The encoder with what only training needs: the linear layer that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ImageEncoder(CONFIG)
        self.draw = nn.Linear(CONFIG.embed_dim, 3 * LOOK * LOOK)

    def embed(self, views: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        embedding: Tensor = self.encoder((views - mean) / std)
        return embedding

    def loss(self, icons: Tensor, views: Tensor) -> Tensor:
        """Of drawing the icons from their views."""
        return (self.drawn(self.embed(views)) - looks(icons)).square().mean()

    def drawn(self, embeddings: Tensor) -> Tensor:
        """(N, 3, 16, 16). The layer gets values of deviation 1, where embeddings have a length of 1."""
        wide: Tensor = self.draw(embeddings * CONFIG.embed_dim**0.5)
        return wide.float().view(-1, 3, LOOK, LOOK)


def optimizers(model: Trained, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for the rest."""
    inside = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    ids = {id(p) for p in inside}
    rest = [p for p in model.parameters() if id(p) not in ids]
    muon = torch.optim.Muon(inside, lr=muon_lr, momentum=0.95, weight_decay=0.01)
    return [muon, torch.optim.AdamW(rest, lr, (0.9, 0.98), weight_decay=0.01)]


@torch.no_grad()
def measure(model: Trained, pictures: Pictures) -> dict[str, float]:
    """Of held-out icons: how many are found by a view of them, among all icons; how well they are drawn."""
    held, views = pictures.held_out, Views(1, 0)
    everything = torch.cat([held, pictures.trained])
    white = everything[:, :3] + 1 - everything[:, 3:]
    plain = torch.cat([model.embed(F.interpolate(x, CONFIG.size, mode="area")) for x in white.split(256)])
    seen = model.embed(views.view(held, CONFIG.size))
    found = (seen @ plain.T).argmax(1) == torch.arange(len(held))
    error = (model.drawn(seen) - looks(held)).square().mean()
    return {"found": round(found.float().mean().item(), 3), "psnr": round(-10 * error.log10().item(), 2)}


def train(args: argparse.Namespace, pictures: Pictures) -> Trained:
    torch.manual_seed(args.seed)
    model = Trained()
    opened = optimizers(model, args.lr, args.muon_lr)
    rates = [o.param_groups[0]["lr"] for o in opened]
    average = {name: value.clone() for name, value in model.state_dict().items()}
    state, start, before = args.out / "state.pt", 0, 0.0
    if state.is_file():
        kept = torch.load(state, weights_only=True)
        start, before, average = kept["step"], kept["seconds"], kept["average"]
        model.load_state_dict(kept["model"])
        for optimizer, values in zip(opened, kept["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    begun = time.monotonic() - before
    for step in range(start, args.steps):
        views = Views(args.seed, step + 1)
        icons = views.choose(pictures.trained, args.batch)
        seen = views.view(icons, CONFIG.size)
        share = min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - step / args.steps))
        for optimizer, rate in zip(opened, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
        # The fused attention's backward pass takes half of the time at so few tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            loss = model.loss(icons, seen)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in opened:
            optimizer.step()
            optimizer.zero_grad()
        decay = min(0.995, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - decay)
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == args.steps:
            record = {"step": step + 1, "seconds": round(time.monotonic() - begun, 1)}
            record["loss"] = round(loss.item(), 5)
            with open(args.out / "vision.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
            values = {"step": step + 1, "seconds": record["seconds"], "average": average}
            values |= {"model": model.state_dict(), "optimizers": [o.state_dict() for o in opened]}
            torch.save(values, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
    model.load_state_dict(average)
    return model


def save(encoder: ImageEncoder, path: Path) -> None:
    """Under transformers' names, in half precision, with what the shapes do not tell."""
    tensors = {name: value.detach().half() for name, value in encoder.model.state_dict().items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith("position_ids")}
    save_safetensors(path, tensors, {"format": "pt", VISION_KEY: CONFIG.to_json()})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--icons", type=Path, required=True, help="what scenes.py icons wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW: norms, biases, outer layers")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = read_pictures(args.icons)
    print(f"{len(pictures.trained)} icons to train, {len(pictures.held_out)} held out", flush=True)
    model = train(args, pictures)
    print(measure(model, pictures), flush=True)
    save(model.encoder, args.out / "image_encoder.safetensors")


if __name__ == "__main__":
    main()
