"""A key is judged again when what it asks for is about to happen: a body, a batch and a stream may take long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from prefixes.tenancy.directory import Directory, NewKey
from server.service import GenerationService
from tests.support.apps import Served, with_apps
from tests.support.callers import bearer

ENDS: dict[str, Callable[[Directory, NewKey], object]] = {
    "revoked": lambda directory, made: directory.revoke(made.key.id, actor="t"),
    "rotated": lambda directory, made: directory.rotate(made.key.id, grace_s=0, actor="t"),
    "blocked": lambda directory, made: directory.block(made.key.tenant, True, actor="t"),
}
STATUSES = {"revoked": 401, "rotated": 401, "blocked": 403}


async def in_two(content: bytes, between: Callable[[], object]) -> AsyncIterator[bytes]:
    """A body whose last byte comes after ``between`` was called."""
    yield content[:-1]
    between()
    yield content[-1:]


def form(served: Served, task: str) -> httpx.Request:
    """A whole upload, to be sent in parts."""
    request = served.public.build_request("POST", "/prefixes", data={"task": task}, files={"file": ("x", served.data)})
    request.read()
    return request


@pytest.mark.parametrize("end", ENDS)
def test_a_body_that_arrives_after_its_key_has_ended_changes_nothing(tmp_path: Path, end: str) -> None:
    """Whoever had stolen a key could begin a slow upload with it, and publish long after it was revoked."""

    async def test(served: Served) -> None:
        directory = Directory(served.assembled.link.registry.tenancy)
        upload = form(served, "new")
        for path, body, kind in (
            ("/prefixes", upload.content, upload.headers["content-type"]),
            ("/prefixes/e2e/rollback", b'{"alias": "production"}', "application/json"),
            ("/generate", b'{"input": "x"}', "application/json"),
        ):
            made = directory.create_key("default", "x", ["publish", "generate"], actor="t")

            def between(made: NewKey = made) -> None:
                ENDS[end](directory, made)
                served.assembled.keyring.look()

            headers = {**bearer(made.secret), "content-type": kind}
            answer = await served.public.post(path, content=in_two(body, between), headers=headers)
            assert answer.status_code == STATUSES[end], (path, answer.text)
            directory.block("default", False, actor="t")
            served.assembled.keyring.look()
        assert [task.name for task in served.assembled.link.registry.tasks("default")] == ["e2e"]

    with_apps(tmp_path, test)


def test_a_body_that_arrives_after_the_first_key_was_made_needs_one(tmp_path: Path) -> None:
    async def test(served: Served) -> None:
        def between() -> None:
            Directory(served.assembled.link.registry.tenancy).create_key("a", "x", ["read"], actor="t")
            served.assembled.keyring.look()

        upload = form(served, "new")
        headers = {"content-type": upload.headers["content-type"]}
        answer = await served.public.post("/prefixes", content=in_two(upload.content, between), headers=headers)
        assert answer.status_code == 401
        assert [task.name for task in served.assembled.link.registry.tasks("default")] == ["e2e"]

    with_apps(tmp_path, test)


def test_items_of_a_batch_that_wait_end_with_their_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(served: Served) -> None:
        directory = Directory(served.assembled.link.registry.tenancy)
        made = directory.create_key("default", "x", ["generate"], actor="t")
        prepare = GenerationService.prepare

        async def revoked_behind_the_first(self: GenerationService, *given: Any) -> Any:
            prepared = await prepare(self, *given)
            directory.revoke(made.key.id, actor="t")
            await asyncio.to_thread(served.assembled.keyring.look)
            return prepared

        monkeypatch.setattr(GenerationService, "prepare", revoked_behind_the_first)
        item = {"input": "x", "parameters": {"max_new_tokens": 1}}
        answer = await served.public.post("/generate/batch", json={"items": [item] * 3}, headers=bearer(made.secret))
        first, *others = answer.json()["items"]
        assert "outputs" in first
        assert [item["error"]["code"] for item in others] == ["unauthorized"] * 2

    with_apps(tmp_path, test)


def test_a_secret_that_is_given_for_an_id_is_in_no_error(tmp_path: Path) -> None:
    """Whoever revokes a key that leaked has its secret at hand, and not its id."""

    async def test(served: Served) -> None:
        made = Directory(served.assembled.link.registry.tenancy).create_key("a", "x", ["keys"], actor="t")
        answer = await served.public.delete(f"/keys/{made.secret}", headers=bearer(made.secret))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "key_not_found")
        assert made.secret[:20] not in answer.text

    with_apps(tmp_path, test)
