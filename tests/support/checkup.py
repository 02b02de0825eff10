"""What a server must look like when all is over: nothing runs, everything is given back, the first answer again.

Owns the questions to one server's ports. Knows no test.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Final

from tests.support.figures import Figures
from tests.support.memory import resident_mib
from tests.support.server import ServerProcess, TinyWorld, metric, upload, wait_for_metric
from tests.support.traffic import generate

EXACT: Final = ("--deterministic",)
"""With it an answer has the same bits whatever runs beside it."""
POOL: Final = 8 << 20
SERVER: Final = (*EXACT, "--threads", "1", "--kv-cache-bytes", str(POOL), "--max-new-tokens-limit", "8000")
PLATEAU_MIB: Final = 96
"""By so much resident memory may differ behind the first round and behind the last: allocators keep what they had."""
SETTLED_S: Final = 60.0
FIRST: Final = "first"


class Checkup:
    """Asks the first question of a server's life, and at its end asks it again and looks for what was left behind."""

    def __init__(self, server: ServerProcess, world: TinyWorld, figures: Figures, pool: int = POOL) -> None:
        self._server, self._figures, self._pool = server, figures, pool
        with server.client() as client:
            assert upload(client, FIRST, world.prefix(seed=77)).status_code == 201
        self._first = self._answer()
        self._memory: list[int] = []

    def round_over(self) -> None:
        """Wait until nothing runs and note the memory."""
        for state in ("running", "waiting"):
            wait_for_metric(self._server, f"prefixd_num_requests_{state}", 0, SETTLED_S)
        self._memory.append(resident_mib(self._server.process.pid))

    def end(self, told: Container[str] = ()) -> None:
        """Raise AssertionError unless all is as it was; ``told`` are the errors that belong into the log."""
        self.round_over()
        server, figures = self._server, self._figures
        assert metric(server, "prefixd_staged_prefix_bytes") == 0
        held = metric(server, "prefixd_kv_cache_usage_perc") * self._pool
        resident = metric(server, "prefixd_resident_prefix_bytes")
        assert abs(held - resident) < self._pool / 256, f"rows hold blocks: {held} bytes, {resident} in prefixes"
        assert figures.compare(self._answer(), self._first), "the first answer is another now"
        figures.notes.append(f"resident memory after each round, MiB: {self._memory}")
        assert self._memory[-1] - self._memory[0] < PLATEAU_MIB, self._memory
        errors = [line for line in server.log_lines() if line["level"] == "error" and line["message"] not in told]
        assert errors == [], errors[:3]

    def _answer(self) -> Any:
        parameters = {"max_new_tokens": 24, "min_new_tokens": 24, "logprobs": 2}
        answer = generate(self._server, FIRST, parameters)
        assert answer.status == 200, answer
        return {name: answer.body[name] for name in ("task", "version", "outputs", "usage")}
