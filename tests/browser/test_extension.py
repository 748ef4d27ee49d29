"""What the pack adds to ComfyUI's page: web/js, locales and help pages, with the embedded model."""

from __future__ import annotations

import json
import re
from itertools import count
from typing import Any

import pytest
from extension_rows import documented, rows_are_shown
from find_host import ROOT

MODEL = "[embedded] hydit-icons-128"
SIZES = [(1024, 1024), (1280, 1280), (128, 128), (1024, 768), (1152, 864), (1280, 960), (768, 1024)]
SIZES += [(864, 1152), (960, 1280), (1280, 768), (768, 1280)]
LONG = "a red apple on the left " * 8
NUMBERS = count()


def node(number: int, kind: str, pos: list[int], size: list[int], values: list[Any], **more: Any) -> dict:
    slots = {"inputs": [], "outputs": [], "properties": {}, "flags": {}, "order": number, "mode": 0}
    return {"id": number, "type": kind, "pos": pos, "size": size, "widgets_values": values} | slots | more


def link_in(name: str, kind: str, link: int | None) -> dict:
    return {"name": name, "type": kind, "link": link}


def link_out(name: str, kind: str, *links: int) -> dict:
    return {"name": name, "type": kind, "links": list(links)}


def workflow() -> dict:
    """Checkpoint -> text -> report, and an empty latent beside them. Runs in a moment: nothing is sampled.

    The text is another one each time, so that it is encoded.
    """
    text = f"{LONG}{next(NUMBERS)}"
    loader = [link_out("MODEL", "MODEL"), link_out("CLIP", "CLIP", 1), link_out("VAE", "VAE")]
    encoded = [link_out("CONDITIONING", "CONDITIONING"), link_out("report", "STRING", 2)]
    latent = [link_out("LATENT", "LATENT")]
    return {
        "last_node_id": 4, "last_link_id": 2, "version": 0.4, "config": {}, "extra": {}, "groups": [],
        "links": [[1, 1, 1, 2, 0, "CLIP"], [2, 2, 1, 3, 0, "STRING"]],
        "nodes": [
            node(1, "HyDiTCheckpointLoader", [0, 0], [330, 150], [MODEL, "default"], outputs=loader),
            node(2, "HyDiTTextEncode", [400, 0], [400, 400], [text, "", "exact", 0, 0],
                 inputs=[link_in("clip", "CLIP", 1)], outputs=encoded),
            node(3, "PreviewAny", [860, 0], [260, 140], [], inputs=[link_in("source", "*", 2)]),
            node(4, "HyDiTEmptyLatent", [0, 300], [330, 220], [1280, 960, 1], outputs=latent),
        ],
    }  # fmt: skip


def row(page: Any, name: str) -> Any:
    return page.page.locator(f".{name}")


def wait_text(page: Any, name: str, pattern: str) -> str:
    """The text of a row once it matches."""
    if not rows_are_shown(page):
        return ""
    page.page.wait_for_function(
        "([name, pattern]) => [...document.querySelectorAll('.' + name)].some("
        "(row) => new RegExp(pattern, 's').test(row.innerText))",
        arg=[name, pattern],
        timeout=10_000,
    )
    return row(page, name).first.inner_text()


def properties(page: Any, kind: str) -> dict[str, str]:
    found = page.evaluate("(type) => ({...app.graph.nodes.find((n) => n.type === type).properties})", kind)
    return {key: value for key, value in found.items() if key.startswith("hydit_")}


def wait_told(page: Any, kind: str) -> None:
    """Until the first node of a type keeps what was said: the history has a run just after its end."""
    page.page.wait_for_function(
        "(type) => Object.keys(app.graph.nodes.find((n) => n.type === type).properties)"
        ".some((key) => key.startsWith('hydit_'))",
        arg=kind,
        timeout=10_000,
    )


def button(page: Any, width: int, height: int) -> Any:
    return page.page.locator(".hydit-sizes button").filter(has_text=re.compile(f"^{width}×{height}$"))


def pressed(page: Any) -> list[str]:
    return page.page.locator(".hydit-sizes button[aria-pressed=true]").all_inner_texts()


def size(page: Any) -> tuple[int, int]:
    values = page.widgets("HyDiTEmptyLatent")
    return values["width"], values["height"]


def click_canvas(page: Any) -> None:
    page.page.mouse.click(1200, 800)


def run(page: Any) -> None:
    """Run what is on the page, until the loader has run too (ComfyUI forgets results when it gets to it)."""
    for _ in range(5):
        page.server.free()
        page.page.wait_for_timeout(300)
        page.queue().check()
        if properties(page, "HyDiTCheckpointLoader"):
            return
    pytest.fail("every run was a cached one")


@pytest.fixture
def ready(either_page):
    either_page.load(workflow())
    either_page.fit()
    yield either_page
    ours = [line for line in either_page.console if "hydit" in line.lower() and line.startswith("error")]
    assert not ours and not [error for error in either_page.errors if "hydit" in error.lower()]


def test_rows_are_neither_saved_nor_sent(ready):
    saved = {entry["type"]: entry.get("widgets_values") for entry in ready.workflow()["nodes"]}
    assert saved["HyDiTCheckpointLoader"] == [MODEL, "default", "auto"]
    assert saved["HyDiTTextEncode"][0].startswith(LONG)
    assert saved["HyDiTTextEncode"][1:] == ["", "exact", 0, 0]
    assert saved["HyDiTEmptyLatent"] == [1280, 960, 1]
    sent = {entry["class_type"]: entry["inputs"] for entry in ready.prompt().values()}
    assert sorted(sent["HyDiTEmptyLatent"]) == ["batch_size", "height", "width"]
    assert sorted(sent["HyDiTCheckpointLoader"]) == ["ckpt_name", "load_key", "weight_dtype"]
    assert sorted(sent["HyDiTTextEncode"]) == ["clip", "height", "mode", "text", "text_mt5", "width"]


def test_a_run_fills_the_rows_and_they_stay(ready):
    wait_text(ready, "hydit_report", "^Counted when")
    wait_text(ready, "hydit_version", "^Detected when")
    run(ready)
    report = properties(ready, "HyDiTTextEncode")["hydit_report"]
    assert re.match(r"BERT \d+ of 24 tokens, mT5 \d+ of 32 tokens\nBERT does not see: .+", report)
    version = properties(ready, "HyDiTCheckpointLoader")["hydit_version"]
    assert "HunyuanDiT" in version and "fp16" in version
    assert wait_text(ready, "hydit_report", "of 24 tokens") in ("", report)
    assert wait_text(ready, "hydit_version", "fp16") in ("", version)
    ready.screenshot("run")

    # A cached run has nothing else to say.
    for _ in range(2):
        again = ready.queue().check()
    assert "2" in again.cached
    assert wait_text(ready, "hydit_report", "of 24 tokens") in ("", report)

    # Nodes of another workflow, in a page that has just been opened: their results come from the cache.
    saved = ready.workflow()
    bare = json.loads(json.dumps(saved))
    for entry in bare["nodes"]:
        entry["properties"] = {}
    ready.reload()
    ready.load(bare)
    assert properties(ready, "HyDiTTextEncode") == {}
    assert "2" in ready.queue().check().cached
    wait_told(ready, "HyDiTCheckpointLoader")
    assert properties(ready, "HyDiTTextEncode")["hydit_report"] == report
    assert properties(ready, "HyDiTCheckpointLoader")["hydit_version"] == version

    # Saved and opened, not run.
    ready.reset()
    ready.load(saved)
    assert wait_text(ready, "hydit_report", "of 24 tokens") in ("", report)
    assert wait_text(ready, "hydit_version", "fp16") in ("", version)
    if rows_are_shown(ready):
        assert row(ready, "hydit-old").count() == 0


def test_another_prompt_grays_the_report_and_another_file_clears_the_version(ready):
    run(ready)
    wait_text(ready, "hydit_report", "of 24 tokens")
    if rows_are_shown(ready):
        field = ready.page.locator("textarea").first
        field.click()
        field.press("End")
        field.type(" and a pear")
        assert row(ready, "hydit_report").and_(row(ready, "hydit-old")).count() == 1
        ready.screenshot("old-report")
        for _ in " and a pear":
            field.press("Backspace")
        assert row(ready, "hydit-old").count() == 0  # the prompt of the report again
    ready.set_widget("HyDiTCheckpointLoader", "ckpt_name", "another.safetensors")
    assert properties(ready, "HyDiTCheckpointLoader") == {}
    wait_text(ready, "hydit_version", "^Detected when")
    assert "hydit_report" in properties(ready, "HyDiTTextEncode")


def test_a_run_is_no_step_of_the_undo_history(ready):
    ready.set_widget("HyDiTEmptyLatent", "batch_size", 3)
    click_canvas(ready)
    ready.queue().check()
    wait_text(ready, "hydit_report", "of 24 tokens")
    click_canvas(ready)
    ready.press("Control+z")
    assert ready.widgets("HyDiTEmptyLatent")["batch_size"] == 1
    ready.press("Control+y")
    assert ready.widgets("HyDiTEmptyLatent")["batch_size"] == 3
    assert "hydit_report" in properties(ready, "HyDiTTextEncode")
    wait_text(ready, "hydit_report", "of 24 tokens")


def test_sizes_are_a_click_away(ready):
    if not rows_are_shown(ready):
        pytest.skip("this frontend's Nodes 2.0 shows no HTML widgets")
    group = ready.page.get_by_role("group", name="Official sizes")
    buttons = group.get_by_role("button")
    assert buttons.count() == len(SIZES)
    assert group.get_by_role("button", name="864 × 1152 pixels, 3:4").count() == 1
    assert pressed(ready) == ["1280×960"]
    for width, height in SIZES:
        button(ready, width, height).click()
        assert size(ready) == (width, height)
        assert pressed(ready) == [f"{width}×{height}"]
    ready.screenshot("sizes")
    box = group.bounding_box()
    for i in range(buttons.count()):
        inner = buttons.nth(i).bounding_box()
        assert box["x"] - 1 <= inner["x"] and inner["x"] + inner["width"] <= box["x"] + box["width"] + 1
        assert buttons.nth(i).evaluate("(b) => b.scrollWidth <= b.clientWidth + 1"), "cut text"

    ready.set_widget("HyDiTEmptyLatent", "width", 1024)
    assert pressed(ready) == []
    button(ready, 768, 1024).focus()
    ready.press("Enter")
    assert size(ready) == (768, 1024)


def test_a_size_is_one_step_of_the_undo_history(ready):
    if not rows_are_shown(ready):
        pytest.skip("this frontend's Nodes 2.0 shows no HTML widgets")
    button(ready, 768, 1280).click()
    click_canvas(ready)
    ready.press("Control+z")
    assert size(ready) == (1280, 960) and pressed(ready) == ["1280×960"]
    # The buttons are those of the node that is there now.
    button(ready, 1024, 1024).click()
    assert size(ready) == (1024, 1024) and pressed(ready) == ["1024×1024"]


def test_linked_sizes_cannot_be_clicked(either_page):
    graph = workflow()
    graph["nodes"][3]["inputs"] = [{**link_in("width", "INT", 9), "widget": {"name": "width"}}]
    graph["nodes"].append(
        node(5, "PrimitiveInt", [0, 600], [250, 90], [512, "fixed"], outputs=[link_out("INT", "INT", 9)])
    )
    graph["links"].append([9, 5, 0, 4, 0, "INT"])
    either_page.load(graph)
    if rows_are_shown(either_page):
        assert pressed(either_page) == []
        assert row(either_page, "hydit-sizes").get_by_role("button", disabled=True).count() == len(SIZES)
    either_page.evaluate(
        "() => app.graph.nodes.find((n) => n.type === 'HyDiTEmptyLatent').disconnectInput(0)"
    )
    either_page.settle()
    if rows_are_shown(either_page):
        either_page.page.wait_for_function("!document.querySelector('.hydit-sizes button:disabled')")
        assert pressed(either_page) == ["1280×960"]


def test_copies_keep_what_was_said(ready):
    ready.queue().check()
    ready.evaluate("""() => {
      app.canvas.selectItems(app.graph.nodes.filter((n) => n.type.startsWith("HyDiT")));
      app.canvas.copyToClipboard();
      app.canvas.pasteFromClipboard({ position: [0, 700] });
    }""")
    ready.settle(7)
    told = ready.evaluate("""() => app.graph.nodes.filter((n) => n.type === "HyDiTTextEncode")
        .map((n) => n.properties.hydit_report)""")
    assert len(told) == 2 and told[0] == told[1] and "of 24 tokens" in told[0]
    if rows_are_shown(ready):
        ready.fit()
        ready.page.wait_for_timeout(500)
        button(ready, 1280, 768).last.click()
        sizes = ready.evaluate("""() => app.graph.nodes.filter((n) => n.type === "HyDiTEmptyLatent")
            .map((n) => n.widgets.slice(0, 2).map((w) => w.value).join())""")
        assert sorted(sizes) == ["1280,768", "1280,960"]  # each with its own buttons
        ready.screenshot("copies")


def test_inside_a_subgraph(ready):
    ready.evaluate("""() => {
      const inside = app.graph.nodes.filter((n) => ["HyDiTTextEncode", "HyDiTEmptyLatent"].includes(n.type));
      app.graph.convertToSubgraph(new Set(inside));
    }""")
    ready.settle(3)
    ready.queue().check()
    told = ready.evaluate("""() => {
      const group = app.graph.nodes.find((n) => n.subgraph);
      return group.subgraph.nodes.find((n) => n.type === "HyDiTTextEncode").properties.hydit_report;
    }""")
    assert "of 24 tokens" in told
    saved = ready.workflow()
    assert "of 24 tokens" in json.dumps(saved["definitions"])
    ready.fit()
    ready.screenshot("subgraph-outside")
    ready.evaluate("""() => {
      const group = app.graph.nodes.find((n) => n.subgraph);
      (app.canvas.openSubgraph ?? app.canvas.setGraph).call(app.canvas, group.subgraph, group);
    }""")
    ready.page.wait_for_timeout(1000)
    wait_text(ready, "hydit_report", "of 24 tokens")
    if rows_are_shown(ready):
        button(ready, 1152, 864).click()
        assert pressed(ready) == ["1152×864"]
    ready.screenshot("subgraph-inside")
    ready.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")


def test_nodes_without_the_usual_widgets_do_no_harm(page):
    """As after a change of names in a later version, or where another pack rebuilds a node."""
    failed = page.evaluate(
        """(kinds) => {
          const ours = app.extensions.filter((extension) => extension.name.startsWith("hydit."));
          const failed = ours.length < 5 ? ["only " + ours.map((extension) => extension.name)] : [];
          for (const kind of kinds) for (const extension of ours) {
            try {
              class Bare extends LiteGraph.LGraphNode {}
              Bare.comfyClass = kind;
              const node = new Bare(kind);
              extension.nodeCreated(node);
              node.onExecuted?.({ hydit_report: ["x"], hydit_version: ["x"], hydit_saved: ["x"] });
              node.onConfigure?.({});
              extension.nodeCreated({ constructor: { comfyClass: kind } });
            } catch (error) { failed.push(`${extension.name} ${kind}: ${error.stack}`); }
          }
          return failed;
        }""",
        documented(),
    )
    assert not failed


@pytest.mark.parametrize("nodes2", [False, True], ids=["classic", "nodes2"])
def test_in_chinese(open_page, nodes2):
    page = open_page(nodes2=nodes2, locale="zh")
    page.load(workflow())
    page.fit()
    wait_text(page, "hydit_report", "编码提示词时统计词元")
    page.queue().check()
    report = wait_text(page, "hydit_report", "个词元")
    if rows_are_shown(page):
        assert re.match(r"BERT \d+/24 个词元；mT5 \d+/32 个词元\nBERT 读不到：", report)
        assert page.page.get_by_role("group", name="官方尺寸").count() == 1
    assert properties(page, "HyDiTTextEncode")["hydit_report"].startswith("BERT ")  # as Python said it
    names = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    titles = page.evaluate("() => app.graph.nodes.map((n) => [n.type, n.constructor.title])")
    for kind, title in titles:
        assert kind == "PreviewAny" or title == names[kind]["display_name"]
    labels = page.evaluate("""() => Object.fromEntries(app.graph.getNodeById(2).widgets.map((w) =>
        [w.name, [w.label, w.options.getOptionLabel?.("weighted")]]))""")
    assert labels["mode"] == ["模式", "加权（weighted）"] and labels["text"][0] == "提示词"
    assert page.prompt()["2"]["inputs"]["mode"] == "exact"
    page.screenshot("graph")


def test_the_sampler_says_what_is_wrong_with_the_size(either_page):
    page = either_page
    page.load(ROOT / "workflows" / "hydit_text_to_image_embedded.json")
    page.set_widget("HyDiTKSampler", "steps", 1)
    room = """() => app.graph.nodes.find((n) => n.type === "HyDiTKSampler")
        .widgets.find((w) => w.name === "hydit_notes").computeSize(200)[1]"""
    for side, said in ((32, "32x32 is far below the size"), (128, "")):
        for name in ("width", "height"):
            page.set_widget("HyDiTEmptyLatent", name, side)
        page.queue().check()
        wait_told(page, "HyDiTKSampler")
        page.page.wait_for_function(
            "(said) => { const told = app.graph.nodes.find((n) => n.type === 'HyDiTKSampler')"
            ".properties.hydit_notes; return said ? told.startsWith(said) : told === '' }",
            arg=said,
            timeout=10_000,
        )
        if rows_are_shown(page):
            assert row(page, "hydit_notes").is_visible() == bool(said)
            assert (page.evaluate(room) > 0) == bool(said)
