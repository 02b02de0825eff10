"""What every call of the jobs' Redis is made within. Knows no command and no key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import redis

from trainer.jobs.errors import JobStoreUnavailable


@asynccontextmanager
async def redis_call() -> AsyncIterator[None]:
    """redis-py's errors as ours, since its messages may hold addresses; and no cancellation lost in it.

    redis-py sends through ``asyncio.wait_for``, which below Python 3.12 swallows a cancellation that comes in the
    moment in which the sending is done (cpython issue 86296). A loop around such a command would then go on for ever.
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
