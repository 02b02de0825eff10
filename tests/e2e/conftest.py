"""One server process for all end-to-end tests that can share it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.server import ServerProcess, TinyWorld, make_world, upload

TEMPLATE = "<in> {input} <out>"


SLOWER = [pytest.param(family, marks=pytest.mark.slow) for family in ("llama", "t5")]


@pytest.fixture(scope="session", params=["gpt2", "bart", *SLOWER])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    """A tiny backbone of each family, and prefixes for it: whatever is served is served for all."""
    return make_world(tmp_path_factory.mktemp("backbone"), request.param)


@pytest.fixture(scope="session")
def registry(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared server's registry."""
    return tmp_path_factory.mktemp("registry")


@pytest.fixture(scope="session")
def server(world: TinyWorld, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A ready server with room for 8 rows and 8 waiting requests, and the tasks ``e2e`` and ``dart``."""
    arguments = (
        *("--backbone", str(world.folder), "--registry", str(registry), "--kernels", "torch", "--threads", "1"),
        *("--kv-cache-bytes", "64MiB", "--max-rows", "8", "--max-new-tokens-limit", "8000"),
        *("--max-waiting", "8", "--max-waiting-per-tenant", "8"),
        *("--max-body-bytes", "64KiB", "--max-upload-bytes", "1MiB", "--access-log", "--max-batch-items", "64"),
    )
    with ServerProcess(tmp_path_factory.mktemp("server"), *arguments) as process:
        process.wait_ready()
        with process.client() as client:
            for seed, (task, length) in enumerate({"e2e": 5, "dart": 17}.items()):
                data = world.prefix(length=length, seed=seed, template=TEMPLATE)
                assert upload(client, task, data).status_code == 201
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    """A client of the shared server; afterwards nothing may be running there any more."""
    from tests.support.server import wait_for_metric

    with server.client() as client:
        yield client
        for state in ("running", "waiting"):
            wait_for_metric(server, f"prefixd_num_requests_{state}", 0)
