"""ComfyUI in this process: start it, run prompts, hand back results and the objects behind them.

The host's modules come from its checkout and are imported only here, in a fixed order: its command line is
read at the first import, and names such as `utils`, `nodes` and `server` exist in more than one place.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import logging
import shutil
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from find_host import ROOT, find_host, host_version, side_folder
from graphs import Graph, Link, Node
from results import Failure, Result

PACK = "hydit"
_BASE: Path | None = None


def prepare() -> None:
    """Put the host on sys.path and give it its command line. Imports none of its heavy modules."""
    global _BASE
    if _BASE is not None:
        return
    comfy = find_host()
    assert comfy is not None
    _BASE = Path(tempfile.mkdtemp(prefix="hydit-host-")).resolve()
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (_BASE / name).mkdir()
    (_BASE / "custom_nodes" / PACK).symlink_to(ROOT, target_is_directory=True)
    # hydit_core alone: the repository's root has a folder `nodes` that must not hide the host's module.
    alone = _BASE / "hydit_core_only"
    alone.mkdir()
    (alone / "hydit_core").symlink_to(ROOT / "hydit_core", target_is_directory=True)
    hidden = {ROOT, Path.cwd().resolve()} if Path.cwd().resolve() == ROOT else {ROOT}
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in hidden]
    sys.path.insert(0, str(comfy))
    sys.path += [str(alone), str(side_folder())]
    argv, sys.argv = sys.argv, [
        "main.py", "--cpu", "--base-directory", str(_BASE), "--use-pytorch-cross-attention",
        "--preview-method", "latent2rgb", "--disable-api-nodes",
        "--database-url", f"sqlite:///{_BASE}/user/comfyui.db",
    ]  # fmt: skip
    try:
        options = importlib.import_module("comfy.options")
        options.enable_args_parsing()
        importlib.import_module("comfy.cli_args")
    finally:
        sys.argv = argv
    # Before the others: the newest host puts comfy/ itself on sys.path, where `utils` is another module.
    importlib.import_module("utils.extra_config")


class Host:
    """The running host. `nodes` is ComfyUI's nodes module, `comfy` its folder, `base` its base directory."""

    def __init__(self, base: Path) -> None:
        found = find_host()
        assert found is not None
        self.comfy = found
        self.version = host_version(found)
        self.base = base
        self.models_dir = base / "models"
        self.input_dir, self.output_dir = base / "input", base / "output"
        self.events: list[tuple[str, Any]] = []
        self.progress: list[tuple[str, float, float]] = []
        self.previews: list[tuple[str, Any]] = []
        self.import_log: list[str] = []
        self._given: dict[str, Any] = {}
        self._captured: dict[str, Any] = {}
        self._on_progress: Callable[[str, float, float], None] | None = None
        self._start()

    def _start(self) -> None:
        self.nodes = importlib.import_module("nodes")
        assert Path(self.nodes.__file__).parent == self.comfy, f"`nodes` came from {self.nodes.__file__}"
        self.execution = importlib.import_module("execution")
        self.folder_paths = importlib.import_module("folder_paths")
        server = importlib.import_module("server")
        self.loop = asyncio.new_event_loop()
        self.server = server.PromptServer(self.loop)
        self.server.client_id, self.server.last_node_id, self.server.last_prompt_id = "test", None, None
        self.server.send_sync = lambda event, data, sid=None: self.events.append((event, data))
        # As main.py does: what the save nodes write is offered by the loaders.
        for kind in ("checkpoints", "clip", "vae", "diffusion_models", "loras"):
            self.folder_paths.add_model_folder_path(kind, str(self.output_dir / kind))
        collect = _Collector(self.import_log)
        logging.getLogger().addHandler(collect)
        try:
            asyncio.run(self.nodes.init_extra_nodes(init_custom_nodes=True, init_api_nodes=False))
        finally:
            logging.getLogger().removeHandler(collect)
        self.nodes.NODE_CLASS_MAPPINGS.update(_test_nodes(self))
        self._hook_progress()
        takes = inspect.signature(self.execution.PromptExecutor.__init__).parameters
        extra = {"cache_args": {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}} if "cache_args" in takes else {}
        classic = self.execution.CacheType.CLASSIC
        self.executor = self.execution.PromptExecutor(self.server, cache_type=classic, **extra)

    def _hook_progress(self) -> None:
        utils = importlib.import_module("comfy.utils")
        management = importlib.import_module("comfy.model_management")
        state = importlib.import_module("comfy_execution.progress").get_progress_state
        context = importlib.import_module("comfy_execution.utils").get_executing_context

        def hook(
            value: float, total: float, preview: Any, prompt_id: Any = None, node_id: Any = None
        ) -> None:
            management.throw_exception_if_processing_interrupted()
            if node_id is None:
                running = context()
                node_id = running.node_id if running is not None else self.server.last_node_id
            state().update_progress(node_id, value, total, preview)
            self.progress.append((node_id, value, total))
            if preview is not None:
                self.previews.append((node_id, preview[1]))
            if self._on_progress is not None:
                self._on_progress(node_id, value, total)

        utils.set_progress_bar_global_hook(hook)

    @property
    def pack(self) -> ModuleType:
        """The pack as the host loaded it."""
        name = str(self.base / "custom_nodes" / PACK).replace(".", "_x_")
        module = sys.modules.get(name)
        if module is None or not hasattr(module, "comfy_entrypoint"):
            raise AssertionError("the pack did not load:\n" + "\n".join(self.import_log))
        return module

    def module(self, name: str) -> ModuleType:
        """A module of the pack, such as "nodes.host.model" or "hydit_core.model.dit", as the host has it."""
        return importlib.import_module(f"{self.pack.__name__}.{name}")

    def comfy_module(self, name: str) -> ModuleType:
        """A module of the host, such as "comfy.sd"."""
        return importlib.import_module(name)

    def input_types(self, class_type: str) -> dict[str, Any]:
        return self.nodes.NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES()

    def give(self, graph: Graph, value: Any) -> Node:
        """A node whose output 0 is `value`, whatever type the input that takes it asks for."""
        key = uuid.uuid4().hex
        self._given[key] = value
        return graph.add("HyDiTTestGive", key=key)

    def values(self, graph: Graph, *outputs: Link | Node | tuple[str, int], **options: Any) -> list[Any]:
        """Run with a capture node on each of `outputs` and return the Python objects that came out.

        Raises AssertionError when the prompt fails. The graph given is not altered.
        """
        graph = graph.copy()
        taps = []
        for output in outputs:
            link = output.out(0) if isinstance(output, Node) else list(output)
            taps.append(graph.add("HyDiTTestCapture", value=link))
        result = self.run(graph, **options).check()
        return [result.values[tap.id] for tap in taps]

    def run(
        self,
        graph: Graph | dict[str, Any],
        *,
        keep_cache: bool = False,
        on_progress: Callable[[str, float, float], None] | None = None,
        extra_data: dict[str, Any] | None = None,
    ) -> Result:
        """Validate and execute a prompt as the queue's worker does.

        Every run starts with an empty result cache unless `keep_cache`. `on_progress(node_id, value, total)`
        is called at each step; `interrupt()` may be called in it.
        """
        graph = graph if isinstance(graph, Graph) else Graph(graph)
        prompt = graph.filled(self.input_types)
        if not keep_cache:
            self.executor.reset()
        self.events.clear(), self.progress.clear(), self.previews.clear(), self._captured.clear()
        prompt_id = uuid.uuid4().hex
        valid, refused, outputs, node_errors = asyncio.run(
            self.execution.validate_prompt(prompt_id, prompt, None)
        )
        if not valid or node_errors:
            # The page, too, refuses to queue nothing; with another valid output ComfyUI would run that one.
            return Result(False, error=Failure(node_errors=node_errors, refused=refused))
        self._on_progress = on_progress
        self.server.last_prompt_id = prompt_id
        try:
            self.executor.execute(prompt, prompt_id, {"client_id": "test", **(extra_data or {})}, outputs)
        finally:
            self._on_progress = None
        return self._result()

    def _result(self) -> Result:
        result = Result(bool(self.executor.success), outputs=self.executor.history_result["outputs"])
        for event, data in self.executor.status_messages:
            if event == "execution_cached":
                result.cached = list(data["nodes"])
            elif event == "execution_interrupted":
                result.interrupted, result.ok = True, False
            elif event == "execution_error":
                result.ok = False
                trace = data["traceback"]
                result.error = Failure(
                    data["node_id"], data["node_type"], data["exception_type"],
                    data["exception_message"].strip(), "".join(trace) if isinstance(trace, list) else trace,
                )  # fmt: skip
        seen = [data["node"] for event, data in self.events if event == "executing" and data["node"]]
        result.executed = [node for node in dict.fromkeys(seen) if node not in result.cached]
        result.progress, result.previews = list(self.progress), list(self.previews)
        result.values = dict(self._captured)
        return result

    def interrupt(self) -> None:
        """What the page's cancel button does."""
        self.nodes.interrupt_processing(True)

    def refresh(self) -> None:
        """Forget the host's file lists: call it after adding a file to `models_dir`."""
        self.folder_paths.filename_list_cache.clear()

    def model_path(self, kind: str, name: str) -> Path:
        """Where a model file of that kind goes; its folder is made."""
        path = self.models_dir / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def forget(self) -> None:
        """Drop results, captured objects and loaded models."""
        management = importlib.import_module("comfy.model_management")
        self.executor.reset()
        self._captured.clear(), self._given.clear(), self.previews.clear(), self.events.clear()
        self.nodes.interrupt_processing(False)
        management.unload_all_models()
        gc.collect()

    def close(self) -> None:
        self.forget()
        self.loop.close()
        shutil.rmtree(self.base, ignore_errors=True)


def start() -> Host:
    """The host of this process; `prepare` must have run."""
    assert _BASE is not None
    return Host(_BASE)


class _Collector(logging.Handler):
    """Keeps what the host logs while it loads packs, to be shown when ours did not load."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if record.exc_info:
            self.lines.append("".join(traceback.format_exception(*record.exc_info)))


class _AnyType(str):
    """A socket type that fits every other: the host compares with `!=`."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


def _test_nodes(host: Host) -> dict[str, type]:
    class Capture:
        """Keeps the object on its input. Never cached, so that it also sees cached results."""

        RETURN_TYPES: tuple[str, ...] = ()
        FUNCTION, CATEGORY, OUTPUT_NODE = "run", "test", True

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"value": ("*",)}, "hidden": {"unique_id": "UNIQUE_ID"}}

        @classmethod
        def VALIDATE_INPUTS(cls, input_types: dict[str, str]) -> bool:
            return True  # taking `input_types` turns the host's own comparison off

        @classmethod
        def IS_CHANGED(cls, **_: Any) -> float:
            return float("nan")

        def run(self, value: Any, unique_id: str) -> tuple[()]:
            host._captured[unique_id] = value
            return ()

    class Give:
        """Puts an object of the test into the graph."""

        RETURN_TYPES = (_AnyType("*"),)
        FUNCTION, CATEGORY = "run", "test"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {"required": {"key": ("STRING", {"default": ""})}}

        def run(self, key: str) -> tuple[Any]:
            return (host._given[key],)

    return {"HyDiTTestCapture": Capture, "HyDiTTestGive": Give}
