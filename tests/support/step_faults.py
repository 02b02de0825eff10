"""Makes one call of an engine's step raise, and runs engines to the end with every end counted. Knows no test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal

import pytest

from server.engine.engine import Engine
from server.engine.types import Failed, Finished
from tests.support.engine import wait_for_loads

Moment = Literal["before", "after"]


@contextmanager
def fault(
    call: str, at: int | None, moment: Moment = "before", error: type[Exception] = MemoryError, ever: bool = False
) -> Iterator[list[int]]:
    """Call number ``at`` of ``call`` raises, before it has done anything or after all of it.

    With ``ever`` those behind it raise too. Gives the number of calls so far.
    """
    module, _, name = call.partition(":")
    owner: Any = import_module(module)
    *parents, attribute = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real, calls = getattr(owner, attribute), [0]

    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        raises = at is not None and (calls[0] >= at if ever else calls[0] == at)
        if raises and moment == "before":
            raise error("a secret that no user may see")
        given = real(*arguments, **named)
        if raises:
            raise error("a secret that no user may see")
        return given

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, attribute, counted)
        yield calls


def serve(engine: Engine) -> dict[str, Finished | Failed]:
    """Run to the end as the engine's thread does. Gives each request's terminal event, which nothing may follow."""
    ends: dict[str, Finished | Failed] = {}
    for _ in range(600):
        if not engine.requests:
            return ends
        wait_for_loads(engine)
        for event in engine.step() if engine.has_work else ():
            assert event.request_id not in ends, "an event behind the end"
            if isinstance(event, Finished | Failed):
                ends[event.request_id] = event
    raise AssertionError("no end in sight")


def assert_at_rest(engine: Engine) -> None:
    """Nothing runs, waits or is held but what is kept for reuse."""
    engine.check_integrity()
    assert engine.requests == engine.waiting() == 0
    assert engine._ledger.available == engine._ledger.capacity
    assert engine._prefixes.idle()
