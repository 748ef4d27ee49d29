"""ComfyUI as users start it: `main.py` in its own process, used over HTTP and its websocket."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import requests
import websocket
from find_host import ROOT, artifacts, find_host, host_version
from graphs import Graph
from PIL import Image
from results import Failure, Result

START_SECONDS = 240
#: Binary websocket messages, by the number they begin with.
PREVIEW, PREVIEW_WITH_METADATA = 1, 4


class ComfyServer:
    """A running server. `url` is its address, `base` its base directory, `log_path` what it prints."""

    def __init__(
        self,
        *,
        name: str = "server",
        pack: str = "hydit",
        copy: bool = False,
        flags: tuple[str, ...] = (),
        files: tuple[str, ...] = (),
        nodes: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        """Start it.

        `pack` is the folder's name in custom_nodes, `nodes` the source of one more pack there; `files` in
        the base directory are made, empty. `environment` is added to the user's.
        """
        found = find_host()
        assert found is not None
        self.comfy, self.version = found, host_version(found)
        self.base = Path(tempfile.mkdtemp(prefix="hydit-server-")).resolve()
        for folder in ("custom_nodes", "models", "input", "output", "user"):
            (self.base / folder).mkdir()
        self.models_dir, self.input_dir, self.output_dir = (
            self.base / folder for folder in ("models", "input", "output")
        )
        install_pack(self.base / "custom_nodes" / pack, copy=copy)
        if nodes:
            (self.base / "custom_nodes" / "test_nodes.py").write_text(nodes, encoding="utf-8")
        for file in files:
            (self.base / file).parent.mkdir(parents=True, exist_ok=True)
            (self.base / file).touch()
        self.client_id = uuid.uuid4().hex
        self.log_path = artifacts() / f"{name}-{self.version}.log"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._flags, self._environment = flags, {**server_environment(), **(environment or {})}
        self._start("wb")

    def _start(self, mode: str) -> None:
        self._info: dict[str, Any] = {}
        with self.log_path.open(mode) as log:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port),
                 "--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base}/user/comfyui.db",
                 "--preview-method", "auto", "--use-pytorch-cross-attention", "--disable-api-nodes",
                 *self._flags],
                cwd=self.comfy, stdout=log, stderr=subprocess.STDOUT, env=self._environment,
                start_new_session=os.name != "nt",
            )  # fmt: skip
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(requests.RequestException):
                requests.get(f"{self.url}/system_stats", timeout=5).raise_for_status()
                return
            time.sleep(0.3)
        self.close()
        raise RuntimeError(f"ComfyUI did not start; the end of {self.log_path}:\n{self.log()[-3000:]}")

    def kill(self) -> None:
        """End it as a crash does: with no word to anything that it started."""
        self.process.kill()
        self.process.wait(15)

    def start_again(self) -> None:
        """After :meth:`kill`: with the same base directory and address."""
        self._start("ab")

    def log(self) -> str:
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def get(self, path: str, **query: Any) -> Any:
        """The JSON at a path such as "/history"."""
        answer = requests.get(self.url + path, params=query, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=60)

    def object_info(self) -> dict[str, Any]:
        """Every node's description, asked for anew: the lists of files are in it."""
        self._info = self.get("/object_info")
        return self._info

    def input_types(self, class_type: str) -> dict[str, Any]:
        return (self._info or self.object_info())[class_type]["input"]

    def upload(self, path: Path) -> str:
        """Put a picture into the input folder; returns the name that LoadImage takes."""
        with path.open("rb") as file:
            form = {"files": {"image": (path.name, file, "image/png")}, "data": {"overwrite": "true"}}
            answer = requests.post(f"{self.url}/upload/image", timeout=60, **form)
        answer.raise_for_status()
        return answer.json()["name"]

    def view(self, image: dict[str, str]) -> bytes:
        """The bytes of a picture that a node's output names."""
        answer = requests.get(f"{self.url}/view", params=image, timeout=60)
        answer.raise_for_status()
        return answer.content

    def images(self, result: Result) -> list[Image.Image]:
        """All pictures of a result, in the order of its nodes."""
        named = [image for ui in result.outputs.values() for image in ui.get("images", [])]
        return [Image.open(io.BytesIO(self.view(image))).convert("RGB") for image in named]

    def free(self) -> None:
        """Unload models and forget results."""
        self.post("/free", {"unload_models": True, "free_memory": True}).raise_for_status()

    def interrupt(self) -> None:
        self.post("/interrupt", {}).raise_for_status()

    def run(
        self,
        graph: Graph | dict[str, Any],
        *,
        workflow: dict[str, Any] | None = None,
        timeout: float = 300,
    ) -> Result:
        """Queue a prompt and wait for its end; `workflow` is stored in the pictures as the page does it."""
        graph = graph if isinstance(graph, Graph) else Graph(graph)
        body: dict[str, Any] = {"prompt": graph.filled(self.input_types), "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        with contextlib.closing(self.connect()) as connection:
            answer = self.post("/prompt", body)
            if answer.status_code == 400:
                told = answer.json()
                failure = Failure(node_errors=told["node_errors"] or {}, refused=told["error"])
                return Result(False, error=failure)
            answer.raise_for_status()
            told = answer.json()
            if told.get("node_errors"):
                self.interrupt()
                return Result(False, error=Failure(node_errors=told["node_errors"]))
            result = self._listen(connection, told["prompt_id"], time.monotonic() + timeout)
        result.outputs = self.outputs(told["prompt_id"])
        return result

    def connect(self) -> websocket.WebSocket:
        """A websocket that has said that it takes previews with metadata."""
        connection = websocket.WebSocket()
        connection.connect(f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}", timeout=60)
        flags = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
        connection.send(json.dumps(flags))
        return connection

    def outputs(self, prompt_id: str) -> dict[str, Any]:
        """The ui dictionaries of a prompt that has ended, by node."""
        # The history is written after the last message was sent.
        for _ in range(100):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]["outputs"]
            time.sleep(0.1)
        raise TimeoutError(f"no history of {prompt_id}")

    def _listen(self, connection: websocket.WebSocket, prompt_id: str, end: float) -> Result:
        result = Result(False)
        while time.monotonic() < end:
            connection.settimeout(max(0.1, end - time.monotonic()))
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException:
                break
            if isinstance(message, bytes):
                _note_preview(result, message)
                continue
            event = json.loads(message)
            data = event["data"]
            if data.get("prompt_id") != prompt_id:
                continue
            if _note_event(result, event["type"], data):
                return result
        raise TimeoutError(f"{prompt_id} did not end in time; the end of the log:\n{self.log()[-2000:]}")

    def close(self) -> None:
        """End the process (and what it started) and remove its base directory; the log stays."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                if os.name == "nt":
                    self.process.kill()
                else:
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(15)
        shutil.rmtree(self.base, ignore_errors=True)


def _note_event(result: Result, kind: str, data: dict[str, Any]) -> bool:
    """Keep what a message tells; True when it was the last of its prompt."""
    if kind == "execution_cached":
        result.cached = list(data["nodes"])
    elif kind == "executing" and data["node"]:
        result.executed.append(data["node"])
    elif kind == "progress":
        result.progress.append((data["node"], data["value"], data["max"]))
    elif kind == "execution_success":
        result.ok = True
    elif kind == "execution_interrupted":
        result.interrupted = True
    elif kind == "execution_error":
        trace = "".join(data["traceback"])
        message = data["exception_message"].strip()
        kind_of = data["exception_type"]
        result.error = Failure(data["node_id"], data["node_type"], kind_of, message, trace)
    return kind in ("execution_success", "execution_interrupted", "execution_error")


def _note_preview(result: Result, message: bytes) -> None:
    kind, number = struct.unpack(">II", message[:8])
    if kind == PREVIEW_WITH_METADATA:
        metadata = json.loads(message[8 : 8 + number])
        result.previews.append((metadata["node_id"], Image.open(io.BytesIO(message[8 + number :]))))
    elif kind == PREVIEW:
        result.previews.append(("", Image.open(io.BytesIO(message[8:]))))


def server_environment() -> dict[str, str]:
    """The user's environment without what the tests put on the path."""
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return {**environment, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def install_pack(target: Path, *, copy: bool) -> None:
    """The repository at `target`, as a symlink or as a copy of what is tracked or would be."""
    if not copy:
        target.symlink_to(ROOT, target_is_directory=True)
        return
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True, capture_output=True,
    )  # fmt: skip
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
