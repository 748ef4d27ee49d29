"""The nodes that have help, and whether a page shows the rows that the pack adds to them."""

from __future__ import annotations

from typing import Any

import pytest
from find_host import ROOT


def rows_are_shown(page: Any) -> bool:
    """Nodes 2.0 of the oldest frontend (a hidden experiment there) shows no HTML widgets at all."""
    return not (page.nodes2 and page.server.version.startswith("0.3."))


def documented() -> list[str]:
    return sorted(path.name for path in (ROOT / "web" / "docs").iterdir() if path.name.startswith("HyDiT"))


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
