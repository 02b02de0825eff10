"""A job's gate on the worker's side: what is compared with, and what a verdict does to the alias, whatever happens."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from prefixes.files import write_bytes, write_json
from prefixes.registry.base import Store
from prefixes.spec import TaskRef
from tests.support.redis_registry import DATA, VERSIONS, publish, resolve
from tests.unit.trainer.service.test_job_routes import with_trainer
from tests.unit.trainer.service.test_worker import NAME, a_worker, registry, settings
from trainer.evaluation.gate_rule import MOST_MOVES
from trainer.jobs.job import claimed, new_job
from trainer.jobs.record import Job
from trainer.jobs.signals import Watch
from trainer.service.current import CURRENT, fetch_current, note_moved
from trainer.service.request import ARTIFACT, RECORD
from trainer.service.settings import TrainerSettings
from trainer.service.worker import Worker
from trainer.training.publish import placed

__all__ = ["registry", "settings"]  # fixtures

E2E = TaskRef("default", "e2e")
NEW = 3


def outcome(current: str | None, verdict: str = "promoted") -> dict[str, Any]:
    return {"verdict": verdict, "reason": "bleu 3.00 against 2.00", "current": current}


def test_what_is_compared_with_stays_until_the_alias_is_known_to_have_moved(tmp_path: Path, registry: Store) -> None:
    assert fetch_current(tmp_path, registry, E2E, "production") == {"version": None, "moves": 0}
    publish(registry, 0)
    assert fetch_current(tmp_path, registry, E2E, "production")["version"] is None, "as it was when the job began"
    note_moved(tmp_path)
    assert fetch_current(tmp_path, registry, E2E, "production") == {"version": VERSIONS[0], "moves": 1}
    assert (tmp_path / CURRENT).read_bytes() == DATA[0]
    publish(registry, 1)
    note_moved(tmp_path)
    assert fetch_current(tmp_path, registry, E2E, "production") == {"version": VERSIONS[0], "moves": MOST_MOVES}


@pytest.mark.parametrize("verdict", ["rejected", "undecided"])
def test_a_verdict_against_a_version_moves_no_alias_and_is_noted(verdict: str) -> None:
    assert placed(outcome(VERSIONS[0], verdict), "production") == {
        "alias": None, "note": f"gate {verdict}: bleu 3.00 against 2.00"
    }  # fmt: skip
    assert placed(None, "canary") == {"alias": "canary"}
    assert placed(outcome(None), "canary")["expected_current"] == ""


class Judging(Worker):
    """Its process compares with what the worker fetched, and somebody else publishes meanwhile, so many times."""

    moves = 0
    judged: list[str | None]

    async def _prepare(self, job: Job, folder: Path, watch: Watch) -> None:
        fetch_current(folder, self.registry, E2E, "production")

    async def _train(self, job: Job, folder: Path, watch: Watch) -> str:
        facts = json.loads((folder / "current.json").read_text())
        self.judged.append(facts["version"])
        made = outcome(facts["version"], "promoted" if facts["moves"] < MOST_MOVES else "undecided")
        write_bytes(folder / ARTIFACT, DATA[NEW])
        write_json(folder / RECORD, {"scores": {}, "gate": made})
        if len(self.judged) <= self.moves:
            publish(self.registry, len(self.judged))
        return VERSIONS[NEW]


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_the_alias_moves_only_from_the_version_that_was_compared_with(
    settings: TrainerSettings, registry: Store, moves: int
) -> None:
    publish(registry, 0)

    async def test() -> Job:
        async with a_worker(settings, registry) as made:
            worker = Judging(**vars(made))
            object.__setattr__(worker, "moves", moves)
            object.__setattr__(worker, "judged", [])
            spec = {"task": "default/e2e", "alias": "production", "promote_if": {}}
            job = await worker.store.create(new_job("default", "me", spec))
            await worker.handle("default", job.id, 1)
            expected = [VERSIONS[number] for number in range(moves + 1)]
            assert worker.judged == (expected if moves < MOST_MOVES else [*expected[:2], VERSIONS[1]])
            return await worker.store.get("default", job.id)

    job = asyncio.run(test())
    assert job.state == "succeeded", job.failure
    task, last = registry.inspect("default", "e2e"), registry.audit("default")[0]
    assert VERSIONS[NEW] in {info.version for info in task.versions}
    if moves < MOST_MOVES:
        assert (job.result["alias"], resolve(registry, "e2e")) == ("production", NEW)
        assert (last.old, last.new) == (VERSIONS[moves], VERSIONS[NEW])
    else:
        assert (job.result["alias"], job.result["gate"]["verdict"]) == (None, "undecided")
        assert resolve(registry, "e2e") == moves
        assert last.note is not None and last.note.startswith("gate undecided")


def test_a_publish_that_is_repeated_after_a_lost_answer_tells_what_was_decided_then(
    settings: TrainerSettings, registry: Store
) -> None:
    """The alias may be elsewhere by then: it is not moved again, and the job is not said to have moved nothing."""
    publish(registry, 0)

    async def test() -> dict[str, Any]:
        async with a_worker(settings, registry) as worker:
            spec = {"task": "default/e2e", "alias": "production", "promote_if": {}}
            job = await worker.store.create(new_job("default", "me", spec))
            job = await worker.store.change("default", job.id, lambda found: claimed(found, 1, NAME))
            folder = worker.folders.enter(job)
            write_bytes(folder / ARTIFACT, DATA[NEW])
            write_json(folder / RECORD, {"scores": {}, "gate": outcome(VERSIONS[0])})
            with worker.store.watch(job.id) as watch:
                first = await worker._publish(job, folder, watch)
                publish(registry, 1)
                write_json(folder / RECORD, {"scores": {}, "gate": outcome(VERSIONS[1], "rejected")})
                assert await worker._publish(job, folder, watch) == first
            return first

    result = asyncio.run(test())
    assert (result["alias"], result["gate"]["verdict"]) == ("production", "promoted")
    assert resolve(registry, "e2e") == 1


BLEU = {"metric": "bleu"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"promote_if": BLEU}, "got neither"),
        ({"promote_if": BLEU, "gate_hold_out": 5, "gate_dataset": "HERE"}, "got both"),
        ({"gate_dataset": "HERE"}, "expected a rule"),
        ({"promote_if": {"metric": "nist"}, "gate_hold_out": 5}, "expected one of bleu"),
        ({"promote_if": {"metric": "bleu", "preset": "x"}, "gate_hold_out": 5}, "preset: expected one of"),
        ({"promote_if": BLEU, "gate_hold_out": 5, "alias": None}, "expected an alias"),
        ({"promote_if": BLEU, "gate_dataset": f"sha256:{'0' * 64}"}, "found none"),
    ],
)
def test_a_gate_that_cannot_decide_is_refused_at_submission(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    async def test(client: Any, store: Any, dataset: str) -> None:
        given = {name: dataset if value == "HERE" else value for name, value in fields.items()}
        answer = await client.post("/jobs", json={"task": "e2e", "dataset": dataset, **given})
        assert answer.status_code in (404, 422), answer.text
        assert message in answer.json()["error"]["message"]
        assert await store.jobs("default", limit=1) == []

    with_trainer(tmp_path, test)


def test_a_job_says_its_rule_with_everything_filled_in_and_keeps_its_dataset(tmp_path: Path) -> None:
    async def test(client: Any, store: Any, dataset: str) -> None:
        gate = (await client.post("/datasets", content=b'{"input": "a", "target": "b"}\n')).json()["dataset"]
        body = {"promote_if": BLEU, "gate_dataset": gate, "evaluation": {"preset": "dart"}}
        spec = (await client.post("/jobs", json={"task": "e2e", "dataset": dataset, **body})).json()["spec"]
        assert spec["promote_if"] == {"metric": "bleu", "margin": 0.0, "preset": "dart"}
        assert (spec["gate_dataset"], spec["gate_hold_out"]) == (gate, 0)
        assert (await client.delete(f"/datasets/{gate}")).status_code == 409

    with_trainer(tmp_path, test)
