"""The trainer's client and its watch, against scripted services; tests/e2e has them against the real one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefixes.errors import InvalidName, PrefixdError
from trainer.client.client import JobEvent, TrainerClient, TrainerUnavailable
from trainer.client.watch import LONGEST_WAIT_S, JobWatch
from trainer.data.files import DatasetNotFound
from trainer.data.lines import InvalidData
from trainer.jobs.errors import JobNotFound

Answer = Callable[[httpx.Request], httpx.Response]
DIGEST = "sha256:" + "0" * 64


def client_of(answer: Answer) -> TrainerClient:
    return TrainerClient(
        "http://x", client=httpx.Client(base_url="http://x", transport=httpx.MockTransport(answer))
    )


def job(state: str = "running") -> httpx.Response:
    return httpx.Response(200, json={"id": "job-1", "state": state})


def error(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"error": {"code": code, "message": f"it is {code}"}})


def stream(*events: tuple[str, str, dict[str, Any]], cut: bool = False) -> httpx.Response:
    """An event stream; ``cut``: the connection breaks behind the last event."""

    def body() -> Iterator[bytes]:
        for number, name, data in events:
            yield f"id: {number}\nevent: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()
        if cut:
            raise httpx.ReadError("connection reset")

    return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=body())


class Script:
    """Answers in turn what it was given, and keeps what it was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append((request.url.path, request.headers.get("last-event-id")))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Waited:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.sleeps, self.told = 0.0, list[float](), list[str]()

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.sleeps.append(seconds)

    def watch(self, script: Script, patience_s: float = 60) -> JobWatch:
        return JobWatch(
            client_of(script), "job-1", patience_s=patience_s, sleep=self.sleep, clock=lambda: self.now,
            interrupted=lambda why: self.told.append(why), resumed=lambda: self.told.append("resumed"),
        )  # fmt: skip


REFUSED = httpx.ConnectError("connection refused")
FIRST = ("1", "state", {"state": "queued"})
SECOND = ("2", "state", {"state": "running"})
THIRD = ("3", "state", {"state": "succeeded"})


def test_events_are_parsed_whatever_the_chunks_and_the_text() -> None:
    data = {"message": "two\u2028lines\u0085 of Unicode, é"}
    text = f": \n\nid: 7-1\nevent: state\ndata: {json.dumps(data, ensure_ascii=False)}\n\n: heartbeat\n\n"
    pieces = [bytes([byte]) for byte in text.encode()]
    client = client_of(lambda _: httpx.Response(200, content=iter(pieces)))
    with client.events("job-1") as events:
        assert list(events) == [None, JobEvent("7-1", "state", data), None]


@pytest.mark.parametrize("text", ["data: 7\n\n", "id: 1\ndata: {}\n\n", "id: 1\nevent: state\ndata: no\n\n"])
def test_other_events_are_no_trainers(text: str) -> None:
    client = client_of(lambda _: httpx.Response(200, text=text))
    with pytest.raises(TrainerUnavailable, match="an event of a job"), client.events("job-1") as events:
        list(events)


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(200, text="<html>hello</html>"),
        httpx.Response(200, json=[]),
        httpx.Response(200, json={"id": "job-1"}),
        httpx.Response(302, headers={"location": "http://elsewhere/"}),
        httpx.Response(502, text="bad gateway"),
    ],
)
def test_answers_of_other_services_are_named(response: httpx.Response) -> None:
    client = client_of(lambda _: response)
    for call in (lambda: client.job("job-1"), client.datasets, lambda: client.dataset(DIGEST)):
        with pytest.raises(TrainerUnavailable, match="the trainer at http://x"):
            call()


def test_errors_come_back_as_their_class_with_the_services_words() -> None:
    with pytest.raises(JobNotFound, match=r"^it is job_not_found$") as caught:
        client_of(lambda _: error(404, "job_not_found")).job("job-1")
    assert caught.value.detail == {}
    assert client_of(lambda _: error(404, "dataset_not_found")).dataset(DIGEST) is None
    with pytest.raises(DatasetNotFound):
        client_of(lambda _: error(404, "dataset_not_found")).delete_dataset(DIGEST)
    with pytest.raises(JobNotFound), client_of(lambda _: error(404, "job_not_found")).events("job-1"):
        raise AssertionError("a stream was opened")


@pytest.mark.parametrize("name", ["../datasets", "", "a/b", ".", "job 1", "job-1?x=2"])
def test_what_is_no_id_is_never_asked_for(name: str) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise AssertionError(request.url)

    client = client_of(fail)
    for call in (client.job, client.cancel, client.retry, client.delete, lambda text: client.report(text, "html")):
        with pytest.raises(InvalidName, match="expected an id"):
            call(name)
    with pytest.raises(InvalidName):
        client.delete_dataset(name)


def test_a_state_is_looked_for_on_every_page_until_there_are_enough() -> None:
    def page(request: httpx.Request) -> httpx.Response:
        assert request.url.params["state"] == "failed"
        assert int(request.url.params["limit"]) <= 50
        number = int(request.url.params.get("before", "job-9").removeprefix("job-"))
        found = [{"id": f"job-{number - 1}", "state": "failed"}] if number % 2 else []
        return httpx.Response(200, json={"jobs": found, "next": f"job-{number - 1}" if number > 1 else None})

    assert [found["id"] for found in client_of(page).jobs(state="failed", limit=2)] == ["job-8", "job-6"]
    assert len(client_of(page).jobs(state="failed", limit=50)) == 5


def test_an_operator_names_the_tenant_and_others_send_none() -> None:
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(f"{request.method} {request.url.raw_path.decode()}")
        return httpx.Response(200, json={"jobs": [], "next": None, "datasets": []})

    client = client_of(answer)
    client.jobs(limit=1)
    client.jobs(limit=1, tenant="acme")
    client.datasets()
    client.datasets(tenant="acme")
    client.delete_dataset(DIGEST, tenant="acme")
    digest = DIGEST.replace(":", "%3A")
    told = [path.replace(digest, DIGEST) for path in asked]
    assert told == [
        "GET /jobs?limit=1", "GET /jobs?limit=1&tenant=acme", "GET /datasets", "GET /datasets?tenant=acme",
        f"DELETE /datasets/{DIGEST}?tenant=acme",
    ]  # fmt: skip


def test_a_file_that_shrinks_while_it_is_sent_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"x" * 10)

    def read(request: httpx.Request) -> httpx.Response:
        request.read()
        return httpx.Response(201, json={"dataset": DIGEST})

    sent: list[int] = []
    assert client_of(read).upload(path, 10, sent=sent.append) == {"dataset": DIGEST}
    assert sent == [10]
    with pytest.raises(InvalidData, match="expected 11 bytes, found 10"):
        client_of(read).upload(path, 11)


def test_a_watch_ends_with_the_job_and_all_its_events() -> None:
    end = (job("succeeded"), httpx.Response(204), job("succeeded"))
    script, waited = Script(job(), stream(FIRST, SECOND, THIRD), *end), Waited()
    watch = waited.watch(script)
    assert [event.id for event in watch.events()] == ["1", "2", "3"]
    assert watch.job["state"] == "succeeded"
    assert script.asked[3] == ("/jobs/job-1/events", "3")
    assert (waited.sleeps, waited.told, script.answers) == ([], [], [])


def test_an_end_that_was_undone_by_a_retry_is_no_end() -> None:
    failed = ("3", "state", {"state": "failed"})
    script = Script(job(), stream(FIRST, SECOND, failed, ("4", *FIRST[1:])), job("queued"),
                    stream(("5", *THIRD[1:])), job("succeeded"), httpx.Response(204), job("succeeded"))  # fmt: skip
    assert [event.id for event in Waited().watch(script).events()] == ["1", "2", "3", "4", "5"]


def test_a_broken_connection_goes_on_behind_the_last_event() -> None:
    script, waited = Script(
        job(), stream(FIRST, SECOND, cut=True), REFUSED, error(503, "no_trainer"), stream(), job(),
        stream(THIRD), job("succeeded"), httpx.Response(204), job("succeeded"),
    ), Waited()  # fmt: skip
    assert [event.id for event in waited.watch(script).events()] == ["1", "2", "3"]
    assert [after for path, after in script.asked if path.endswith("events")] == [None, "2", "2", "2", "2", "3"]
    assert waited.told == ["cannot reach the trainer at http://x: connection reset", "resumed"]
    assert waited.sleeps == [0.25, 0.5, 1, 2]


def test_a_sign_of_life_is_enough_to_be_connected_again() -> None:
    waited = Waited()
    alive = httpx.Response(200, content=b": \n\n")
    end = (job("succeeded"), stream(), job("succeeded"))
    script = Script(job(), stream(FIRST, cut=True), alive, job(), stream(THIRD), *end)
    assert [event.id for event in waited.watch(script).events()] == ["1", "3"]
    assert waited.told[1:] == ["resumed", "the trainer has ended the stream, but not the job", "resumed"]


def test_patience_ends_and_begins_anew_with_every_interruption() -> None:
    waited = Waited()
    script = Script(job(), stream(FIRST, cut=True), *[REFUSED] * 6, stream(SECOND, cut=True), *[REFUSED] * 100)
    told = []
    with pytest.raises(TrainerUnavailable, match="connection refused"):
        for event in waited.watch(script, patience_s=20).events():
            told.append((event.id, waited.now))
    assert [number for number, _ in told] == ["1", "2"]
    assert 20 - LONGEST_WAIT_S <= waited.now - told[1][1] <= 20
    assert max(waited.sleeps) == LONGEST_WAIT_S


@pytest.mark.parametrize("code", ["job_not_found", "forbidden", "internal"])
def test_what_no_waiting_helps_ends_a_watch_at_once(code: str) -> None:
    waited = Waited()
    with pytest.raises(PrefixdError, match=f"it is {code}"):
        list(waited.watch(Script(job(), stream(FIRST, cut=True), error(404, code))).events())
    with pytest.raises(PrefixdError, match=f"it is {code}"):
        waited.watch(Script(error(404, code)))
    with pytest.raises(TrainerUnavailable):
        waited.watch(Script(REFUSED))
    assert len(waited.sleeps) == 1
