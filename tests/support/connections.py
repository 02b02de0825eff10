"""Raw connections to a service, for what no HTTP client does: half requests, silence, reading nothing."""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any, Self

TIMEOUT_S = 60.0


class Connection:
    """One TCP connection. Every wait is bounded; ``None`` stands for a connection that was closed without a word."""

    def __init__(self, port: int, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(("127.0.0.1", port))
        self._read = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> Self:
        """Send ``data`` as it is."""
        self.socket.sendall(data)
        return self

    def post(self, path: str, body: bytes, *, declared: int | None = None, host: str = "localhost") -> Self:
        """Send a JSON body whose Content-Length says ``declared``; more than there is makes it a half one."""
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body) if declared is None else declared}\r\n\r\n"
        )
        return self.send(head.encode() + body)

    def until(self, end: bytes) -> bytes:
        """What comes up to and with ``end``; raises if the connection ends before."""
        while end not in self._read:
            piece = self.socket.recv(1 << 16)
            assert piece, f"the connection was closed behind {self._read[-200:]!r}"
            self._read += piece
        text, _, self._read = self._read.partition(end)
        return text + end

    def answer(self) -> tuple[int, dict[str, str], Any] | None:
        """One whole answer: status, headers, and its JSON."""
        try:
            head = self.until(b"\r\n\r\n").decode()
        except (AssertionError, ConnectionResetError):
            return None
        status, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if "content-length" in headers:
            body = self._exactly(int(headers["content-length"]))
        elif headers.get("transfer-encoding") == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rest()
        return int(status.split()[1]), headers, json.loads(body)

    def rest(self) -> bytes:
        """All that comes until the connection ends."""
        with contextlib.suppress(ConnectionResetError):
            while piece := self.socket.recv(1 << 16):
                self._read += piece
        rest, self._read = self._read, b""
        return rest

    def _exactly(self, count: int) -> bytes:
        while len(self._read) < count:
            piece = self.socket.recv(1 << 16)
            assert piece, "the connection was closed within a body"
            self._read += piece
        body, self._read = self._read[:count], self._read[count:]
        return body

    def _chunks(self) -> list[bytes]:
        chunks = []
        while size := int(self.until(b"\r\n"), 16):
            chunks.append(self._exactly(size))
            self.until(b"\r\n")
        self.until(b"\r\n")
        return chunks
