"""``python3 -m tests.docker.board PROMETHEUS_URL``: the dashboard in a browser where no Grafana is at hand.

Serves ``docker/test/board.html``, the dashboard's JSON and Prometheus' query interface on one port of this machine. A
check tool: it draws the panels' own queries, it is no Grafana.
"""

from __future__ import annotations

import argparse
import sys
import urllib.error
import urllib.request
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from tests.support.paths import ROOT

FILES: Final = {
    "/": (ROOT / "docker/test/board.html", "text/html; charset=utf-8"),
    "/board.json": (ROOT / "docker/grafana/dashboards/prefixd.json", "application/json"),
}
QUERIES: Final = "/api/v1/query"


class Handler(BaseHTTPRequestHandler):
    """GET alone."""

    prometheus = ""

    def do_GET(self) -> None:
        """A file, or Prometheus' answer."""
        path = self.path.partition("?")[0]
        if path in FILES:
            file, kind = FILES[path]
            self._answer(HTTPStatus.OK, kind, file.read_bytes())
        elif path.startswith(QUERIES):
            try:
                with urllib.request.urlopen(self.prometheus + self.path, timeout=20) as answer:
                    self._answer(HTTPStatus.OK, "application/json", answer.read())
            except urllib.error.HTTPError as error:
                self._answer(HTTPStatus(error.code), "application/json", error.read())
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"not here")

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="tests.docker.board")
    parser.add_argument("prometheus", help="http://HOST:9090")
    parser.add_argument("--port", type=int, default=8090)
    arguments = parser.parse_args()
    Handler.prometheus = arguments.prometheus.rstrip("/")
    sys.stdout.write(f"http://127.0.0.1:{arguments.port}/?minutes=10\n")
    sys.stdout.flush()
    ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
