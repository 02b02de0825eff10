"""Clients that stand still: half headers, half bodies, unread answers. They end, and harm nobody meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.support.connections import Connection
from tests.support.server import LONG, PLAIN, ServerProcess, TinyWorld, make_world, wait_for_metric

BOUNDS = (
    "--header-timeout-s", "2", "--body-timeout-s", "2", "--write-timeout-s", "2",
    "--max-unfinished-bytes", "1MiB", "--max-connections", "300", "--max-new-tokens-limit", "8192",
)  # fmt: skip
PLAIN_REQUEST = json.dumps({"input": "hello", "parameters": {"max_new_tokens": 3}}).encode()
HALF = {"body": b'{"input": "hel', "declared": 5000}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def server(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    given = ("--backbone", str(world.folder), "--registry", str(folder / "registry"), *BOUNDS)
    with ServerProcess(folder, *given) as process:
        yield process.wait_ready()


def whole(server: ServerProcess) -> None:
    """An honest request is answered."""
    assert httpx.post(f"{server.url}/generate", content=PLAIN_REQUEST, timeout=60, verify=PLAIN,
                      headers={"content-type": "application/json"}).status_code == 200  # fmt: skip


@pytest.mark.parametrize("admin", [False, True], ids=["public", "admin"])
@pytest.mark.parametrize("sent", [b"GET /health HTTP/1.1\r\nHost: [::1]\r\nX-", b"G"], ids=["half headers", "one byte"])
def test_headers_that_do_not_arrive_are_refused(server: ServerProcess, admin: bool, sent: bytes) -> None:
    with Connection(server.admin_port if admin else server.port) as connection:
        answer = connection.send(sent).answer()
        assert answer is not None and answer[0] == 408 and answer[2]["error"]["code"] == "timeout"
        assert answer[1]["connection"] == "close" and connection.rest() == b""


def test_a_connection_that_sends_nothing_is_closed(server: ServerProcess) -> None:
    with Connection(server.port) as connection:
        assert connection.answer() is None


def test_headers_that_trickle_are_refused(server: ServerProcess) -> None:
    with Connection(server.port) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nHost: [::1]\r\nX-Long: ")
        began = time.monotonic()
        try:
            while time.monotonic() < began + 60:
                connection.send(b"a")
                time.sleep(0.2)
        except OSError:
            return  # closed, while we sent
        raise AssertionError("one byte now and then kept the connection")


def test_a_further_request_on_a_connection_has_the_time_of_the_first(server: ServerProcess) -> None:
    with Connection(server.port) as connection:
        first = connection.post("/generate", PLAIN_REQUEST).answer()
        assert first is not None and first[0] == 200
        time.sleep(2.5)  # longer than headers may take: an idle connection is no unfinished request
        second = connection.post("/generate", PLAIN_REQUEST).answer()
        assert second is not None and second[0] == 200
        third = connection.send(b"GET /health HT").answer()
        assert third is not None and third[0] == 408


@pytest.mark.parametrize("path", ["/generate", "/generate/batch", "/v1/completions", "/nowhere"])
def test_a_body_that_stands_still_is_refused(server: ServerProcess, path: str) -> None:
    with Connection(server.port) as connection:
        answer = connection.post(path, **HALF).answer()  # type: ignore[arg-type]
        assert answer is not None and answer[0] in ({408} if path != "/nowhere" else {404, 408})
        assert connection.rest() == b"" or path == "/nowhere"
    whole(server)


def test_an_upload_that_stands_still_is_refused(server: ServerProcess) -> None:
    with Connection(server.port) as connection:
        connection.send(
            b"POST /prefixes HTTP/1.1\r\nHost: [::1]\r\nContent-Type: multipart/form-data; boundary=edge\r\n"
            b"Content-Length: 5000\r\n\r\n"
            b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhalf'
        )
        answer = connection.answer()
        assert answer is not None and answer[0] == 408


def test_a_chunked_body_that_stands_still_is_refused(server: ServerProcess) -> None:
    with Connection(server.port) as connection:
        connection.send(b"POST /generate HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\n"
                        b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"inp")  # fmt: skip
        answer = connection.answer()
        assert answer is not None and answer[0] == 408


def test_unfinished_bodies_are_bounded_in_total_and_the_honest_go_on(server: ServerProcess) -> None:
    held = [Connection(server.port).post("/generate", b" " * (100 << 10), declared=200 << 10) for _ in range(20)]
    whole(server)
    answers = [connection.answer() for connection in held]
    assert all(answer is not None and answer[0] in (408, 503) for answer in answers)
    crowded = [answer for answer in answers if answer is not None and answer[0] == 503]
    assert len(crowded) >= 9  # 20 x 100 KiB in 1 MiB
    assert all(a[2]["error"]["code"] == "overloaded" and "retry-after" in a[1] for a in crowded)
    for connection in held:
        connection.socket.close()


def test_a_stream_that_is_not_read_is_ended(server: ServerProcess) -> None:
    body = json.dumps({"input": "hello", "stream": True, "parameters": {**LONG, "logprobs": 20}}).encode()
    streams = [Connection(server.port, receive_buffer=4096).post("/generate", body) for _ in range(2)]
    for stream in streams:
        stream.until(b"event: token")
    wait_for_metric(server, "prefixd_num_requests_running", 0, timeout_s=60)
    whole(server)
    assert sum(line["message"] == "a client does not read" for line in server.log_lines()) == len(streams)
    for stream in streams:
        assert b"event: done" not in stream.rest()
        stream.socket.close()


def test_beyond_the_most_connections_idle_ones_give_way(server: ServerProcess) -> None:
    idle = [Connection(server.port) for _ in range(320)]
    whole(server)
    for connection in idle:
        connection.socket.close()


def test_what_is_no_http_is_answered_in_the_form_of_our_errors(server: ServerProcess) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /a b HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n"):
        with Connection(server.port) as connection:
            answer = connection.send(sent).answer()
            assert answer is not None and answer[0] == 400 and answer[2]["error"]["code"] == "invalid_request"


def test_none_of_this_is_an_error_of_ours(server: ServerProcess) -> None:
    levels = {line["level"] for line in server.log_lines()}
    assert levels <= {"info", "warning"} and "Traceback" not in server.log.read_text()
