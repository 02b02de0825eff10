"""The deployment's files against the code: paths, limits, times and variables that stand in both are the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_network
from threading import Thread
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped]
from fastapi import FastAPI

from server.routes import generate, keys, openai, prefixes, task_changes
from server.settings import Settings
from server.web.settings_sources import load_settings
from tests.support.paths import ROOT
from trainer.service.routes import datasets, jobs
from trainer.service.routes import operations as trainer_operations
from trainer.service.settings import TrainerSettings

PROXY: Final = (ROOT / "docker/proxy/haproxy.cfg").read_text()
DOCKERFILE: Final = (ROOT / "docker/Dockerfile").read_text()
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: Final[dict[str, Any]] = COMPOSE["services"]
SECRETS: Final = "/run/prefixd/secrets"
ALSO: Final = {"PREFIXD_REGISTRY"}
"""What commands in the trainer's image read besides its settings."""


def paths(*routers: Any) -> list[str]:
    """Of the routes, a parameter as some name."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    for router in routers:
        app.include_router(router)
    return [re.sub(r"\{[^}]*\}", "some-name", path) for path in app.openapi()["paths"]]


def is_led_to_the_trainers(path: str) -> bool:
    """What the proxy does with it, by its own rules."""
    rules = dict(re.findall(r"^    acl training (path|path_beg) (.+)$", PROXY, re.M))
    return path in rules["path"].split() or path.startswith(tuple(rules["path_beg"].split()))


def test_the_proxy_leads_every_path_to_the_service_that_has_it() -> None:
    trainers = paths(datasets.router, jobs.router, trainer_operations.public)
    servers = paths(generate.router, openai.router, prefixes.router, task_changes.router, keys.router)
    assert len(trainers) > 8 and len(servers) > 8
    assert [path for path in trainers if not is_led_to_the_trainers(path)] == []
    assert [path for path in servers if is_led_to_the_trainers(path)] == []
    assert "use_backend trainers if training" in PROXY and "default_backend replicas" in PROXY


def test_the_proxys_limits_of_uploads_are_the_services_own() -> None:
    limits = dict(re.findall(r"deny_status 413 if ([a-z !]+) \{ req.hdr_val\(content-length\) gt (\d+) \}", PROXY))
    servers, trainers = Settings.model_fields, TrainerSettings.model_fields
    assert limits == {
        "upload": str(int(servers["max_upload_bytes"].default)),
        "dataset": str(int(trainers["max_dataset_bytes"].default)),
        "!upload !dataset": str(int(servers["max_body_bytes"].default)),
    }


@pytest.mark.parametrize(("service", "settings"), [("server", Settings), ("trainer", TrainerSettings)])
def test_a_container_may_stop_for_as_long_as_its_process_drains(service: str, settings: Any) -> None:
    grace_s = int(SERVICES[service]["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings.model_fields["drain_timeout_s"].default + 10


@pytest.mark.parametrize(("service", "settings"), [("server", Settings), ("trainer", TrainerSettings)])
def test_every_variable_that_a_container_gets_is_a_setting(service: str, settings: Any) -> None:
    stage = re.search(rf"^FROM runtime AS {service}$(.*?)(?=^# ---|\Z)", DOCKERFILE, re.M | re.S)
    assert stage is not None
    in_image = dict(re.findall(r"(PREFIXD_\w+)=(\S+)", stage[1]))
    given = set(in_image) | {name for name in SERVICES[service]["environment"] if name.startswith("PREFIXD_")}
    known = {settings.variable(name) for name in (*settings.model_fields, "config")}
    assert given - known - (ALSO if service == "trainer" else set()) == set()
    exposed = re.search(r"^EXPOSE (.+)$", stage[1], re.M)
    # `docker run --publish-all` publishes what is exposed, and an image has no network for monitoring.
    assert exposed is not None and exposed[1].split() == [in_image[settings.variable("port")]]
    assert settings.variable("admin_host") not in in_image and settings.variable("admin_port") in in_image
    check = re.search(r'healthcheck.py", "(\w+)"', stage[1])
    assert check is not None and check[1] in in_image


@pytest.mark.parametrize(("service", "settings"), [("server", Settings), ("trainer", TrainerSettings)])
def test_admin_ports_are_open_on_the_monitoring_network_alone(service: str, settings: Any) -> None:
    """They were on 0.0.0.0, and so on the proxy's network and on Redis' too."""
    network = COMPOSE["networks"]["monitoring"]
    (subnet,) = [config["subnet"] for config in network["ipam"]["config"]]
    assert network["internal"] is True and "monitoring" in SERVICES[service]["networks"]
    assert SERVICES[service]["environment"][settings.variable("admin_host")] == subnet
    default = re.fullmatch(r"\$\{PREFIXD_MONITORING_SUBNET:-(.+)\}", subnet)
    assert default is not None and ip_network(default[1]).is_private
    assert load_settings(settings, {"admin_host": default[1]}).admin_host == default[1]
    assert f"`{default[1]}`" in (ROOT / "docs/deploy.md").read_text()


def test_servers_and_trainers_have_one_registry_as_users_of_their_own_and_the_jobs_a_database() -> None:
    environment = SERVICES["trainer"]["environment"]
    registry = SERVICES["server"]["environment"]["PREFIXD_REGISTRY"]
    assert SERVICES["identity"]["environment"]["PREFIXD_REGISTRY"] == registry
    assert registry == f"redis://server@redis:6379/0?password_file={SECRETS}/redis_server_password"
    assert environment["PREFIXD_TRAINER_REGISTRY"] == environment["PREFIXD_REGISTRY"]
    assert environment["PREFIXD_REGISTRY"] == registry.replace("server", "trainer")
    assert environment["PREFIXD_TRAINER_REDIS"] == environment["PREFIXD_REGISTRY"].replace(":6379/0?", ":6379/1?")


def test_only_the_proxy_and_grafana_publish_ports_and_every_service_is_hardened() -> None:
    assert {name for name, service in SERVICES.items() if service.get("ports")} == {"proxy", "grafana"}
    for name, service in SERVICES.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "profiles" not in service, name


def test_no_container_may_take_all_of_a_machine() -> None:
    """One job could fill the memory and the process table of the machine that its servers run on."""
    for name, service in SERVICES.items():
        assert service["init"] is True and 0 < service["pids_limit"] <= 4096, name
        limit = str(service["mem_limit"])
        assert limit.endswith(("g", "g}")) or name == "redis", "redis has maxmemory"
    assert "REDIS_MAXMEMORY" in SERVICES["redis"]["environment"]
    for name in ("server", "trainer"):
        assert "CPUS" in SERVICES[name]["cpus"]
    assert SERVICES["trainer"]["cpu_shares"] < 1024, "the default, which the servers have"


@pytest.fixture
def port() -> Iterator[int]:
    """Of something that is well at ``/health`` alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_the_health_check_asks_the_port_that_the_variable_names(port: int) -> None:
    def exit_code(value: int) -> int:
        return subprocess.run(
            [sys.executable, str(ROOT / "docker/healthcheck.py"), "PREFIXD_TRAINER_ADMIN_PORT"],
            env={**os.environ, "PREFIXD_TRAINER_ADMIN_PORT": str(value)}, capture_output=True, check=False,
        ).returncode  # fmt: skip

    assert exit_code(port) == 0
    assert exit_code(9) == 1  # the discard port: nobody is there
