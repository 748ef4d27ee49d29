"""Help pages, and every node as it is when it is new: nothing of it covers anything else."""

from __future__ import annotations

import re
from typing import Any

import pytest
from extension_rows import documented, nothing_overlaps, rows_are_shown
from find_host import ROOT


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_help_pages(open_page, locale):
    """Every page is served where the panel looks for it; one is opened in the panel."""
    page = open_page(locale=locale)
    served = page.evaluate(
        """async ([kinds, locale]) => {
          const found = {};
          for (const kind of kinds) {
            const pack = LiteGraph.registered_node_types[kind].nodeData.python_module.split(".")[1];
            const answer = await fetch(app.api.fileURL(`/extensions/${pack}/docs/${kind}/${locale}.md`));
            found[kind] = answer.ok ? await answer.text() : null;
          }
          return found;
        }""",
        [documented(), locale],
    )
    docs = ROOT / "web" / "docs"
    for kind, text in served.items():
        assert text == (docs / kind / f"{locale}.md").read_text(encoding="utf-8")

    page.evaluate("""() => {
      const node = LiteGraph.createNode("HyDiTKSampler");
      app.graph.add(node);
      Object.assign(app.canvas.ds, { scale: 1, offset: [700, 250] });
      app.canvas.selectNode(node);
      app.canvas.onSelectionChange?.(app.canvas.selected_nodes);
      app.canvas.setDirty(true, true);
    }""")
    page.page.wait_for_timeout(500)
    page.page.get_by_test_id("info-button").click()
    panel = page.page.locator(".node-help-content")
    title = re.search("^# (.+)$", served["HyDiTKSampler"], re.M)
    panel.get_by_role("heading", name=title[1]).wait_for(timeout=10_000)
    page.page.wait_for_function(
        """() => [...document.querySelectorAll(".node-help-content img")]
            .some((picture) => picture.complete && picture.naturalWidth > 0)""",
        timeout=10_000,
    )
    page.screenshot("help")
    close = page.page.locator("[data-testid=properties-panel] button[aria-pressed=true]")
    (close.first if close.count() else page.page.get_by_test_id("info-button")).click()


def test_all_nodes_look_right(either_page):
    """For the eye: every node, in both languages, as it is when it is new."""
    look_at_all(either_page)


@pytest.mark.parametrize("nodes2", [False, True], ids=["classic", "nodes2"])
def test_all_nodes_look_right_in_chinese(open_page, nodes2):
    look_at_all(open_page(nodes2=nodes2, locale="zh"))


def look_at_all(page: Any) -> None:
    """Few at a time: when the page is zoomed out far it shows no HTML."""
    kinds, rows = documented(), 0
    for i in range(0, len(kinds), 6):
        page.load({"nodes": [], "links": [], "version": 0.4})
        show(page, kinds[i : i + 6])
        if rows_are_shown(page):
            rows += nothing_overlaps(page)
        page.screenshot(f"all-nodes-{i // 6 + 1}")
    assert rows >= 6 or not rows_are_shown(page)


def show(page: Any, kinds: list[str]) -> None:
    page.evaluate(
        """(kinds) => kinds.forEach((kind, i) => {
          const node = LiteGraph.createNode(kind);
          node.pos = [(i % 3) * 460, Math.floor(i / 3) * 460];
          app.graph.add(node);
        })""",
        kinds,
    )
    page.settle(len(kinds))
    page.fit()
