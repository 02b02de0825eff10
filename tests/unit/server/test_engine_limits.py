"""The limits of rows and of waiting requests that a tenant and a key have in the registry hold in the engine."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from prefixes.tenancy.directory import Directory
from prefixes.tenancy.limits import Limits
from prefixes.tenancy.records import tenancy_to_json
from prefixes.tenancy.store import TenancyStore
from tests.support.apps import Served, with_apps
from tests.support.callers import bearer


def set_limits(store: TenancyStore, tenant: str, limits: Limits, key_id: str | None) -> None:
    """Give the tenant, or one of its keys, these limits."""
    state, stored = Directory(store).load(), store.read()
    if key_id is None:
        changed = replace(state, tenants={**state.tenants, tenant: replace(state.tenants[tenant], limits=limits)})
    else:
        changed = replace(state, keys={**state.keys, key_id: replace(state.keys[key_id], limits=limits)})
    assert store.replace(tenancy_to_json(changed), stored.revision)


@pytest.mark.parametrize("whose", ["tenant", "key"])
def test_rows_running_and_requests_waiting_are_read_from_the_registry(tmp_path: Path, whose: str) -> None:
    async def test(served: Served) -> None:
        store, keyring = served.assembled.link.registry.tenancy, served.assembled.keyring
        made = Directory(store).create_key("default", "k", ["generate"], actor="test")
        set_limits(store, "default", Limits(rows_running=2, requests_waiting=1),
                   made.key.id if whose == "key" else None)  # fmt: skip
        keyring.look()
        gate, loader = threading.Event(), served.assembled.engine._prefixes._loader
        load = loader._load
        loader._load = lambda key: (gate.wait(30), load(key))[1]

        async def generate(task: str | None = None, **parameters: int) -> tuple[int, str]:
            body = {"task": task, "input": "a", "parameters": {"max_new_tokens": 2, **parameters}}
            answer = await served.public.post("/generate", json=body, headers=bearer(made.secret))
            return answer.status_code, answer.text

        status, text = await generate(num_beams=3)
        assert status == 422 and f"at most 2 rows (rows_running of the {whose}), got 3" in text
        assert (await generate(num_beams=2))[0] == 200
        waits = asyncio.create_task(generate("e2e"))
        while served.assembled.engine.waiting() == 0:
            await asyncio.sleep(0.01)
        status, text = await generate()
        assert status == 429 and "requests_waiting" in text and whose in text
        gate.set()
        assert (await waits)[0] == 200

    with_apps(tmp_path, test)
