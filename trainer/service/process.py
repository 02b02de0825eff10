"""A job's own process, seen from the worker: started without the worker's secrets, heard, stopped, killed.

Owns the pipes and the environment; knows neither store nor job. The process says what it does as JSON lines on its
standard output; "stop" on its standard input asks it to end before the next training step, and the input's end, which
comes with the worker's death, ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

LOG: Final = "child.log"
MAX_LINE: Final = 1 << 20
KEPT: Final = frozenset(
    {"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "PYTHONPATH", "PYTHONHASHSEED", "LD_LIBRARY_PATH", "SSL_CERT_FILE"}
)
KEPT_BEGINNINGS: Final = (
    "LC_", "OMP_", "MKL_", "KMP_", "TORCH", "PYTORCH_", "CUDA_", "NVIDIA_", "CUBLAS_", "HF_HOME", "HF_HUB_",
    "XDG_CACHE_", "NUMBA_", "MPL", "TRITON_", "NO_COLOR",
)  # fmt: skip
"""What of the worker's environment its children get: where things are and how to compute, no credentials."""


class ChildProcess:
    """A running child; ``started`` makes them."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def messages(self) -> AsyncIterator[Mapping[str, Any]]:
        """What it says, until it ends; what is no JSON object is not its own and is left out.

        A number that is not finite, as the loss of a run that diverges, is None: no answer of the API could carry it.
        """
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            with contextlib.suppress(ValueError):
                message = json.loads(line, parse_constant=lambda _: None)
                if isinstance(message, dict):
                    yield message

    async def wait(self) -> int:
        """Its exit code; negative is the signal that killed it."""
        return await self._process.wait()

    async def ended(self, timeout_s: float) -> int:
        """The exit code of one that has said its last word, or was asked to stop; killed when it stays for too long."""
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
        """End it now, and whatever it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the number may be another's by now
            os.killpg(self._process.pid, signal.SIGKILL)


@asynccontextmanager
async def started(folder: Path, threads: int | None) -> AsyncIterator[ChildProcess]:
    """A child that works in ``folder``; it is dead when the block has ended."""
    with (folder / LOG).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "trainer.service.child", str(folder),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
            env=environment(os.environ, threads), cwd="/", start_new_session=True, limit=MAX_LINE,
        )  # fmt: skip
    child = ChildProcess(process)
    try:
        yield child
    finally:
        child.kill()
        await asyncio.shield(process.wait())


def environment(mine: Mapping[str, str], threads: int | None) -> dict[str, str]:
    """What a child gets of the environment ``mine``."""
    kept = {name: value for name, value in mine.items() if name in KEPT or name.startswith(KEPT_BEGINNINGS)}
    return kept if threads is None else {**kept, "OMP_NUM_THREADS": str(threads)}
