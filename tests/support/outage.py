"""A registry that fails: two replicas on one Redis, and the ways to break and mend it.

Owns the scene and what its replicas hold in memory; ``traffic`` sends them requests. Knows no test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from prefixes.registry import open_registry
from prefixes.registry.transfer import open_target, transfer
from tests.support.redis_front import Front
from tests.support.redis_server import RedisServer
from tests.support.server import ServerProcess, TinyWorld, wait_for_metric
from tests.support.traffic import ROW, ask, generate, publish

LATE_S = 20.0
"""For what a busy machine may take longer with."""
STALE_S = 2
"""``--max-stale-s`` of the impatient replica."""
BIG = 300
"""A prefix of this length does not fit into the patient replica's host tier, and two do not into its blocks."""
DELAY_S = 0.25
POOL = 64 << 20


@dataclass
class Scene:
    """Redis, and two replicas on it: ``patient`` reaches it through ``front``, ``impatient`` with STALE_S directly.

    ``expected`` is version and text by task, ``row`` the tokens of the task that streams run on.
    """

    world: TinyWorld
    redis: RedisServer
    front: Front
    patient: ServerProcess
    impatient: ServerProcess
    folder: Path
    expected: dict[str | None, tuple[str | None, str]] = field(default_factory=dict)
    row: list[int] = field(default_factory=list)
    mended: str = ""  # the fault before, mended
    breaking_at: float = 0.0  # time.monotonic() seconds, just before the last fault
    _seeds: int = 0

    def publish(self, task: str, length: int = 5) -> None:
        """A prefix that no other task has."""
        self._seeds += 1
        answer = publish(self.impatient, task, self.world.prefix(length=length, seed=self._seeds))
        assert answer.status == 201, answer

    def learn(self, server: ServerProcess, task: str | None) -> None:
        """Ask once, while all is well, and remember what was said, which is the same wherever one asks."""
        answer = generate(server, task)
        assert answer.status == 200, answer
        assert self.expected.setdefault(task, answer.said) == answer.said

    def introduce(self, server: ServerProcess, task: str) -> None:
        """Let ``server`` know the task without loading it: what is refused for its length has been resolved."""
        answer = generate(server, task, text="x" * 20_000)
        assert (answer.status, answer.body["error"]["code"]) == (422, "input_too_long"), answer

    def evict(self, in_host: Sequence[str], on_disk: Sequence[str]) -> None:
        """Let the patient replica have loaded the tasks and keep them in these tiers alone."""
        for task in (*in_host, *on_disk, "filler"):
            self.learn(self.patient, task)
        for task in (*in_host, *on_disk):
            assert self.tiers(task) == ({"host", "disk"} if task in in_host else {"disk"}), task

    def tiers(self, task: str) -> set[str]:
        """Where the patient replica has the task's prefix."""
        version = self.expected[task][0]
        tiers = ask(self.patient, "GET", "/admin/residents", admin=True).body["tiers"]
        return {tier["tier"] for tier in tiers if any(item["version"] == version for item in tier["prefixes"])}

    # --- breaking and mending ---

    @contextmanager
    def broken(self, how: str) -> Iterator[None]:
        """Redis ``slow``, ``stopped``, ``down``, ``flushed`` or ``up`` inside, and well again behind."""
        mend: Callable[[], None]
        if how == "flushed":
            self._back_up()
        self.breaking_at = time.monotonic()
        if how == "slow":
            self.front.delay_s, mend = DELAY_S, lambda: setattr(self.front, "delay_s", 0.0)
        elif how == "stopped":
            mend = self.redis.resume
            self.redis.pause()
        elif how == "down":
            mend = lambda: _ignore(self.redis.start())  # noqa: E731
            self.redis.kill()
        elif how == "flushed":
            mend = self._restore
            self.redis.flush()
        else:
            mend = _ignore
        try:
            yield
        finally:
            mend()
            self.mended = how
            for server in (self.patient, self.impatient):
                wait_for_metric(server, "prefixd_registry_up", 1)

    def wait_away(self) -> None:
        """Return once both replicas know that the registry is away."""
        for server in (self.patient, self.impatient):
            wait_for_metric(server, "prefixd_registry_up", 0)

    def wait_stale(self) -> None:
        """Return once the impatient replica has been without its registry for longer than it may."""
        deadline = time.monotonic() + LATE_S
        while ask(self.impatient, "GET", "/ready").status != 503:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    @property
    def _backup(self) -> str:
        return str(self.folder / "backup")

    @property
    def _patient_url(self) -> str:
        """For those who back up and restore: that the machine is busy is not what is tested."""
        return f"{self.redis.url}?timeout_s=20"

    def _back_up(self) -> None:
        with (
            closing(open_registry(self._patient_url)) as source,
            closing(open_registry(self._backup, registry_id=source.id)) as backup,
        ):
            assert not [outcome for outcome in transfer(source, backup, mirror=True).outcomes if outcome.bad]

    def _restore(self) -> None:
        with closing(open_registry(self._backup)) as backup:
            target = open_target(self._patient_url, backup.id)
            assert target is not None
            with closing(target):
                bad = [outcome for outcome in transfer(backup, target).outcomes if outcome.bad]
                assert not bad, bad[:3]


def _ignore(*_: object) -> None:
    pass


def arguments(world: TinyWorld) -> tuple[str, ...]:
    """For a replica whose answers are the same on every one."""
    return (
        *("--backbone", str(world.folder), "--kernels", "torch", "--threads", "1", "--dtype", "float64"),
        *("--kv-cache-bytes", str(POOL), "--max-rows", "16", "--max-new-tokens-limit", "8000"),
    )


@contextmanager
def scene(world: TinyWorld, folder: Path) -> Iterator[Scene]:
    """The scene with its tasks ``row``, ``resident`` and ``filler``, and what they answer."""
    shared = arguments(world)
    tiers = ("--max-prefix-bytes", "480KiB", "--host-cache-bytes", "64KiB", "--disk-cache", str(folder / "cache"))
    with ExitStack() as stack:
        # As the compose file has it: each write is on disk before it is answered.
        redis = stack.enter_context(RedisServer(append_only=True, config={"appendfsync": "always"}))
        front = stack.enter_context(Front(redis.server_port))
        servers = []
        for name, url, more in (
            ("patient", f"redis://127.0.0.1:{front.port}", tiers),
            ("impatient", redis.url, ("--max-stale-s", str(STALE_S))),
        ):
            (folder / name).mkdir()
            servers.append(stack.enter_context(ServerProcess(folder / name, "--registry", url, *shared, *more)))
        patient, impatient = (server.wait_ready() for server in servers)
        made = Scene(world, redis, front, patient, impatient, folder)
        for task, length in (("row", 5), ("resident", 5), ("filler", BIG)):
            made.publish(task, length)
            made.learn(made.patient, task)
            made.learn(made.impatient, task)
        made.learn(made.patient, None)
        made.row = generate(made.impatient, "row", ROW).body["outputs"][0]["token_ids"]
        yield made
