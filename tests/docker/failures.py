"""What must hold of the composed services while parts of them are killed, stopped and started again, under load.

As ``checks``: one function per promise. Each leaves the services whole.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from tests.docker.load import Load, body, expected_texts
from tests.docker.stack import REPLICAS, Stack, wait_for


def a_killed_replica_costs_no_wrong_answer(stack: Stack) -> None:
    """SIGKILL under load: broken connections of that replica, then as before on the other; then both again."""
    expected = expected_texts(stack)
    with Load(stack, expected) as load:
        before = load.during(10)
        served = {name: stack.metric(name, "prefixd_request_success_total") for name in stack.containers("server")}
        assert len(served) == REPLICAS and all(served.values()), f"expected both replicas to have worked: {served}"
        first, second = stack.containers("server")
        counted = load.outcomes()
        stack.kill(first)
        time.sleep(6)
        around = load.outcomes() - counted
        after = load.during(8)
        stack.start(first)
        wait_for("both replicas again", lambda: stack.answering() == REPLICAS)
        count = stack.metric(first, "prefixd_request_success_total")
        wait_for("the first works again", lambda: stack.metric(first, "prefixd_request_success_total") > count, 60)
        again = load.during(5)
        _say(before=before, around=around, after=after, again=again)
    assert not load.wrong, load.wrong[:3]
    assert set(before) == set(after) == set(again) == {"ok"}, "expected failures around the kill alone"
    assert {"ok"} < set(around) <= {"ok", "broken", "connection", "502", "503"}, around
    assert second in stack.containers("server")


def a_stopped_replica_finishes_what_it_runs(stack: Stack) -> None:
    """SIGTERM under load, as a rolling upgrade does it: no answer is cut off."""
    expected = expected_texts(stack)
    with Load(stack, expected) as load:
        load.during(2)
        first = stack.containers("server")[0]
        counted = load.outcomes()
        stopping = threading.Thread(target=stack.stop, args=(first,))
        stopping.start()
        time.sleep(8)
        around = load.outcomes() - counted
        stopping.join(160)
        after = load.during(3)
        stack.start(first)
        wait_for("both replicas again", lambda: stack.answering() == REPLICAS)
        _say(around=around, after=after)
    assert not load.wrong, load.wrong[:3]
    assert set(around) <= {"ok", "503"}, f"expected whole answers, and refusals while the proxy learns of it: {around}"
    assert set(after) == {"ok"}, after
    assert "stopped" in stack.logs(first) and '"exit_code": 0' in stack.logs(first)


def a_task_trained_in_a_container_is_served(stack: Stack) -> None:
    """The trainer's image, as documented: data in, published to redis, answered through the proxy."""
    lines = [{"input": f"name : Number {n} | Type : pub", "target": f"Number {n} is a pub."} for n in range(80)]
    said = stack.train("trained", lines)
    assert "published default/trained" in said, said[-2000:]
    status, _, answer = stack.request("POST", "/generate", body("trained", "name : Number 5 | Type : pub"))
    assert status == 200 and json.loads(answer)["version"] in said, (answer, said[-2000:])


def a_killed_redis_loses_nothing_and_stops_no_resident_task(stack: Stack) -> None:
    """SIGKILL; what is resident answers meanwhile, what was published is there afterwards."""
    (redis,) = stack.containers("redis")
    before = stack.request("GET", "/v1/models")[2]
    assert b"e2e" in before
    request = body("e2e", "name : Number 5 | Type : pub")
    for _ in range(2 * REPLICAS):  # known and resident on every replica
        assert stack.request("POST", "/generate", request)[0] == 200
    stack.kill(redis)
    for _ in range(5):
        assert stack.request("POST", "/generate", request)[0] == 200
        assert stack.request("GET", "/ready")[0] == 200, "expected the proxy to keep its replicas"
        time.sleep(0.5)
    assert stack.request("GET", "/v1/models")[0] == 503
    stack.start(redis)

    def everywhere() -> bool:  # on every replica: one may still wait for the name of a host that was gone
        return all(stack.request("GET", "/v1/models")[:3:2] == (200, before) for _ in range(4 * REPLICAS))

    wait_for("the registry again", everywhere, 60)


def _say(**counts: Counter[str]) -> None:
    for name, counted in counts.items():
        sys.stdout.write(f"    {name}: {dict(counted)}\n")


FAILURES: Final[tuple[Callable[[Stack], None], ...]] = (
    a_task_trained_in_a_container_is_served,
    a_killed_redis_loses_nothing_and_stops_no_resident_task,
    a_killed_replica_costs_no_wrong_answer,
    a_stopped_replica_finishes_what_it_runs,
)
