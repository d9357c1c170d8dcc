"""The server of the live view: two addresses, read-only, for browsers on this machine unless it is told otherwise.

Beside ``/`` and ``/data`` nothing is served, so that no file can be asked for. A page of somebody else, open in the
same browser, learns nothing: its requests carry a host name that is not ours (which stops DNS rebinding), and no answer
may be read by another origin.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from adadagrad.report.live.view import LiveView
from adadagrad.report.style import DARK, LIGHT
from adadagrad.report.template import render

ALLOWED = ("GET", "HEAD")


class LiveServer(ThreadingHTTPServer):
    """Serves the page of a run directory; ``serve_forever`` runs it, ``shutdown`` and ``server_close`` end it.

    Args:
        directory: A run directory or a folder that holds some; it may come to be later.
        host: Address to listen at. Other than the loopback's it is open to everyone who can reach this machine.
        port: To listen at; 0 takes any that is free.

    Raises:
        MissingExtra: jinja2 is not installed.
    """

    daemon_threads = True

    def __init__(self, directory: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.view = LiveView(directory)
        self.page = render("live/page.html.j2", title=directory.resolve().name, light=LIGHT, dark=DARK,
                           page_style="live/page.css").encode()  # fmt: skip
        self.policy = content_security_policy(self.page.decode())
        self.names = {name.lower() for name in ("localhost", host, socket.gethostname())}
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)

    @property
    def url(self) -> str:
        """Where the page is, for a browser on this machine."""
        host, port = self.server_address[:2]
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(str(host), str(host))
        return f"http://{f'[{name}]' if ':' in name else name}:{port}/"

    def knows(self, host: str | None) -> bool:
        """Return whether a request's Host header names this machine: by an address, or by a name that is its own.

        Args:
            host: The header, with or without a port; None where there is none.
        """
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?", host or "")
        if match is None:
            return False
        name = match[1].strip("[]")
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self.names
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing where a browser has gone away in the middle of an answer."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    server: LiveServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        """Answer with the page or with what is new."""
        path, _, query = self.path.partition("?")
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            self._answer(HTTPStatus.BAD_REQUEST, "a request has no body here")
        elif not self.server.knows(self.headers.get("Host")):
            self._answer(HTTPStatus.FORBIDDEN, "this host name is not that of the machine: use its address")
        elif path == "/":
            self._answer(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "/data":
            since = parse_qs(query).get("since", [""])[0]
            self._answer(HTTPStatus.OK, self.server.view.news(since), "application/json")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is / alone")

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse what cannot be read, and methods other than GET and HEAD, in one line.

        Args:
            code: The status.
            message: Why.
            explain: Not said.
        """
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:
            status, message = HTTPStatus.METHOD_NOT_ALLOWED, "this server only shows: GET or HEAD"
        self.close_connection, self.request_version = True, "HTTP/1.1"  # also where it could not be read
        self._answer(status, message or status.phrase)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal is for one line that says where the page is."""

    def version_string(self) -> str:
        """Tell nobody which Python this is."""
        return "adadagrad"

    def _answer(self, status: HTTPStatus, content: str | bytes, kind: str = "text/plain; charset=utf-8") -> None:
        body = content.encode() + b"\n" if isinstance(content, str) else content
        if status >= HTTPStatus.BAD_REQUEST:
            self.close_connection = True
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": self.server.policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", ", ".join(ALLOWED))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def content_security_policy(page: str) -> str:
    """Return what a browser may do for a page: run its own style and script, ask its own server, and nothing else.

    Args:
        page: Its HTML.

    Returns:
        The header.

    Example:
        >>> content_security_policy("<style>a {}</style>").split("; ")[1]
        "style-src 'sha256-mkSHzL7faOU7/U/v8Umg+058R69+vN2A2xmE3Fz1q98='"
    """
    rules = ["default-src 'none'"]
    for kind in ("style", "script"):
        parts = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        rules += [f"{kind}-src " + " ".join(f"'sha256-{one}'" for one in hashes)] if hashes else []
    rules += ["connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return "; ".join(rules)
