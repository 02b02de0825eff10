"""A crowd of clients, well and ill behaved, on many tasks at once: each answer is the one it has alone."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import httpx

from tests.support.checkup import SERVER, Checkup
from tests.support.clients import ACTS, PATIENCE_S, Crowd
from tests.support.crowd import Question, extreme, ordinary, plain
from tests.support.figures import Figures
from tests.support.server import PLAIN, ServerProcess, TinyWorld
from tests.support.traffic import publish

CLIENTS: Final = 64
ROUNDS: Final = 4
ROUND_S: Final = 15.0
EXTREMES: Final = 600
TASKS: Final = {"short": 1, "e2e": 5, "dart": 17, "long": 100, "longer": 300}
"""Tasks and the lengths of their prefixes."""
VERSIONS: Final = 3


def test_every_answer_in_a_crowd_is_the_one_given_alone(figures: Figures, world: TinyWorld, tmp_path: Path) -> None:
    arguments = ("--backbone", str(world.folder), "--registry", str(tmp_path / "registry"), "--max-waiting", "2048")
    with ServerProcess(tmp_path, *arguments, *SERVER, "--max-rows", "32") as server:
        checkup = Checkup(server.wait_ready(), world, figures)
        for seed, (task, length) in enumerate(TASKS.items()):
            assert publish(server, task, world.prefix(length=length, seed=seed)).status == 201
        uploads = {}
        for seed in range(VERSIONS):
            data = world.prefix(length=9, seed=900 + seed)
            uploads[publish(server, "moving", data).body["version"]] = data
        crowd = asyncio.run(introduced(server, uploads, figures))
        for number in range(ROUNDS):
            asyncio.run(crowd.run(CLIENTS, ROUND_S, number))
            assert crowd.faults == [], crowd.faults[:5]
            checkup.round_over()
        assert crowd.acts.keys() == {act.__name__ for act in ACTS}
        figures.notes.append(f"what clients did: {dict(crowd.acts)}")
        checkup.end()


async def introduced(server: ServerProcess, uploads: Mapping[str, bytes], figures: Figures) -> Crowd:
    """The crowd, with each question asked alone."""
    tasks = (None, *TASKS)
    moving = [Question(f"moving@{version}", "Blue", {"max_new_tokens": 20}) for version in uploads]
    questions = [*ordinary(tasks), *extreme(tasks, EXTREMES)]
    async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S, verify=PLAIN) as client:
        known = [replace(question, expected=await plain(client, question)) for question in (*questions, *moving)]
    statuses = Counter(question.expected[0] for question in known)
    figures.notes.append(f"statuses alone: {dict(statuses)}")
    assert statuses.keys() == {200, 422}, [question for question in known if question.expected[0] not in (200, 422)]
    versions = dict(zip(uploads, known[-len(moving) :], strict=True))
    return Crowd(server, known, versions, uploads, figures)
