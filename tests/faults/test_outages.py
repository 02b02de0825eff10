"""A Redis that is stopped, killed, emptied or slow, again and again under load: no wrong answer, and none missing."""

from __future__ import annotations

import random
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.support.checkup import Checkup
from tests.support.figures import Figures
from tests.support.outage import LATE_S, POOL, Scene, scene
from tests.support.server import ServerProcess, TinyWorld
from tests.support.traffic import Background, Stream, generate

FAULTS: Final = ("slow", "stopped", "down", "flushed")
ROUNDS: Final = 3
CLIENTS: Final = 3
"""On each replica; each asks for one task after the other, at random."""
TASKS: Final = 6


class Asker(Background):
    """Asks a replica for one task after the other, and keeps what was answered."""

    def __init__(self, server: ServerProcess, scene: Scene, tasks: list[str | None], seed: int) -> None:
        super().__init__()
        self._server, self._scene, self._tasks, self._rng = server, scene, tasks, random.Random(seed)
        self.statuses: Counter[tuple[int, str]] = Counter()
        self.right = self.wrong = 0

    def work(self) -> None:
        task = self._rng.choice(self._tasks)
        answer = generate(self._server, task)
        if answer.status == 200:
            self.right += answer.said == self._scene.expected[task]
            self.wrong += answer.said != self._scene.expected[task]
        self.statuses[answer.status, answer.body["error"]["code"] if "error" in answer.body else ""] += 1
        self.count += 1


def test_a_registry_that_fails_again_and_again_costs_no_answer(
    figures: Figures, world: TinyWorld, tmp_path: Path
) -> None:
    rng = random.Random(14)
    with scene(world, tmp_path) as stage, ExitStack() as stack:
        for number in range(TASKS):
            stage.publish(f"task-{number}", length=rng.choice((1, 5, 40)))
            stage.learn(stage.patient, f"task-{number}")
            stage.learn(stage.impatient, f"task-{number}")
        checkups = [Checkup(server, world, figures, POOL) for server in (stage.patient, stage.impatient)]
        for checkup in checkups:
            checkup.round_over()
        tasks: list[str | None] = [None, "resident", *(f"task-{number}" for number in range(TASKS))]
        askers = [
            stack.enter_context(Asker(server, stage, tasks, seed=seed))
            for seed, server in enumerate((stage.patient, stage.impatient) * CLIENTS)
        ]
        stream = stack.enter_context(Stream(stage.patient, "row", stage.row))
        for _ in range(ROUNDS):
            for fault in rng.sample(FAULTS, len(FAULTS)):
                for background in (*askers, stream):
                    background.wait_for(3, LATE_S)
                with stage.broken(fault):
                    time.sleep(rng.uniform(0.2, 3.0))
                figures.cases += 1
        for background in (*askers, stream):
            background.wait_for(3, LATE_S)
        stack.pop_all().close()
        assert [fault for background in (*askers, stream) for fault in background.faults] == []
        figures.compared += sum(asker.right + asker.wrong for asker in askers)
        figures.wrong += sum(asker.wrong for asker in askers)
        for name, its in (("patient", askers[::2]), ("impatient", askers[1::2])):
            statuses = sum((asker.statuses for asker in its), Counter[tuple[int, str]]())
            figures.notes.append(f"{name} replica: {dict(statuses)}; {ROUNDS} each of {', '.join(FAULTS)}")
            assert statuses.keys() <= {(200, ""), (503, "registry_unavailable")}, statuses
            # What it knows and holds it serves, unless it may not for as long as the registry was away.
            assert name == "impatient" or statuses.keys() == {(200, "")}, statuses
        figures.notes.append(f"{stream.count} tokens of a stream compared")
        assert figures.wrong == 0
        for checkup in checkups:
            checkup.end(told={"the registry is away"})
