"""The row of the LoRA nodes: what the last run found in the file, with the embedded LoRA."""

from __future__ import annotations

import json
import re
from itertools import count
from typing import Any

import pytest
import torch
from extension_rows import nothing_overlaps, rows_are_shown
from find_host import ROOT
from safetensors.torch import load_file, save_file
from test_extension import MODEL, link_in, link_out, node, wait_told

LORA = ROOT / "hydit_core" / "assets" / "lora" / "hydit-icons-128-delft.safetensors"
NAME = f"[embedded] {LORA.stem}"
NUMBERS = count(1)
LOADER, FIRST, SECOND = 2, 3, 4


def workflow() -> dict:
    """A LoRA loader, and two merge nodes with the same file in a chain. Nothing is sampled.

    The strengths are others each time, so that the nodes run.
    """
    strength = next(NUMBERS) / 100
    model = link_out("MODEL", "MODEL", 1, 2)
    loaded = [link_out("MODEL", "MODEL"), link_out("CLIP", "CLIP"), link_out("report", "STRING", 3)]

    def merged(lora: list[int], report: int) -> list[dict]:
        more = [link_out("MODEL", "MODEL"), link_out("CLIP", "CLIP"), link_out("report", "STRING", report)]
        return [link_out("LORA_MODEL", "LORA_MODEL", *lora), *more]

    return {
        "last_node_id": 7, "last_link_id": 6, "version": 0.4, "config": {}, "extra": {}, "groups": [],
        "links": [
            [1, 1, 0, 2, 0, "MODEL"], [2, 1, 0, 4, 1, "MODEL"], [3, 2, 2, 5, 0, "STRING"],
            [4, 3, 0, 4, 0, "LORA_MODEL"], [5, 3, 3, 6, 0, "STRING"], [6, 4, 3, 7, 0, "STRING"],
        ],
        "nodes": [
            node(1, "HyDiTCheckpointLoader", [0, 0], [330, 150], [MODEL, "default"],
                 outputs=[model, link_out("CLIP", "CLIP"), link_out("VAE", "VAE")]),
            node(LOADER, "HyDiTLoraLoader", [0, 330], [330, 260], [NAME, strength, 1, "uniform(1)"],
                 inputs=[link_in("model", "MODEL", 1), link_in("clip", "CLIP", None)], outputs=loaded),
            node(FIRST, "HyDiTLoraMerge", [400, 0], [330, 260], [NAME, strength, "1"],
                 inputs=[link_in("lora", "LORA_MODEL", None), link_in("model", "MODEL", None),
                         link_in("clip", "CLIP", None)], outputs=merged([4], 5)),
            node(SECOND, "HyDiTLoraMerge", [400, 400], [330, 260], [NAME, -strength, "1"],
                 inputs=[link_in("lora", "LORA_MODEL", 4), link_in("model", "MODEL", 2),
                         link_in("clip", "CLIP", None)], outputs=merged([], 6)),
            *(node(5 + i, "PreviewAny", [800, 250 * i], [300, 160], [],
                   inputs=[link_in("source", "*", link)]) for i, link in enumerate((3, 5, 6))),
        ],
    }  # fmt: skip


def told(page: Any, number: int) -> str | None:
    """What a node keeps."""
    return page.evaluate("(id) => app.graph.getNodeById(id).properties.hydit_lora ?? null", number)


def shown(page: Any, number: int) -> Any:
    """A node's row on the page."""
    return page.page.locator(f".hydit_lora[data-of$=' {number} hydit_lora']")


def wait_shown(page: Any, number: int, pattern: str) -> None:
    """Until a node's row matches."""
    if rows_are_shown(page):
        shown(page, number).filter(has_text=re.compile(pattern)).wait_for(timeout=10_000)


def truth() -> tuple[int, int]:
    """The rank of the embedded LoRA, and how many modules it changes."""
    ranks = [len(value) for key, value in load_file(LORA).items() if ".lora_down." in key]
    assert len(set(ranks)) == 1
    return ranks[0], len(ranks)


@pytest.fixture
def ready(either_page):
    either_page.load(workflow())
    either_page.fit()
    yield either_page
    ours = [line for line in either_page.console if "hydit" in line.lower() and line.startswith("error")]
    assert not ours and not either_page.errors


def strip(saved: dict) -> dict:
    """A workflow as it was before its first run."""
    bare = json.loads(json.dumps(saved))
    for entry in bare["nodes"]:
        entry["properties"] = {}
    return bare


def check_all(page: Any) -> list[str]:
    """Each node says, and shows, what its own run found."""
    rank, modules = truth()
    texts = [told(page, number) for number in (LOADER, FIRST, SECOND)]
    first = f"comfy LoRA of rank {rank}: {modules} modules of the DiT"
    assert all((text or "").startswith(first) for text in texts), texts
    strengths = [
        f"{entry['widgets_values'][1]:g}" for entry in page.workflow()["nodes"] if "Merge" in entry["type"]
    ]
    name = LORA.stem
    assert "merged" not in texts[0]
    assert texts[1].endswith(f"merged: {name} at {strengths[0]}")
    assert texts[2].endswith(f"merged: {name} at {strengths[0]}, {name} at {strengths[1]}")
    for number, text in zip((LOADER, FIRST, SECOND), texts, strict=True):
        wait_shown(
            page, number, rf"{modules}[\s\S]*" + re.escape(text.split(" at ")[-1] if number != LOADER else "")
        )
    return texts


def test_a_run_says_what_the_lora_is(ready):
    for number in (LOADER, FIRST, SECOND):
        wait_shown(ready, number, "^Told when the file is read$")
    ready.queue().check()
    check_all(ready)
    ready.fit()
    if rows_are_shown(ready):
        assert nothing_overlaps(ready) == 4  # with the checkpoint loader's
        cut = "(row) => row.scrollHeight > row.clientHeight + 1 || row.scrollWidth > row.clientWidth + 1"
        for number in (LOADER, FIRST, SECOND):
            assert not shown(ready, number).evaluate(cut), "cut text"
            assert shown(ready, number).get_attribute("aria-label") == "What the LoRA is"
    ready.screenshot("lora-row")


def test_what_was_said_stays(ready):
    """Over a cached run, which says nothing, and when the workflow is opened again."""
    ready.queue().check()
    texts = check_all(ready)
    ready.queue().check()
    assert check_all(ready) == texts
    saved = ready.workflow()
    ready.reset()
    ready.load(saved)
    assert check_all(ready) == texts
    # Another workflow's nodes, never run: the results come from the cache.
    ready.reset()
    ready.load(strip(saved))
    assert told(ready, LOADER) is None
    ready.queue().check()
    wait_told(ready, "HyDiTLoraLoader")
    assert check_all(ready) == texts


def test_nobody_elses_report(ready):
    """Same file, other settings, not run: it says nothing."""
    ready.queue().check()
    check_all(ready)
    alone = strip(ready.workflow())
    for entry in alone["nodes"]:
        if entry["id"] in (FIRST, SECOND):
            entry["widgets_values"][1] = 9.5
        if entry["id"] in (FIRST, SECOND, 6, 7):
            entry["mode"] = 2  # muted, with what shows their reports
    ready.reset()
    ready.load(alone)
    ready.queue().check()
    wait_told(ready, "HyDiTLoraLoader")
    assert told(ready, LOADER) and told(ready, FIRST) is None and told(ready, SECOND) is None


def test_another_file_clears_it_and_another_strength_grays_it(ready):
    ready.queue().check()
    texts = check_all(ready)
    ready.set_widget("HyDiTLoraMerge", "strength", 5)
    if rows_are_shown(ready):
        row = shown(ready, FIRST)
        assert "hydit-old" in row.get_attribute("class")
        assert row.get_attribute("title") == "Of the last run: a setting has changed since"
        assert "hydit-old" not in shown(ready, LOADER).get_attribute("class")
        ready.screenshot("lora-row-old")
    ready.set_widget("HyDiTLoraLoader", "strength_model", 5)
    assert [told(ready, number) for number in (LOADER, FIRST, SECOND)] == texts
    for kind in ("HyDiTLoraLoader", "HyDiTLoraMerge"):
        ready.set_widget(kind, "lora_name", "another.safetensors")
    assert [told(ready, number) for number in (LOADER, FIRST, SECOND)] == [None, None, texts[2]]
    wait_shown(ready, LOADER, "^Told when the file is read$")
    wait_shown(ready, FIRST, "^Told when the file is read$")


def test_it_is_there_after_the_page_is_loaded_again(either_page):
    """By the page's own draft of the workflow."""
    page = either_page
    keep = {"Comfy.Workflow.Persist": True}
    try:
        page.reload(**keep)
        page.load(workflow())
        page.queue().check()
        texts = check_all(page)
        page.page.wait_for_timeout(2000)
        page.reload(**keep)
        page.settle(7)
        assert check_all(page) == texts
        page.fit()
        page.screenshot("lora-row-reloaded")
    finally:
        page.evaluate("() => { localStorage.clear(); sessionStorage.clear() }")
        page.reload()


@pytest.mark.parametrize("nodes2", [False, True], ids=["classic", "nodes2"])
def test_in_chinese(open_page, nodes2):
    page = open_page(nodes2=nodes2, locale="zh")
    page.load(workflow())
    page.fit()
    wait_shown(page, LOADER, "^读取文件时显示$")
    page.queue().check()
    check_all(page)
    page.fit()
    if rows_are_shown(page):
        nothing_overlaps(page)
    page.screenshot("lora-row")


def test_an_sdxl_lora_is_called_one(either_page):
    page = either_page
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 640), f"{name}.lora_up.weight": torch.ones(640, 4)}
    folder = page.server.models_dir / "loras"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sdxl.safetensors")
    page.evaluate("async () => { await app.refreshComboInNodes() }")
    page.load(workflow())
    page.set_widget("HyDiTLoraLoader", "lora_name", "sdxl.safetensors")
    page.fit()
    result = page.queue()
    (folder / "sdxl.safetensors").unlink()
    assert not result.ok and result.error.node_id == str(LOADER)
    message = result.error.exception_message
    assert "sdxl.safetensors" in message and "SDXL" in message and "\n" not in message
    details = page.page.get_by_text("View details", exact=True)
    page.page.wait_for_timeout(500)
    if details.count():  # newer pages say first that something failed
        details.first.click()
    page.page.get_by_text("is a LoRA for SDXL, not for HunyuanDiT").first.wait_for(timeout=10_000)
    page.screenshot("lora-sdxl")
    panel = page.page.locator("[data-testid=properties-panel] button[aria-pressed=true]")
    if panel.count():
        panel.first.click()
