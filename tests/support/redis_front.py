"""A proxy in front of a Redis server: TLS, delay, cut connections.

Owns a listening port, the bytes between it and the server, and a test's certificates. The servers from the wheels are
built without TLS, so TLS ends here, as it would at stunnel. Knows no Redis command.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from pathlib import Path
from typing import Self

import trustme


class Certificates:
    """A certificate authority of our own, a server's certificate for 127.0.0.1 and a client's, as PEM files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self._authority = authority
        self._server = authority.issue_cert("127.0.0.1", "localhost")
        client = authority.issue_cert("client@prefixd.test")
        self.ca_certs = folder / "ca.pem"
        self.certfile = folder / "client.pem"
        self.keyfile = folder / "client.key"
        authority.cert_pem.write_to_path(str(self.ca_certs))
        client.cert_chain_pems[0].write_to_path(str(self.certfile))
        client.private_key_pem.write_to_path(str(self.keyfile))
        self.keyfile.chmod(0o600)

    def server_context(self, *, require_client: bool = False) -> ssl.SSLContext:
        """What the server's side of a connection uses; with ``require_client`` a client must show its certificate."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._server.configure_cert(context)
        if require_client:
            self._authority.configure_trust(context)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class Front:
    """Listens on a free port of 127.0.0.1 and carries bytes to and from ``upstream`` (a port).

    ``delay_s``, which may change at any time, holds back every piece that the server answers. ``pace`` is how many
    bytes a second go each way, as over a slow line; 0 is as many as come. A client that comes while the server is down
    is accepted and then closed, one that comes while it is stopped waits. ``carried`` counts the bytes of questions and
    of answers.
    """

    def __init__(self, upstream: int, *, context: ssl.SSLContext | None = None, delay_s: float = 0.0) -> None:
        self.upstream = upstream
        self.delay_s = delay_s
        self.pace = 0
        self.carried = {"questions": 0, "answers": 0}
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="redis-front", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context), self._loop
        ).result(30)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def cut(self) -> None:
        """Break every open connection, as a network does; new ones are served."""
        asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result(30)

    def close(self) -> None:
        """Break every connection and stop listening."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _cut(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        await self._cut()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        self._open.add(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
            writers.append(up_writer)
            self._open.add(up_writer)
            pipes = [
                asyncio.ensure_future(self._carry(reader, up_writer, answers=False)),
                asyncio.ensure_future(self._carry(up_reader, writer, answers=True)),
            ]
            try:
                await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pipe in pipes:
                    pipe.cancel()
        except OSError:
            pass  # the server is down: the client sees its connection closed
        except asyncio.CancelledError:
            pass  # the front closes: a task of asyncio's streams that ends cancelled is reported as an error
        finally:
            for side in writers:
                self._open.discard(side)
                side.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if answers and self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.pace:
                    await asyncio.sleep(len(data) / self.pace)
                self.carried["answers" if answers else "questions"] += len(data)
                writer.write(data)
                await writer.drain()
