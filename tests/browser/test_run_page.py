"""The page of training runs in Chromium: no error, quick with many records, in both languages and schemes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from comfy_page import find_browser
from PIL import Image

from hydit_core.train.page.write import write

# In a process of its own: the thread of these tests has a Playwright already.
LOOK = """
import json, sys, time
from playwright.sync_api import sync_playwright

browser, url, scheme, locale, shot = sys.argv[1:]
said = []
with sync_playwright() as playwright:
    chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
    page = chromium.new_context(
        viewport={"width": 1280, "height": 800}, color_scheme=scheme, locale=locale
    ).new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    start = time.monotonic()
    page.goto(url)
    page.wait_for_selector("#charts canvas")
    seconds = time.monotonic() - start
    found = {
        "seconds": seconds,
        "charts": page.locator("[data-chart]").count(),
        "title": page.locator("#title").inner_text(),
        "run": page.locator(".run").first.inner_text(),
        "background": page.evaluate("getComputedStyle(document.body).backgroundColor"),
        "wide": page.evaluate("document.documentElement.scrollWidth > innerWidth"),
        "left": page.locator(".sheets img").first.get_attribute("alt"),
        "right": page.locator(".sheets img").last.get_attribute("alt"),
        "keys": page.locator("#config tbody tr").count(),
    }
    page.screenshot(path=shot, full_page=True)
    page.locator("#right").select_option("1")
    found["chosen"] = page.locator(".sheets img").last.get_attribute("alt")
    page.locator("#log").check()
    page.locator("#all").check()
    found["all_keys"] = page.locator("#config tbody tr").count()
    page.locator("#language").click()
    found["other"] = page.locator("#title").inner_text()
    page.set_viewport_size({"width": 500, "height": 800})
    page.wait_for_timeout(200)
    found["narrow"] = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    found["said"] = said
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of 100,000 records and of a few."""
    folder = tmp_path_factory.mktemp("runs")
    for name, count in (("long", 100_000), ("short", 300)):
        run = folder / name
        (run / "samples").mkdir(parents=True)
        with (run / "metrics.jsonl").open("w") as file:
            for step in range(1, count + 1):
                loss = 0.1 + math.exp(-step / 1000) + 0.02 * math.sin(step)
                line = {"step": step, "loss": loss, "grad_norm": 1 / step, "lr": 1e-4, "seconds": step / 2}
                file.write(json.dumps(line) + "\n")
            file.write(json.dumps({"step": count, "val_loss": 0.2, "val_mse_t0_249": 0.1}) + "\n")
        for index, step in enumerate((0, 100, 200)):
            picture = Image.new("RGB", (900, 300), (80 * index, 120, 200))
            picture.save(run / f"samples/step_{step:08d}.png")
    state = folder / "short/checkpoints/step_00000300"
    state.mkdir(parents=True)
    config = {"model": {"init_from": "m"}, "data": {"sources": [{"path": "p"}], "resolution": 64}}
    config["run"] = {"output_dir": "o", "steps": 400, "batch_size": 1}
    (state / "state.json").write_text(json.dumps({"config": config, "progress": {}}), "utf-8")
    path = folder / "report.html"
    write([folder / "long", folder / "short"], path)
    return path


@pytest.mark.parametrize(("scheme", "locale"), [("light", "en-US"), ("dark", "zh-CN")])
def test_the_page_of_two_runs(report: Path, scheme: str, locale: str, tmp_path: Path) -> None:
    browser = find_browser()
    assert browser
    look = [sys.executable, "-c", LOOK, browser, report.as_uri(), scheme, locale, str(tmp_path / "page.png")]
    done = subprocess.run(look, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["said"] == []
    assert found["seconds"] < 2
    assert found["charts"] == 5
    titles = ["Training runs", "训练记录"]
    assert [found["title"], found["other"]] == (titles if locale == "en-US" else titles[::-1])
    assert "long" in found["run"]
    assert found["background"] == ("rgba(0, 0, 0, 0)" if scheme == "light" else "rgb(20, 23, 27)")
    assert not found["wide"] and not found["narrow"]
    step = "step" if locale == "en-US" else "步"
    assert [found[key] for key in ("left", "right", "chosen")] == [f"{step} {n}" for n in (0, 200, 100)]
    assert 5 <= found["keys"] < 15 and found["all_keys"] > 60
