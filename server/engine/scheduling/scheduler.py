"""Who runs in the next step: admission, budgets, preemption. Torch-free.

Owns the waiting and the running groups; ``row_blocks`` owns their block tables. Knows neither tensors nor texts. Rules:

- Groups are admitted in order of arrival. A group needs its prefix loaded, and room for the blocks of its prefix and
  its prompt at once: all or nothing, so that prefixes cannot deadlock admission. A group whose prefix still loads lets
  others pass.
- An encoder's input is encoded first, within the budget of ``encoding``. Its blocks are taken at admission too.
- Rows with one token to compute come first. Prompts take what is left of the step's tokens and time, in chunks.
- When blocks run out, the youngest running group is preempted: it gives up all of its blocks and waits to be
  recomputed. The oldest fits alone (``Capacity`` is asked before a request is accepted), so the engine always makes
  progress: ``Admission`` refuses pins that would take the room of what was accepted. Should one lack it all the same,
  it fails: nothing else would ever give way.
- A group claims its prefix when it is first admitted, until it ends, so that it never loads it again. While the bound
  on claims keeps the head out, preempted groups behind it go first, and no others: so claims end.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from functools import partial

from prefixes.errors import EngineFailure, PrefixdError
from server.engine.config import EngineConfig
from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse
from server.engine.observer import EngineObserver
from server.engine.prefixes.entry import LoadStatus
from server.engine.prefixes.store import PrefixStore
from server.engine.row import Group, GroupState
from server.engine.scheduling.capacity import Capacity
from server.engine.scheduling.encoding import EncoderBudget
from server.engine.scheduling.plan import Outcome, ScheduledRow, StepPlan
from server.engine.scheduling.prefill import PrefillBudget
from server.engine.scheduling.recovery import forget_blocks, guarded, log_fault
from server.engine.scheduling.row_blocks import RowBlocks
from server.engine.scheduling.waiting import WaitingGroups
from server.engine.types import PrefixKey


class Scheduler:
    """Waiting and running groups, each in order of arrival."""

    def __init__(
        self,
        ledger: BlockLedger,
        prefixes: PrefixStore,
        reuse: PromptReuse | None,
        config: EngineConfig,
        observer: EngineObserver,
        encoder: EncoderBudget,
        prefill: PrefillBudget,
    ) -> None:
        self._encoder, self._prefill = encoder, prefill
        self._ledger, self._prefixes = ledger, prefixes
        self._config, self._observer = config, observer
        self.capacity = Capacity(ledger, prefixes)
        self._blocks = RowBlocks(ledger, reuse, self._encoder.units)
        self._failed: dict[Group, PrefixdError] = {}  # not in a plan yet
        self.waiting = WaitingGroups()
        self.running: list[Group] = []

    # --- what the engine calls ---

    def add(self, group: Group) -> None:
        """Let a new group wait. A load that failed before fails only those that waited then: this one loads anew."""
        self._take_in_loads()
        self._wait(group)

    def schedule(self) -> StepPlan:
        """Choose the next step's rows and give them their blocks."""
        self._take_in_loads()
        self._admit()
        plan = StepPlan(rows=self._fitting_rows())
        for row in plan.rows:
            plan.copies += self._blocks.grow(row)
        plan.encode = self._encoder.choose(self.running)
        plan.failed, self._failed = list(self._failed.items()), {}
        return plan

    def update(
        self,
        outcomes: Iterable[Outcome],
        plan: StepPlan | None = None,
        *,
        encoder_seconds: float | None = None,
        decoder_seconds: float | None = None,
    ) -> dict[Group, Exception]:
        """Take in the outcomes of a step or an abort. Seconds are None where no such call succeeded.

        Returns the groups that end because their own part of this failed; it fails no other.
        """
        outcomes = list(outcomes)
        ends = dict.fromkeys(outcome.group for outcome in outcomes if outcome.ends_group)
        errors = [(outcome.group, outcome.error) for outcome in outcomes if outcome.error]
        failed: dict[Group, Exception] = dict(errors)
        if plan and plan.encode and encoder_seconds is not None:
            for group in self._encoder.ran(plan.encode, encoder_seconds):
                guarded(failed, group, self._blocks.encoded, group)
        if plan and decoder_seconds is not None:
            self._prefill.ran(plan.rows, decoder_seconds)
        by_group = {outcome.group: outcome for outcome in outcomes}
        for row in plan.rows if plan else ():
            outcome = by_group.get(row.group)
            finite = outcome is not None and outcome.advances(row.row)
            guarded(failed, row.group, partial(self._blocks.computed, finite=finite), row)
        for outcome in outcomes:
            guarded(failed, outcome.group, self._apply, outcome)
        broken = list(failed)[len(dict(errors)) :]
        for group in ends:
            if group not in broken:
                self._end(group)
        if broken:
            self.drop(broken)
        return {group: failed[group] for group in broken if group not in ends}

    def _apply(self, outcome: Outcome) -> None:
        for row in outcome.ended:
            self._blocks.release_row(row)
        if outcome.beams:
            self._blocks.continue_beams(outcome.group, outcome.beams)

    def drop(self, groups: Iterable[Group] = ()) -> None:
        """End groups that a fault has met between two changes. All counts are made anew of what the others have."""
        for group in groups:
            forget_blocks(group)
            self._failed.pop(group, None)
        self.running = [group for group in self.running if group.state is GroupState.RUNNING]
        waiting = [group for group in self.waiting if group.state is GroupState.WAITING]
        claiming = [g for g in dict.fromkeys([*self.running, *waiting, *self._failed]) if g.admitted]
        self._prefixes.recount(*([g.request for g in some] for some in (self.running, waiting, claiming)))
        self._blocks.recount([*self.holdings(), *self._prefixes.holdings()])
        self.waiting = WaitingGroups()
        for group in waiting:
            self._queue(group)

    def preempt(self, group: Group) -> None:
        """Take all blocks from a running group; it waits to be recomputed."""
        self._observer.on_preemption()
        self._stop_running(group)
        self._wait(group)

    def runnable(self) -> bool:
        """Whether a step has something to do now; False while all groups wait for their prefixes to load."""
        return bool(self.running or self._failed or self._next() or self._prefixes.has_news)

    def holdings(self) -> Iterator[list[int]]:
        """Every block table of a running row or its input, for the integrity check."""
        return self._blocks.tables(self.running)

    # --- waiting ---

    def _wait(self, group: Group) -> None:
        group.state, key = GroupState.WAITING, group.request.prefix
        if key:
            assert group.request.prefix_spec is not None
            self._prefixes.want(key, group.request.prefix_spec)
        self._queue(group)

    def _queue(self, group: Group) -> None:
        key = group.request.prefix
        self.waiting.add(group, loading=key is not None and self._prefixes.status(key) is LoadStatus.LOADING)

    def _take_in_loads(self) -> None:
        for key in self._prefixes.settle():
            if self._prefixes.status(key) is LoadStatus.FAILED:
                self._fail_all(key)
            else:
                self.waiting.loaded(key)

    def _fail_all(self, key: PrefixKey) -> None:
        error = self._prefixes.error(key)
        for group in self.waiting.of(key):
            self._fail(group, error)

    def _fail(self, group: Group, error: PrefixdError) -> None:
        group.state, self._failed[group] = GroupState.FAILED, error
        self._stop_waiting(group)

    def _stop_waiting(self, group: Group) -> None:
        self.waiting.remove(group)
        if group.request.prefix:
            self._prefixes.unwant(group.request.prefix)

    def _stop_running(self, group: Group) -> None:
        self.running.remove(group)
        self._blocks.release(group)
        group.prefix_blocks = {}
        if group.request.prefix:
            self._prefixes.release(group.request.prefix)

    def _end(self, group: Group) -> None:
        if group.state is GroupState.RUNNING:
            self._stop_running(group)
        elif group.state is GroupState.WAITING:
            self._stop_waiting(group)
        self._failed.pop(group, None)
        if group.admitted and group.request.prefix:
            self._prefixes.unclaim(group.request.prefix)
        group.state = GroupState.ENDED

    # --- admission ---

    def _admit(self) -> None:
        while (group := self._next()) is not None:
            try:
                if not self._take(group):
                    return
            except Exception as error:
                log_fault(group)
                self.drop([group])
                group.state, self._failed[group] = GroupState.FAILED, EngineFailure.unexpected(error)

    def _take(self, group: Group) -> bool:
        """Admit the group, let it wait for its prefix again, or fail it; False if it and those behind must wait."""
        key, rows = group.request.prefix, group.request.params.rows
        if key and self._prefixes.status(key) is LoadStatus.LOADING:
            self.waiting.wait_for_prefix(group)
        elif rows + sum(running.request.params.rows for running in self.running) > self._config.max_rows:
            return False
        elif self._try_admit(group):
            return True
        elif key and self._prefixes.status(key) is LoadStatus.FAILED:  # it could not be written to its blocks
            self._fail_all(key)
        elif self.running:
            return False
        else:
            self._fail(group, self.capacity.no_room(group))
        return True

    def _next(self) -> Group | None:
        """The next to be admitted or to wait for its prefix again."""
        head = self.waiting.head
        key = head.request.prefix if head and not head.admitted else None
        if key is None or self._prefixes.status(key) is LoadStatus.LOADING or self._prefixes.may_claim(key):
            return head
        return self.waiting.preempted_head

    def _try_admit(self, group: Group) -> bool:
        beginning = self._blocks.find(group)
        if not self._take_prefix(group, beginning.missing + beginning.input_missing + self._reserve(group)):
            self._blocks.give_up(beginning)
            return False
        self._stop_waiting(group)
        if group.request.prefix and not group.admitted:
            self._prefixes.claim(group.request.prefix)
        group.admitted = True
        self._blocks.begin(group, beginning)
        group.state = GroupState.RUNNING
        bisect.insort(self.running, group, key=lambda running: running.submitted_at)
        return True

    def _take_prefix(self, group: Group, blocks: int) -> bool:
        """Hold the prefix's blocks if there are ``blocks`` more for the group itself."""
        key = group.request.prefix
        if key is None:
            return self._ledger.available >= blocks
        prefix_blocks = self._prefixes.try_acquire(key, blocks)
        group.prefix_blocks = prefix_blocks or {}
        return prefix_blocks is not None

    def _reserve(self, group: Group) -> int:
        """Blocks to leave free beside ``group``'s first ones, so that admitting it does not preempt at once.

        One for each row that runs. For its own rows, what they recompute behind their shared prompt, at least one each.
        """
        if not self.running:
            return 0  # it fits alone
        shared = group.prompt_length // self._ledger.block_size
        rows = group.active if len(group.active) > 1 else []
        tails = sum(self._ledger.blocks_for(row.length) - shared for row in rows)
        return sum(g.request.params.rows for g in self.running) + max(tails, group.request.params.rows)

    # --- the step ---

    def _fitting_rows(self) -> list[ScheduledRow]:
        """The step's rows, after as many preemptions as it takes to fit their blocks."""
        rows = self._candidates()
        while sum(self._blocks.growth(row) for row in rows) > self._ledger.available:
            if len(self.running) == 1:
                [last] = self.running
                self._failed[last] = self.capacity.no_room(last)
                return []
            self.preempt(self.running[-1])
            rows = self._candidates()
        return rows

    def _candidates(self) -> list[ScheduledRow]:
        decode: list[ScheduledRow] = []
        prefill: list[ScheduledRow] = []
        for group in self.running:
            for row, end in group.pending():
                scheduled = ScheduledRow(group, row, row.computed, end - row.computed)
                (decode if scheduled.count == 1 else prefill).append(scheduled)
        encoder_seconds = self._encoder.seconds(self._encoder.choose(self.running))
        return decode + self._prefill.chunks(decode, prefill, encoder_seconds)
