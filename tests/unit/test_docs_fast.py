"""docs/fast.md and docs/zh/fast.md say what docs/fast/*.json say."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

from hydit_core.compare.figures import Pair, Result
from hydit_core.compare.report import content
from hydit_core.compare.store import Cost

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def benchmark(name: str):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # for dataclasses
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


@pytest.fixture(scope="module")
def pages():
    return benchmark("fast_pages")


@pytest.fixture(scope="module")
def told():
    return json.loads((DOCS / "fast" / "forecast_counts.json").read_text("utf-8"))


def between(page: str, name: str) -> str:
    return page.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


@pytest.mark.parametrize("language", [0, 1])
def test_the_tables_are_those_of_the_figures(pages, language):
    page = (DOCS / pages.PAGES[language]).read_text("utf-8")
    for name, text in pages.sections(DOCS / "fast", language).items():
        assert between(page, name) == text.strip(), f"{name}: run python benchmarks/fast_pages.py"


def test_the_tables_figures_are_in_the_json(told):
    """Read back from the page, without the functions that wrote it."""
    page = (DOCS / "fast.md").read_text("utf-8")
    (row,) = re.findall(r"^\| 50 steps, `safe` +\| (.+) \|$", page, re.M)
    calls, mean, worst, peer, _ = (cell.strip() for cell in row.split("|"))
    safe = next(row for row in told["dpmpp_2m, 50 steps, against 200"] if row["forecast"] == "safe")
    plain = next(row for row in told["plain steps, against 200"] if row["calls"] == 30)
    assert (float(calls), float(mean), float(worst)) == (
        safe["calls"], round(safe["mean_dB"], 1), round(safe["worst_dB"], 1)
    )  # fmt: skip
    assert peer == f"{plain['mean_dB']:.1f} (30)"


def report(folder: Path, tmp_path: Path) -> dict:
    """What hydit compare writes, of three sides whose figures are known."""
    drawn = {"drawn": {"steps": 11, "sampler": "euler", "cfg": 1, "dtype": "fp32"}}
    figures = {"psnr": 20.0, "ssim": 0.9, "haarpsi": 0.8, "flip": None}
    pairs = [
        Pair(f"{i}", "a", i, (8, 8), tmp_path, tmp_path, mse, figures) for i, mse in enumerate((0.01, 0.03))
    ]
    cost = [Cost(1.0, 8, 16)] * 2
    results = [
        Result("a", "", drawn, [], cost, 2, 2),
        Result("b", f"--lora '{ROOT}/x/t.safetensors' --steps 8", drawn, pairs, cost, 1, 2),
        Result("c", "--peer-steps b", drawn, pairs, cost),
        Result("noise floor (bf16)", "", drawn, pairs, cost),
    ]
    folder.mkdir(parents=True)
    found = content(results, "a")
    (folder / "compare.json").write_text(json.dumps(found), "utf-8")
    Image.new("RGB", (8, 8)).save(folder / "sheet.png")
    return found


def test_a_set_that_arrives_fills_its_place_in_both_pages(pages, tmp_path):
    docs = shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns("images"))
    for page in pages.PAGES:
        text = (docs / page).read_text("utf-8")
        assert "<!-- set quantised -->" in text
    report(tmp_path / "out" / "few_steps", tmp_path)
    benchmark("fast").publish("few_steps", tmp_path / "out", docs / "fast")
    pages.write(docs)
    for page, at, peer in (("fast.md", "fast", "11 plain"), ("zh/fast.md", "../fast", "11 个普通步")):
        text = between((docs / page).read_text("utf-8"), "set few_steps")
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in text.split("\n")
            if line[:1] == "|"
        ]
        assert all(len(row) == len(rows[0]) for row in rows)
        # 0.02 is the mean of both errors, 17 dB; 0.03 the worst.
        assert rows[3] == [
            "b", "`--lora t.safetensors --steps 8`", "8.0", "16.0", "17.0 (15.2)", "0.900 (0.900)",
            "0.800 (0.800)", "", "1 / 2",
        ]  # fmt: skip
        assert rows[2][2:] == ["8.0", "16.0", "", "", "", "", "2 / 2"]
        assert peer in rows[4][1] and "bf16" in rows[5][1] and rows[4][8] == ""
        assert f"({at}/few_steps.json)" in text and f"({at}/few_steps.png)" in text
        # Where both are, seen from the page.
        assert all(((docs / page).parent / f"{at}/few_steps.{kind}").is_file() for kind in ("json", "png"))
    before = [(docs / page).read_text("utf-8") for page in pages.PAGES]
    pages.write(docs)
    assert [(docs / page).read_text("utf-8") for page in pages.PAGES] == before


def test_every_set_has_a_place_and_no_name_of_another_file(pages, tmp_path):
    assert set(pages.SETS) == benchmark("fast").sets(tmp_path).keys()
    assert not {*pages.SETS} & {"forecast_counts"}


def test_a_count_is_met_by_the_most_calls_that_are_no_more(pages):
    row = {"mean_dB": 1.0, "worst_dB": 1.0, "mse": 1.0}
    told = {
        "plain steps, against 200": [{**row, "calls": float(count)} for count in range(16, 41)],
        "dpmpp_2m, 50 steps, against 200": [
            {**row, "forecast": name, "calls": calls}
            for name, calls in (("off", 20.0), (0.1, 18.0), ("fast", 23.6), ("safe", 29.7))
        ],
        "40 steps, against 200": [{**row, "forecast": 0.1, "calls": 15.0}],
    }
    met = {count: said for count, _, said, _ in pages.at_counts(told)}
    assert met[16] == met[17] == "0.1, 40" and met[18] == met[23] == "0.1"
    assert met[24] == met[29] == "fast" and met[30] == met[40] == "safe"
