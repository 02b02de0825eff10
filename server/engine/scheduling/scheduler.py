"""Who runs in the next step: admission, budgets, preemption. Torch-free.

Owns the running groups; ``entrance`` has those that wait, ``row_blocks`` their block tables. Knows neither tensors nor
texts. Rules:

- Each tenant has a queue in order of arrival, and a counter of the tokens computed for it. ``entrance`` admits from the
  queue whose counter is the least. A group needs its prefix loaded, and room for the blocks of its prefix and its
  prompt at once: all or nothing, so that prefixes cannot deadlock admission. A group whose prefix still loads lets
  others pass.
- An encoder's input is encoded first, within the budget of ``encoding``. Its blocks are taken at admission too.
- Rows with one token to compute come first. Prompts take what is left of the step's tokens and time, in chunks.
- When blocks run out, one group is preempted: it gives up all of its blocks and waits to be recomputed. It is the
  youngest group of the running tenant with the largest counter, and never the oldest running group.

So all end. The oldest running group is never preempted, it fits alone (``Capacity`` is asked before a request is
accepted, and ``Admission`` refuses pins that would take its room), and it computes something in every step: rows are
served, and prompts and inputs begun, in order of arrival. It ends, unless an older group is admitted and takes its
place. Only finitely many groups are older than one, so that at last one ends; and so the next. Should the oldest lack
room all the same, it fails: nothing else would ever give way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from prefixes.errors import EngineFailure
from server.engine.config import EngineConfig
from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse
from server.engine.observer import EngineObserver
from server.engine.prefixes.store import PrefixStore
from server.engine.row import Group, GroupState
from server.engine.scheduling.capacity import Capacity
from server.engine.scheduling.encoding import EncoderBudget
from server.engine.scheduling.entrance import Entrance
from server.engine.scheduling.fairness import TokenCounters
from server.engine.scheduling.plan import Outcome, ScheduledRow, StepPlan
from server.engine.scheduling.prefill import PrefillBudget
from server.engine.scheduling.recovery import forget_blocks, guarded, log_fault
from server.engine.scheduling.row_blocks import RowBlocks
from server.engine.scheduling.waiting import WaitingGroups


class Scheduler:
    """The running groups, in order of arrival, and the way in."""

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
        self._observer = observer
        self.capacity = Capacity(ledger, prefixes)
        self._blocks = RowBlocks(ledger, reuse, self._encoder.units)
        self.counters = TokenCounters(config.weight_of)
        self._entrance = Entrance(self.capacity, self._blocks, config, self.counters)
        self.running: list[Group] = []

    @property
    def waiting(self) -> WaitingGroups:
        """The groups that wait."""
        return self._entrance.waiting

    # --- what the engine calls ---

    def add(self, group: Group) -> None:
        """Let a new group wait. A load that failed before fails only those that waited then: this one loads anew."""
        self._entrance.take_in_loads()
        self._entrance.wait(group)

    def schedule(self) -> StepPlan:
        """Choose the next step's rows and give them their blocks."""
        self._entrance.take_in_loads()
        self._admit()
        plan = StepPlan(rows=self._fitting_rows())
        for row in plan.rows:
            plan.copies += self._blocks.grow(row)
        plan.encode = self._encoder.choose(self.running)
        plan.failed = self._entrance.take_failed()
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
        self.counters.chosen(outcome.group.request.caller, outcome.tokens)
        for row in outcome.ended:
            self._blocks.release_row(row)
        if outcome.beams:
            self._blocks.continue_beams(outcome.group, outcome.beams)

    def drop(self, groups: Iterable[Group] = ()) -> None:
        """End groups that a fault has met between two changes. All counts are made anew of what the others have."""
        for group in groups:
            forget_blocks(group)
            self._entrance.failed.pop(group, None)
        self.running = [group for group in self.running if group.state is GroupState.RUNNING]
        waiting = [group for group in self.waiting if group.state is GroupState.WAITING]
        claiming = [g for g in dict.fromkeys([*self.running, *waiting, *self._entrance.failed]) if g.admitted]
        self._prefixes.recount(*([g.request for g in some] for some in (self.running, waiting, claiming)))
        self._blocks.recount([*self.holdings(), *self._prefixes.holdings()])
        self._entrance.rebuild(waiting, self.running)

    def preempt(self, group: Group) -> None:
        """Take all blocks from a running group; it waits to be recomputed."""
        self._observer.on_preemption()
        self._stop_running(group)
        self._entrance.wait(group)

    def runnable(self) -> bool:
        """Whether a step has something to do now; False while all groups wait for their prefixes to load."""
        if self.running or self._entrance.failed or self._prefixes.has_news:
            return True
        return next(self._entrance.turns(), None) is not None

    def holdings(self) -> Iterator[list[int]]:
        """Every block table of a running row or its input, for the integrity check."""
        return self._blocks.tables(self.running)

    # --- inside ---

    def _stop_running(self, group: Group) -> None:
        self.running.remove(group)
        self._entrance.rows.remove(group.request)
        self._blocks.release(group)
        group.prefix_blocks = {}
        if group.request.prefix:
            self._prefixes.release(group.request.prefix)

    def _end(self, group: Group) -> None:
        if group.state is GroupState.RUNNING:
            self._stop_running(group)
        elif group.state is GroupState.WAITING:
            self._entrance.stop_waiting(group)
        self._entrance.failed.pop(group, None)
        if group.admitted and group.request.prefix:
            self._prefixes.unclaim(group.request.prefix)
        group.state = GroupState.ENDED

    # --- the step ---

    def _admit(self) -> None:
        while self._admit_one():
            pass

    def _admit_one(self) -> bool:
        """Admit, fail or send back to its prefix the first that can be; False if there is none."""
        for turn in self._entrance.turns():
            group = turn.group
            try:
                if self._entrance.take(turn, self.running):
                    return True
            except Exception as error:
                log_fault(group)
                self.drop([group])
                self._entrance.fail(group, EngineFailure.unexpected(error))
                return True
        return False

    def _fitting_rows(self) -> list[ScheduledRow]:
        """The step's rows, after as many preemptions as it takes to fit their blocks."""
        rows = self._candidates()
        while sum(self._blocks.growth(row) for row in rows) > self._ledger.available:
            if len(self.running) == 1:
                [last] = self.running
                self._entrance.failed[last] = self.capacity.no_room(last)
                return []
            self.preempt(self._victim())
            rows = self._candidates()
        return rows

    def _victim(self) -> Group:
        """The youngest group of the running tenant with the largest counter; never the oldest running group."""
        younger = enumerate(self.running[1:])
        _, victim = max(younger, key=lambda item: (self.counters.of(item[1].request.caller), item[0]))
        return victim

    def _candidates(self) -> list[ScheduledRow]:
        decode: list[ScheduledRow] = []
        prefill: list[ScheduledRow] = []
        for group in self.running:
            for row, end in group.pending():
                scheduled = ScheduledRow(group, row, row.computed, end - row.computed)
                (decode if scheduled.count == 1 else prefill).append(scheduled)
        encoder_seconds = self._encoder.seconds(self._encoder.choose(self.running))
        return decode + self._prefill.chunks(decode, prefill, encoder_seconds)
