"""The process: readiness, drain, signals, and what a start that fails says. Each test has a server of its own."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import LONG, ServerProcess, TinyWorld, events, make_world, metric, upload

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """One family is enough: no process knows which it serves."""
    return make_world(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def start(world: TinyWorld, tmp_path: Path) -> Iterator[Start]:
    """Starts servers over the tiny backbone; kills them in the end."""
    with ExitStack() as stack:

        def start(*arguments: str, env: dict[str, str] | None = None, backbone: str | None = None) -> ServerProcess:
            base = ("--backbone", backbone or str(world.folder), "--registry", str(tmp_path / "registry"))
            sizes = ("--kv-cache-bytes", "32MiB", "--max-new-tokens-limit", "8000", "--kernels", "torch")
            return stack.enter_context(ServerProcess(tmp_path, *base, *sizes, *arguments, env=env))

        yield start


def stream(client: httpx.Client, tokens: int | None = None) -> Any:
    parameters = LONG if tokens is None else {"max_new_tokens": tokens, "min_new_tokens": tokens}
    body = {"task": None, "input": "x", "stream": True, "parameters": parameters}
    return client.stream("POST", "/generate", json=body)


def test_sigterm_drains_running_rows_finish_nothing_new_begins_and_the_exit_code_is_zero(start: Start) -> None:
    server = start().wait_ready()
    with server.client() as client, server.client() as other, stream(client, 1500) as response:
        tokens = events(response.iter_lines())
        next(tokens)
        server.signal(signal.SIGTERM)
        refused = until(lambda: other.get("/ready"), 503)
        assert refused.json()["error"]["code"] == "shutting_down"
        for path, body in (("/generate", {"input": "x"}), ("/generate/batch", {"items": [{"input": "x"}]})):
            answer = other.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
            assert int(answer.headers["retry-after"]) >= 1
        assert upload(other, "late", b"").status_code == 503
        assert other.get("/health").status_code == 200
        assert httpx.get(f"{server.admin_url}/ready").status_code == 503
        assert metric(server, "prefixd_num_requests_running") == 1, "the admin port tells of the drain to its end"
        *rest, (name, done) = tokens
    assert name == "done"
    assert (len(done["outputs"][0]["token_ids"]), done["outputs"][0]["finish_reason"]) == (1500, "length")
    assert len(rest) > 100
    assert server.wait() == 0


@pytest.mark.parametrize("how", ["second signal", "timeout"])
def test_a_drain_cut_short_aborts_what_runs_and_says_so(start: Start, how: str) -> None:
    server = start("--drain-timeout-s", "1" if how == "timeout" else "60").wait_ready()
    with server.client() as client, stream(client) as response:
        tokens = events(response.iter_lines())
        next(tokens)
        server.signal(signal.SIGINT)
        if how == "second signal":
            time.sleep(1.0)
            server.signal(signal.SIGINT)
        *_, (name, done) = tokens
    assert (name, done["outputs"][0]["finish_reason"]) == ("done", "abort")
    assert server.wait() == 1


def test_a_signal_delivered_twice_at_once_is_one_signal(start: Start) -> None:
    """`make` forwards what the whole process group has already got; the drain was cancelled before it had begun."""
    server = start().wait_ready()
    with server.client() as client, stream(client, 300) as response:
        tokens = events(response.iter_lines())
        next(tokens)
        server.signal(signal.SIGTERM)
        server.signal(signal.SIGTERM)
        *_, (name, done) = tokens
    assert (name, done["outputs"][0]["finish_reason"]) == ("done", "length")
    assert server.wait() == 0


def test_a_registry_that_goes_away_makes_the_server_unready_and_an_idle_server_stops_at_once(
    start: Start, tmp_path: Path
) -> None:
    server = start("--max-stale-s", "0", env={"PREFIXD_MAX_BATCH_ITEMS": "1"}).wait_ready()
    with server.client() as client:
        (tmp_path / "registry").rename(tmp_path / "gone")
        answer = until(lambda: client.get("/ready"), 503)
        assert answer.json()["error"]["code"] == "registry_unavailable"
        assert client.get("/health").json() == {"status": "ok"}
        item = {"input": "x", "parameters": {"max_new_tokens": 1}}
        assert client.post("/generate", json=item).status_code == 200  # the bare backbone needs no registry
        assert client.post("/generate/batch", json={"items": [item, item]}).status_code == 422  # PREFIXD_…
        (tmp_path / "gone").rename(tmp_path / "registry")
        until(lambda: client.get("/ready"), 200)
        begun = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - begun < 10
    assert all({"time", "level", "message"} <= line.keys() for line in server.log_lines())


def fails(server: ServerProcess, code: int = 1) -> str:
    """The one line that a start that fails writes; nothing before or after it but log lines."""
    assert server.wait(120) == code
    lines = [line for line in server.log.read_text().splitlines() if line and not line.startswith("{")]
    assert len(lines) == 1, lines
    return lines[0]


def test_a_port_in_use_is_one_line_and_exit_code_one(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(start("--port", str(port)))
    assert line == f"prefixd serve: cannot listen on 127.0.0.1 port {port}: Address already in use"


def test_an_admin_port_in_use_is_one_line_that_names_the_option(start: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = fails(start("--admin-port", str(port)))
    assert line == f"prefixd serve: cannot listen on 127.0.0.1 port {port} (--admin-port): Address already in use"


def test_free_ports_are_picked_on_request_and_the_log_says_both(start: Start) -> None:
    server = start("--port", "0", "--admin-port", "0")
    deadline = time.monotonic() + 120
    while not (lines := [line for line in server.log_lines() if line["message"] == "ready"]):
        assert time.monotonic() < deadline and server.process.poll() is None, server.log.read_text()
        time.sleep(0.05)
    public, admin = lines[0]["url"], lines[0]["admin_url"]
    assert public != admin
    assert httpx.get(f"{admin}/ready").status_code == httpx.get(f"{public}/ready").status_code == 200
    assert "prefixd_num_requests_running" in httpx.get(f"{admin}/metrics").text
    for path in ("/metrics", "/admin/residents", "/admin/gc"):
        assert httpx.get(f"{public}{path}").status_code == 404
    assert httpx.post(f"{admin}/generate", json={"input": "x"}).status_code == 404


def test_a_stuck_scrape_does_not_hold_up_the_exit(start: Start) -> None:
    server = start().wait_ready()
    with socket.create_connection(("127.0.0.1", server.admin_port)) as half_asked, server.admin_client() as kept_alive:
        half_asked.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert kept_alive.get("/metrics").status_code == 200
        server.signal(signal.SIGTERM)
        assert server.wait(30) == 0


HANGING_DISK = """
import os
from pathlib import Path
from threading import Event

real = os.open

def opened(name, *arguments, **options):
    at = Path(__file__).with_name("hangs-at")
    if str(name).endswith(".safetensors") and at.exists() and at.read_text() in str(name):
        Event().wait()
    return real(name, *arguments, **options)

os.open = opened
"""
"""Python runs it before anything else: opening the artifact that the file ``hangs-at`` names never returns."""


def test_a_fetch_that_hangs_holds_up_neither_rows_nor_the_exit(
    start: Start, world: TinyWorld, tmp_path: Path
) -> None:
    """The loader's threads were joined at exit, however long the registry hung."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (disk / "sitecustomize.py").write_text(HANGING_DISK)
    server = start("--drain-timeout-s", "1", "--host-cache-bytes", "0", env={"PYTHONPATH": str(disk)}).wait_ready()
    with server.client() as client, server.client() as stuck, ThreadPoolExecutor() as pool:
        for task, seed in (("hung", 0), ("fine", 1)):
            assert upload(client, task, world.prefix(seed=seed)).status_code == 201
        version = client.get("/prefixes/hung").json()["versions"][0]["version"].removeprefix("sha256:")
        (disk / "hangs-at").write_text(version)
        waiting = pool.submit(stuck.post, "/generate", json={"task": "hung", "input": "x"})
        deadline = time.monotonic() + 60
        while metric(server, "prefixd_num_requests_waiting") < 1:
            assert time.monotonic() < deadline and not waiting.done(), "it does not hang"
            time.sleep(0.02)
        body = {"task": "fine", "input": "x", "parameters": {"max_new_tokens": 20, "min_new_tokens": 20}}
        assert client.post("/generate", json=body).json()["usage"]["output_tokens"] == 20
        begun = time.monotonic()
        server.signal(signal.SIGTERM)
        assert waiting.result().json()["outputs"][0]["finish_reason"] == "abort"
        assert server.wait(30) == 1
        assert time.monotonic() - begun < 15


def test_what_was_fetched_before_a_restart_is_served_from_the_disk_cache(
    start: Start, world: TinyWorld, tmp_path: Path
) -> None:
    body = {"task": "e2e", "input": "x", "parameters": {"max_new_tokens": 8}}
    texts: list[str] = []
    for reads in ({"registry": 1, "disk": 0}, {"registry": 0, "disk": 1}):
        server = start("--disk-cache", str(tmp_path / "cache")).wait_ready()
        with server.client() as client, server.admin_client() as admin:
            if not texts:
                assert upload(client, "e2e", world.prefix()).status_code == 201
            texts.append(client.post("/generate", json=body).json()["outputs"][0]["text"])
            shown = server.metrics()
            for tier, count in reads.items():
                assert f'prefixd_prefix_reads_total{{tier="{tier}"}} {float(count)}' in shown
            tiers = admin.get("/admin/residents").json()["tiers"]
            assert {tier["tier"]: len(tier["prefixes"]) for tier in tiers} == {"device": 1, "host": 1, "disk": 1}
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
    assert texts[0] == texts[1]


def test_a_backbone_that_is_none_is_one_line_and_exit_code_one(start: Start, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = fails(start(backbone=str(tmp_path / "empty"), env={"HF_HUB_OFFLINE": "1"}))
    assert line.startswith("prefixd serve: backbone")
    assert str(tmp_path / "empty") in line


def test_a_generation_config_that_is_not_supported_is_one_line_that_names_field_and_option(
    start: Start, world: TinyWorld, tmp_path: Path
) -> None:
    folder = shutil.copytree(world.folder, tmp_path / "biased")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "sequence_bias": [[[5], 2.0]]}))
    line = fails(start(backbone=str(folder)))
    assert "sequence_bias: expected none, got [[[5], 2.0]]" in line
    assert line.endswith("--ignore-generation-config sequence_bias")


def test_a_server_starts_without_a_field_that_it_is_told_to_ignore_and_warns(
    start: Start, world: TinyWorld, tmp_path: Path
) -> None:
    folder = shutil.copytree(world.folder, tmp_path / "biased")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "sequence_bias": [[[5], 2.0]]}))
    option = ("--ignore-generation-config", "sequence_bias")
    server = start(*option, *option[:1], "min_p", backbone=str(folder)).wait_ready()
    with server.client() as client:
        assert client.post("/generate", json={"input": "x", "parameters": {"max_new_tokens": 3}}).status_code == 200
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    warned = [line["message"] for line in server.log_lines() if line["level"] == "warning"]
    assert ["sequence_bias" in message for message in warned] == [True]


def test_a_settings_file_that_is_none_is_one_line_and_exit_code_one(start: Start) -> None:
    line = fails(start("--config", "/nowhere.toml"))
    assert line.startswith("prefixd serve: settings file /nowhere.toml: cannot be read")


def until(ask: Callable[[], httpx.Response], status: int) -> httpx.Response:
    """The first answer with ``status``, within a few seconds."""
    deadline = time.monotonic() + 10
    while (response := ask()).status_code != status:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.02)
    return response


