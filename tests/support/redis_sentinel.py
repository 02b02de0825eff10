"""A master, its replica and the Sentinels that watch them, as real processes.

Owns its servers and the failover. Knows no registry and no test.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import redis

from tests.support.redis_server import RedisServer, wait_until

SERVICE = "prefixd"
DOWN_AFTER_MS = 1500
"""Quick, and yet no busy machine's pause takes a living master for a dead one (500 did)."""


class RedisSentinel:
    """Two servers, the first of them the master; ``sentinels`` Sentinels notice a dead one in a second or two.

    ``password`` is the servers'; the Sentinels have none.
    """

    def __init__(
        self,
        binary: Path | None = None,
        *,
        sentinels: int = 1,
        password: str | None = None,
        append_only: bool = False,
    ) -> None:
        self.binary = binary
        self.password = password
        self.service = SERVICE
        self.servers = [
            RedisServer(binary, password=password, append_only=append_only, config={"repl-diskless-sync-delay": "0"})
            for _ in range(2)
        ]
        self.sentinels: list[RedisServer] = []
        self._count = sentinels
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """``redis+sentinel://`` with every Sentinel and the service."""
        secret = f":{self.password}@" if self.password is not None else ""
        return f"redis+sentinel://{secret}{','.join(watch.address for watch in self.sentinels)}/{self.service}"

    @property
    def master(self) -> RedisServer:
        """The server that the first living Sentinel names."""
        port = self._named(next(watch for watch in self.sentinels if watch.running))
        return next(server for server in self.servers if server.server_port == port)

    @property
    def replica(self) -> RedisServer:
        """The other one."""
        return next(server for server in self.servers if server is not self.master)

    def client(self, **options: Any) -> Any:
        """A ``redis.Redis`` for the master of the moment."""
        settings = {"socket_timeout": 10, "password": self.password, **options}
        watches = [("127.0.0.1", watch.port) for watch in self.sentinels]
        return redis.Sentinel(watches, socket_timeout=10).master_for(self.service, **settings)

    def flush(self) -> None:
        """FLUSHALL on the master; the replica follows."""
        with self.client() as client:
            client.flushall()

    def failover(self) -> RedisServer:
        """Kill the master and return the new one once every Sentinel names it and it takes writes."""
        old, new = self.master, self.replica
        old.kill()
        self._wait_master(new)
        return new

    def switch(self) -> RedisServer:
        """Let the Sentinels change over while both live; the old master becomes the replica."""
        new = self.replica
        with self.sentinels[0].client() as client:
            client.execute_command("SENTINEL FAILOVER", self.service)
        self._wait_master(new)
        return new

    def wait_replica(self) -> None:
        """Return once the replica has everything that the master has and the Sentinels know it as sound."""
        master, replica = self.master, self.replica
        wait_until(
            lambda: in_step(master, replica) and all(self._knows(watch) for watch in self.sentinels),
            lambda: f"no replica: {replica.output()} {[watch.output() for watch in self.sentinels]}",
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for server in self.servers:
                stack.callback(server.close)
                server.start()
            with self.servers[1].client() as client:
                client.replicaof("127.0.0.1", self.servers[0].server_port)
            # Attached before a Sentinel looks: one that comes later is seen only with the next INFO, ten seconds on.
            wait_until(lambda: in_step(*self.servers), lambda: f"no replica: {self.servers[1].output()}")
            for _ in range(self._count):
                watch = RedisServer(self.binary, sentinel=True, config=self._sentinel_config())
                stack.callback(watch.close)
                self.sentinels.append(watch.start())
                # Ten seconds unless told; a Sentinel of Redis 6.2 cannot be told.
                with watch.client() as client, suppress(redis.ResponseError):
                    client.execute_command("SENTINEL", "DEBUG", "info-period", "500")
            self.wait_replica()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _sentinel_config(self) -> dict[str, str]:
        quorum = self._count // 2 + 1
        lines = {
            "sentinel monitor": f"{self.service} 127.0.0.1 {self.servers[0].server_port} {quorum}",
            "sentinel down-after-milliseconds": f"{self.service} {DOWN_AFTER_MS}",
            "sentinel failover-timeout": f"{self.service} 3000",
        }
        if self.password is not None:
            lines["sentinel auth-pass"] = f"{self.service} {self.password}"
        return lines

    def _named(self, watch: RedisServer) -> int:
        """The port of the master as one Sentinel has it.

        Not by GET-MASTER-ADDR-BY-NAME, which names a new master before the change is done: redis-py asks as we do.
        """
        with watch.client() as client:
            return int(client.sentinel_masters()[self.service]["port"])

    def _knows(self, watch: RedisServer) -> bool:
        with watch.client() as client:
            state = client.sentinel_masters()[self.service]
            replicas = client.sentinel_slaves(self.service)
        sound = [item for item in replicas if item["master-link-status"] == "ok" and not item["is_sdown"]]
        return bool(sound) and int(state["num-other-sentinels"]) == self._count - 1

    def _wait_master(self, server: RedisServer) -> None:
        def promoted() -> bool:
            if any(self._named(watch) != server.server_port for watch in self.sentinels if watch.running):
                return False
            with server.client() as client:
                return str(client.info("replication")["role"]) == "master"

        wait_until(promoted, lambda: f"no failover: {[watch.output() for watch in self.sentinels]}")


def in_step(master: RedisServer, replica: RedisServer) -> bool:
    """Whether the replica's link is up and it has all that the master wrote."""
    with master.client() as one, replica.client() as two:
        theirs, own = one.info("replication"), two.info("replication")
    linked = own.get("master_link_status") == "up" and int(own["master_port"]) == master.server_port
    return linked and int(own["slave_repl_offset"]) >= int(theirs["master_repl_offset"])
