"""A job's process as the worker sees it: starts it without the worker's secrets, reads its messages, stops or kills it.

Owns the pipes and the environment; knows neither store nor job. The process writes JSON lines to its standard output.
"stop" on its standard input asks it to end before the next training step. The end of the input, which the worker's
death causes, ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

LOG: Final = "child.log"
MAX_MEMORY: Final = "--max-memory"
CONFINED: Final = "--confined"
MAX_LINE: Final = 1 << 20
KEPT: Final = frozenset(
    {"PATH", "HOME", "USER", "LANG", "TZ", "PYTHONPATH", "PYTHONHASHSEED", "LD_LIBRARY_PATH", "SSL_CERT_FILE"}
)
KEPT_BEGINNINGS: Final = (
    "LC_", "OMP_", "MKL_", "KMP_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "CUBLAS_", "HF_HOME", "HF_HUB_",
    "XDG_CACHE_", "NUMBA_", "MPL", "TRITON_", "NO_COLOR",
)  # fmt: skip
"""The variables that children inherit from the worker: paths and compute settings, no credentials."""


class ChildProcess:
    """A running child process, made by ``started``."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def messages(self) -> AsyncIterator[Mapping[str, Any]]:
        """Yield its messages until it ends. Lines that are no JSON object come from elsewhere and are skipped.

        A number that is not finite, such as the loss of a diverged run, becomes None: the API's JSON cannot hold it.
        """
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            with contextlib.suppress(ValueError):
                message = json.loads(line, parse_constant=lambda _: None)
                if isinstance(message, dict):
                    yield message

    async def wait(self) -> int:
        """Wait for its exit code; a negative one is the signal that killed it."""
        return await self._process.wait()

    async def ended(self, timeout_s: float) -> int:
        """Wait for the exit code of a process that should end now; kill it after ``timeout_s`` seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()

    def stop(self) -> None:
        """Ask it to end before its next training step."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(b"stop\n")

    def kill(self) -> None:
        """Kill it and every process that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # another process may have the id by now
            os.killpg(self._process.pid, signal.SIGKILL)


@asynccontextmanager
async def started(
    folder: Path, threads: int | None, max_memory: int | None, *, confined: bool
) -> AsyncIterator[ChildProcess]:
    """Start a child that works in ``folder`` with ``max_memory`` bytes at most. It is dead when the block ends.

    Its temporary files lie in a folder that goes with it.
    """
    options = [] if max_memory is None else [MAX_MEMORY, str(int(max_memory))]
    options += [CONFINED] if confined else []
    with tempfile.TemporaryDirectory(prefix="prefixd-job-", ignore_cleanup_errors=True) as temporary:
        with (folder / LOG).open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "trainer.service.child", str(folder), *options,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                env=environment(os.environ, threads) | {"TMPDIR": temporary},
                cwd="/", start_new_session=True, limit=MAX_LINE,
            )  # fmt: skip
        child = ChildProcess(process)
        try:
            yield child
        finally:
            child.kill()
            await asyncio.shield(process.wait())


def environment(mine: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """Return the environment of a child whose worker has the environment ``mine``."""
    kept = {name: value for name, value in mine.items() if name in KEPT or name.startswith(KEPT_BEGINNINGS)}
    return kept if threads is None else {**kept, "OMP_NUM_THREADS": str(threads)}
