"""The failure table of docs/failures.md, cell by cell: real replicas under load, on a real Redis that fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import pytest

from server.registry.catalog import WAIT_S
from server.registry.link import SILENT_S
from tests.support.outage import BIG, LATE_S, Scene, scene
from tests.support.server import ServerProcess, make_world, metric, wait_for_metric
from tests.support.traffic import Answer, Requests, Stream, ask, generate, publish

AWAY: Final = ("stopped", "down", "flushed")
STATES: Final = ("up", "flushed", "restored", "slow", "stopped", "resumed", "down", "restarted")
FAULT: Final = {"resumed": "stopped", "restarted": "down", "restored": "flushed"}
"""What each recovery is from."""

BOUND_S: Final = 10.0
"""Tells a hang from an answer on a busy machine; the documented bounds are a fraction of it."""
ROW_TOKENS: Final = 40


@dataclass(frozen=True)
class Tasks:
    """The tasks of one round of requests to one replica, each with a prefix of its own."""

    known: str  # resolved before, in no tier
    unknown: str  # never asked for
    in_host: str  # known, and in host memory alone
    on_disk: str  # known, and in the disk cache alone
    spare: str  # to be deleted


@dataclass(frozen=True)
class Cell:
    """A kind of request, and its status while the registry is there, is away, and is away for too long.

    ``task`` is whose text a 200 must have.
    """

    ask: Callable[[Scene, ServerProcess, Tasks], Answer]
    here: int
    away: int
    stale: int
    task: Callable[[Tasks], str | None] | None = None


def served(task: Callable[[Tasks], str | None], away: int, stale: int) -> Cell:
    """A request for text."""
    return Cell(lambda _, server, tasks: generate(server, task(tasks)), 200, away, stale, task)


def asked(method: str, path: str, here: int, away: int = 503, stale: int = 503, **options: Any) -> Cell:
    """A request for ``path``, with the unknown task's name in it."""
    return Cell(
        lambda _, server, tasks: ask(server, method, path.format(tasks.unknown), **options), here, away, stale
    )


def upload(scene: Scene, server: ServerProcess, tasks: Tasks) -> Answer:
    return publish(server, f"{tasks.unknown}-new", scene.world.prefix())


def promote(scene: Scene, server: ServerProcess, tasks: Tasks) -> Answer:
    body = {"version": scene.expected["resident"][0], "alias": tasks.unknown}
    return ask(server, "POST", "/prefixes/resident/promote", json=body)


def download(scene: Scene, server: ServerProcess, tasks: Tasks) -> Answer:
    version = scene.expected[tasks.unknown][0]
    return ask(server, "GET", f"/prefixes/{tasks.unknown}/versions/{version}")


def delete(scene: Scene, server: ServerProcess, tasks: Tasks) -> Answer:
    return ask(server, "DELETE", f"/prefixes/{tasks.spare}")


CELLS: Final[Mapping[str, Cell]] = {
    "resident": served(lambda tasks: "resident", 200, 503),
    "in host memory": served(lambda tasks: tasks.in_host, 200, 503),
    "on disk": served(lambda tasks: tasks.on_disk, 200, 503),
    "in no tier": served(lambda tasks: tasks.known, 503, 503),
    "unknown": served(lambda tasks: tasks.unknown, 503, 503),
    "no such task": Cell(lambda _, server, tasks: generate(server, f"not-{tasks.unknown}"), 404, 503, 503),
    "bare backbone": served(lambda tasks: None, 200, 200),
    "publish": Cell(upload, 201, 503, 503),
    "promote": Cell(promote, 200, 503, 503),
    "rollback": asked("POST", "/prefixes/resident/rollback", 409),
    "delete": Cell(delete, 204, 503, 503),
    "undelete": asked("POST", "/prefixes/{}/undelete", 409),
    "download": Cell(download, 200, 503, 503),
    "list": asked("GET", "/prefixes", 200),
    "models": asked("GET", "/v1/models", 200),
    "inspect": asked("GET", "/prefixes/{}", 200),
    "ready": asked("GET", "/ready", 200, 200, 503),
    "health": asked("GET", "/health", 200, 200, 200),
    "metrics": asked("GET", "/metrics", 200, 200, 200, admin=True),
}


@dataclass
class Situation:
    """The scene in one state, under load since before it came about.

    ``at_once`` is what the patient replica answered to requests that came with the fault, before it could know.
    """

    scene: Scene
    state: str
    stream: Stream
    requests: Requests
    first: Tasks
    later: Tasks
    impatients: Tasks
    at_once: dict[str, Answer]
    kept: Stream  # on the impatient replica
    errors_before: float
    lines_before: int  # of the patient replica's log

    @property
    def away(self) -> bool:
        return self.state in AWAY

    def check(self, name: str, answer: Answer, status: int) -> None:
        """``answer`` is the right one, in time."""
        assert answer.status == status, (self.state, name, answer)
        assert answer.seconds < BOUND_S
        if status == 503:
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.body["error"]
            assert error["code"] == "registry_unavailable"
            assert "127.0.0.1" not in error["message"]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One family is enough: no registry knows which it keeps."""
    with scene(make_world(tmp_path_factory.mktemp("backbone")), tmp_path_factory.mktemp("scene")) as made:
        yield made


@pytest.fixture(scope="module", params=STATES)
def situation(request: pytest.FixtureRequest, stage: Scene) -> Iterator[Situation]:
    """The scene in a state; well again afterwards, and nobody who was served all the time has noticed."""
    state: str = request.param
    first, later = (prepared(stage, f"{state}-{number}") for number in range(2))
    others = Tasks(*(f"{state}-other-{name}" for name in ("known", "unknown", "known", "known", "known")))
    for task in (others.known, others.unknown):
        stage.publish(task)
        stage.learn(stage.patient, task)
    stage.introduce(stage.impatient, others.known)
    stage.evict((first.in_host, later.in_host), (first.on_disk, later.on_disk))
    errors = metric(stage.patient, "prefixd_registry_errors_total")
    lines = len(stage.patient.log_lines())
    with ExitStack() as stack:
        stream = stack.enter_context(Stream(stage.patient, "row", stage.row))
        requests = stack.enter_context(Requests(stage.patient, "resident", stage.expected["resident"]))
        kept = stack.enter_context(Stream(stage.impatient, "row", stage.row, 8000)) if state in AWAY else stream
        stream.wait_for(1, LATE_S)
        kept.wait_for(1, LATE_S)
        if FAULT.get(state, stage.mended) != stage.mended:
            with stage.broken(FAULT[state]):
                stage.wait_away()
        stack.enter_context(stage.broken(state))
        at_once = fire(stage, first)
        if state in AWAY:
            stage.wait_away()
        yield Situation(stage, state, stream, requests, first, later, others, at_once, kept, errors, lines)
        assert requests.count and kept.count
    for background in (stream, requests):
        assert background.faults == []


def prepared(stage: Scene, name: str) -> Tasks:
    """Tasks as the patient replica must have them."""
    tasks = Tasks(*(f"{name}-{field}" for field in ("known", "unknown", "host", "disk", "spare")))
    for task in (tasks.known, tasks.unknown, tasks.in_host, tasks.on_disk):
        stage.publish(task, BIG if task == tasks.on_disk else 5)
        stage.learn(stage.impatient, task)
    stage.introduce(stage.patient, tasks.known)
    stage.publish(tasks.spare)
    return tasks


def fire(stage: Scene, tasks: Tasks) -> dict[str, Answer]:
    """Every kind of request at the same time."""
    with ThreadPoolExecutor(len(CELLS)) as pool:
        asked = {name: pool.submit(cell.ask, stage, stage.patient, tasks) for name, cell in CELLS.items()}
        return {name: answer.result() for name, answer in asked.items()}


def says(situation: Situation, cell: Cell, answer: Answer, tasks: Tasks) -> None:
    """A text is the one that was said when all was well."""
    if cell.task is None or answer.status != 200:
        return
    assert answer.said == situation.scene.expected[cell.task(tasks)]


def test_running_rows_and_resident_tasks_never_notice(
    situation: Situation, record_property: Callable[[str, object], None]
) -> None:
    situation.stream.wait_for(ROW_TOKENS, BOUND_S)
    situation.requests.wait_for(2, BOUND_S)
    assert situation.stream.faults == situation.requests.faults == []
    assert situation.requests.longest_s < BOUND_S
    record_property("seconds", situation.stream.longest_gap_s)
    record_property("longest_request_s", situation.requests.longest_s)


@pytest.mark.parametrize("situation", AWAY, indirect=True)
def test_beyond_max_stale_running_rows_go_on(
    situation: Situation, record_property: Callable[[str, object], None]
) -> None:
    situation.scene.wait_stale()
    situation.kept.wait_for(ROW_TOKENS, BOUND_S)
    assert situation.kept.faults == []
    record_property("seconds", situation.kept.longest_gap_s)


@pytest.mark.parametrize("name", CELLS)
def test_a_replica_answers_as_the_table_says(
    situation: Situation, name: str, record_property: Callable[[str, object], None]
) -> None:
    cell = CELLS[name]
    answer = cell.ask(situation.scene, situation.scene.patient, situation.later)
    record_property("seconds", answer.seconds)
    situation.check(name, answer, cell.away if situation.away else cell.here)
    says(situation, cell, answer, situation.later)


@pytest.mark.parametrize("name", CELLS)
def test_requests_that_come_with_the_fault_are_answered_alike(
    situation: Situation, name: str, record_property: Callable[[str, object], None]
) -> None:
    cell, answer = CELLS[name], situation.at_once[name]
    record_property("seconds", answer.seconds)
    if situation.state == "slow" and answer.status == 503:
        assert answer.seconds >= WAIT_S  # many at once wait for each other, and for connections
        return
    situation.check(name, answer, cell.away if situation.away else cell.here)
    says(situation, cell, answer, situation.first)


@pytest.mark.parametrize("situation", AWAY, indirect=True)
@pytest.mark.parametrize("name", [name for name in CELLS if name not in ("in host memory", "on disk")])
def test_beyond_max_stale_what_needs_the_registry_is_refused_at_once(
    situation: Situation, name: str, record_property: Callable[[str, object], None]
) -> None:
    cell, scene = CELLS[name], situation.scene
    scene.wait_stale()
    answer = cell.ask(scene, scene.impatient, situation.impatients)
    record_property("seconds", answer.seconds)
    situation.check(name, answer, cell.stale)
    says(situation, cell, answer, situation.impatients)


@pytest.mark.parametrize("situation", AWAY, indirect=True)
def test_a_publish_that_is_refused_leaves_what_is_served(situation: Situation) -> None:
    """It made the replica forget the task, and with the registry away the task was gone."""
    scene = situation.scene
    answer = publish(scene.patient, "resident", scene.world.prefix(seed=1000))
    situation.check("publish", answer, 503)
    assert generate(scene.patient, "resident").said == scene.expected["resident"]


def test_the_metrics_tell_the_state(situation: Situation) -> None:
    patient, away = situation.scene.patient, situation.away
    assert metric(patient, "prefixd_registry_up") == (not away)
    assert metric(patient, "prefixd_registry_wrong_id") == (situation.state == "flushed")
    if situation.state != "slow":  # where it may be polled at times
        wait_for_metric(patient, "prefixd_registry_subscribed", not away)
    age = metric(patient, "prefixd_registry_age_seconds")
    if away:
        assert metric(patient, "prefixd_registry_age_seconds") > age > 0
    else:
        assert age < SILENT_S
    failed = metric(patient, "prefixd_registry_errors_total") - situation.errors_before
    assert failed > 0 if away else situation.state in FAULT or failed == 0


@pytest.mark.parametrize("situation", AWAY, indirect=True)
def test_an_outage_is_told_once_in_the_log(situation: Situation) -> None:
    lines = situation.scene.patient.log_lines()[situation.lines_before :]
    told = Counter(line["message"] for line in lines)
    assert (told["the registry is away"], told["the registry is back"]) == (1, 0)
    assert told["registry announcements interrupted"] <= 1
