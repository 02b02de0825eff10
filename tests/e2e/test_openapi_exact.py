"""The server's OpenAPI documents are exactly true: nothing is found to say against any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from prefixes.registry import open_registry
from prefixes.tenancy.directory import Directory
from tests.support.callers import bearer
from tests.support.openapi import NUMBERS, check, run
from tests.support.server import ServerProcess, make_world, upload


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose limits keep every generated request small."""
    world = make_world(tmp_path_factory.mktemp("backbone"))
    arguments = (
        *("--backbone", str(world.folder), "--registry", str(tmp_path_factory.mktemp("registry"))),
        *("--kernels", "torch", "--threads", "1", "--kv-cache-bytes", "16MiB", "--max-rows", "8"),
        *("--max-new-tokens-limit", "8", "--default-max-new-tokens", "4", "--num-beams-limit", "4"),
        *("--num-return-sequences-limit", "4", "--max-batch-items", "4", "--max-waiting", "64"),
        *("--max-waiting-per-tenant", "64"),
        *("--max-body-bytes", "1MiB", "--max-upload-bytes", "1MiB"),
    )
    with ServerProcess(tmp_path_factory.mktemp("server"), *arguments) as process:
        process.wait_ready()
        with process.client() as client:
            assert upload(client, "e2e", world.prefix()).status_code == 201
        yield process


@pytest.mark.parametrize("cases", NUMBERS)
def test_the_servers_documents_are_exact(server: ServerProcess, cases: int) -> None:
    check(server, cases)


@pytest.mark.parametrize("cases", NUMBERS)
def test_the_documents_of_keys_are_exact_once_there_are_some(
    tmp_path_factory: pytest.TempPathFactory, cases: int
) -> None:
    folder = tmp_path_factory.mktemp("keyed")
    with closing(open_registry(str(folder / "registry"))) as registry:
        secret = Directory(registry.tenancy).create_key("ops", "operator", ["operator"], actor="test").secret
    backbone = str(make_world(folder / "backbone").folder)
    with ServerProcess(folder, "--backbone", backbone, "--registry", str(folder / "registry")) as keyed:
        url = f"{keyed.wait_ready().url}/openapi.json"
        sent, findings = run(url, cases // 4, waiting=False, headers=bearer(secret), tags=["keys", "audit"])
        assert not findings, "\n\n".join(sorted(findings))
        assert sent >= cases // 8
