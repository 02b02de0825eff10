"""Load on the composed service, every answer compared with what that task must say.

Owns the requests, their expected texts and the book of outcomes. A text that differs is ``wrong``, whatever else
happened; a refusal, a broken connection or a stream that ends early are counted by kind.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from typing import Any, Final, Self

from tests.docker.stack import Stack

MARKER: Final = "Zebra Lantern"
"""Stands in every input, so that a log that shows inputs gives itself away."""

TASKS: Final = ("e2e", "e2e-fields", "dart", None)
INPUTS: Final = (
    "name : Blue Spice | Type : coffee shop | area : city centre",
    "name : Blue Spice | Type : pub | area : riverside",
    f"name : {MARKER} | Type : coffee shop | price : cheap",
    f"name : {MARKER} | Type : restaurant | food : Indian | area : riverside",
    "name : The Mill | food : Italian | customer rating : high | family friendly : yes",
    "name : The Mill | Type : restaurant | food : English | price : moderate | near : Café Rouge",
    "The Mill : PRICE : cheap | The Mill : FOOD : Indian | The Mill : AREA : riverside",
    f"{MARKER} : EAT_TYPE : coffee shop | {MARKER} : NEAR : Burger King",
    f"{MARKER} : FOOD : French | {MARKER} : CUSTOMER_RATING : 5 out of 5",
    "Blue Spice : LOCATION : Berlin | Berlin : COUNTRY : Germany",
    "The Mill is a cheap Indian restaurant in the city centre.",
    f"{MARKER} is a coffee shop near Burger King with a high customer rating.",
)
MIN_INPUTS: Final = 5
MAX_NEW_TOKENS: Final = 24


def body(task: str | None, text: str, **more: Any) -> dict[str, Any]:
    """A greedy request; a task of None asks the bare backbone."""
    named = {} if task is None else {"task": task}
    return {**named, "input": text, "parameters": {"max_new_tokens": MAX_NEW_TOKENS, **more}}


def expected_texts(stack: Stack) -> dict[tuple[str | None, str], str]:
    """Each task's answer to each input, one at a time while nothing else runs; of inputs that tell all tasks apart."""
    texts = {}
    for task in TASKS:
        for text in INPUTS:
            status, _, answer = stack.request("POST", "/generate", body(task, text))
            assert status == 200, answer
            texts[task, text] = json.loads(answer)["outputs"][0]["text"]
    telling = [text for text in INPUTS if len({texts[task, text] for task in TASKS}) == len(TASKS)]
    assert len(telling) >= MIN_INPUTS, f"two tasks say the same too often for a mix-up to be seen: {texts}"
    return {(task, text): texts[task, text] for task in TASKS for text in telling}


class Load:
    """Threads that ask until told to stop: every second request as a stream."""

    def __init__(self, stack: Stack, expected: dict[tuple[str | None, str], str], threads: int = 8) -> None:
        self._stack, self._expected = stack, list(expected.items())
        self._threads = [threading.Thread(target=self._run, args=(index,), daemon=True) for index in range(threads)]
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(120)

    def outcomes(self) -> Counter[str]:
        """Counts so far."""
        with self._lock:
            return Counter(self._outcomes)

    def during(self, seconds: float) -> Counter[str]:
        """Counts of the next ``seconds``."""
        before = self.outcomes()
        time.sleep(seconds)
        return self.outcomes() - before

    def _run(self, index: int) -> None:
        turn = index * 7
        while not self._stopped.is_set():
            (task, text), expected = self._expected[turn % len(self._expected)]
            turn += 1
            outcome, got = self._ask(task, text, stream=turn % 2 == 0)
            if got is not None and got != expected and not (outcome == "broken" and expected.startswith(got)):
                outcome = "wrong"
            with self._lock:
                self._outcomes[outcome] += 1
                if outcome == "wrong":
                    self.wrong.append(f"{task} {text!r}: expected {expected!r}, got {got!r}")
            if outcome not in ("ok", "wrong"):
                self._stopped.wait(0.2)

    def _ask(self, task: str | None, text: str, *, stream: bool) -> tuple[str, str | None]:
        try:
            status, _, answer = self._stack.request("POST", "/generate", {**body(task, text), "stream": stream})
        except http.client.IncompleteRead as cut:
            return "broken", _so_far(cut.partial.decode(errors="ignore")) if stream else None
        except (OSError, http.client.HTTPException):
            return "connection", None
        if status != 200:
            return str(status), None
        if not stream:
            return "ok", json.loads(answer)["outputs"][0]["text"]
        said = answer.decode()
        done = [json.loads(data) for name, data in _events(said) if name == "done"]
        if not done:
            return "broken", _so_far(said)
        whole: str = done[0]["outputs"][0]["text"]
        return "ok", whole if _so_far(said) == whole else f"{whole!r} after the pieces {_so_far(said)!r}"


def _so_far(said: str) -> str:
    """The text that a stream's tokens make, whether it came to its end or not; of a line cut short, nothing."""
    tokens = [data for name, data in _events(said[: said.rfind("\n\n") + 1]) if name == "token"]
    return "".join(json.loads(data)["text"] for data in tokens)


def _events(text: str) -> list[tuple[str, str]]:
    events, name = [], ""
    for line in text.splitlines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            events.append((name, line.removeprefix("data: ")))
    return events
