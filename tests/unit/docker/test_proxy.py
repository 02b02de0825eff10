"""The proxy's limits: of one client, of bodies and of silence; against the services' settings, and with a HAProxy."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]

from server.settings import Settings
from tests.support.paths import ROOT
from trainer.service.settings import TrainerSettings

CONFIG: Final = (ROOT / "docker/proxy/haproxy.cfg").read_text()
PROXY: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["proxy"]
UNITS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}


def default(kind: Any, name: str) -> float:
    return float(kind.model_fields[name].default)


def seconds(directive: str) -> float:
    found = re.search(rf"^ +{directive} +(\d+)(ms|s|m|h)\b", CONFIG, re.M)
    assert found is not None, directive
    return int(found[1]) * UNITS[found[2]]


def presets() -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"^    presetenv (\w+) (\d+)$", CONFIG, re.M)}


def test_no_answer_is_cut_while_its_server_still_works_on_it() -> None:
    """An answer that is not streamed was cut after ten minutes of silence; 4,096 tokens may take longer."""
    silence = seconds("timeout server")
    assert silence > default(Settings, "max_new_tokens_limit"), "a token a second"
    for page in ("api.md", "deploy.md"):
        assert f"{silence / 60:g} minutes" in (ROOT / "docs" / page).read_text(), page
    for kind in (Settings, TrainerSettings):
        assert silence > default(kind, "body_timeout_s") + 30, "an upload that waits for its place"
        assert min(silence, seconds("timeout client")) > 2 * default(kind, "heartbeat_s")
    assert "option srvtcpka" in CONFIG
    assert seconds("srvtcpka-idle") + 6 * seconds("srvtcpka-intvl") < 120, "a machine that is gone is told sooner"


def test_who_reads_nothing_or_sends_half_is_the_services_to_judge_and_goes_at_the_proxy_too() -> None:
    for kind in (Settings, TrainerSettings):
        assert default(kind, "write_timeout_s") < seconds("timeout client") <= 300
        assert seconds("timeout http-request") >= default(kind, "header_timeout_s")
        assert seconds("http-request wait-for-body time") == default(kind, "body_timeout_s")


def test_one_client_leaves_most_connections_to_the_others() -> None:
    most = re.search(r"^    fd-hard-limit (\d+)$", CONFIG, re.M)
    assert most is not None
    assert presets()["PREFIXD_PROXY_CLIENT_CONNECTIONS"] * 4 < int(most[1]) / 2, "two descriptors for each"
    assert presets().keys() == set(PROXY["environment"])
    rejected = CONFIG.index("tcp-request connection reject")
    assert CONFIG.index("track-sc0 src") < rejected < CONFIG.index("    http-request set-var")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[int]:
    """The port of a HAProxy with our file in front of one server: 5 connections, 20 requests, bodies within 1 s."""
    if (program := shutil.which("haproxy")) is None:
        pytest.skip("needs haproxy")
    with ExitStack() as stack:
        server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=server.serve_forever, daemon=True).start()
        stack.callback(server.shutdown)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port: int = free.getsockname()[1]
        text = CONFIG.replace("bind :8000", f"bind 127.0.0.1:{port}").replace("time 30s if", "time 1s if")
        text = re.sub(r"server-template .*", f"server one 127.0.0.1:{server.server_address[1]}", text)
        text = re.sub(r"^ +(option httpchk|http-check|default-server|fd-hard-limit).*\n", "", text, flags=re.M)
        (tmp_path / "haproxy.cfg").write_text(text)
        limits = {"PREFIXD_PROXY_CLIENT_CONNECTIONS": "5", "PREFIXD_PROXY_CLIENT_REQUESTS": "20"}
        process = subprocess.Popen(
            [program, "-f", str(tmp_path / "haproxy.cfg")], env=limits, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port


def sent(port: int, text: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(text.encode())
    return connection


def answer(connection: socket.socket) -> str:
    with connection, connection.makefile("rb") as file:
        return file.readline().decode()


POST: Final = "POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: "


def test_half_a_small_body_reaches_no_server(proxy: int) -> None:
    assert " 200 " in answer(sent(proxy, POST + "2\r\n\r\n{}"))
    assert " 408 " in answer(sent(proxy, POST + "50\r\n\r\n{"))


def test_connections_beyond_a_clients_own_are_closed(proxy: int) -> None:
    held = [sent(proxy, "") for _ in range(5)]
    with suppress(ConnectionError):
        assert answer(sent(proxy, "")) == ""
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if " 200 " in answer(sent(proxy, POST + "2\r\n\r\n{}")):
                return
        except ConnectionError:
            time.sleep(0.05)
    raise AssertionError("its closed connections still count")


def test_a_client_that_asks_too_often_is_told_so(proxy: int) -> None:
    statuses = [answer(sent(proxy, POST + "2\r\n\r\n{}")).split()[1] for _ in range(25)]
    assert statuses[:15] == ["200"] * 15 and statuses[-4:] == ["429"] * 4  # the fixture's own look counts too
