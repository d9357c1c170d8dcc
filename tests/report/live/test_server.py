"""The server over real HTTP: two addresses, two methods, its own names; everything else is refused."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from adadagrad.report.live.server import LiveServer, content_security_policy
from tests.report.logs import small_run, write

pytest.importorskip("jinja2")
Answer = tuple[int, dict[str, str], bytes]
"""Status, headers by their names in small letters, body."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    write(tmp_path / "run", small_run())
    (tmp_path / "secret").write_text("nobody's business")
    with LiveServer(tmp_path / "run") as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def raw(server: LiveServer, request: str) -> Answer:
    """Send a request as it stands, which no client would."""
    with socket.create_connection(server.server_address[:2], timeout=20) as line:  # type: ignore[arg-type]
        line.sendall(request.encode("latin-1"))
        response = http.client.HTTPResponse(line, method=request.split(" ", 1)[0])
        response.begin()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def ask(
    server: LiveServer, path: str, method: str = "GET", host: str | None = "localhost"
) -> tuple[int, dict[str, str], bytes]:
    named = "" if host is None else f"Host: {host}\r\n"
    return raw(server, f"{method} {path} HTTP/1.1\r\n{named}Connection: close\r\n\r\n")


def test_it_listens_on_the_loopback_alone_and_says_where(server: LiveServer) -> None:
    address, port = server.server_address[:2]
    assert address == "127.0.0.1"
    assert port > 0
    assert server.url == f"http://127.0.0.1:{port}/"


def test_the_page_holds_all_that_it_needs(server: LiveServer) -> None:
    status, headers, body = ask(server, "/")
    page = body.decode()
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "<h1>run</h1>" in page
    links = [word for word in ("http://", "https://", "//cdn", "url(", "@import") if word in page.replace(
        "http://www.w3.org/2000/svg", "").replace("`url(#${clip})`", "")]  # fmt: skip
    assert links == []
    assert " style=" not in page
    assert " on" + "click" not in page


def test_the_data_are_json_and_go_on_where_they_were(server: LiveServer) -> None:
    status, headers, body = ask(server, "/data")
    first = json.loads(body)
    assert (status, headers["content-type"], len(first["runs"][0]["rows"])) == (200, "application/json", 4)
    second = json.loads(ask(server, f"/data?since={first['next']}")[2])
    assert second["runs"][0]["rows"] == []
    assert len(json.loads(ask(server, "/data?since=%00%ff&since=x&other=1")[2])["runs"][0]["rows"]) == 4


@pytest.mark.parametrize(
    "path",
    [
        "/secret", "/../secret", "/..%2fsecret", "/%2e%2e/secret", "/%2e%2e%2fsecret", "/data/../../secret",
        "../secret", "/run.jsonl", "/./", "/data/", "/%64ata", "/\0", "/%00", "/data%00", "..", "etc/passwd",
        "/etc/passwd", "//etc/passwd", "http://localhost/", "file:///etc/passwd", "*", "/favicon.ico",
        "/index.html", "/" + "a" * 5000,
    ],
)  # fmt: skip
def test_nothing_else_is_there(server: LiveServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status == 404
    assert body == b"there is / alone\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "NONSENSE"])
def test_it_only_shows(server: LiveServer, method: str) -> None:
    for path in ("/", "/data", "/secret"):
        status, headers, _ = ask(server, path, method)
        assert (status, headers["allow"], headers["connection"]) == (405, "GET, HEAD", "close")


def test_head_is_get_without_a_body(server: LiveServer) -> None:
    for path in ("/", "/nowhere"):
        got, head = ask(server, path), ask(server, path, "HEAD")
        assert head[2] == b""
        assert (head[0], head[1]["content-length"]) == (got[0], str(len(got[2])))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("LOCALHOST:80", 200), ("127.0.0.1:9999", 200), ("[::1]:80", 200), ("10.1.2.3", 200),
        (socket.gethostname(), 200),
        ("evil.example", 403), ("evil.example:8127", 403), ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403), ("", 403), (None, 403), ("a b", 403), ("[evil]", 403),
        ("localhost:80:80", 403), ("localhost@evil.example", 403),
    ],
)  # fmt: skip
def test_a_name_that_is_not_this_machine_is_refused(server: LiveServer, host: str | None, status: int) -> None:
    found, _, body = ask(server, "/data", host=host)
    assert found == status
    assert (b"rows" in body) == (status == 200)


def test_every_answer_is_closed_to_other_pages(server: LiveServer) -> None:
    for path in ("/", "/data", "/nowhere"):
        headers = ask(server, path)[1]
        assert "access-control-allow-origin" not in headers
        assert headers["content-security-policy"] == content_security_policy(server.page.decode())
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert headers["server"] == "adadagrad"


def test_the_policy_allows_its_own_style_and_script_alone() -> None:
    policy = content_security_policy("<style>a {}</style><script>b</script><style>c</style>")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].count("sha256-") == 1
    assert rules["style-src"].count("sha256-") == 2
    assert "unsafe" not in policy
    assert rules["connect-src"] == "'self'"
    assert content_security_policy("<script>b </script>") != content_security_policy("<script>b</script>")


def test_nonsense_and_bodies_are_refused_and_the_next_one_is_answered(server: LiveServer) -> None:
    assert raw(server, "GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello")[0] == 400
    assert raw(server, "GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")[0] == 400
    assert raw(server, "GET / HTTP/9.9\r\nHost: localhost\r\n\r\n")[0] == 505
    assert raw(server, "nonsense\r\n\r\n")[0] == 400
    assert raw(server, "GET /" + "a" * 70_000 + " HTTP/1.1\r\n\r\n")[0] == 414
    assert ask(server, "/data")[0] == 200


def test_one_connection_may_ask_often(server: LiveServer) -> None:
    line = http.client.HTTPConnection(*server.server_address[:2], timeout=20)  # type: ignore[arg-type]
    for _ in range(3):
        line.request("GET", "/data")
        assert line.getresponse().read().startswith(b"{")
    line.close()


def test_a_name_of_the_page_is_text(tmp_path: Path) -> None:
    with LiveServer(tmp_path / "<script>alert(1)<") as made:
        assert b"<script>alert" not in made.page
        assert b"&lt;script&gt;alert(1)&lt;" in made.page


def test_other_hosts(tmp_path: Path) -> None:
    with LiveServer(tmp_path, "0.0.0.0") as everywhere:
        assert everywhere.url == f"http://127.0.0.1:{everywhere.server_address[1]}/"
    if socket.has_ipv6:
        try:
            six = LiveServer(tmp_path, "::1")
        except OSError:
            pytest.skip("this machine has no IPv6 loopback")
        with six:
            assert six.url == f"http://[::1]:{six.server_address[1]}/"


def test_a_port_that_is_taken_is_an_error(server: LiveServer, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="in use"):
        LiveServer(tmp_path, port=server.server_address[1])
