"""What a fault leaves of a group, and the guard around one group's part of a step. Torch-free.

Owns neither queues nor counts: the scheduler makes these anew of what the other groups have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from server.engine.row import Group, GroupState

log = logging.getLogger(__name__)


def guarded(failed: dict[Group, Exception], group: Group, act: Callable[[Any], None], argument: object) -> None:
    """One group's fault stays its own: it is noted in ``failed``, and nothing more is done for the group."""
    if group in failed:
        return
    try:
        act(argument)
    except Exception as error:
        log_fault(group)
        failed[group] = error


def log_fault(group: Group) -> None:
    """Log the exception that is being handled, with the request's id."""
    facts = {"request_id": group.request.request_id}
    log.exception("a group's blocks could not be kept; its request ends with an error", extra={"facts": facts})


def forget_blocks(group: Group) -> None:
    """End ``group`` and take all from it without giving anything back: nobody knows what was given back already."""
    group.note_input()
    group.state, group.admitted, group.input, group.prefix_blocks = GroupState.ENDED, False, None, {}
    for row in group.rows:
        row.blocks, row.computed, row.digests = [], 0, []
