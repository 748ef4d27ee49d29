"""The bars of HyDiTLayerWeights: dragged, drawn, typed, kept, sent. PreviewAny shows what Python received."""

from __future__ import annotations

import json
from typing import Any

import pytest
from weight_bars import (
    LAYERS,
    NODE,
    bar,
    drag,
    drawn,
    point,
    received,
    said,
    shows_rows,
    text,
    typed,
    undo,
    workflow,
    written,
)

from hydit_core.errors import ConfigError
from hydit_core.layer_weights import CURVES, LayerWeights

#: As ComfyUI's page has it, next to ours: the addresses of a pack's files begin with its folder's name.
READ = """async (cases) => {
  const { readWeights } = await import("/extensions/hydit/js/layer_curves.js");
  return cases.map(([text, count]) => {
    const { values, problem } = readWeights(text, count);
    return problem ? null : values;
  });
}"""

TEXTS = [
    "uniform(1)", "decay", "decay(0.9)", "DECAY( 0.9 )", "decay (0.5)", "linear(2)", "ease", "ease(-2)",
    "only-early", "only-late(0.5)", "0.5", " 0.5 ", "(0.5)", "[0.1, 0.2]", "0.1 0.2;0.3", "0.1,,0.2,",
    "1\n2\t3", "1e3", "1_0", "_1", "1__0", ".5", "5.", "+.5", "-1", "--1", "1.e2, 2", "1e", "0x10",
    "1,2,x", "1e400", "inf", "nan", "", "  ", "()[]", "((1))", "foo", "foo(1)", "constructor", "toString(1)",
    "uniform(x)", "uniform()", "uniform(1", "uniform(nan)", "decay(1e300)", "decay(-0.5)", "decay(0)",
]  # fmt: skip


@pytest.fixture
def bars_page(either_page):
    shows_rows(either_page)
    return either_page


@pytest.fixture
def ready(bars_page):
    bars_page.load(workflow())
    bars_page.fit()
    bars_page.page.mouse.move(1400, 800)
    bars_page.page.locator(".hydit-bars-plot").wait_for()
    yield bars_page
    ours = [line for line in bars_page.console if "hydit" in line.lower() and line.startswith("error")]
    assert not ours and not [error for error in bars_page.errors if "hydit" in error.lower()]


def test_what_is_dragged_is_what_python_has_after_saving_and_loading(ready, tmp_path):
    drag(ready, (5, 1.0), (5, 1.5))
    drag(ready, (12, 0.2), (12, 0.25))
    drag(ready, (1, 1.9), (1, 2.4))  # beyond the top
    drag(ready, (19, 0.3), (19, -0.4))  # and the bottom
    weights = written(ready)
    assert len(weights) == LAYERS and weights[0] == 2 and weights[18] == 0
    assert weights[4] == pytest.approx(1.5, abs=0.05) and weights[11] == pytest.approx(0.25, abs=0.05)
    assert all(w == 1 for i, w in enumerate(weights) if i not in (0, 4, 11, 18))

    # Drawn with Shift, in few and large movements: no bar is skipped.
    ready.page.keyboard.down("Shift")
    drag(ready, (6, 0.1), (10, 1.7), steps=2)
    ready.page.keyboard.up("Shift")
    line = [0.1, 0.5, 0.9, 1.3, 1.7]
    assert written(ready)[5:10] == pytest.approx(line, abs=0.05)
    assert written(ready)[:5] == weights[:5] and written(ready)[10:] == weights[10:]
    weights = written(ready)
    assert drawn(ready) == weights

    ready.page.mouse.move(*point(ready, 5, 0.5))
    tip = ready.page.locator(".hydit-bars-tip").first
    assert tip.inner_text() == f"Layer 5: {weights[4]:g}"
    ready.screenshot("weights-dragged")

    saved = ready.workflow()
    (kept,) = (node["widgets_values"] for node in saved["nodes"] if node["type"] == NODE)
    assert kept == [text(ready), LAYERS]
    assert ready.prompt()["1"]["inputs"] == {"weights": text(ready), "layers": LAYERS}
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(saved), encoding="utf-8")
    ready.reload()
    ready.drop(path, nodes=2)
    ready.fit()
    ready.page.mouse.move(1400, 800)
    ready.page.locator(".hydit-bars-plot").wait_for()
    assert drawn(ready) == weights == written(ready)
    assert received(ready) == weights


def test_a_click_and_a_curve_become_a_list(ready):
    typed(ready, "decay(0.825)")
    curve = LayerWeights.parse("decay(0.825)").resolve(LAYERS)
    assert drawn(ready) == pytest.approx(curve, abs=5e-5)
    drag(ready, (3, 1.25))
    weights = written(ready)
    assert weights[2] == pytest.approx(1.25, abs=0.03)
    del weights[2], curve[2]
    assert weights == pytest.approx(curve, abs=5e-5)
    assert len(text(ready)) < 9 * LAYERS


def test_keys(ready):
    bars = ready.page.get_by_role("group", name="Weight of each layer", exact=True).get_by_role("slider")
    assert bars.count() == LAYERS
    assert bars.evaluate_all("(bars) => bars.filter((bar) => bar.tabIndex === 0).length") == 1
    press = ready.page.keyboard.press
    focused = "() => document.activeElement.getAttribute('aria-label')"
    value = "() => Number(document.activeElement.getAttribute('aria-valuenow'))"
    bar(ready, 1).focus()
    for key, layer, weight in [
        ("ArrowLeft", 1, 1), ("ArrowRight", 2, 1), ("ArrowUp", 2, 1.05), ("PageUp", 2, 1.3),
        ("ArrowDown", 2, 1.25), ("PageDown", 2, 1), ("Home", 2, 0), ("ArrowDown", 2, 0), ("End", 2, 2),
        ("PageUp", 2, 2), ("Shift+ArrowRight", 3, 2), ("ArrowRight", 4, 1), ("PageDown", 4, 0.75),
        ("Delete", 4, 1), ("PageUp", 4, 1.25),
    ]:  # fmt: skip
        press(key)
        assert (ready.evaluate(focused), ready.evaluate(value)) == (f"Layer {layer}", weight), key
    assert written(ready) == [1, 2, 2, 1.25] + [1] * 15
    assert ready.evaluate("() => app.graph.nodes.length") == 2  # nothing was deleted
    for _ in range(4, LAYERS):
        press("ArrowRight")
    press("ArrowRight")
    assert ready.evaluate(focused) == "Layer 19"
    # From the keyboard alone: out to the first curve and back.
    press("Tab")
    assert ready.evaluate("() => document.activeElement.textContent") == "uniform"
    press("Shift+Tab")
    assert ready.evaluate(focused) == "Layer 19"
    assert ready.page.locator(".hydit-bars-tip").first.inner_text() == "Layer 19: 1"
    ready.screenshot("weights-keys")


def test_a_held_key_is_one_step_of_the_undo_history(ready):
    bar(ready, 3).focus()
    for _ in range(4):
        ready.page.keyboard.down("ArrowUp")
    ready.page.keyboard.up("ArrowUp")
    ready.page.wait_for_timeout(300)
    assert written(ready)[2] == 1.2
    undo(ready)
    assert text(ready) == "uniform(1)" and drawn(ready) == [1] * LAYERS
    undo(ready, "Control+y")
    assert written(ready)[2] == 1.2 == drawn(ready)[2]


def test_a_drag_is_one_step_of_the_undo_history(ready):
    drag(ready, (4, 1), (4, 0.5), steps=8)
    first = text(ready)
    drag(ready, (9, 1), (9, 1.6), steps=8)
    second = text(ready)
    ready.page.wait_for_timeout(300)
    undo(ready)
    assert text(ready) == first and drawn(ready) == written(ready)
    undo(ready)
    assert text(ready) == "uniform(1)" and drawn(ready) == [1] * LAYERS
    undo(ready, "Control+y")
    undo(ready, "Control+y")
    assert text(ready) == second and drawn(ready) == written(ready)
    assert ready.page.locator(".hydit-bars-plot").count() == 1
    # The bars are those of the node that is there now.
    drag(ready, (2, 1), (2, 0.2))
    assert written(ready)[1] == pytest.approx(0.2, abs=0.05) == drawn(ready)[1]


def test_a_drag_that_is_cut_off(ready):
    drag(ready, (4, 1), (4, 0.5), drop=False)
    ready.evaluate("() => window.dispatchEvent(new Event('blur'))")
    kept = text(ready)
    ready.page.mouse.move(*point(ready, 4, 1.8))
    assert text(ready) == kept and written(ready)[3] == pytest.approx(0.5, abs=0.05)
    ready.page.mouse.up()
    drag(ready, (4, 0.5), (4, 1.5), drop=False)
    assert written(ready)[3] == pytest.approx(1.5, abs=0.05)
    ready.page.keyboard.press("Escape")
    assert text(ready) == kept == ", ".join(f"{value:g}" for value in drawn(ready))
    ready.page.mouse.up()
    ready.page.wait_for_timeout(300)
    undo(ready)
    assert text(ready) == "uniform(1)"

    # The node goes while it is dragged: the page's undo history goes on.
    drag(ready, (6, 1), (6, 0.5), drop=False)
    ready.evaluate("() => app.graph.remove(app.graph.getNodeById(1))")
    ready.page.mouse.up()
    tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker.changeCount"
    assert ready.evaluate(f"() => {tracker}") == 0


def test_curves_are_a_click_away(ready):
    buttons = ready.page.get_by_role("group", name="Curves").get_by_role("button")
    names = ["uniform", "decay", "linear", "ease", "early half", "late half", "reset"]
    assert buttons.all_inner_texts() == names
    pressed = ready.page.locator(".hydit-weights-presets button[aria-pressed=true]")
    for i, (name, (_, number)) in enumerate(CURVES.items()):
        buttons.nth(i).click()
        assert text(ready) == f"{name}({number:g})"
        assert drawn(ready) == pytest.approx(LayerWeights.parse(name).resolve(LAYERS), abs=5e-5)
        assert pressed.all_inner_texts() == [names[i]]
    assert received(ready) == LayerWeights.parse("only-late").resolve(LAYERS)
    drag(ready, (2, 0.5))
    assert pressed.count() == 0
    buttons.last.click()
    assert text(ready) == "uniform(1)" and pressed.all_inner_texts() == ["uniform"]
    ready.page.mouse.click(1300, 800)
    ready.page.wait_for_timeout(500)
    undo(ready)
    assert len(written(ready)) == LAYERS


def test_what_is_typed_is_drawn_and_kept(ready):
    typed(ready, "0.5", 7)
    assert drawn(ready) == [0.5] * 7
    typed(ready, "0.123456789, 3, -0.5, 1", 4)
    assert drawn(ready) == [0.1235, 3, -0.5, 1]
    assert bar(ready, 2).get_attribute("aria-valuemax") == "3"
    drag(ready, (4, 0.5))
    assert text(ready).startswith("0.123456789, 3, -0.5, ")  # what was not moved is as it was typed
    bar(ready, 2).press("ArrowUp")
    assert written(ready)[1] == 3
    bar(ready, 2).press("ArrowDown")
    assert written(ready)[1] == 2.95
    ready.screenshot("weights-beyond")

    typed(ready, "0.2, 0.4", 4)
    assert said(ready) == "2 numbers for 4 layers" and drawn(ready) == [0.2, 0.4, 1, 1]
    drag(ready, (3, 0.5))
    assert said(ready).startswith("Drag") and written(ready)[:2] == [0.2, 0.4] and len(written(ready)) == 4
    typed(ready, "0.2, 0.4, 0.6", 2)
    assert said(ready) == "3 numbers for 2 layers" and drawn(ready) == [0.2, 0.4]
    typed(ready, "as you like")
    assert said(ready).startswith("Not understood") and drawn(ready) == [1, 1]
    typed(ready, "decay(1e300)")
    assert said(ready) == "Beyond all numbers for 2 layers"
    typed(ready, "linear", 1)
    drag(ready, (1, 0.5))
    assert drawn(ready) == written(ready) and len(written(ready)) == 1
    typed(ready, "ease", 64)
    assert len(drawn(ready)) == 64
    drag(ready, (64, 1), (64, 0.5))
    assert written(ready)[63] == pytest.approx(0.5, abs=0.05) and len(written(ready)) == 64


def test_the_text_field_of_the_page(ready):
    """Typed by hand where the page has a field for it, and shown there when bars move."""
    if not ready.nodes2:
        ready.page.mouse.dblclick(*canvas_point(ready, 200, 40))
        field = ready.page.locator(".graphdialog input, .graphdialog textarea").first
        field.fill("only-early(0.5)")
        field.press("Enter")
    else:
        field = ready.page.locator("[data-node-id='1'] input[type=text], [data-node-id='1'] input").first
        assert field.input_value() == "uniform(1)"
        field.fill("only-early(0.5)")
        field.press("Enter")
        field.blur()
    ready.settle()
    assert text(ready) == "only-early(0.5)"
    assert drawn(ready) == LayerWeights.parse("only-early(0.5)").resolve(LAYERS)
    drag(ready, (1, 1.5))
    if ready.nodes2:
        ready.settle()
        assert field.input_value() == text(ready)


def canvas_point(page: Any, x: float, y: float) -> list[float]:
    return page.evaluate(
        """([x, y]) => {
          const { scale, offset } = app.canvas.ds;
          const box = app.canvas.canvas.getBoundingClientRect();
          return [box.x + (x + offset[0]) * scale, box.y + (y + offset[1]) * scale];
        }""",
        [x, y],
    )


def test_the_page_reads_as_python_reads(page):
    cases = [(given, count) for given in TEXTS for count in (1, 2, 3, LAYERS, 64)]
    for (given, count), found in zip(cases, page.evaluate(READ, cases), strict=True):
        try:
            wanted = LayerWeights.parse(given).resolve(count)
        except ConfigError:
            wanted = None
        assert found == (wanted if wanted is None else pytest.approx(wanted, rel=1e-12)), (given, count)


def test_copies_have_bars_of_their_own(ready):
    drag(ready, (3, 0.5))
    ready.evaluate("""() => {
      app.canvas.selectItems([app.graph.getNodeById(1)]);
      app.canvas.copyToClipboard();
      app.canvas.pasteFromClipboard({ position: [0, 420] });
    }""")
    ready.settle(3)
    ready.fit()
    ready.page.mouse.move(1400, 800)
    ready.page.wait_for_timeout(500)
    assert drawn(ready, 0) == drawn(ready, 1) == written(ready)
    ready.page.mouse.click(*point(ready, 7, 0.25, which=1))
    texts = """() => app.graph.nodes.filter((n) => n.widgets?.[0].name === "weights")
      .map((n) => n.widgets[0].value)"""
    before, after = ready.evaluate(texts)
    assert before == text(ready) and before != after
    assert float(after.split(", ")[6]) == pytest.approx(0.25, abs=0.05)
    assert drawn(ready, 0) == written(ready)
    assert drawn(ready, 1) == [float(part) for part in after.split(", ")]


def test_linked_weights_cannot_be_dragged(bars_page):
    linked = [{"name": "weights", "type": "STRING", "link": 9, "widget": {"name": "weights"}}]
    graph = workflow("decay(0.9)", inputs=linked)
    graph["nodes"].append(
        {"id": 3, "type": "PrimitiveString", "pos": [0, 400], "size": [300, 90], "order": 2, "inputs": [],
         "outputs": [{"name": "STRING", "type": "STRING", "links": [9]}], "properties": {}, "flags": {},
         "mode": 0, "widgets_values": ["linear(0.5)"]}
    )  # fmt: skip
    graph["links"].append([9, 3, 0, 1, 0, "STRING"])
    bars_page.load(graph)
    bars_page.fit()
    bars_page.page.mouse.move(1400, 800)
    bars_page.page.locator(".hydit-bars-plot").wait_for()
    assert said(bars_page) == "The weights come from another node"
    drag(bars_page, (4, 0.5), (4, 1.5))
    assert text(bars_page) == "decay(0.9)"
    bars = bars_page.page.locator(".hydit-bars").get_by_role("slider")
    assert bars.evaluate_all("(bars) => bars.every((bar) => bar.tabIndex < 0)")
    curves = bars_page.page.locator(".hydit-weights-presets")
    assert curves.get_by_role("button", disabled=True).count() == 7
    bars_page.screenshot("weights-linked")
    assert received(bars_page) == LayerWeights.parse("linear(0.5)").resolve(LAYERS)
    bars_page.evaluate("() => app.graph.getNodeById(1).disconnectInput(0)")
    bars_page.settle()
    assert said(bars_page).startswith("Drag")
    drag(bars_page, (4, 0.5), (4, 1.5))
    assert written(bars_page)[3] == pytest.approx(1.5, abs=0.05)
