"""A Redis Cluster of three masters, as real processes.

Owns its servers and how they join. Knows no registry and no test.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import redis
from redis.cluster import ClusterNode

from tests.support.redis_server import RedisServer, wait_until

SLOTS = 16384


class RedisCluster:
    """Three masters, no replicas, every slot served. ``nodes`` can be killed, paused and restarted one by one."""

    def __init__(self, binary: Path | None = None, *, password: str | None = None, append_only: bool = False) -> None:
        config = {"cluster-enabled": "yes", "cluster-node-timeout": "2000"}
        self.password = password
        self.nodes = [
            RedisServer(binary, password=password, append_only=append_only, config=config) for _ in range(3)
        ]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """``redis+cluster://`` with every node."""
        secret = f":{self.password}@" if self.password is not None else ""
        return f"redis+cluster://{secret}{','.join(node.address for node in self.nodes)}"

    def client(self, **options: Any) -> Any:
        """A ``redis.RedisCluster`` for it, with time-outs."""
        settings = {"socket_timeout": 10, "socket_connect_timeout": 10, "password": self.password, **options}
        return redis.RedisCluster(
            startup_nodes=[ClusterNode("127.0.0.1", node.port) for node in self.nodes], **settings
        )

    def node_of(self, key: str) -> RedisServer:
        """The server that holds a key."""
        with self.nodes[0].client() as client:
            slot = int(client.execute_command("CLUSTER KEYSLOT", key))
        return self.nodes[next(index for index, slots in enumerate(shares()) if slot in slots)]

    def flush(self) -> None:
        """FLUSHALL on every node."""
        for node in self.nodes:
            node.flush()

    def wait_ok(self) -> None:
        """Return once every node sees every slot served."""
        wait_until(
            lambda: all(self._is_ok(node) for node in self.nodes),
            lambda: f"the cluster is not whole: {[node.output()[-1000:] for node in self.nodes]}",
        )

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for node in self.nodes:
                stack.callback(node.close)
            for node in self.nodes:
                node.start()
            self._meet()
            self.wait_ok()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _meet(self) -> None:
        for index, (node, slots) in enumerate(zip(self.nodes, shares(), strict=True)):
            with node.client() as client:
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", index + 1)
                client.execute_command("CLUSTER ADDSLOTS", *slots)  # ADDSLOTSRANGE came with Redis 7
                if index:
                    client.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[0].server_port)

    def _is_ok(self, node: RedisServer) -> bool:
        with node.client() as client:
            try:
                answer = client.execute_command("CLUSTER INFO")
                table = client.execute_command("CLUSTER SLOTS")
            except (redis.ConnectionError, redis.TimeoutError):
                return False
        info = answer if isinstance(answer, dict) else dict(line.split(":") for line in answer.decode().split())
        masters = len(table) if isinstance(table, (dict, list)) else 0
        return info["cluster_state"] == "ok" and int(info["cluster_slots_ok"]) == SLOTS and masters == len(self.nodes)


def shares() -> list[range]:
    """The slots of each node."""
    return [range(5461), range(5461, 10923), range(10923, SLOTS)]
