"""A small Hugging Face hub on 127.0.0.1: the few answers that huggingface_hub asks for, from a folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import warm_commands

COMMIT = "a" * 40


class Hub:
    """Serves ``folder/ORG/NAME/...``; ``asked`` are the requests so far, as ``METHOD /path``.

    Attributes:
        cut: how many bytes of a file's content to send before the connection breaks; None: all.
        cards: by repository, what its model card says.
        gated: repositories that ask for a login.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.ranges: list[str] = []
        self.cut: int | None = None
        self.cards: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def run(self, home: Path, *command: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Python with these arguments, in a process that reads the hub's address anew, as when it starts."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment.pop("TRANSFORMERS_OFFLINE", None)
        environment |= {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environment |= {"HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **more}
        return warm_commands.start(*command, environment=environment, anew=["huggingface_hub"]).wait()

    def downloaded(self) -> list[str]:
        """The files whose content was sent."""
        return sorted(
            asked.split("/resolve/")[1].split("/", 1)[1]
            for asked in self.asked
            if "GET" in asked and "/resolve/" in asked
        )

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                path = self.path.partition("?")[0]
                listing = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/([\w.%-]+))?", path)
                content = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.%-]+)/(.+)", path)
                match = listing or content
                if match is None or not (hub.folder / match[1]).is_dir():
                    return self._error(404, "RepoNotFound")
                if match[1] in hub.gated:
                    return self._error(403, "GatedRepo")
                if match[2] not in (None, "main", COMMIT):
                    return self._error(404, "RevisionNotFound")
                if listing:
                    return self._send(200, self._info(match[1]), {"Content-Type": "application/json"}, body)
                file = hub.folder / match[1] / match[3]
                if not file.is_file():
                    return self._error(404, "EntryNotFound")
                self._file(file.read_bytes(), body)

            def _info(self, repo: str) -> bytes:
                root = hub.folder / repo
                files = sorted(path for path in root.rglob("*") if path.is_file())
                siblings = [
                    {"rfilename": path.relative_to(root).as_posix(), "size": path.stat().st_size}
                    for path in files
                ]
                card = hub.cards.get(repo, {})
                info = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "cardData": card}
                return json.dumps({**info, "private": False, "tags": [], "downloads": 0}).encode()

            def _file(self, content: bytes, body: bool) -> None:
                etag = hashlib.sha256(content).hexdigest()
                headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
                begin, status = 0, 200
                if asked := self.headers.get("Range"):
                    hub.ranges.append(asked)
                    begin, status = int(asked.removeprefix("bytes=").split("-")[0]), 206
                    headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
                self._send(status, content[begin:], headers, body)

            def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if not body:
                    return
                whole = hub.cut is None or "ETag" not in headers or len(content) <= hub.cut
                self.wfile.write(content if whole else content[: hub.cut])
                if not whole:
                    self.close_connection = True

            def _error(self, status: int, code: str) -> None:
                self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}, True)

        return Handler
