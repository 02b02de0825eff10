"""The questions of a crowd of clients, and what each was answered when it was alone.

Owns the catalogue of questions (tasks, texts, parameters of every kind) and the way each is asked over HTTP. Knows no
load and no test.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

TEXTS: Final = ("Blue Spice", "name : Blue Spice | Type : coffee shop " * 4, "café ☕", "概要 \u2028 x", "x " * 150)
ORDINARY: Final[tuple[dict[str, Any], ...]] = (
    {}, {"min_new_tokens": 32}, {"do_sample": True, "seed": 3}, {"temperature": 0.7, "seed": 4, "top_k": 20},
    {"do_sample": True, "seed": 5, "num_return_sequences": 3, "top_p": 0.9}, {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True}, {"logprobs": 3},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {"stop": ["e", "never"]},
)  # fmt: skip
LENGTH: Final = 32

NUMBERS: Final = (
    0, -1, 1, 1e-320, 1e-37, 1e-9, 0.01, 0.5, 2.0, 17, 100, 101, -100, 1e30, 1e308, -1e308, 2**31 - 1, 2**31, 10**30,
)  # fmt: skip
OTHERS: Final[tuple[Any, ...]] = (
    None, True, False, "", "x", [], {}, [0], {"a": 1}, ["x"] * 17, ["x" * 256], ["x" * 257], [""], "never",
)  # fmt: skip
NAMES: Final = (
    "max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "logprobs",
    "no_repeat_ngram_size", "num_beams", "length_penalty", "early_stopping", "num_return_sequences", "stop", "seed",
    "truncate", "unknown",
)  # fmt: skip
SHORT: Final = 6
JSON: Final = {"content-type": "application/json"}


@dataclass(frozen=True)
class Question:
    """A task, a text, parameters; ``expected`` is status and answer when it was asked alone."""

    task: str | None
    text: str
    parameters: dict[str, Any]
    expected: tuple[int, Any] = field(default=(0, None), compare=False)

    @property
    def body(self) -> dict[str, Any]:
        """Of ``POST /generate``."""
        return {"task": self.task, "input": self.text, "parameters": self.parameters}


def ordinary(tasks: tuple[str | None, ...]) -> list[Question]:
    """Each way of decoding on each task, texts in turn."""
    texts = itertools.cycle(TEXTS)
    return [
        Question(task, next(texts), {"max_new_tokens": LENGTH, **parameters})
        for parameters in ORDINARY
        for task in tasks
    ]


def extreme(tasks: tuple[str | None, ...], count: int, seed: int = 0) -> list[Question]:
    """Parameters at and beyond every edge, each name with each value at least once, then two of them at random."""
    rng = random.Random(seed)
    singles: list[dict[str, Any]] = [{name: value} for name in NAMES for value in (*NUMBERS, *OTHERS)]
    rng.shuffle(singles)
    pairs = [{**rng.choice(singles), **rng.choice(singles)} for _ in range(max(0, count - len(singles)))]
    return [
        Question(rng.choice(tasks), rng.choice(TEXTS), _bounded(parameters))
        for parameters in (*singles, *pairs)[:count]
    ]


def _bounded(parameters: dict[str, Any]) -> dict[str, Any]:
    """With a short output and a seed, unless these are what is asked for: without a seed no answer comes again."""
    return {"max_new_tokens": SHORT, "seed": 1, **parameters}


def essence(status: int, body: Any) -> tuple[int, Any]:
    """What must be the same whatever runs beside it; of an error its code and message."""
    if status != 200:
        return status, (body["error"]["code"], body["error"]["message"])
    outputs = [
        (output["text"], output["token_ids"], output["finish_reason"], len(output.get("logprobs") or ()))
        for output in body["outputs"]
    ]
    return status, (body["version"], outputs, body["usage"])


def encoded(body: Any) -> bytes:
    """As JSON, numbers beyond its range among them."""
    return json.dumps(body).encode()


async def plain(client: httpx.AsyncClient, question: Question) -> tuple[int, Any]:
    """The essence of ``POST /generate``."""
    answer = await client.post("/generate", content=encoded(question.body), headers=JSON)
    return essence(answer.status_code, answer.json())


async def batch(client: httpx.AsyncClient, questions: list[Question]) -> list[tuple[int, Any]]:
    """Each item's essence; an error's status is its question's own, since items have none."""
    content = encoded({"items": [question.body for question in questions]})
    answer = await client.post("/generate/batch", content=content, headers=JSON)
    if answer.status_code != 200:
        return [essence(answer.status_code, answer.json())] * len(questions)
    items = answer.json()["items"]
    return [
        essence(question.expected[0] if "error" in item else 200, item)
        for question, item in zip(questions, items, strict=True)
    ]


async def told(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, Any]]:
    """Named server-sent events as (name, data)."""
    name = ""
    async for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def joined(events: list[tuple[str, Any]]) -> list[tuple[str, list[int]]]:
    """Text and tokens of each output, from its token events."""
    outputs: dict[int, tuple[str, list[int]]] = {}
    for name, data in events:
        if name == "token":
            text, ids = outputs.get(data["index"], ("", []))
            outputs[data["index"]] = (text + data["text"], ids + data["token_ids"])
    return [outputs[index] for index in sorted(outputs)]

