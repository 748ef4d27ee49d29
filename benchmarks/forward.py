"""One forward of our DiT against diffusers' HunyuanDiT2DModel: time, memory and difference, on the CPU.

Both models share one set of random weights and get the same inputs; runs alternate in one process, and the
ratio is the median of the paired ratios, so that a machine that slows down slows both. Both do a complete
forward: text projection and pooling (which ours does once per prompt in sampling) and image blocks.
diffusers gets its rotary table ready-made, as from its pipeline; ours computes it.

    python benchmarks/forward.py
    python benchmarks/forward.py --write docs/benchmarks.md

measures width 1408, 4 blocks, 512 and 1024 px in fp32 and bf16.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import HunyuanDiT2DModel
from report import machine, publish, table, with_peak_memory
from torch import Tensor

from hydit_core.facts import ModelInfo
from hydit_core.model.config import DiTConfig
from hydit_core.model.dit import DiT
from hydit_core.model.rope import rope_table
from hydit_core.weights.diffusers_config import transformer_config
from hydit_core.weights.layouts import from_tencent

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADER = (
    "dtype",
    "size",
    "ours, s",
    "diffusers, s",
    "ratio",
    "ours, GFLOP/s",
    "diffusers, GFLOP/s",
    "matmul peak, GFLOP/s",
    "ours, MiB",
    "diffusers, MiB",
    "max difference / std",
)
WARM_UP_SIZE = 64  # so that libraries' one-time allocations do not count as memory of the first forward
TIMESTEP = 500  # exact in bfloat16, which diffusers casts it to


class Result(NamedTuple):
    """Seconds and bytes of one forward each, and how far the outputs differ."""

    ours: float
    theirs: float
    ratio: float
    our_peak: float | None
    their_peak: float | None
    difference: float


def make_models(config: DiTConfig, dtype: torch.dtype) -> tuple[DiT, HunyuanDiT2DModel]:
    """Our DiT with random weights in every tensor, and diffusers' sharing their memory."""
    generator = torch.Generator().manual_seed(0)
    ours = DiT(config).eval().requires_grad_(False)
    ours.initialize(generator)
    for parameter in ours.parameters():
        if not parameter.any():  # zero at the start of training
            parameter.normal_(0, 0.02, generator=generator)
    ours.to(dtype)
    options = transformer_config(config, ModelInfo.published(config.version))
    options.pop("_class_name")
    with torch.device("meta"):
        theirs = HunyuanDiT2DModel(**options).eval().requires_grad_(False)
    view = from_tencent(ours.state_dict(), "diffusers")
    theirs.load_state_dict({key: view[key] for key in view}, strict=True, assign=True)
    return ours, theirs


def make_calls(
    ours: DiT, theirs: HunyuanDiT2DModel, size: int, batch: int, dtype: torch.dtype
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """The two forwards, from latents and text features in ``dtype`` to (batch, 8, size / 8, size / 8)."""
    config = ours.config
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator).to(dtype)

    x = randn(config.in_channels, size // 8, size // 8)
    bert, t5 = randn(config.text_len, config.text_dim), randn(config.t5_len, config.t5_dim)
    bert_mask, t5_mask = torch.ones(batch, config.text_len), torch.ones(batch, config.t5_len)
    bert_mask[:, 20:] = t5_mask[:, 25:] = 0
    t = torch.full((batch,), float(TIMESTEP))
    side = size // 8 // config.patch_size
    rope = rope_table(side, side, config.head_dim, base=config.rope_base)

    def run_ours() -> Tensor:
        return ours(x, t, ours.encode_context(bert, bert_mask, t5, t5_mask))

    def run_theirs() -> Tensor:
        return theirs(
            x,
            t.to(dtype),
            encoder_hidden_states=bert,
            text_embedding_mask=bert_mask,
            encoder_hidden_states_t5=t5,
            text_embedding_mask_t5=t5_mask,
            image_rotary_emb=rope,
            return_dict=False,
        )[0]

    return run_ours, run_theirs


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(run_ours: Callable[[], Tensor], run_theirs: Callable[[], Tensor], runs: int) -> Result:
    """Memory and difference from one run of each, which warms up the shapes; then alternating timed runs."""
    our_output, our_peak = with_peak_memory(run_ours)
    their_output, their_peak = with_peak_memory(run_theirs)
    difference = (our_output - their_output).float().abs().max() / their_output.float().std()
    times: list[tuple[float, float]] = []
    for i in range(runs):
        if i % 2 == 0:
            ours, theirs = seconds(run_ours), seconds(run_theirs)
        else:
            theirs, ours = seconds(run_theirs), seconds(run_ours)
        times.append((ours, theirs))
    return Result(
        statistics.median(ours for ours, _ in times),
        statistics.median(theirs for _, theirs in times),
        statistics.median(ours / theirs for ours, theirs in times),
        our_peak,
        their_peak,
        difference.item(),
    )


def matmul_peak(config: DiTConfig, tokens: int, dtype: torch.dtype, runs: int) -> float:
    """FLOP/s of a square product or the model's largest one (fc1 on ``tokens``), whichever is faster."""
    shapes = [(2048, 2048, 2048), (tokens, config.hidden_size, config.mlp_hidden)]
    best = 0.0
    for rows, inner, columns in shapes:
        a, b = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
        product = functools.partial(torch.nn.functional.linear, a, b)
        product()
        fastest = min(seconds(product) for _ in range(runs))
        best = max(best, 2 * rows * inner * columns / fastest)
    return best


def flops(config: DiTConfig, tokens: int, batch: int) -> float:
    """Floating-point operations of one forward (a multiply-add counts as two), without norms and the like."""
    d, n, text = config.hidden_size, tokens, config.text_len + config.t5_len
    per_block = (
        8 * n * d**2  # self-attention: q, k, v and output projections
        + 4 * n**2 * d  # scores and weighted sum
        + 4 * n * d**2  # cross-attention: q and output projections
        + 4 * text * config.text_dim * d  # text keys and values
        + 4 * n * text * d  # scores and weighted sum
        + 4 * n * d * config.mlp_hidden
    )
    skips = config.num_controls * 4 * n * d**2
    project_t5 = 2 * config.t5_len * config.t5_hidden * (config.t5_dim + config.text_dim)
    pool = 4 * (config.t5_len + 1) * config.t5_dim**2
    return batch * (config.depth * per_block + skips + project_t5 + pool)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=4, help="depth of the model, even")
    parser.add_argument("--hidden", type=int, default=1408, help="width; the MLP is 4.3637 times as wide")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="picture side in pixels")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=2, help="2 is one picture with guidance")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the section of this document")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    config = DiTConfig(hidden_size=args.hidden, depth=args.blocks, mlp_hidden=int(args.hidden * 4.3637))
    rows = []
    with torch.inference_mode():
        for name in args.dtypes:
            ours, theirs = make_models(config, DTYPES[name])
            for call in make_calls(ours, theirs, WARM_UP_SIZE, args.batch, DTYPES[name]):
                call()
            for size in args.sizes:
                rows.append(measure(ours, theirs, size, name, args.batch, args.runs))
                print(f"{name} {size} px: ratio {rows[-1][4]}", flush=True)
            del ours, theirs
    setting = (
        f"Width {args.hidden}, {args.blocks} blocks, batch {args.batch}. Seconds are medians of {args.runs} "
        "alternating runs in one process, the ratio is the median of the paired ratios (below 1: ours is "
        "faster). MiB: peak memory above that before the forward, weights not counted."
    )
    text = f"{setting}\n\nMachine: {machine()}.\n\n{table(HEADER, rows)}"
    publish(args.write, "forward", "Forward pass: our DiT and diffusers' HunyuanDiT2DModel", text)


def measure(ours: DiT, theirs: HunyuanDiT2DModel, size: int, dtype: str, batch: int, runs: int) -> list[str]:
    """One row of the table."""
    config = ours.config
    tokens = (size // 8 // config.patch_size) ** 2
    result = compare(*make_calls(ours, theirs, size, batch, DTYPES[dtype]), runs)
    work = flops(config, tokens, batch)
    peak = matmul_peak(config, batch * tokens, DTYPES[dtype], runs)

    def mebibytes(value: float | None) -> str:
        return "not measured" if value is None else f"{value / 2**20:.0f}"

    return [
        dtype,
        f"{size} px, {tokens} tokens",
        f"{result.ours:.3f}",
        f"{result.theirs:.3f}",
        f"{result.ratio:.3f}",
        f"{work / result.ours / 1e9:.0f}",
        f"{work / result.theirs / 1e9:.0f}",
        f"{peak / 1e9:.0f}",
        mebibytes(result.our_peak),
        mebibytes(result.their_peak),
        f"{result.difference:.1e}",
    ]


if __name__ == "__main__":
    main()
