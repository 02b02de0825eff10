"""SIGTERM at any moment, among clients that ask without end and connections that stand still: only whole answers."""

from __future__ import annotations

import json
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx

from tests.support.checkup import EXACT
from tests.support.connections import Connection
from tests.support.figures import Figures
from tests.support.server import PLAIN, ServerProcess, TinyWorld, events, upload

CLIENTS: Final = 32
ROUNDS: Final = 4
TOKENS: Final = 40

Said = tuple[str, list[int]]


def test_sigterm_under_load_gives_everybody_a_whole_answer(figures: Figures, world: TinyWorld, tmp_path: Path) -> None:
    rng = random.Random(15)
    given = ("--backbone", str(world.folder), "--registry", str(tmp_path / "registry"), "--drain-timeout-s", "60")
    refused = 0
    for _ in range(ROUNDS):
        with ServerProcess(tmp_path, *given, *EXACT) as server, ThreadPoolExecutor(CLIENTS) as clients:
            with server.wait_ready().client() as client:
                assert upload(client, "e2e", world.prefix(seed=5)).status_code == 201
                alone = said(client.post("/generate", json=question(stream=False)), stream=False)
            stuck = stand_still(server)
            asked = [
                clients.submit(until_refused, server, number % 2 == 0, alone) for number in range(CLIENTS)
            ]
            time.sleep(rng.uniform(0.5, 2.0))
            server.signal(signal.SIGTERM)
            answered = 0
            for one in asked:
                whole, told = one.result(timeout=120)
                answered, refused = answered + whole, refused + told
            assert answered > 0
            assert server.wait(60) == 0
            figures.compared += answered
            figures.cases += len(stuck) + 1
            for connection in stuck:
                connection.socket.close()
    assert "Traceback" not in server.log.read_text()  # of all rounds
    figures.notes.append(f"{ROUNDS} SIGTERMs; of {ROUNDS * CLIENTS} clients {refused} were told 503, others not let in")


def stand_still(server: ServerProcess) -> list[Connection]:
    """Connections of every kind that will not end by themselves."""
    half = b'{"input": "hel'
    long = json.dumps(question(stream=True, tokens=800)).encode()
    unread = Connection(server.port, receive_buffer=4096).post("/generate", long)
    unread.until(b"event: token")
    return [
        Connection(server.port),
        Connection(server.port).send(b"POST /generate HTTP/1.1\r\nHos"),
        Connection(server.port).post("/generate", half, declared=5000),
        Connection(server.port).post("/prefixes", half, declared=5000),
        Connection(server.admin_port),
        Connection(server.admin_port).post("/admin/gc", half, declared=5000),
        unread,
    ]


def question(*, stream: bool, tokens: int = TOKENS) -> dict[str, Any]:
    """The body of ``POST /generate``."""
    parameters = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return {"task": "e2e", "input": "hello", "stream": stream, "parameters": parameters}


def until_refused(server: ServerProcess, stream: bool, alone: Said) -> tuple[int, bool]:
    """How many answers were whole, and whether a 503 was the last, and not a connection that was refused unused."""
    whole = 0
    with httpx.Client(timeout=60, verify=PLAIN) as client:
        while True:
            try:
                answer = client.post(f"{server.url}/generate", json=question(stream=stream))
            except httpx.ConnectError:
                return whole, False
            if answer.status_code == 503:
                return whole, True
            assert answer.status_code == 200
            assert said(answer, stream=stream) == alone
            whole += 1


def said(answer: httpx.Response, *, stream: bool) -> Said:
    """Text and tokens of a whole answer."""
    if not stream:
        output = answer.json()["outputs"][0]
        return output["text"], output["token_ids"]
    told = list(events(answer.iter_lines()))
    assert told[-1][0] == "done", told[-1]
    pieces = [data for name, data in told if name == "token"]
    return "".join(data["text"] for data in pieces), [token for data in pieces for token in data["token_ids"]]
