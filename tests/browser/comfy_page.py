"""ComfyUI's page in Chromium: load, drop, convert, queue, look."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

from comfy_server import ComfyServer
from find_host import artifacts
from playwright.sync_api import Browser, ConsoleMessage, Page
from results import Failure, Result

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
READY_MS = 180_000

#: Every message of the server about running prompts, kept from the page's start on.
LISTEN = """() => {
  window.__heard = [];
  for (const kind of ["execution_cached", "executing", "executed", "execution_success",
                      "execution_error", "execution_interrupted"])
    app.api.addEventListener(kind, (event) => window.__heard.push([kind, event.detail]));
}"""

#: What the page itself makes of a file dropped by hand: drag events with a DataTransfer that holds it.
DROP = """async ([name, type, data, selector]) => {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type }));
  const target = document.querySelector(selector);
  const box = target.getBoundingClientRect();
  const at = { clientX: box.x + box.width / 2, clientY: box.y + box.height / 2 };
  const options = { bubbles: true, cancelable: true, dataTransfer: transfer, ...at };
  for (const kind of ["dragenter", "dragover", "drop"])
    target.dispatchEvent(new DragEvent(kind, options));
}"""

QUEUE = """async () => {
  window.__heard.length = 0;
  app.lastNodeErrors = null;
  await app.queuePrompt(0, 1);
  const refused = app.lastNodeErrors;
  return refused && Object.keys(refused).length ? JSON.parse(JSON.stringify(refused)) : null;
}"""

#: Each node's name and rectangle: of its element in Nodes 2.0, which alone knows how large it is.
BOXES = """(nodes2) => app.graph.nodes.map((node) => {
  const element = document.querySelector(`[data-node-id="${node.id}"]`);
  const box = nodes2 && element.getBoundingClientRect();
  const scaled = box && [box.x, box.y, box.width, box.height].map((v) => v / app.canvas.ds.scale);
  return [`${node.id} ${node.type}`, scaled || [...node.boundingRect]];
})"""

ENDS = ("execution_success", "execution_error", "execution_interrupted")


def find_browser() -> str | None:
    """COMFYUI_BROWSER, else a Chromium on PATH."""
    return os.environ.get("COMFYUI_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


class ComfyPage:
    """One open page. `page` is Playwright's; `console` and `errors` are what it has complained about."""

    def __init__(self, browser: Browser, server: ComfyServer, *, nodes2: bool, locale: str) -> None:
        self.server, self.nodes2, self.locale = server, nodes2, locale
        self.console: list[str] = []
        self.errors: list[str] = []
        self.context = browser.new_context(viewport={"width": 1600, "height": 1000}, locale=locale)
        self.page: Page = self.context.new_page()
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.reload()

    def reload(self, **settings: Any) -> None:
        """Open the page, also once more; all pages share the server's settings, so they are set anew."""
        settings = {
            "Comfy.VueNodes.Enabled": self.nodes2,
            "Comfy.Locale": self.locale,
            "Comfy.TutorialCompleted": True,
            "Comfy.Workflow.Persist": False,
            "Comfy.Minimap.Visible": False,
            "Comfy.ColorPalette": "dark",
        } | settings
        self.server.post("/settings", settings).raise_for_status()
        self.page.goto(self.server.url, timeout=READY_MS)
        self.page.wait_for_function("window.app?.graph && window.app?.canvas", timeout=READY_MS)
        self.page.wait_for_selector("#graph-canvas, canvas.graph-canvas", timeout=READY_MS)
        self.page.wait_for_timeout(500)
        self.page.keyboard.press("Escape")
        self.page.evaluate(LISTEN)

    def _hear(self, message: ConsoleMessage) -> None:
        self.console.append(f"{message.type}: {message.text}")

    def evaluate(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def reset(self) -> None:
        """An empty graph, no dialogs, nothing remembered."""
        self.close_dialogs()
        self.evaluate("() => { app.graph.clear(); window.__heard.length = 0 }")
        self.console.clear(), self.errors.clear()

    def close_dialogs(self) -> None:
        for _ in range(3):
            if not self.page.locator(".p-dialog:visible, [role=dialog]:visible").count():
                return
            self.page.keyboard.press("Escape")
            self.page.wait_for_timeout(300)

    def load(self, workflow: dict[str, Any] | Path) -> None:
        """Open a workflow (page format) as the menu's Open does."""
        if isinstance(workflow, Path):
            workflow = json.loads(workflow.read_text(encoding="utf-8"))
        self.evaluate("async (workflow) => { await app.loadGraphData(workflow) }", workflow)
        self.settle(len(workflow["nodes"]))

    def open_template(self, name: str, nodes: int) -> float:
        """Open a workflow of ours in the template browser, as a newcomer does; returns the page's scale."""
        self.reset()
        self.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        card = self.page.get_by_test_id(f"template-workflow-{name}")
        for _ in range(20):  # what is clicked before the dialog is ready is lost
            self.page.locator("[role=dialog]").get_by_text("hydit", exact=True).last.dispatch_event("click")
            self.page.wait_for_timeout(500)
            if card.count():
                break
            if (shown := self.page.locator('[data-testid^="template-workflow-hydit_"]')).count():
                shown.last.scroll_into_view_if_needed()  # older pages add cards as one scrolls
                self.page.wait_for_timeout(500)
        card.dispatch_event("click")
        self.settle(nodes)
        self.close_dialogs()
        return self.evaluate("() => app.canvas.ds.scale")

    def offers_nodes2(self) -> bool:
        """Whether users can choose Nodes 2.0; older pages hide an experiment that shows no prompts."""
        setting = 'app.ui.settings.settingsLookup["Comfy.VueNodes.Enabled"]'
        return self.evaluate(f"() => {setting}.type !== 'hidden'")

    def drop(self, path: Path, *, selector: str = "#graph-canvas", nodes: int | None = None) -> None:
        """Drop a file on the page; with `nodes`, wait until the graph has that many."""
        kind = {".png": "image/png", ".json": "application/json"}.get(path.suffix, "application/octet-stream")
        data = base64.b64encode(path.read_bytes()).decode()
        self.evaluate(DROP, [path.name, kind, data, selector])
        self.settle(nodes)

    def settle(self, nodes: int | None = None, timeout: float = 30) -> None:
        """Wait until the graph has `nodes` nodes (if given) and two frames were drawn."""
        end = time.monotonic() + timeout
        while nodes is not None and (count := self.evaluate("() => app.graph.nodes.length")) != nodes:
            if time.monotonic() > end:
                raise TimeoutError(f"the graph has {count} nodes, not {nodes}")
            self.page.wait_for_timeout(100)
        self.evaluate("() => new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")

    def workflow(self) -> dict[str, Any]:
        """The graph as the page saves it."""
        return self.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")

    def boxes(self) -> list[tuple[str, tuple[float, float, float, float]]]:
        """What each node covers (left, top, right, bottom), as it is drawn; by number and type."""
        return [
            (name, (x, y, x + width, y + height))
            for name, (x, y, width, height) in self.evaluate(BOXES, self.nodes2)
        ]

    def prompt(self) -> dict[str, Any]:
        """The graph as the page's own graphToPrompt converts it to the API format."""
        return self.evaluate("async () => JSON.parse(JSON.stringify((await app.graphToPrompt()).output))")

    def queue(self, timeout: float = 300) -> Result:
        """Queue what is on the page and wait for its end."""
        refused = self.evaluate(QUEUE)
        if refused:
            return Result(False, error=Failure(node_errors=refused))
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            heard = self.evaluate("() => JSON.parse(JSON.stringify(window.__heard))")
            if any(kind in ENDS for kind, _ in heard):
                return self._result(heard)
            self.page.wait_for_timeout(100)
        raise TimeoutError(f"the queue did not end; the end of the log:\n{self.server.log()[-2000:]}")

    def _result(self, heard: list[list[Any]]) -> Result:
        result = Result(False)
        for kind, detail in heard:
            if kind == "execution_cached":
                result.cached = detail["nodes"]
            elif kind == "executing" and detail:
                result.executed.append(detail if isinstance(detail, str) else detail["node"])
            elif kind == "execution_error":
                trace = "".join(detail["traceback"])
                told = detail["exception_message"].strip()
                of = detail["exception_type"]
                result.error = Failure(detail["node_id"], detail["node_type"], of, told, trace)
            if kind in ENDS:
                result.ok, result.interrupted = kind == ENDS[0], kind == ENDS[2]
                result.outputs = self.server.outputs(detail["prompt_id"])
        self.page.wait_for_timeout(200)
        return result

    def press(self, keys: str) -> None:
        """Press keys, and wait until the page, which may load a graph then, draws again without delay.

        It drops what is pressed while it loads.
        """
        self.page.keyboard.press(keys)
        self.page.wait_for_timeout(800)
        self.page.evaluate(
            """() => new Promise((done) => {
                let last = performance.now(), smooth = 0;
                const step = (now) => {
                    smooth = now - last < 250 ? smooth + 1 : 0;
                    last = now;
                    smooth < 5 ? requestAnimationFrame(step) : done();
                };
                requestAnimationFrame(step);
            })"""
        )

    def widgets(self, node_type: str) -> dict[str, Any]:
        """Widget values of the first node of a type, by name."""
        return self.evaluate(
            """(type) => Object.fromEntries(app.graph.nodes.find((n) => n.type === type).widgets
                .map((w) => [w.name, typeof w.value === "object" ? null : w.value]))""",
            node_type,
        )

    def set_widget(self, node: str, name: str, value: Any) -> None:
        """Set a widget of a node, by its number, or of the first of a type, its callback included."""
        self.evaluate(
            """([wanted, name, value]) => {
                const node = app.graph.nodes.find((n) => n.type === wanted || String(n.id) === wanted);
                const widget = node.widgets.find((w) => w.name === name);
                widget.value = value;
                widget.callback?.(value, app.canvas, node);
            }""",
            [node, name, value],
        )

    def fit(self) -> None:
        """Show the whole graph, for screenshots."""
        self.evaluate("""() => {
          const nodes = app.graph.nodes;
          const left = Math.min(...nodes.map((n) => n.pos[0]));
          const top = Math.min(...nodes.map((n) => n.pos[1])) - 40;
          const width = Math.max(...nodes.map((n) => n.pos[0] + n.size[0])) - left;
          const height = Math.max(...nodes.map((n) => n.pos[1] + n.size[1])) - top;
          const scale = Math.min(1.2, (innerWidth - 140) / width, (innerHeight - 140) / height);
          const ds = app.canvas.ds;
          ds.scale = scale;
          ds.offset[0] = 100 / scale - left;
          ds.offset[1] = 80 / scale - top;
          app.canvas.setDirty(true, true);
        }""")
        self.settle()
        self.page.wait_for_timeout(300)

    def screenshot(self, name: str) -> Path:
        """Keep a picture of the page in the artifacts folder."""
        mode = "nodes2" if self.nodes2 else "classic"
        plain = re.sub(r"[^\w.-]+", "-", name)
        path = artifacts() / f"{self.server.version}-{mode}-{self.locale}-{plain}.png"
        self.page.screenshot(path=path)
        return path

    def close(self) -> None:
        self.context.close()
