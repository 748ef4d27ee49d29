"""The tables of docs/fast.md and docs/zh/fast.md, made of docs/fast/*.json.

    python benchmarks/fast_pages.py     after benchmarks/forecast.py or benchmarks/fast.py

Both pages have a place for each of them, between ``<!-- NAME -->`` and ``<!-- /NAME -->``. Where a set of
benchmarks/fast.py has left no JSON yet, its place is empty.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from report import table, write_section

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ("fast.md", "zh/fast.md")
"""In English and Chinese, in ``DOCS``."""
SETS = ("forecast", "forecast_ddpm", "cfg_end", "quantised", "few_steps")
"""Of benchmarks/fast.py."""
COUNTS = range(16, 41)

FORECASTS = {
    "dpmpp_2m, 50 steps, against 200": ("50 steps", "50 步"),
    "other prompts and seeds, against 200": ("other prompts, 50 steps", "另一些提示词，50 步"),
    "25 steps, against 200": ("25 steps", "25 步"),
    "with a lora, 50 steps, against 200": ("with a LoRA, 50 steps", "加 LoRA，50 步"),
    "with a controlnet, 50 steps, against 200": ("with a ControlNet, 50 steps", "加 ControlNet，50 步"),
    "with a lora, 50 steps, against all calls": ("with a LoRA ¹", "加 LoRA ¹"),
    "with a controlnet, 50 steps, against all calls": ("with a ControlNet ¹", "加 ControlNet ¹"),
    "ddpm, 50 steps, against all calls": ("ddpm, 50 steps ¹", "ddpm，50 步 ¹"),
    "ddim, eta 0.5, 50 steps, against all calls": (
        "ddim with eta 0.5, 50 steps ¹",
        "ddim，eta 0.5，50 步 ¹",
    ),
}
SHOWN = ("off", "safe", "fast", 0.1, 0.002)
PLAIN = "plain steps, against 200"
PEERS = {
    "dpmpp_2m, 50 steps, against 200": PLAIN,
    "with a lora, 50 steps, against 200": "with a lora, plain steps, against 200",
    "with a controlnet, 50 steps, against 200": "with a controlnet, plain steps, against 200",
}
FORECASTS_HEAD = (
    ("drawn", "calls", "mean, dB", "worst, dB", "plain steps: mean, dB", "worst, dB"),
    ("画法", "调用次数", "平均（dB）", "最差（dB）", "同样次数的普通步：平均（dB）", "最差（dB）"),
)
COUNTS_HEAD = (
    ("calls", "plain: mean, dB", "worst, dB", "forecasts", "their calls", "mean, dB", "worst, dB", "error"),
    (
        "调用次数",
        "普通步：平均（dB）",
        "最差（dB）",
        "预测",
        "其调用次数",
        "平均（dB）",
        "最差（dB）",
        "误差比",
    ),
)
SET_HEAD = (
    ("side", "drawn", "calls", "passes", "PSNR, dB", "SSIM", "HaarPSI", "FLIP", "right"),
    ("方", "画法", "调用", "计算遍数", "PSNR（dB）", "SSIM", "HaarPSI", "FLIP", "画对"),
)
WORDS = {
    "own": ("as the model recommends", "按模型推荐"),
    "peer": ("{steps} plain steps, at the cost of {peer}", "与 {peer} 开销相同的 {steps} 个普通步"),
    "floor": ("{reference} in {kind}", "{reference} 用 {kind} 计算"),
    "alone": ("{reference}, drawn one by one", "{reference}，逐张绘制"),
    "said": (
        "By `python benchmarks/fast.py {name}`, {count} pictures a side against those of {reference}: means, "
        "and in brackets those of the worst 5 %. PSNR is of the mean square error; less FLIP is closer. "
        "[All figures]({at}.json).",
        "由 `python benchmarks/fast.py {name}` 测得：每方 {count} 张，与 {reference} 比较；"
        "数字为平均值，括号内为最差的 5%。PSNR 由平均平方误差算得；FLIP 越低越接近。[全部数据]({at}.json)。",
    ),
    "picture": ("Worst and median pairs of each side", "各方最差与居中的一对"),
}


def sections(found: Path, language: int) -> dict[str, str]:
    """What stands in each place of a page; ``found`` is the folder of the JSON, 0 English and 1 Chinese."""
    told = json.loads((found / "forecast_counts.json").read_text("utf-8"))
    made = {"forecast": forecasts(told, language), "forecast counts": counts(told, language)}
    for name in SETS:
        path = found / f"{name}.json"
        one = json.loads(path.read_text("utf-8")) if path.exists() else None
        made[f"set {name}"] = "" if one is None else evidence(name, one, language)
    return made


def forecasts(told: dict[str, Any], language: int) -> str:
    """What forecasts cost, beside plain steps of as many calls or a few more."""
    rows = []
    for name, said in FORECASTS.items():
        plain = {row["calls"]: row for row in told.get(PEERS.get(name, ""), [])}
        for row in told.get(name, []):
            if row["forecast"] not in SHOWN:
                continue
            count = min((calls for calls in plain if calls >= row["calls"]), default=None)
            peer = plain[count] if count and row["forecast"] != "off" else None
            rows.append(
                [
                    f"{said[language]}, `{row['forecast']}`",
                    f"{row['calls']:g}",
                    f"{row['mean_dB']:.1f}",
                    f"{row['worst_dB']:.1f}",
                    f"{peer['mean_dB']:.1f} ({count:g})" if peer else "",
                    f"{peer['worst_dB']:.1f}" if peer else "",
                ]
            )
    return table(FORECASTS_HEAD[language], rows)


def at_counts(told: dict[str, Any]) -> list[tuple[int, dict[str, Any], str, dict[str, Any]]]:
    """Plain steps at each count, and of the forecasts with no more calls the one with the most."""
    plain = {row["calls"]: row for row in told[PLAIN]}
    runs = [
        (f"{row['forecast']}{said}", row)
        for name, said in (("dpmpp_2m, 50 steps, against 200", ""), ("40 steps, against 200", ", 40"))
        for row in told.get(name, [])
        if row["forecast"] != "off"
    ]
    found = []
    for count in COUNTS:
        within = [(said, row) for said, row in runs if row["calls"] <= count]
        if count not in plain or not within:
            continue
        said, row = max(within, key=lambda one: one[1]["calls"])
        found.append((count, plain[count], said, row))
    return found


def counts(told: dict[str, Any], language: int) -> str:
    """Forecasts beside plain steps at every number of calls."""
    rows = [
        [
            str(count),
            *(f"{plain[key]:.1f}" for key in ("mean_dB", "worst_dB")),
            f"`{said}`",
            f"{row['calls']:g}",
            *(f"{row[key]:.1f}" for key in ("mean_dB", "worst_dB")),
            f"{row['mse'] / plain['mse']:.2f}",
        ]
        for count, plain, said, row in at_counts(told)
    ]
    return table(COUNTS_HEAD[language], rows)


def evidence(name: str, found: dict[str, Any], language: int) -> str:
    """One set of benchmarks/fast.py: what it is, the sides' figures, the picture."""
    reference = found["reference"]
    rows = [
        [
            side,
            label(side, one, reference, language),
            *(number(one["figures"].get(key), 1) for key in ("calls", "passes")),
            *(
                pair(one["figures"].get(key), 1 if "psnr" in key else 3)
                for key in ("psnr_of_mean_mse", "ssim", "haarpsi", "flip")
            ),
            f"{one['figures']['right']} / {one['figures']['judged']}" if "judged" in one["figures"] else "",
        ]
        for side, one in found["sides"].items()
    ]
    at = f"{'../' * PAGES[language].count('/')}fast/{name}"
    count = found["sides"][reference]["figures"]["pictures"]
    said = WORDS["said"][language].format(name=name, count=count, reference=reference, at=at)
    picture = f"![{WORDS['picture'][language]}]({at}.png)"
    return "\n\n".join((said, table(SET_HEAD[language], rows), picture))


def label(side: str, one: dict[str, Any], reference: str, language: int) -> str:
    """What a side is, without the places of files."""
    if side.startswith("noise floor"):
        kind = side.partition("(")[2].rstrip(")")
        words = WORDS["alone" if kind == "batch" else "floor"]
        return words[language].format(reference=reference, kind=kind)
    words = [Path(word).name for word in shlex.split(one["given"])]
    if not words:
        return WORDS["own"][language]
    if words[0] == "--peer-steps":
        return WORDS["peer"][language].format(steps=one["drawn"]["steps"], peer=words[1])
    return f"`{' '.join(words)}`"


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def pair(one: dict[str, float] | None, digits: int) -> str:
    return "" if one is None else f"{one['mean']:.{digits}f} ({one['worst']:.{digits}f})"


def write(docs: Path = DOCS) -> None:
    """Fill the places of both pages."""
    for language, page in enumerate(PAGES):
        for name, text in sections(docs / "fast", language).items():
            write_section(docs / page, name, text)


if __name__ == "__main__":
    write()
