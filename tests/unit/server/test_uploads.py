"""Uploads that cannot be kept, or that their client gives up: named answers, and nothing that feeds an alert."""

from __future__ import annotations

import errno
import logging
import tempfile
from pathlib import Path
from typing import Any

import pytest

from prefixes.artifact import write_prefix
from prefixes.files.folder import Folder
from tests.support.apps import Served, with_apps
from tests.support.prefixes import make_prefix

BOUNDARY = "multipart/form-data; boundary=b"
BEGINNING = b'--b\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\nxxx'


async def upload(served: Served, seed: int = 1) -> Any:
    data = write_prefix(make_prefix(served.assembled.backbone.spec, seed=seed))
    return await served.public.post("/prefixes", data={"task": "e2e"}, files={"file": ("x", data)})


async def cut_off(served: Served, path: str, kind: str) -> list[Any]:
    """What the application sends to a client that leaves in the middle of its body."""
    came = iter([{"type": "http.request", "body": BEGINNING, "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(came)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", kind.encode()), (b"content-length", b"1000")]
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
        "scheme": "http", "query_string": b"", "headers": headers, "client": ("1.2.3.4", 5), "server": ("public", 80),
        "root_path": "",
    }  # fmt: skip
    await served.apps.public(scope, receive, send)
    return sent


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(served: Served) -> None:
        monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", full)
        refused = await upload(served)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
        assert "retry-after" not in refused.headers

    with_apps(tmp_path, test)


def test_no_usable_temporary_folder_is_named_without_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/secret/tmp']")

    async def test(served: Served) -> None:
        monkeypatch.setattr(tempfile.SpooledTemporaryFile, "write", none)
        refused = await upload(served)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert "secret" not in refused.text

    with_apps(tmp_path, test)


@pytest.mark.parametrize("step", ["write", "touch"])
def test_a_full_registry_is_507_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    async def test(served: Served) -> None:
        before = (await served.public.get("/prefixes/e2e")).json()
        with monkeypatch.context() as patch:
            patch.setattr(Folder, step, full)
            refused = await upload(served)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
        assert "retry-after" not in refused.headers
        assert (await served.public.get("/prefixes/e2e")).json() == before
        assert (await upload(served)).status_code == 201

    with_apps(tmp_path, test)


@pytest.mark.parametrize(
    ("path", "kind"), [("/prefixes", BOUNDARY), ("/generate", "application/json"), ("/v1/completions", "")]
)
def test_a_body_that_its_client_gives_up_is_no_error_of_ours(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, path: str, kind: str
) -> None:
    async def test(served: Served) -> None:
        with caplog.at_level(logging.WARNING):
            assert await cut_off(served, path, kind) == []
        assert not caplog.records
        lines = (await served.admin.get("/metrics")).text.splitlines()
        counted = [line for line in lines if line.startswith("prefixd_http_requests_total")]
        assert counted == [f'prefixd_http_requests_total{{limit_of="",method="POST",route="{path}",status="499"}} 1.0']

    with_apps(tmp_path, test)


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode", "rot13", "utf-7", "nothing"])
def test_a_forms_odd_charset_is_never_a_fault_of_ours(tmp_path: Path, charset: str) -> None:
    async def test(served: Served) -> None:
        body = b'--b\r\ncontent-disposition: form-data; name="task"\r\n\r\n\xff\xfe.x\r\n--b--\r\n'
        headers = {"content-type": f"{BOUNDARY}; charset={charset}"}
        assert (await served.public.post("/prefixes", content=body, headers=headers)).status_code == 422

    with_apps(tmp_path, test)
