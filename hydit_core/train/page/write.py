"""The page of runs as a file, or from a server for this machine alone."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ...errors import HyditError
from ...new_files import replacing
from ...pages.render import render
from ...untrusted import read_json
from ...version import VERSION
from .collect import collect

HOST = "127.0.0.1"
_HERE = Path(__file__).parent


def page(runs: Sequence[Path], *, live: bool = False) -> str:
    """One HTML page of one or several runs.

    Raises :class:`HyditError` if a folder holds no records.
    """
    return render(
        _HERE,
        "page.html",
        styles=("uplot.css", "page.css"),
        scripts=("uplot.js", "page.js"),
        live=live,
        runs=[collect(run) for run in runs],
        words=read_json(_HERE / "words.json"),
        hydit=VERSION,
        made=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def write(runs: Sequence[Path], path: Path) -> None:
    """Write the page to ``path``.

    Raises :class:`HyditError` if it cannot be written.
    """
    text = page(runs)
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise HyditError(f"{path}: cannot be written: {error.strerror or error}") from error


def server(runs: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server for this machine alone that gives the page as the runs are at that moment.

    Raises :class:`HyditError` if the port is taken.
    """
    page(runs)  # what is wrong with a folder is said at once, not to a browser

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site that a name server sends here is not to read this.
            if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
                return self.send_error(HTTPStatus.FORBIDDEN)
            try:
                if self.path == "/":
                    return self._send(page(runs, live=True), "text/html; charset=utf-8")
                if self.path == "/data.json":
                    return self._send(json.dumps([collect(run) for run in runs]), "application/json")
            except HyditError as error:
                return self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=str(error))
            return self.send_error(HTTPStatus.NOT_FOUND)

        def _send(self, text: str, kind: str) -> None:
            content = text.encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """The terminal is for what the user asked."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise HyditError(f"--live {port}: {error}; choose another port, or 0 for any") from error
