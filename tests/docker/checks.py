"""What must hold of the composed services: one function per promise, named by it, raising AssertionError.

Knows no engine; asks through ``Stack`` alone. What must hold when parts of it fail is ``failures``'s.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import Any, Final

from tests.docker.load import MARKER, TASKS, body
from tests.docker.stack import ADMIN_PORTS, MONITORING, REPLICAS, TRAINERS, NotChecked, Stack, wait_for

LONG_RUNNING: Final = ("redis", "server", "trainer", "proxy", "prometheus")
RUNBOOK: Final = "docs/alerts.md#"


def the_demo_is_served_through_the_proxy(stack: Stack) -> None:
    """As a first user would find it."""
    wait_for("ready through the proxy", lambda: stack.request("GET", "/ready")[0] == 200)
    wait_for("both replicas answer prometheus", lambda: stack.answering() == REPLICAS)
    status, _, answer = stack.request("POST", "/generate", body("e2e", "name : Blue Spice | Type : pub"))
    assert status == 200 and "Blue Spice" in json.loads(answer)["outputs"][0]["text"], answer
    status, _, answer = stack.request("GET", "/v1/models")
    tasks = {model["id"] for model in json.loads(answer)["data"]}
    assert {str(task) for task in TASKS if task} <= {task.removeprefix("default/") for task in tasks}, tasks


def containers_run_read_only_without_root_and_without_capabilities(stack: Stack) -> None:
    """Each of the long-running ones, from inside as well as by what the engine says."""
    for service in (*LONG_RUNNING, *(["grafana"] if "grafana" in stack.services else [])):
        for container in stack.containers(service):
            assert stack.inspect(container)["HostConfig"]["ReadonlyRootfs"], f"{container}: expected read-only"
            lines = stack.execute(container, "cat", "/proc/1/status").splitlines()
            status = dict(line.split(":", 1) for line in lines if ":" in line)
            uids = status["Uid"].split()
            assert "0" not in uids, f"{container}: expected another user than root, got {uids}"
            for kind in ("CapEff", "CapPrm", "CapBnd"):
                assert int(status[kind], 16) == 0, f"{container}: expected no capabilities, got {kind} {status[kind]}"
            assert status["NoNewPrivs"].strip() == "1", f"{container}: expected no new privileges"
            for path in ("/written", "/usr/written", "/etc/written"):
                written = stack.execute(container, "sh", "-c", f"touch {path} 2>/dev/null && echo written", check=False)
                assert not written, f"{container}: expected {path} not to be writable"


def health_checks_pass(stack: Stack) -> None:
    """Those of the images and of the compose file."""
    for service in ("server", "trainer", "redis", "proxy"):
        for container in stack.containers(service):
            wait_for(f"{container} healthy", lambda name=container: stack.engine.healthy(name), 60)  # type: ignore[misc]


def only_the_proxy_publishes_a_port(stack: Stack) -> None:
    """And grafana, to this machine."""
    for service in stack.services:
        for container in stack.containers(service):
            ports = stack.inspect(container)["NetworkSettings"]["Ports"] or {}
            published = {port: [b["HostIp"] for b in bound] for port, bound in ports.items() if bound}
            wanted = {"proxy": {"8000/tcp": ["127.0.0.1"]}, "grafana": {"3000/tcp": ["127.0.0.1"]}}.get(service, {})
            assert published == wanted, f"{container}: expected {wanted} to be published, got {published}"


def metrics_and_administration_are_not_reachable_through_the_proxy(stack: Stack) -> None:
    """However the path is spelt; the admin port itself does answer."""
    paths = (
        "/metrics", "/metrics/", "//metrics", "/Metrics", "/%6detrics", "/x/../metrics", "/metrics?x", "/admin",
        "/admin/residents", "/admin/gc", "/%61dmin/residents", "//admin/residents",
        "/jobs/../metrics", "/datasets/metrics/", "/jobs//metrics",
    )  # fmt: skip
    for path in paths:
        status, _, answer = stack.request("GET", path)
        assert status == 404 and b"prefixd_" not in answer, f"{path}: expected 404, got {status} {answer[:200]!r}"
    status, _, answer = stack.request("POST", "/admin/gc", {"retention_s": 0, "dry_run": True})
    assert status == 404, answer
    for container in stack.containers("server"):
        assert "prefixd_registry_up 1" in stack.admin(container, "/metrics")
    for container in stack.containers("trainer"):
        assert "prefixd_trainer_queue_age_seconds 0" in stack.admin(container, "/metrics")


def admin_ports_are_open_on_the_monitoring_network_alone(stack: Stack) -> None:
    """Of all the networks that servers and trainers are in; asked from a server, which is in all of them too."""
    for service, port in ADMIN_PORTS.items():
        for container in stack.containers(service):
            networks = stack.inspect(container)["NetworkSettings"]["Networks"]
            assert len(networks) == 3, networks
            for network in networks.values():
                address, answer = network["IPAddress"], ""
                with suppress(RuntimeError):
                    answer = stack.inside(f"http://{address}:{port}/metrics")
                inside = ip_address(address) in ip_network(MONITORING)
                assert ("python_info" in answer) == inside, f"{container}: expected {port} on {MONITORING} alone"


def prometheus_finds_every_replica_and_not_the_proxy(stack: Stack) -> None:
    """Servers and trainers by their own addresses, on the admin port; and it has read the alert rules."""
    wait_for("both trainers answer prometheus", lambda: stack.answering("prefixd-trainer") == TRAINERS)
    targets = json.loads(stack.inside("http://prometheus:9090/api/v1/targets?state=active"))["data"]["activeTargets"]
    addresses = {target["labels"]["instance"] for target in targets if target["health"] == "up"}
    own = {
        f"{network['IPAddress']}:{port}"
        for service, port in ADMIN_PORTS.items()
        for container in stack.containers(service)
        for network in stack.inspect(container)["NetworkSettings"]["Networks"].values()
    }
    assert len(addresses) == len(targets) == REPLICAS + TRAINERS and addresses <= own, (addresses, own)
    groups = json.loads(stack.inside("http://prometheus:9090/api/v1/rules"))["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert rules and all(rule["annotations"]["runbook"].startswith(RUNBOOK) for rule in rules), rules
    wait_for("rules evaluated", lambda: all(
        rule["health"] == "ok"
        for group in json.loads(stack.inside("http://prometheus:9090/api/v1/rules"))["data"]["groups"]
        for rule in group["rules"]), 60)  # fmt: skip


def alert_rules_fire_when_they_should(stack: Stack) -> None:
    """By Prometheus' own tests of rules."""
    (prometheus,) = stack.containers("prometheus")
    test = "TMPDIR=/prometheus promtool test rules /etc/prometheus/alerts_test.yml 2>&1"
    said = stack.execute(prometheus, "sh", "-c", test, check=False)
    assert "SUCCESS" in said and "FAILED" not in said, said


def no_password_of_redis_is_in_an_environment_argument_or_log(stack: Stack) -> None:
    """And without one redis tells nothing."""
    (redis,) = stack.containers("redis")
    assert "NOAUTH" in stack.execute(redis, "redis-cli", "ping", check=False)
    holders = {"redis_password": redis, "redis_probe_password": redis} | {
        f"redis_{service}_password": stack.containers(service)[0] for service in ("server", "trainer")
    }
    for name, holder in holders.items():
        password = stack.execute(holder, "cat", f"/run/prefixd/secrets/{name}").strip()
        assert len(password) >= 32, f"{name}: expected a password made at start"
        for service in stack.services:
            for container in stack.containers(service, stopped=True):
                assert password not in json.dumps(stack.inspect(container)), f"{container}: the engine shows {name}"
                assert password not in stack.logs(container), f"{container}: the log shows {name}"
        for container in (redis, *stack.containers("server"), *stack.containers("trainer")):
            assert password not in stack.execute(container, "cat", "/proc/1/cmdline", "/proc/1/environ"), container


def bodies_beyond_their_limit_are_refused(stack: Stack) -> None:
    """By what is declared, before it is sent; by the server where nothing is declared. The same code for both."""
    for path, length in (
        ("/generate", (4 << 20) + 1), ("/prefixes", (512 << 20) + 1), ("/datasets", (1 << 30) + 1), ("/jobs", 2 << 20),
    ):  # fmt: skip
        status, error = _upload(stack, path, {"content-length": str(length)}, [])
        assert status == 413 and error["code"] == "body_too_large", (path, status, error)
    chunks = [b"10000\r\n" + b"x" * 0x10000 + b"\r\n"] * 65 + [b"0\r\n\r\n"]
    status, error = _upload(stack, "/generate", {"transfer-encoding": "chunked"}, chunks)
    assert status == 413 and error["code"] == "body_too_large", (status, error)


def _upload(stack: Stack, path: str, headers: dict[str, str], pieces: list[bytes]) -> tuple[int, dict[str, Any]]:
    connection = _connect(stack)
    try:
        connection.putrequest("POST", path)
        for name, value in {**stack.headers, **headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        for piece in pieces:
            connection.send(piece)
        answer = connection.getresponse()
        error: dict[str, Any] = json.loads(answer.read())["error"]
        return answer.status, error
    finally:
        connection.close()


def _connect(stack: Stack) -> http.client.HTTPConnection:
    host = urllib.parse.urlsplit(stack.url)
    return http.client.HTTPConnection(str(host.hostname), host.port, timeout=60)


def a_request_id_goes_through_everything(stack: Stack) -> None:
    """Answer, proxy's log, server's log; one that is no id is replaced, a missing one made."""
    wanted = f"docker-test-{time.time_ns()}"
    _, headers, _ = stack.request("POST", "/generate", body("e2e", MARKER), {"X-Request-Id": wanted})
    assert headers["x-request-id"] == wanted, headers
    _, headers, _ = stack.request("GET", "/nowhere", headers={"X-Request-Id": 'evil"id'})
    assert len(headers["x-request-id"]) == 36, headers
    long = f"{wanted}-long"
    assert stack.request("GET", "/" + "%22" * 2500, headers={"X-Request-Id": long})[0] == 404
    (proxy,) = stack.containers("proxy")
    wait_for("the proxy's log line", lambda: wanted in stack.logs(proxy), 10)
    wait_for("that of a long path, whole", lambda: long in stack.logs(proxy), 10)
    wait_for("a server's", lambda: any(wanted in stack.logs(name) for name in stack.containers("server")), 10)
    for line in stack.logs(proxy).splitlines():
        if line.startswith("{"):
            assert {"time", "status", "request_id", "server"} <= set(json.loads(line)), line
    for container in stack.containers("server"):
        for line in stack.logs(container).splitlines():
            if not line.startswith("prefixd serve: "):  # a start that failed, say before redis had come up
                assert line.startswith("{") and json.loads(line)["level"], f"expected JSON lines, got {line!r}"


def streams_are_not_held_back(stack: Stack) -> None:
    """The first token of a long answer comes well before its end."""
    request = urllib.request.Request(
        stack.url + "/generate", method="POST", headers=stack.headers,
        data=json.dumps({**body(None, "The", max_new_tokens=300, min_new_tokens=300), "stream": True}).encode(),
    )  # fmt: skip
    begun, times = time.monotonic(), []
    with urllib.request.urlopen(request, timeout=120) as answer:
        times = [time.monotonic() - begun for line in answer if line.startswith(b"data: ")]
    assert len(times) > 100 and times[0] < times[-1] / 2, f"first after {times[0]:.2f} s, last after {times[-1]:.2f} s"


def a_client_that_leaves_frees_its_rows(stack: Stack) -> None:
    """Through the proxy, stream or not."""
    long = body(None, "The", max_new_tokens=480, min_new_tokens=480, num_return_sequences=8, do_sample=True)
    for stream in (True, False):
        with _leaving(stack, {**long, "stream": stream}):
            wait_for("running", lambda: _running(stack) >= 1, 20)
        wait_for("nothing running", lambda: _running(stack) == 0, 8)


class _leaving:  # noqa: N801
    """A request whose client closes its connection at the end of the block, whatever came."""

    def __init__(self, stack: Stack, request: dict[str, Any]) -> None:
        self._connection = _connect(stack)
        self._request, self._headers = json.dumps(request), stack.headers

    def __enter__(self) -> None:
        self._connection.request("POST", "/generate", self._request, self._headers)

    def __exit__(self, *exception: object) -> None:
        self._connection.close()


def _running(stack: Stack) -> float:
    return sum(stack.metric(container, "prefixd_num_requests_running") for container in stack.containers("server"))


def grafana_has_the_dashboard(stack: Stack) -> None:
    """Where there is a Grafana to ask."""
    if "grafana" not in stack.services:
        raise NotChecked("there is no Grafana for this engine")
    wait_for("the dashboard", lambda: "First token" in stack.inside("http://grafana:3000/api/dashboards/uid/prefixd"))


def no_input_is_in_a_log(stack: Stack) -> None:
    """After all of the above."""
    for service in ("server", "trainer", "proxy"):
        for container in stack.containers(service, stopped=True):
            assert MARKER not in stack.logs(container), f"{container}: expected no inputs in the log"


SEEN_AT_FIRST: Final[tuple[Callable[[Stack], None], ...]] = (
    the_demo_is_served_through_the_proxy,
    containers_run_read_only_without_root_and_without_capabilities,
    health_checks_pass,
    only_the_proxy_publishes_a_port,
    metrics_and_administration_are_not_reachable_through_the_proxy,
    admin_ports_are_open_on_the_monitoring_network_alone,
    prometheus_finds_every_replica_and_not_the_proxy,
    alert_rules_fire_when_they_should,
    grafana_has_the_dashboard,
    no_password_of_redis_is_in_an_environment_argument_or_log,
    bodies_beyond_their_limit_are_refused,
    a_request_id_goes_through_everything,
    streams_are_not_held_back,
    a_client_that_leaves_frees_its_rows,
)

SEEN_AT_LAST: Final[tuple[Callable[[Stack], None], ...]] = (no_input_is_in_a_log,)
