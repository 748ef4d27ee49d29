"""One training step of our DiT and of diffusers' HunyuanDiT2DModel, in the same loop on the same data.

Both begin with one set of random weights and get the same latents, noise, timesteps and cached text features;
the loop is the trainer's: its module from latents to losses (autocast with bf16), AdamW, clipped gradients.
Steps alternate in one process; the ratio is the median of the paired ratios. Seconds are of the processor.

    python benchmarks/step.py --write docs/benchmarks.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import HunyuanDiT2DModel
from forward import make_models
from report import machine, publish, table
from torch import Tensor, nn

from hydit_core.diffusion.schedule import Schedule
from hydit_core.facts import DiffusionConfig
from hydit_core.model.config import DiTConfig
from hydit_core.model.rope import rope_table
from hydit_core.text.features import TextFeatures
from hydit_core.train.objectives.base import DiffusionModule
from hydit_core.train.sections import ObjectiveSection

HEADER = ("precision", "size", "ours, s", "diffusers, s", "ratio", "losses differ by")


class Theirs(nn.Module):
    """diffusers' model, called as ours is."""

    def __init__(self, network: HunyuanDiT2DModel, config: DiTConfig, size: int) -> None:
        super().__init__()
        self.network = network
        side = size // 8 // config.patch_size
        self.rope = rope_table(side, side, config.head_dim, base=config.rope_base)

    def encode_context(self, *features: Tensor, image_meta_size: Tensor | None) -> tuple[Tensor, ...]:
        return features

    def forward(self, x: Tensor, t: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        bert, bert_mask, t5, t5_mask = context
        return self.network(
            x,
            t.to(x.dtype),
            encoder_hidden_states=bert,
            text_embedding_mask=bert_mask,
            encoder_hidden_states_t5=t5,
            text_embedding_mask_t5=t5_mask,
            image_rotary_emb=self.rope,
            return_dict=False,
        )[0]


def data(config: DiTConfig, size: int, batch: int, step: int) -> dict[str, Any]:
    """A step's latents, noise, timesteps and text features."""
    generator = torch.Generator().manual_seed(step)
    shape = batch, config.in_channels, size // 8, size // 8
    latents, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    lengths = (config.text_len, config.text_dim), (config.t5_len, config.t5_dim)
    bert, t5 = (torch.randn(batch, *length, generator=generator) for length in lengths)
    bert_mask, t5_mask = torch.ones(batch, config.text_len), torch.ones(batch, config.t5_len)
    bert_mask[:, 20:] = t5_mask[:, 25:] = 0
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return {"latents": latents, "noise": noise, "t": t, "text": TextFeatures(bert, bert_mask, t5, t5_mask)}


def stepper(network: nn.Module, bf16: bool) -> Callable[[dict[str, Any]], float]:
    """What makes a step of training and gives its loss."""
    module: Any = DiffusionModule(network, None, Schedule(DiffusionConfig()), ObjectiveSection()).train()
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def step(inputs: dict[str, Any]) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = module(**inputs).loss.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def seconds(step: Callable[[dict[str, Any]], float], inputs: dict[str, Any]) -> tuple[float, float]:
    begun = time.process_time()
    loss = step(inputs)
    return time.process_time() - begun, loss


def measure(config: DiTConfig, size: int, precision: str, batch: int, runs: int) -> list[str]:
    """One row of the table; the first step of each warms up."""
    ours, theirs = make_models(config, torch.float32)
    theirs.load_state_dict({name: t.clone() for name, t in theirs.state_dict().items()}, assign=True)
    steps = [stepper(net, precision == "bf16") for net in (ours, Theirs(theirs, config, size))]
    times: list[list[float]] = []
    differences = []
    for number in range(runs + 1):
        inputs = data(config, size, batch, number)
        pair = [0.0, 0.0]
        losses = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            pair[which], losses[which] = seconds(steps[which], inputs)
        times.append(pair)
        differences.append(abs(losses[0] - losses[1]) / losses[1])
    times = times[1:]
    medians = [statistics.median(pair[which] for pair in times) for which in (0, 1)]
    ratio = statistics.median(one / other for one, other in times)
    tokens = (size // 8 // config.patch_size) ** 2
    return [
        precision,
        f"{size} px, {tokens} tokens",
        *(f"{value:.2f}" for value in medians),
        f"{ratio:.3f}",
        f"{max(differences):.0e}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=4, help="depth of the model, even")
    parser.add_argument("--hidden", type=int, default=1408, help="width; the MLP is 4.3637 times as wide")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="picture side in pixels")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5, help="timed steps of each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the section of this document")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = DiTConfig(hidden_size=args.hidden, depth=args.blocks, mlp_hidden=int(args.hidden * 4.3637))
    rows = []
    for precision in args.precisions:
        for size in args.sizes:
            rows.append(measure(config, size, precision, args.batch, args.runs))
            print(*rows[-1], flush=True)
    setting = (
        f"Width {args.hidden}, {args.blocks} blocks, {args.batch} pictures a step, all weights trained. "
        f"Seconds of the processor are medians of {args.runs} alternating steps in one process, the ratio is "
        "the median of the paired ratios (below 1: ours is faster). Losses: at most, in all steps."
    )
    text = f"{setting}\n\nMachine: {machine()}.\n\n{table(HEADER, rows)}"
    publish(args.write, "step", "Training step: our DiT and diffusers' HunyuanDiT2DModel", text)


if __name__ == "__main__":
    main()
