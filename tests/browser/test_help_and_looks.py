"""Help pages, and every node as it is when it is new: nothing of it covers anything else."""

from __future__ import annotations

import re
from typing import Any

import pytest
from extension_rows import documented, rows_are_shown
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
    page.page.wait_for_timeout(500)
    page.screenshot("help")
    assert panel.locator("img").evaluate("(picture) => picture.complete && picture.naturalWidth > 0")
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


OVERLAPS = """() => {
  const box = (element) => element.getBoundingClientRect();
  const elements = [...document.querySelectorAll(".hydit-row")];
  const rows = elements.map(box).filter((a) => a.width && a.height);
  const fields = [...document.querySelectorAll("textarea")].map(box);
  const hit = (a, b) =>
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const wrong = [];
  const widgets = app.graph.nodes.flatMap((n) => n.widgets ?? []);
  const wanted = widgets.filter((w) => w.name.startsWith("hydit_") && w.computeSize(200)[1] > 0).length;
  if (rows.length !== wanted) wrong.push(`${rows.length} of ${wanted} rows`);
  // Of its element in Nodes 2.0: what is kept of a node's size there need not be what it covers.
  const inside = (element, a) => {
    const node = element.closest("[data-node-id]");
    if (node) {
      const b = box(node);
      return a.left > b.left && a.right < b.right && a.top > b.top && a.bottom < b.bottom;
    }
    const [x, y] = app.canvas.convertEventToCanvasOffset({ clientX: a.left, clientY: a.bottom });
    return app.graph.nodes.some(
      ({ pos, size }) => x > pos[0] && x < pos[0] + size[0] && y > pos[1] && y < pos[1] + size[1] + 2);
  };
  for (const element of elements) {
    const a = box(element);
    if (!a.width || !a.height) continue;
    if (fields.some((b) => hit(a, b))) wrong.push("over a text field");
    if (!inside(element, a)) wrong.push("outside its node");
  }
  return [wrong, rows.length];
}"""


def nothing_overlaps(page: Any) -> int:
    """No row of ours lies outside its node, nor over another widget of HTML. Returns how many there are."""
    page.page.mouse.move(1300, 850)  # the page places its HTML when it draws
    for _ in range(20):
        page.page.wait_for_timeout(250)
        wrong, rows = page.evaluate(OVERLAPS)
        if not wrong:
            return rows
    pytest.fail(f"{wrong}; see {page.screenshot('overlap')}")
