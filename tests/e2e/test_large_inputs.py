"""Large inputs hold up nobody else: streams go on and ``/health`` answers while they are tokenised and refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import PLAIN, ServerProcess, wait_for_metric

WORD: str = "ab" * 500_000
"""One word: it has no place to cut it at, so that all of it is tokenised, for some tenths of a second."""
PROSE: str = "name : Blue Spice, " * 200_000  # 3.8 MB
PARAMETERS = {"max_new_tokens": 1, "truncate": True}
AT_ONCE = 8
LEAST = 20
"""Answers and tokens that others get at least meanwhile. Where tokenising holds the lock they get next to none."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("large")
    arguments = ("--backbone", "demo", "--registry", str(folder / "registry"), "--kernels", "torch", "--threads", "1")
    with ServerProcess(folder, *arguments) as process:
        yield process.wait_ready()


def asked(path: str, text: str, parameters: dict[str, Any]) -> dict[str, Any]:
    if path == "/generate":
        return {"input": text, "parameters": parameters}
    if path == "/generate/batch":
        return {"items": [{"input": text, "parameters": parameters}]}
    return {"model": "demo", "prompt": [text], "max_tokens": 1, "truncate": parameters.get("truncate", False)}


async def beside(server: ServerProcess, path: str, body: dict[str, Any]) -> tuple[list[httpx.Response], int, int]:
    """Answers to ``AT_ONCE`` such requests; the answers of ``/health``, and a stream's events, until the last came."""
    events = 0
    running = {"input": "name : x", "parameters": {"max_new_tokens": 900, "min_new_tokens": 900}, "stream": True}
    async with httpx.AsyncClient(base_url=server.url, timeout=120, verify=PLAIN) as client:
        async with client.stream("POST", "/generate", json=running) as stream:
            lines = (line async for line in stream.aiter_lines() if line.startswith("event: token"))
            await anext(lines)

            async def count() -> None:
                nonlocal events
                async for _ in lines:
                    events += 1

            counting = asyncio.create_task(count())
            large = [asyncio.create_task(client.post(path, json=body)) for _ in range(AT_ONCE)]
            healthy = 0
            while not all(task.done() for task in large):
                (await client.get("/health")).raise_for_status()
                healthy += 1
            seen = events
            counting.cancel()
        return [task.result() for task in large], healthy, seen


@pytest.mark.parametrize("path", ["/generate", "/generate/batch", "/v1/completions"])
def test_streams_and_probes_go_on_while_large_inputs_are_tokenised(server: ServerProcess, path: str) -> None:
    answers, healthy, seen = asyncio.run(beside(server, path, asked(path, WORD, PARAMETERS)))
    assert [answer.status_code for answer in answers] == [200] * AT_ONCE, answers[0].text[:300]
    assert healthy >= LEAST
    assert seen >= LEAST


def test_an_input_that_cannot_fit_is_refused_by_its_length(server: ServerProcess) -> None:
    with server.client() as client:
        whole = client.post("/generate", json=asked("/generate", PROSE, {})).json()["error"]
        cut = client.post("/generate", json=asked("/generate", PROSE, PARAMETERS))
        word = client.post("/generate", json=asked("/generate", WORD * 2, PARAMETERS)).json()["error"]
    assert (whole["code"], whole["detail"]["expected"]) == ("input_too_long", 511)
    assert whole["detail"]["got"] > 200_000
    assert "got at least" in whole["message"]
    assert "parameters.truncate" in whole["message"]
    assert cut.json()["truncated"] is True
    assert cut.json()["usage"]["input_tokens"] == 511
    assert (word["code"], word["detail"]) == ("input_too_long", {"expected": 1 << 20, "got": 2_000_000})


async def leave(server: ServerProcess) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=120, verify=PLAIN) as client:
        body = asked("/generate", WORD, PARAMETERS)
        sent = [asyncio.create_task(client.post("/generate", json=body)) for _ in range(40)]
        while not any(task.done() for task in sent):
            await asyncio.sleep(0.01)
        for task in sent:
            task.cancel()
        await asyncio.gather(*sent, return_exceptions=True)
        answer = await client.post("/generate", json=body)
        assert answer.status_code == 200


def test_those_who_leave_while_they_wait_are_not_tokenised(server: ServerProcess) -> None:
    """Forty wait for two threads and leave: those behind them would wait for all of their texts otherwise."""
    before = requests_ended(server)
    asyncio.run(leave(server))
    wait_for_metric(server, "prefixd_num_requests_running", 0)
    assert requests_ended(server) - before < 20


def requests_ended(server: ServerProcess) -> float:
    lines = server.metrics().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("prefixd_request_success_total"))
