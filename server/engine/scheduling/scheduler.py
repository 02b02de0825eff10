"""Who runs in the next step: admission, budgets, preemption. Torch-free.

Owns the waiting and running groups and their block tables; knows neither tensors nor texts. Rules:

- A group is admitted when its prefix is loaded and the prefix's blocks and its prompt's fit at once (all or nothing, so
  that prefixes cannot deadlock admission), in order of arrival; one that waits for its prefix lets others pass.
- An input that an encoder reads is encoded first, at the pace of ``encoding``; its blocks, too, are taken at admission.
- Rows with one token to compute come first, then prompts in chunks of what is left of the step's tokens.
- When blocks run out, the youngest running group gives up all of its own and waits to be recomputed. The oldest always
  fits alone (``fits_alone`` is checked before a request is accepted), so that the engine always makes progress. Where
  prefixes pinned since then have taken its room, it fails: nothing would ever give way.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field

from prefixes.errors import InputTooLong, PrefixdError
from server.engine.config import EngineConfig
from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse, chain
from server.engine.observer import EngineObserver
from server.engine.prefixes.store import LoadStatus, PrefixStore
from server.engine.row import EncodedInput, Group, GroupState, Prompt, Sequence
from server.engine.scheduling.encoding import EncoderPace, EncoderWork
from server.engine.types import GenerationRequest


@dataclass(frozen=True)
class ScheduledRow:
    """Tokens ``start`` to ``start + count`` of a sequence are computed in this step."""

    group: Group
    sequence: Sequence
    start: int
    count: int

    @property
    def wants_logits(self) -> bool:
        """Whether its last token is the sequence's last: the next one is to be chosen."""
        return self.start + self.count == len(self.sequence.token_ids)


@dataclass
class StepPlan:
    """One step: inputs to encode, blocks to copy (source, target), then rows; and groups that cannot run, with why."""

    encode: EncoderWork | None = None
    rows: list[ScheduledRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    failed: list[tuple[Group, PrefixdError]] = field(default_factory=list)


class Scheduler:
    """Waiting and running groups, in order of arrival."""

    def __init__(
        self,
        ledger: BlockLedger,
        prefixes: PrefixStore,
        reuse: PromptReuse | None,
        config: EngineConfig,
        observer: EngineObserver,
        pace: EncoderPace | None = None,
    ) -> None:
        """``pace`` is the encoder's, where there is one."""
        self._pace = pace or EncoderPace(0, 0, 1, config)
        self._ledger, self._prefixes, self._reuse = ledger, prefixes, reuse
        self._config, self._observer = config, observer
        self.waiting: list[Group] = []
        self.running: list[Group] = []

    def fits_alone(self, request: GenerationRequest, prompt: Prompt, max_new_tokens: int) -> tuple[int, int]:
        """Blocks that the request may need at most, its prefix's included, and blocks there are for it."""
        length, rows = len(prompt.decoder_ids), request.params.rows
        if rows == 1:
            own = self._ledger.blocks_for(length + max_new_tokens)
        else:  # each row may copy the prompt's last block, and shares none of its own tokens in the worst case
            own = self._ledger.blocks_for(length) + rows * (self._ledger.blocks_for(max_new_tokens) + 1)
        own += self._ledger.blocks_for(len(prompt.encoder_ids))
        if request.prefix is None or request.prefix_spec is None:
            return own, self._ledger.capacity - self._prefixes.pinned_blocks
        prefix = self._prefixes.block_count(request.prefix_spec)
        room = self._ledger.capacity - self._prefixes.pinned_blocks_beside(request.prefix)
        return own + prefix, room

    def add(self, group: Group) -> None:
        """Let a new group wait."""
        self._wait(group)

    def schedule(self) -> StepPlan:
        """Choose the next step's rows and give them their blocks."""
        plan = StepPlan()
        self._admit(plan)
        rows = self._candidates()
        while sum(self._growth(row) for row in rows) > self._ledger.available:
            if len(self.running) == 1:
                plan.failed.append((self.running[0], self._no_room(self.running[0])))
                return plan
            self.preempt(self.running[-1])
            rows = self._candidates()
        for row in rows:
            self._grow(row, plan.copies)
        plan.rows = rows
        plan.encode = self._pace.choose(self.running)
        return plan

    def preempt(self, group: Group) -> None:
        """Take all blocks of a running group; it waits, and is recomputed later."""
        self._observer.on_preemption()
        self._release(group)
        self.running.remove(group)
        self._wait(group)

    # --- what the engine tells after a step ---

    def encoded(self, work: EncoderWork, seconds: float) -> None:
        """The work has run, in ``seconds``; inputs that are through it are ready, and reusable."""
        self._pace.took(work, seconds)
        for group, encoded in zip(work.groups, work.inputs, strict=True):
            encoded.done = work.units.stop
            if encoded.complete and self._reuse:
                self._reuse.remember_input(group.chain_root, encoded.blocks)

    def computed(self, row: ScheduledRow) -> None:
        """The row's tokens have their keys and values; full blocks become reusable."""
        row.sequence.computed += row.count
        if self._reuse and (row.group.beams is None or not row.group.started):
            self._remember(row.group, row.sequence)

    def fork_prompt(self, group: Group) -> None:
        """Every other active row shares the blocks of the one that computed the prompt."""
        leader, *others = group.active
        blocks = leader.blocks[: self._ledger.blocks_for(group.prompt_length)]
        for row in others:
            self._ledger.share(blocks)
            row.blocks, row.computed, row.digests = list(blocks), group.prompt_length, list(leader.digests)

    def replace_rows(self, group: Group, rows: list[Sequence], parents: list[Sequence]) -> None:
        """Beams move on: ``rows[i]`` continues ``parents[i]``, sharing its blocks."""
        for row, parent in zip(rows, parents, strict=True):
            self._ledger.share(parent.blocks)
            row.blocks, row.computed = list(parent.blocks), parent.computed
        for row in group.sequences:
            self._release_row(row)
        group.sequences = rows

    def finish_row(self, sequence: Sequence) -> None:
        """One output of a group ended: its blocks go back at once."""
        self._release_row(sequence)

    def end(self, group: Group) -> None:
        """The group ended, in whatever way: every block and pin goes back."""
        if group.state is GroupState.RUNNING:
            self._release(group)
            self.running.remove(group)
        elif group.state is GroupState.WAITING:
            self.waiting.remove(group)
            if group.request.prefix:
                self._prefixes.unwant(group.request.prefix)
        group.state = GroupState.ENDED

    def runnable(self) -> bool:
        """Whether a step could do something now: false while all that is here waits for prefixes to load."""
        return bool(self.running) or any(self._loaded(group) for group in self.waiting)

    def holdings(self) -> Iterator[list[int]]:
        """Every block table of a running row or its input, for the integrity check."""
        for group in self.running:
            yield from (row.blocks for row in group.sequences)
            if group.input:
                yield group.input.blocks

    # --- admission ---

    def _wait(self, group: Group) -> None:
        group.state = GroupState.WAITING
        if group.request.prefix:
            self._prefixes.want(group.request.prefix)
        bisect.insort(self.waiting, group, key=lambda waiting: waiting.submitted_at)

    def _loaded(self, group: Group) -> bool:
        prefix = group.request.prefix
        return prefix is None or self._prefixes.status(prefix) is not LoadStatus.LOADING

    def _admit(self, plan: StepPlan) -> None:
        rows = sum(group.request.params.rows for group in self.running)
        for group in list(self.waiting):
            if not self._loaded(group):
                continue
            if self._load_error(group) is None:
                if rows + group.request.params.rows > self._config.max_rows:
                    return
                if self._try_admit(group):
                    rows += group.request.params.rows
                    continue
            error = self._load_error(group)  # which trying to admit it may have brought
            if error is None and self.running:
                return
            plan.failed.append((group, error or self._no_room(group)))

    def _load_error(self, group: Group) -> PrefixdError | None:
        prefix = group.request.prefix
        failed = prefix is not None and self._prefixes.status(prefix) is LoadStatus.FAILED
        return self._prefixes.error(prefix) if prefix and failed else None

    def _no_room(self, group: Group) -> PrefixdError:
        needed, capacity = self.fits_alone(group.request, group.prompt, group.max_new_tokens)
        return InputTooLong(
            f"memory: the request may need {needed} blocks, pinned prefixes leave {capacity}; ask for fewer tokens or "
            "rows, or unpin a prefix",
            expected=capacity,
            got=needed,
        )

    def _try_admit(self, group: Group) -> bool:
        leader = group.active[0]
        target = group.prompt_length if len(group.active) > 1 else len(leader.token_ids)
        blocks, digests = self._reuse.match(group.chain_root, leader.token_ids[:target]) if self._reuse else ([], [])
        needed = self._ledger.blocks_for(target) - len(blocks)
        input_blocks, input_needed = self._match_input(group)
        if not self._take_prefix(group, needed + input_needed + self._reserve(group)):
            self._ledger.release(blocks)
            self._ledger.release(input_blocks)
            return False
        if group.prompt.encoder_ids:
            done = 0 if input_needed else self._pace.units
            input_blocks = input_blocks + self._ledger.allocate(input_needed)
            group.input = EncodedInput(group.prompt.encoder_ids, self._pace.units, input_blocks, done)
        leader.blocks = blocks + self._ledger.allocate(needed)
        leader.digests, leader.computed = digests, len(blocks) * self._ledger.block_size
        group.state = GroupState.RUNNING
        self.waiting.remove(group)
        bisect.insort(self.running, group, key=lambda running: running.submitted_at)
        return True

    def _match_input(self, group: Group) -> tuple[list[int], int]:
        """Blocks of the group's input that is encoded already, and how many it needs where it is not."""
        count = self._ledger.blocks_for(len(group.prompt.encoder_ids))
        if count == 0:
            return [], 0
        found = self._reuse.match_input(group.chain_root, count) if self._reuse else []
        return found, 0 if found else count

    def _reserve(self, group: Group) -> int:
        """Blocks to leave free beside ``group``'s first ones, so that admitting it does not preempt at once.

        One for each row that runs; for its own rows, what they recompute behind the prompt that they share.
        """
        if not self.running:
            return 0  # it fits alone
        shared = group.prompt_length // self._ledger.block_size
        rows = group.active if len(group.active) > 1 else []
        tails = sum(self._ledger.blocks_for(len(row.token_ids)) - shared for row in rows)
        return sum(g.request.params.rows for g in self.running) + max(tails, group.request.params.rows)

    def _take_prefix(self, group: Group, needed: int) -> bool:
        key = group.request.prefix
        if key is None:
            return self._ledger.available >= needed
        blocks = self._prefixes.try_acquire(key, needed)
        if blocks is None:
            return False
        group.prefix_blocks = blocks
        self._prefixes.unwant(key)
        return True

    # --- the step ---

    def _candidates(self) -> list[ScheduledRow]:
        decode: list[ScheduledRow] = []
        prefill: list[ScheduledRow] = []
        for group in self.running:
            for sequence, end in group.pending():
                row = ScheduledRow(group, sequence, sequence.computed, end - sequence.computed)
                (decode if row.count == 1 else prefill).append(row)
        budget = self._config.max_step_tokens - len(decode)
        for row in prefill:
            count = min(row.count, budget)
            if count > 0:
                decode.append(ScheduledRow(row.group, row.sequence, row.start, count))
                budget -= count
        return decode

    def _growth(self, row: ScheduledRow) -> int:
        """Blocks the row still needs for this step: new ones, and one to copy a shared last block into."""
        sequence = row.sequence
        new = self._ledger.blocks_for(row.start + row.count) - len(sequence.blocks)
        return max(new, 0) + self._must_copy(row)

    def _must_copy(self, row: ScheduledRow) -> bool:
        first = row.start // self._ledger.block_size
        return first < len(row.sequence.blocks) and self._ledger.shared(row.sequence.blocks[first])

    def _grow(self, row: ScheduledRow, copies: list[tuple[int, int]]) -> None:
        sequence = row.sequence
        if self._must_copy(row):
            first = row.start // self._ledger.block_size
            source, [target] = sequence.blocks[first], self._ledger.allocate(1)
            copies.append((source, target))
            sequence.blocks[first] = target
            self._ledger.release([source])
        new = self._ledger.blocks_for(row.start + row.count) - len(sequence.blocks)
        if new > 0:
            sequence.blocks += self._ledger.allocate(new)

    def _remember(self, group: Group, sequence: Sequence) -> None:
        assert self._reuse is not None
        size = self._ledger.block_size
        for index in range(len(sequence.digests), sequence.computed // size):
            parent = sequence.digests[-1] if sequence.digests else group.chain_root
            digest = chain(parent, sequence.token_ids[index * size : (index + 1) * size])
            sequence.digests.append(digest)
            self._reuse.remember(digest, sequence.blocks[index])

    # --- giving back ---

    def _release(self, group: Group) -> None:
        for row in group.sequences:
            self._release_row(row)
        group.prefix_blocks = {}
        if group.input:
            self._ledger.release(group.input.blocks)
            group.input = None
        if group.request.prefix:
            self._prefixes.release(group.request.prefix)

    def _release_row(self, sequence: Sequence) -> None:
        self._ledger.release(sequence.blocks)
        sequence.blocks, sequence.computed, sequence.digests = [], 0, []
