"""From the queue into the batch: what waits, for what, and who is admitted next. Torch-free.

Owns the waiting groups and those that failed before they ran. The scheduler owns what runs. ``waiting`` has the queues
and their order, ``fairness`` the counters, ``row_blocks`` the blocks that an admitted group begins with. Rules:

- The head of the tenant with the least counter goes first, of those that may run more rows. Within a tenant its keys
  take turns, and within a key nobody is overtaken but by those whose prefix was loaded earlier.
- Who has all rows that its limit allows is as one who does not wait: nobody passes it, and it holds up nobody.
- A head that does not fit lets groups of other tenants pass. When ``PASSES`` have passed its tenant since that was last
  behind others, its head *reserves*: nobody else is admitted before it, so that it waits no longer than what runs takes
  to end. It is the tenant that counts them, not each head: else one whose heads never fit at once could be passed by
  any amount.
- A group claims its prefix when it is first admitted, until it ends. While the bound on claims keeps a head out, its
  tenant's preempted groups behind it go first. They hold claims. While it reserves, those of all tenants go before it,
  and nobody else: so claims end.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

from prefixes.errors import PrefixdError
from server.engine.config import EngineConfig
from server.engine.memory.blocks import BlockLedger
from server.engine.prefixes.entry import LoadStatus
from server.engine.prefixes.store import PrefixStore
from server.engine.row import Group, GroupState
from server.engine.scheduling.capacity import Capacity
from server.engine.scheduling.fairness import TokenCounters
from server.engine.scheduling.row_blocks import RowBlocks
from server.engine.scheduling.running_rows import RunningRows
from server.engine.scheduling.tenant_queue import PASSES, TenantQueue
from server.engine.scheduling.waiting import Turn, WaitingGroups
from server.engine.types import PrefixKey


class Entrance:
    """Waiting and failed groups over one ledger. ``running`` is always the scheduler's, in order of arrival."""

    def __init__(
        self, capacity: Capacity, blocks: RowBlocks, config: EngineConfig, counters: TokenCounters
    ) -> None:
        self._capacity, self._blocks, self._config, self._counters = capacity, blocks, config, counters
        self._ledger: BlockLedger = capacity.ledger
        self._prefixes: PrefixStore = capacity.prefixes
        self.waiting = WaitingGroups(self._counters)
        self.rows = RunningRows(config.limits_of)
        self.failed: dict[Group, PrefixdError] = {}  # not in a plan yet

    # --- waiting ---

    def wait(self, group: Group) -> None:
        """Let a group wait: a new one, or one that was preempted."""
        group.state, key = GroupState.WAITING, group.request.prefix
        if key:
            assert group.request.prefix_spec is not None
            self._prefixes.want(key, group.request.prefix_spec)
        self._queue(group)

    def stop_waiting(self, group: Group) -> None:
        """Take a group out of the queue."""
        self.waiting.remove(group)
        if group.request.prefix:
            self._prefixes.unwant(group.request.prefix)

    def take_in_loads(self) -> None:
        """Note which prefixes have been loaded, and fail the groups of those that could not be."""
        for key in self._prefixes.settle():
            if self._prefixes.status(key) is LoadStatus.FAILED:
                self._fail_all(key)
            else:
                self.waiting.loaded(key)

    def fail(self, group: Group, error: PrefixdError) -> None:
        """A group that nothing keeps any more cannot run: the next plan says so."""
        group.state, self.failed[group] = GroupState.FAILED, error

    def take_failed(self) -> list[tuple[Group, PrefixdError]]:
        """Those that failed since the last call, each with its error."""
        failed, self.failed = list(self.failed.items()), {}
        return failed

    def rebuild(self, waiting: Iterable[Group], running: Iterable[Group]) -> None:
        """After a fault: these wait and those run, and no others."""
        self.rows.recount(group.request for group in running)
        self.waiting = WaitingGroups(self._counters)
        for group in waiting:
            self._queue(group)

    def _queue(self, group: Group) -> None:
        key = group.request.prefix
        self.waiting.add(group, loading=key is not None and self._prefixes.status(key) is LoadStatus.LOADING)

    def _fail_all(self, key: PrefixKey) -> None:
        error = self._prefixes.error(key)
        for group in self.waiting.of(key):
            self._fail_waiting(group, error)

    def _fail_waiting(self, group: Group, error: PrefixdError) -> None:
        self.fail(group, error)
        self.stop_waiting(group)

    # --- admission ---

    def turns(self) -> Iterator[Turn]:
        """Those that may be admitted or must wait for their prefix again, in the order in which to ``take`` them.

        After one that could be taken the order is another. A step tries at most ``PASSES`` heads in vain.
        """
        only_preempted, tried = False, 0
        passes, limited = list[TenantQueue](), list[TenantQueue]()
        for queue in self.waiting.in_turn() if self.rows.total < self._config.max_rows else ():
            head, preempted = queue.head(self.rows), queue.preempted_head(self.rows)
            if head is None:
                limited.append(queue)
                continue
            reserves = queue.passed >= PASSES
            if not only_preempted and self._may_begin(head):
                yield Turn(head, tuple(passes), tuple(limited))
                tried += 1
                if reserves or tried == PASSES:
                    return
            else:
                if preempted is not None:
                    yield Turn(preempted, tuple(passes), tuple(limited))
                only_preempted = only_preempted or reserves
            passes.append(queue)

    def take(self, turn: Turn, running: list[Group]) -> bool:
        """Admit the group, let it wait for its prefix again, or fail it; False if it does not fit now."""
        group = turn.group
        key, rows = group.request.prefix, group.request.params.rows
        if key and self._prefixes.status(key) is LoadStatus.LOADING:
            self.waiting.wait_for_prefix(group)
        elif rows + self.rows.total > self._config.max_rows:
            return False
        elif self._try_admit(turn, running):
            return True
        elif key and self._prefixes.status(key) is LoadStatus.FAILED:  # it could not be written to its blocks
            self._fail_all(key)
        elif running:
            return False
        else:
            self._fail_waiting(group, self._capacity.no_room(group))
        return True

    def _may_begin(self, group: Group) -> bool:
        """Whether the bound on claims lets the group in, or is not what it waits for next."""
        key = group.request.prefix
        if key is None or group.admitted or self._prefixes.status(key) is LoadStatus.LOADING:
            return True
        return self._prefixes.may_claim(key)

    def _try_admit(self, turn: Turn, running: list[Group]) -> bool:
        group = turn.group
        beginning = self._blocks.find(group)
        if not self._take_prefix(group, beginning.missing + beginning.input_missing + self._reserve(group, running)):
            self._blocks.give_up(beginning)
            return False
        self.waiting.note_turn(turn, self.rows)
        self.stop_waiting(group)
        self._blocks.begin(group, beginning)
        if not group.admitted:
            self._counters.admitted(group.request.caller, group.input_to_compute)
            if group.request.prefix:
                self._prefixes.claim(group.request.prefix)
        group.admitted, group.state = True, GroupState.RUNNING
        bisect.insort(running, group, key=lambda one: one.submitted_at)
        self.rows.add(group.request)
        return True

    def _take_prefix(self, group: Group, blocks: int) -> bool:
        """Hold the prefix's blocks if there are ``blocks`` more for the group itself."""
        key = group.request.prefix
        if key is None:
            return self._ledger.available >= blocks
        prefix_blocks = self._prefixes.try_acquire(key, blocks)
        group.prefix_blocks = prefix_blocks or {}
        return prefix_blocks is not None

    def _reserve(self, group: Group, running: list[Group]) -> int:
        """Blocks to leave free beside ``group``'s first ones, so that admitting it does not preempt at once.

        One for each row that runs. For its own rows, what they recompute behind their shared prompt, at least one each.
        """
        if not running:
            return 0  # it fits alone
        shared = group.prompt_length // self._ledger.block_size
        rows = group.active if len(group.active) > 1 else []
        tails = sum(self._ledger.blocks_for(row.length) - shared for row in rows)
        return self.rows.total + max(tails, group.request.params.rows)
