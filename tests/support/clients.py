"""Clients as they are: some read to the end, some leave, some never finish what they began to say.

Owns one client's life among others, and what is counted of it. Knows no test.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import httpx

from tests.support.crowd import JSON, Question, batch, encoded, essence, joined, plain, told
from tests.support.figures import Figures
from tests.support.server import PLAIN, ServerProcess

PATIENCE_S: Final = 90.0
"""Tells a lost answer: an answer takes a fraction of a second, on a busy machine with this crowd some seconds."""
HELD_S: Final = 3.0
"""For so long a half-open connection is held."""

Act = Callable[["Crowd", httpx.AsyncClient, random.Random], Awaitable[None]]


@dataclass
class Crowd:
    """Many clients of one server until ``done``. ``known`` are questions with their answers, ``moving`` a task's
    answers by version, while the task is promoted, and ``uploads`` artifacts with their versions."""

    server: ServerProcess
    known: list[Question]
    moving: Mapping[str, Question]
    uploads: Mapping[str, bytes]
    figures: Figures
    acts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    async def run(self, clients: int, seconds: float, seed: int) -> None:
        """Let them ask until the time is up, and read what they have asked for."""
        end = asyncio.get_running_loop().time() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self.server.url, timeout=PATIENCE_S, verify=PLAIN, limits=limits
        ) as client:
            await asyncio.gather(*(self._live(client, random.Random(f"{seed} {n}"), end) for n in range(clients)))

    async def _live(self, client: httpx.AsyncClient, rng: random.Random, end: float) -> None:
        while asyncio.get_running_loop().time() < end:
            act = rng.choices(list(ACTS), weights=list(ACTS.values()))[0]
            self.acts[act.__name__] += 1
            self.figures.cases += 1
            try:
                await act(self, client, rng)
            except Exception as error:
                self.figures.lost += 1
                self.faults.append(f"{act.__name__}: {type(error).__name__}: {error}")

    def compare(self, question: Question, got: object) -> None:
        """Count the answer and keep a wrong one."""
        if not self.figures.compare(got, question.expected):
            self.faults.append(f"{question.body}: expected {question.expected}, got {got}")


async def asks(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    question = rng.choice(crowd.known)
    crowd.compare(question, await plain(client, question))


async def asks_for_many(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    questions = rng.sample(crowd.known, rng.randrange(1, 6))
    for question, got in zip(questions, await batch(client, questions), strict=True):
        if got[0] in (400, 422) and question.expected[0] == 422:  # an item's place stands before its message
            got = (got[0], (got[1][0], question.expected[1][1]))
        crowd.compare(question, got)


async def streams(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random, pause_s: float = 0.0) -> None:
    question = rng.choice(crowd.known)
    content = encoded({**question.body, "stream": True})
    async with client.stream("POST", "/generate", content=content, headers=JSON) as answer:
        if answer.status_code != 200:
            await answer.aread()
            crowd.compare(question, essence(answer.status_code, answer.json()))
            return
        events = []
        async for event in told(answer.aiter_lines()):
            events.append(event)
            if pause_s:
                await asyncio.sleep(pause_s)
    name, last = events[-1]
    if name == "error":
        crowd.compare(question, (question.expected[0], (last["error"]["code"], last["error"]["message"])))
        return
    crowd.compare(question, essence(200, last))
    pieces = joined(events)
    assert not pieces or pieces == [(output["text"], output["token_ids"]) for output in last["outputs"]], "other pieces"


async def reads_slowly(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    await streams(crowd, client, rng, pause_s=0.1)


async def leaves(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    body = {**rng.choice(crowd.known).body, "stream": True, "parameters": {"max_new_tokens": 4000}}
    async with client.stream("POST", "/generate", content=encoded(body), headers=JSON) as answer:
        left = rng.randrange(12)
        async for _ in answer.aiter_lines():
            left -= 1
            if left < 0:
                return


async def leaves_before_the_answer(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    body = encoded({**rng.choice(crowd.known).body, "parameters": {"max_new_tokens": 4000}})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(0.01, 0.5)):
            await client.post("/generate", content=body, headers=JSON)


async def half_speaks(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    begun = rng.choice([
        b"", b"POST /gen", b"POST /generate HTTP/1.1\r\nHost: [::1]\r\n",
        b"POST /generate HTTP/1.1\r\nHost: [::1]\r\nContent-Type: application/json\r\nContent-Length: 4000\r\n\r\n{\"t",
        b"POST /generate HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n{",
    ])  # fmt: skip
    await _say(crowd.server, begun, rng.uniform(0, HELD_S))


async def aborts_an_upload(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    head = (
        b"POST /prefixes HTTP/1.1\r\nHost: [::1]\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        b"Content-Length: 4000000\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"task\"\r\n\r\nmoving\r\n--b\r\n"
        b"Content-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n"
    )
    await _say(crowd.server, head + b"\0" * rng.randrange(2_000_000), rng.uniform(0, 0.5))


async def asks_while_it_moves(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    some = next(iter(crowd.moving.values()))
    answer = await client.post("/generate", content=encoded({**some.body, "task": "moving"}), headers=JSON)
    body = answer.json()
    assert answer.status_code == 200, body
    crowd.compare(crowd.moving[body["version"]], essence(200, body))


async def moves(crowd: Crowd, client: httpx.AsyncClient, rng: random.Random) -> None:
    version = rng.choice(list(crowd.uploads))
    if rng.random() < 0.5:
        answer = await client.post("/prefixes/moving/promote", json={"version": version})
    else:
        files = {"file": ("prefix.safetensors", crowd.uploads[version])}
        answer = await client.post("/prefixes", data={"task": "moving"}, files=files)
    assert answer.status_code in (200, 201), answer.text


ACTS: Final[Mapping[Act, int]] = {
    asks: 4, streams: 6, asks_for_many: 3, reads_slowly: 2, leaves: 3, leaves_before_the_answer: 1, half_speaks: 2,
    aborts_an_upload: 1, asks_while_it_moves: 3, moves: 1,
}  # fmt: skip
"""What a client may do next, and how often."""


async def _say(server: ServerProcess, begun: bytes, held_s: float) -> None:
    """Say so much, wait, and break the connection."""
    with contextlib.suppress(OSError):
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(begun)
            await writer.drain()
            await asyncio.sleep(held_s)
        finally:
            writer.transport.abort()
