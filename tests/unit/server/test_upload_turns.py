"""``POST /prefixes``: what can be judged before the body is judged before it, and uploads have places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final, NoReturn

import pytest

from server.routes import prefixes
from server.web.errors import Forbidden
from tests.support.apps import Served, with_apps

BOUNDARY: Final = "part"
HEADERS: Final = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
BEGINNING: Final = (
    f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'.encode()
)
PATIENCE_S: Final = 20


class Begun:
    """An upload whose first bytes come and whose rest waits for ``go``. ``read`` counts the pieces."""

    def __init__(self) -> None:
        self.read = 0
        self.go = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.read += 1
        yield BEGINNING
        await self.go.wait()
        yield f"\r\n--{BOUNDARY}--\r\n".encode()


@pytest.mark.parametrize("why", ["forbidden", "registry away"])
def test_no_byte_is_read_of_an_upload_that_cannot_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """Up to 512 MiB were kept in a temporary file before anybody asked whether the caller may publish."""

    def refuse(*_: object) -> NoReturn:
        raise Forbidden("expected the scope publish")

    async def test(served: Served) -> None:
        body = Begun()
        if why == "forbidden":
            monkeypatch.setattr(prefixes, "authorize", refuse)
        else:
            monkeypatch.setattr(served.assembled.catalog, "require_up", refuse)
        async with asyncio.timeout(PATIENCE_S):
            answer = await served.public.post("/prefixes", content=body, headers=HEADERS)
        assert (answer.status_code, body.read) == (403, 0)

    with_apps(tmp_path, test)


def test_only_so_many_uploads_are_taken_at_once(tmp_path: Path) -> None:
    """Each was kept in a temporary file as it came, as many as there were connections."""

    async def test(served: Served) -> None:
        bodies = [Begun() for _ in range(5)]
        posts = [
            asyncio.create_task(served.public.post("/prefixes", content=body, headers=HEADERS)) for body in bodies
        ]
        async with asyncio.timeout(PATIENCE_S):
            while sum(body.read for body in bodies) < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            assert [body.read for body in bodies] == [1, 1, 0, 0, 0]
            for body in bodies:
                body.go.set()
            answers = await asyncio.gather(*posts)
        assert [answer.status_code for answer in answers] == [422] * 5  # the form lacks the task

    with_apps(tmp_path, test, max_uploads_of_a_tenant=2)
