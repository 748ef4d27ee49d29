"""How HyDiTLayerWeights looks: in light and dark, in Chinese; and what stands on the ControlNet's loader."""

from __future__ import annotations

import pytest
from weight_bars import (
    point,
    shows_rows,
    workflow,
)


@pytest.fixture
def bars_page(either_page):
    shows_rows(either_page)
    return either_page


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  // What lies behind, then the color over it.
  const mixed = (...colors) => {
    for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
    const light = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  };
  const style = (selector) => getComputedStyle(document.querySelector(selector));
  const behind = (() => {
    const node = document.querySelector("[data-node-id='1']");
    for (let at = document.querySelector(".hydit-weights"); at && node?.contains(at); at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
    return node ? getComputedStyle(node).backgroundColor : LiteGraph.NODE_DEFAULT_BGCOLOR;
  })();
  const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const on = mixed(behind);
  return {
    bars: ratio(on, mixed(behind, style(".hydit-bars-bar i").backgroundColor)),
    words: ratio(on, mixed(behind, style(".hydit-weights-said").color)),
    scale: ratio(on, mixed(behind, style(".hydit-bars-scale").color)),
    buttons: ratio(mixed(style(".hydit-weights-presets button:last-child").backgroundColor),
      mixed(style(".hydit-weights-presets button:last-child").color)),
    pressed: ratio(mixed(style(".hydit-weights-presets button[aria-pressed=true]").backgroundColor),
      mixed(style(".hydit-weights-presets button[aria-pressed=true]").color)),
    tip: ratio(mixed(style(".hydit-bars-tip").backgroundColor), mixed(style(".hydit-bars-tip").color)),
  };
}"""


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_readable_in_light_and_dark(bars_page, theme):
    bars_page.reload(**{"Comfy.ColorPalette": theme})
    bars_page.load(workflow("ease(1.5)"))
    bars_page.fit()
    bars_page.page.mouse.move(1400, 800)
    bars_page.page.locator(".hydit-bars-plot").wait_for()
    bars_page.page.mouse.move(*point(bars_page, 12, 0.5))
    bars_page.screenshot(f"weights-{theme}")
    contrasts = bars_page.evaluate(CONTRASTS)
    bars_page.reload()
    wanted = {"bars": 3, "words": 4.5, "scale": 4, "buttons": 4.5, "pressed": 3, "tip": 4.5}
    assert not {name: found for name, found in contrasts.items() if found < wanted[name]}


@pytest.mark.parametrize("nodes2", [False, True], ids=["classic", "nodes2"])
def test_in_chinese(open_page, nodes2):
    page = open_page(nodes2=nodes2, locale="zh")
    shows_rows(page)
    page.load(workflow("decay(0.825)"))
    page.fit()
    page.page.mouse.move(1400, 800)
    page.page.get_by_role("group", name="各层权重").wait_for()
    assert page.page.get_by_role("slider", name="第 19 层").count() == 1
    page.page.mouse.move(*point(page, 19, 0.5))
    assert page.page.locator(".hydit-bars-tip").inner_text() == "第 19 层：0.825"
    buttons = page.page.get_by_role("group", name="曲线").get_by_role("button")
    assert buttons.all_inner_texts() == ["均匀", "衰减", "线性", "平滑", "仅前半", "仅后半", "重置"]
    assert buttons.evaluate_all("(all) => all.every((one) => one.scrollWidth <= one.clientWidth + 1)")
    page.screenshot("weights")


def test_the_control_loader_shows_what_it_found(either_page):
    loader = {"id": 1, "type": "HyDiTControlNetLoader", "pos": [0, 0], "size": [380, 130], "order": 0,
              "mode": 0, "inputs": [],
              "outputs": [{"name": "CONTROL_NET", "type": "CONTROL_NET", "links": [1]}],
              "properties": {}, "flags": {},
              "widgets_values": ["[embedded] hydit-icons-128-canny", "default"]}  # fmt: skip
    graph = workflow()
    graph["nodes"][0] = loader
    graph["links"][0][5] = "CONTROL_NET"
    either_page.load(graph)
    either_page.fit()
    either_page.server.free()
    either_page.page.wait_for_timeout(500)
    either_page.queue().check()
    told = either_page.evaluate("() => app.graph.getNodeById(1).properties.hydit_version")
    assert "ControlNet" in told and "canny" in told and "fp16" in told
    shows_rows(either_page)
    row = either_page.page.locator(".hydit_version").first
    row.get_by_text(told).wait_for(timeout=10_000)
    either_page.screenshot("control-loader")
