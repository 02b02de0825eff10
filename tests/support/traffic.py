"""Sends requests to replicas and keeps the answers: one by one, and as load in the background.

Owns requests, threads, the comparison with the expected answers, and what a registry has of what was written. Knows
no test.
"""

from __future__ import annotations

import json
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Self

import httpx

from prefixes.artifact import read_prefix
from prefixes.registry import open_registry
from tests.support.server import ServerProcess, events

SHORT = {"max_new_tokens": 6, "min_new_tokens": 6}
ROW = {"max_new_tokens": 1000, "min_new_tokens": 1000}


@dataclass(frozen=True)
class Answer:
    """What was answered, and after how many seconds."""

    status: int
    body: Any
    headers: httpx.Headers
    seconds: float

    @property
    def said(self) -> tuple[str | None, str]:
        """Version and text of a generation; the bare backbone has no version."""
        return self.body["version"], self.body["outputs"][0]["text"]


def ask(server: ServerProcess, method: str, path: str, *, admin: bool = False, **options: Any) -> Answer:
    """One request on a connection of its own."""
    began = time.monotonic()
    with server.admin_client() if admin else server.client() as client:
        answer = client.request(method, path, **options)
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    body = answer.json() if is_json and answer.content else answer.text
    return Answer(answer.status_code, body, answer.headers, time.monotonic() - began)


def generate(server: ServerProcess, task: str | None, parameters: dict[str, Any] = SHORT, text: str = "Blue") -> Answer:
    """``POST /generate``."""
    return ask(server, "POST", "/generate", json={"task": task, "input": text, "parameters": parameters})


def publish(server: ServerProcess, task: str, data: bytes) -> Answer:
    """``POST /prefixes``."""
    return ask(server, "POST", "/prefixes", data={"task": task}, files={"file": ("prefix.safetensors", data)})


class Background(ABC):
    """A thread that works until the block ends; what goes wrong in it is in ``faults``."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.count = 0  # of what has come
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @abstractmethod
    def work(self) -> None:
        """Once more, until ``_done``."""

    def wait_for(self, more: int, timeout_s: float) -> None:
        """Return once that many more have come."""
        goal, deadline = self.count + more, time.monotonic() + timeout_s
        while self.count < goal:
            assert not self.faults, self.faults
            assert time.monotonic() < deadline, f"it stands still: {goal - self.count} of {more} are missing"
            time.sleep(0.01)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._done.is_set():
            try:
                self.work()
            except Exception as error:
                self.faults.append(f"{type(error).__name__}: {error}")
                self._done.wait(0.1)


class Repeated(Background):
    """One call after the other."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call

    def work(self) -> None:
        self._call()
        self.count += 1


class Stream(Background):
    """A row that always runs, one stream after the other, each compared token by token with what it must be.

    With ``length`` one may run for longer than ``expected`` says, and is compared up to there.
    """

    def __init__(self, server: ServerProcess, task: str, expected: list[int], length: int | None = None) -> None:
        super().__init__()
        self._server, self._task, self._expected = server, task, expected
        self._length = length or len(expected)
        self.longest_gap_s = 0.0
        self._last = 0.0

    def work(self) -> None:
        parameters = {"max_new_tokens": self._length, "min_new_tokens": self._length}
        body = {"task": self._task, "input": "Blue", "parameters": parameters, "stream": True}
        with self._server.client() as client, client.stream("POST", "/generate", json=body) as response:
            if response.status_code != 200:
                raise AssertionError(f"{response.status_code}: {response.read()[:300]!r}")
            told, self._last = 0, time.monotonic()
            for name, data in events(response.iter_lines()):
                if name == "error" or (name == "done" and told != self._length):
                    raise AssertionError(f"after {told} tokens: {name} {json.dumps(data)[:300]}")
                if name == "token":
                    ids = data["token_ids"]
                    expected = self._expected[told : told + len(ids)]
                    if ids[: len(expected)] != expected:
                        raise AssertionError(f"token {told}: other than when all was well")
                    told += len(ids)
                    self._note(len(ids))
                if self._done.is_set():
                    return

    def _note(self, count: int) -> None:
        now = time.monotonic()
        self.longest_gap_s = max(self.longest_gap_s, now - self._last)
        self.count, self._last = self.count + count, now


class Requests(Background):
    """Short requests for one task, one after the other, each of which must be answered as ``expected``."""

    def __init__(self, server: ServerProcess, task: str, expected: tuple[str | None, str]) -> None:
        super().__init__()
        self._server, self._task, self._expected = server, task, expected
        self.longest_s = 0.0

    def work(self) -> None:
        with self._server.client() as client:
            while not self._done.wait(0.05):
                began = time.monotonic()
                body = {"task": self._task, "input": "Blue", "parameters": SHORT}
                answer = client.post("/generate", json=body)
                self.longest_s = max(self.longest_s, time.monotonic() - began)
                if answer.status_code != 200:
                    raise AssertionError(f"{answer.status_code}: {answer.text[:300]}")
                if (answer.json()["version"], answer.json()["outputs"][0]["text"]) != self._expected:
                    raise AssertionError("other than when all was well")
                self.count += 1


@dataclass(frozen=True)
class Write:
    """A change that was asked for: a task published, or an alias of the task ``holder`` promoted."""

    began: float  # time.monotonic() seconds
    name: str
    is_task: bool
    status: int  # 0: there was no answer
    holder: str


class Writer(Background):
    """Publishes tasks and promotes aliases in turn, each under a name of its own.

    The aliases are of the task ``holder``, which has the version ``resident``; a task has so many and no more.
    """

    def __init__(
        self, server: ServerProcess, name: str, data: bytes, resident: str, holder: str = "resident"
    ) -> None:
        super().__init__()
        self._server, self._name, self._data, self._resident = server, name, data, resident
        self._holder = holder
        self.writes: list[Write] = []

    def work(self) -> None:
        number, began, status = len(self.writes), time.monotonic(), 0
        name, is_task = f"{self._name}-{number}", number % 2 == 0
        try:
            if is_task:
                status = publish(self._server, name, self._data).status
            else:
                body = {"version": self._resident, "alias": name}
                status = ask(self._server, "POST", f"/prefixes/{self._holder}/promote", json=body).status
        finally:
            self.writes.append(Write(began, name, is_task, status, self._holder))
        if status in (200, 201):
            self.count += 1
        elif status != 503:
            raise AssertionError(f"{name}: {status}")
        else:
            self._done.wait(0.02)

    @property
    def refused(self) -> int:
        """How many were answered with 503."""
        return sum(write.status == 503 for write in self.writes)


def check_writes(url: str, writes: Iterable[Write], *, kept: bool) -> Counter[str]:
    """How many there are of each outcome. ``kept``, unless what was made may be lost: what was made is there, once."""
    with closing(open_registry(url)) as registry:
        tasks = {task.name: task for task in registry.tasks("default")}
        audit = registry.audit("default", limit=100_000)
        for task in tasks.values():
            for info in task.versions:
                read_prefix(registry.fetch("default", info.version), expected_version=info.version)
    entries = Counter(entry.alias if entry.action == "promote" else entry.task for entry in audit)
    outcomes: Counter[str] = Counter()
    for write in writes:
        there = write.name in (tasks if write.is_task else tasks[write.holder].aliases)
        if kept:
            assert there or write.status not in (200, 201), write
            assert entries[f"default/{write.name}" if write.is_task else write.name] == there, write
        outcomes[f"{'there' if there else 'not there'} after {write.status}"] += 1
    return outcomes
