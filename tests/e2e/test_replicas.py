"""Two server processes on one Redis: what one does the other serves, and no answer is a mixture of two versions."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest

from prefixes.registry import open_registry
from tests.support.redis_server import RedisServer
from tests.support.server import LONG, ServerProcess, TinyWorld, events, upload

SEEN_S = 1.0
"""Within this long every replica serves what was promoted."""
LATE_S = 20.0
"""For what a busy machine may take longer with."""
PARAMETERS = {"max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    with RedisServer(append_only=True) as server:
        yield server


@pytest.fixture(scope="module")
def replicas(
    world: TinyWorld, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServerProcess]]:
    redis_server.flush()
    started = [
        ServerProcess(tmp_path_factory.mktemp(f"replica-{number}"), *arguments(world, redis_server))
        for number in range(2)
    ]
    try:
        yield [process.wait_ready() for process in started]
    finally:
        for process in started:
            process.kill()


def arguments(world: TinyWorld, redis_server: RedisServer) -> tuple[str, ...]:
    return (
        *("--backbone", str(world.folder), "--registry", redis_server.url, "--kernels", "torch", "--threads", "1"),
        *("--dtype", "float64", "--kv-cache-bytes", "64MiB", "--max-rows", "16", "--max-new-tokens-limit", "8000"),
    )


@pytest.fixture
def clients(replicas: list[ServerProcess]) -> Iterator[list[httpx.Client]]:
    with replicas[0].client() as first, replicas[1].client() as second:
        yield [first, second]


def ask(client: httpx.Client, task: str, parameters: dict[str, Any] | None = None) -> tuple[str, str]:
    """Version and text of an answer."""
    body = {"task": task, "input": "Blue Spice", "parameters": parameters or PARAMETERS}
    answer = client.post("/generate", json=body).raise_for_status().json()
    return answer["version"], answer["outputs"][0]["text"]


def wait_for(client: httpx.Client, task: str, version: str) -> float:
    """Seconds until the replica answers with that version; for as long as a busy machine may take."""
    began = time.monotonic()
    while ask(client, task)[0] != version:
        assert time.monotonic() - began < LATE_S
    return time.monotonic() - began


def publish(client: httpx.Client, world: TinyWorld, task: str, *seeds: int) -> list[str]:
    return [upload(client, task, world.prefix(seed=seed)).raise_for_status().json()["version"] for seed in seeds]


def test_a_task_published_on_one_replica_is_served_by_the_other_at_once(
    world: TinyWorld, clients: list[httpx.Client]
) -> None:
    (version,) = publish(clients[0], world, "fresh", 1)
    assert ask(clients[1], "fresh")[0] == version
    assert ask(clients[0], "fresh") == ask(clients[1], "fresh")


def test_a_promote_and_a_rollback_are_seen_by_the_other_replica(
    world: TinyWorld, clients: list[httpx.Client], replicas: list[ServerProcess]
) -> None:
    first, second = publish(clients[0], world, "seen", 1, 2)
    assert ask(clients[1], "seen")[0] == second
    taken = []
    for move in range(6):
        mover, other = clients[move % 2], clients[1 - move % 2]
        if move % 2 == 0:
            moved = mover.post("/prefixes/seen/promote", json={"version": first, "expected_current": second})
            target = first
        else:
            moved, target = mover.post("/prefixes/seen/rollback"), second
        assert moved.raise_for_status().json()["aliases"]["production"] == target
        taken.append(wait_for(other, "seen", target))
    assert sorted(taken)[len(taken) // 2] < SEEN_S
    assert all("prefixd_registry_subscribed 1.0" in replica.metrics() for replica in replicas)


def test_a_deleted_task_is_gone_on_the_other_replica_and_comes_back(
    world: TinyWorld, clients: list[httpx.Client]
) -> None:
    (version,) = publish(clients[0], world, "leaving", 1)
    assert ask(clients[1], "leaving")[0] == version
    body = {"task": "leaving", "input": "x", "parameters": LONG, "stream": True}
    with clients[1].stream("POST", "/generate", json=body) as running:
        tokens = events(running.iter_lines())
        next(tokens)
        assert clients[0].delete("/prefixes/leaving").status_code == 204
        deadline = time.monotonic() + LATE_S
        with httpx.Client(base_url=clients[1].base_url, timeout=60) as client:
            while (status := client.post("/generate", json={"task": "leaving", "input": "x"}).status_code) != 404:
                assert status == 200 and time.monotonic() < deadline
        assert next(tokens)[0] == "token"  # the row that runs keeps what it has
    assert clients[0].post("/prefixes/leaving/undelete").status_code == 200
    assert wait_for(clients[1], "leaving", version) < LATE_S


def test_deletes_and_undeletes_are_seen_by_the_other_replica(world: TinyWorld, clients: list[httpx.Client]) -> None:
    (version,) = publish(clients[0], world, "coming", 1)
    body, taken = {"task": "coming", "input": "x", "parameters": PARAMETERS}, []
    for _ in range(5):
        assert ask(clients[1], "coming")[0] == version
        assert clients[0].delete("/prefixes/coming").status_code == 204
        began = time.monotonic()
        while (status := clients[1].post("/generate", json=body).status_code) != 404:
            assert status == 200 and time.monotonic() - began < LATE_S
        taken.append(time.monotonic() - began)
        assert clients[0].post("/prefixes/coming/undelete").status_code == 200
        while clients[1].post("/generate", json=body).status_code != 200:
            assert time.monotonic() - began < LATE_S
    assert sorted(taken)[len(taken) // 2] < SEEN_S


def test_a_digest_of_another_tenant_is_as_unknown_as_one_that_nobody_has(
    world: TinyWorld, clients: list[httpx.Client], redis_server: RedisServer
) -> None:
    publish(clients[0], world, "mine", 1)
    with closing(open_registry(redis_server.url)) as registry:
        theirs = registry.publish("acme", "theirs", world.prefix(seed=2), record={}).version
    nobodys = f"sha256:{'0' * 64}"

    def answers(version: str) -> list[tuple[int, str]]:
        told = [
            clients[0].get(f"/prefixes/mine/versions/{version}"),
            clients[0].post("/prefixes/mine/promote", json={"version": version}),
            clients[1].post("/generate", json={"task": f"mine@{version}", "input": "x"}),
            clients[1].post("/v1/completions", json={"model": f"mine@{version}", "prompt": "x"}),
        ]
        errors = [answer.json()["error"] for answer in told]
        return [(a.status_code, e["message"].replace(version, "?")) for a, e in zip(told, errors, strict=True)]

    assert answers(theirs) == answers(nobodys)
    assert {status for status, _ in answers(theirs)} == {404}


def test_no_answer_is_a_mixture_of_two_versions_under_promotes_and_rollbacks(
    world: TinyWorld, clients: list[httpx.Client], replicas: list[ServerProcess]
) -> None:
    tried = publish(clients[0], world, "tried", *range(12))
    seeds = {ask(clients[0], f"tried@{version}")[1]: seed for seed, version in enumerate(tried)}
    versions = publish(clients[0], world, "moving", *list(seeds.values())[:3])
    expected = {version: ask(clients[0], f"moving@{version}")[1] for version in versions}
    assert expected == {version: ask(clients[1], f"moving@{version}")[1] for version in versions}
    assert len(set(expected.values())) == 3, "a small model answers some prefixes alike, but not twelve"
    answers: list[tuple[str, str]] = []
    faults: list[BaseException] = []
    done = threading.Event()

    def load(url: str, streamed: bool) -> None:
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                while not done.is_set():
                    answers.append(stream(client, "moving") if streamed else ask(client, "moving"))
        except BaseException as error:
            faults.append(error)

    threads = [
        threading.Thread(target=load, args=(replica.url, streamed))
        for replica in replicas
        for streamed in (False, True)
    ]
    for thread in threads:
        thread.start()
    generator = random.Random(0)
    for move in range(30):
        mover = clients[move % 2]
        if move % 3 == 2:
            assert mover.post("/prefixes/moving/rollback").status_code == 200
        else:
            target = generator.choice(versions)
            assert mover.post("/prefixes/moving/promote", json={"version": target}).status_code == 200
        time.sleep(generator.uniform(0, 0.1))
    done.set()
    for thread in threads:
        thread.join(60)
    assert faults == []
    assert {version for version, _ in answers} == set(versions)
    assert [answer for answer in answers if expected[answer[0]] != answer[1]] == []


def stream(client: httpx.Client, task: str) -> tuple[str, str]:
    """Version and text of an answer, the text put together from its tokens."""
    body = {"task": task, "input": "Blue Spice", "parameters": PARAMETERS, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        response.raise_for_status()
        told = list(events(response.iter_lines()))
    assert told[-1][0] == "done"
    text = "".join(data["text"] for name, data in told if name == "token")
    assert text == told[-1][1]["outputs"][0]["text"]
    return told[-1][1]["version"], text


def test_a_running_row_keeps_its_version_whatever_is_promoted(
    world: TinyWorld, clients: list[httpx.Client], replicas: list[ServerProcess]
) -> None:
    first, second = publish(clients[0], world, "long", 1, 2)
    parameters = {"max_new_tokens": 300, "min_new_tokens": 300}
    expected = ask(clients[1], f"long@{second}", parameters)
    body = {"task": "long", "input": "Blue Spice", "parameters": parameters, "stream": True}
    with clients[1].stream("POST", "/generate", json=body) as response:
        told = events(response.iter_lines())
        begun = [next(told)]
        for target in (first, second, first):
            clients[0].post("/prefixes/long/promote", json={"version": target}).raise_for_status()
        begun += told
    assert (begun[-1][1]["version"], begun[-1][1]["outputs"][0]["text"]) == expected
    assert ask(clients[0], "long")[0] == first


def test_of_two_promotes_through_two_replicas_one_wins_and_the_other_is_told(
    world: TinyWorld, clients: list[httpx.Client]
) -> None:
    first, second, third = publish(clients[0], world, "contested", 1, 2, 3)
    for round_ in range(5):
        barrier, statuses = threading.Barrier(2), [0, 0]

        def promote(number: int, target: str) -> None:
            barrier.wait()  # noqa: B023
            body = {"version": target, "expected_current": third}
            statuses[number] = clients[number].post("/prefixes/contested/promote", json=body).status_code  # noqa: B023

        threads = [threading.Thread(target=promote, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200, 409]
        winner = (first, second)[statuses.index(200)]
        task = clients[round_ % 2].get("/prefixes/contested").json()
        assert task["aliases"]["production"] == winner
        assert task["history"]["production"][-1]["version"] == winner
        clients[0].post("/prefixes/contested/promote", json={"version": third}).raise_for_status()


def test_what_one_replica_was_told_outlives_it(
    world: TinyWorld, clients: list[httpx.Client], redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with ServerProcess(tmp_path_factory.mktemp("short"), *arguments(world, redis_server)) as third:
        third.wait_ready()
        with third.client() as client:
            (version,) = publish(client, world, "outliving", 7)
            expected = ask(client, "outliving")
        third.signal(signal.SIGKILL)
        third.wait()
    assert ask(clients[1], "outliving") == expected == (version, expected[1])
