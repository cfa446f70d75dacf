"""Serves a live report to browsers on this machine, and to nobody else."""

from __future__ import annotations

import errno
import json
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from mvsplit.diagnostics.live import LiveReport
from mvsplit.errors import UserError

LOCALHOST = "127.0.0.1"
_NAMES = (LOCALHOST, "localhost")  # any port of them: an SSH tunnel may give it another
_PORTS_TRIED = 50
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class LiveServer(ThreadingHTTPServer):
    """`/` is the page, `/news?known=TOKEN` what it does not know yet, and nothing else exists."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, report: LiveReport, port: int) -> None:
        super().__init__((LOCALHOST, port), _Handler)
        self.report = report

    @property
    def url(self) -> str:
        return f"http://{LOCALHOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader who left in the middle of an answer is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def serve(report: LiveReport, port: int) -> LiveServer:
    """A server on `port`, or on the next free one; 0: on any. It answers from `serve_forever` on.

    Raises:
        UserError: none of the next ports is free.
    """
    ports = range(port, min(port + _PORTS_TRIED, 65536)) if port else (0,)
    for candidate in ports:
        try:
            return LiveServer(report, candidate)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise UserError(f"port={port}: no port from there to {ports[-1]} is free; choose another")


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer
    server_version = "mvsplit"
    sys_version = ""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0]
        if host not in _NAMES:  # a page elsewhere whose name was made to lead here
            return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "only for localhost\n")
        url = urlsplit(self.path)
        if url.path == "/":
            return self._answer(HTTPStatus.OK, "text/html", self.server.report.page())
        if url.path == "/news":
            return self._send_news(parse_qs(url.query).get("known", [None])[0])
        return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "no such page\n")

    def _send_news(self, known: str | None) -> None:
        news = self.server.report.news(known)
        if news is None:
            return self._answer(HTTPStatus.NO_CONTENT, "application/json", "")
        text = json.dumps(news, allow_nan=False, separators=(",", ":"))
        return self._answer(HTTPStatus.OK, "application/json", text)

    def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
        body = text.encode("utf-8", errors="replace")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        if status is not HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page that asks every second would fill the terminal."""
