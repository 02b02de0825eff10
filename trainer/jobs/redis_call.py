"""The context that wraps every call to the jobs' Redis. Knows no command and no key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis

from trainer.jobs.errors import JobStoreUnavailable


@asynccontextmanager
async def redis_call() -> AsyncIterator[None]:
    """Turn redis-py's errors into JobStoreUnavailable, since their texts may hold addresses; lose no cancellation.

    redis-py sends through ``asyncio.wait_for``. Before Python 3.12 it swallows a cancellation that arrives just as the
    sending finishes (cpython issue 86296). A loop around such a command would then never end.
    """
    before = _cancellations()
    try:
        yield
    except (redis.RedisError, OSError) as error:
        if _cancellations() == before:
            raise JobStoreUnavailable(f"the jobs' Redis does not answer ({type(error).__name__})") from error
    if _cancellations() > before:
        raise asyncio.CancelledError


def _cancellations() -> int:
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()
