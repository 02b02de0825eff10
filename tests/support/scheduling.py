"""A scheduler over a real ledger, prefix store and prompt reuse, driven as the engine drives it, without a model.

Instead of keys and values, each slot of a block holds the chain of tokens up to it. Every step checks that each row
reads exactly its own context and that no other holder of a block could see a write.
"""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prefixes.artifact import Prefix
from prefixes.errors import PrefixdError
from prefixes.spec import PrefixSpec, Site
from server.engine.config import EngineConfig
from server.engine.decoding.beams import BeamSearch
from server.engine.decoding.state import DecodingState
from server.engine.decoding.token_rules import TokenRules
from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse, chain_root
from server.engine.memory.shares import Shares
from server.engine.observer import SilentObserver
from server.engine.prefixes.placement import Placement
from server.engine.prefixes.store import PrefixStore
from server.engine.row import Group, Prompt, Row
from server.engine.scheduling.capacity import Capacity
from server.engine.scheduling.encoding import EncoderBudget, EncoderWork
from server.engine.scheduling.plan import Outcome, StepPlan
from server.engine.scheduling.prefill import PrefillBudget
from server.engine.scheduling.scheduler import Scheduler
from server.engine.types import GenerationRequest, PrefixKey, SamplingParams
from tests.support.choosing import RandomChoices
from tests.support.prefixes import make_prefix


class RecordedScheduler(Scheduler):
    """Notes who is preempted, in order."""

    preempted: list[str]

    def preempt(self, group: Group) -> None:
        self.preempted.append(group.request.request_id)
        super().preempt(group)


class Machine(SilentObserver):
    """``lengths`` are the prefixes it knows; ``failures`` fail to load; those in ``held`` load when let go.

    With ``units`` there is an encoder that reads the input in so many of them, the first two thirds its layers; a layer
    takes a second for a token, a unit behind them a sixth. The decoder takes ``token_seconds`` for each token,
    and ``call_seconds`` for each call with a row that answers. A sampled output ends early with the probability
    ``early_end``, after each token.
    """

    def __init__(self, blocks: int, *, size: int = 4, reuse: bool = True, seed: int = 0,
                 lengths: Mapping[PrefixKey, int] | None = None, max_prefix_bytes: int | None = None,
                 units: int = 0, token_seconds: float = 0.0, call_seconds: float = 0.0,
                 shares: Shares | None = None, early_end: float = 0.1, **config: Any) -> None:
        self.size, self.choices = size, RandomChoices(random.Random(seed), early_end)
        self.config = EngineConfig(block_size=size, **{"max_rows": 16, "max_step_tokens": 16, **config})
        self.shares = shares or Shares(self.config.weight_of)
        self.ledger = BlockLedger(blocks + 1, size, self.shares)
        self.prefixes = {key: make_prefix(length=length) for key, length in (lengths or {}).items()}
        self.failures: dict[PrefixKey, PrefixdError] = {}
        self.gates: dict[PrefixKey, queue.Queue[None]] = {}
        self.loads: list[PrefixKey] = []
        self.woken: queue.Queue[None] = queue.Queue()
        self.store = PrefixStore(self.ledger, self._load, Placement(self.ledger, self._write, self._read),
                                 bytes_per_block=1, max_bytes=max_prefix_bytes,
                                 max_claimed_bytes=self.config.preempted_prefix_bytes, workers=4,
                                 max_staged_bytes=self.config.max_staged_bytes, observer=self,
                                 wake=lambda: self.woken.put(None))
        self.decoder_prompt = (0,) if units else ()
        self.scheduler = RecordedScheduler(
            self.ledger, self.store, PromptReuse(self.ledger) if reuse else None, self.config, self,
            EncoderBudget(2 * units // 3, units, 10**9, self.config), PrefillBudget(1, 1000, self.config),
        )  # fmt: skip
        self.preempted: list[str] = []
        self.scheduler.preempted = self.preempted
        self.token_seconds, self.call_seconds = token_seconds, call_seconds
        self.layers = 2 * units // 3
        self.encoder_calls: list[EncoderWork] = []
        self.encoder_seconds: list[float] = []
        self.contents: list[list[object]] = [[None] * size for _ in range(blocks + 1)]
        self.ended: dict[str, str] = {}
        self.steps = self.computed_tokens = self.copies = 0
        self.may_preempt = True

    # --- what the store calls ---

    def _load(self, key: PrefixKey) -> Prefix:
        self.loads.append(key)
        if key in self.gates:
            self.gates[key].get(timeout=30)
        if key in self.failures:
            raise self.failures[key]
        return self.prefixes[key]

    def _write(self, prefix: Prefix, blocks: Mapping[Site, tuple[int, ...]]) -> None:
        for block in blocks["decoder"]:
            self.contents[block] = [id(prefix)] * self.size

    def _read(self, spec: PrefixSpec, blocks: Mapping[Site, tuple[int, ...]]) -> Prefix:
        self.copies += 1
        [prefix] = [known for known in self.prefixes.values() if known.spec is spec]
        for block in blocks["decoder"]:
            assert self.contents[block] == [id(prefix)] * self.size, "the prefix was written over before it was read"
        return prefix

    def pin(self, key: PrefixKey) -> None:
        self.store.pin(key, self.prefixes[key].spec)

    def on_preemption(self) -> None:
        assert self.may_preempt, "preempted although it fits alone"

    # --- requests ---

    def request(self, name: str, prompt: Iterable[int], key: PrefixKey | None = None, *, caller: str = "default",
                caller_key: str | None = None, **params: Any) -> GenerationRequest:
        spec = self.prefixes[key].spec if key else None
        return GenerationRequest(name, caller, tuple(prompt), SamplingParams(**params), key, spec, key=caller_key)

    def add(self, request: GenerationRequest, at: float | None = None) -> Group:
        """As ``Engine.add``; ``at`` is the time of arrival, the order of calls where none is given."""
        params = request.params
        beams = BeamSearch(params, params.max_new_tokens, TokenRules()) if params.num_beams > 1 else None
        prompt = Prompt.of(request, self.decoder_prompt)
        length = len(prompt.decoder_ids)
        rows = [
            Row(DecodingState(index, list(prompt.decoder_ids), length)) for index in range(1 if beams else params.rows)
        ]
        order = float(self.steps + len(self.scheduler.waiting) + len(self.scheduler.running))
        root = chain_root(request, prompt.encoder_ids)
        group = Group(request, prompt, params.max_new_tokens, 0, order if at is None else at, root, rows, beams)
        self.scheduler.add(group)
        return group

    def fits_alone(self, request: GenerationRequest) -> tuple[int, int]:
        prompt, capacity = Prompt.of(request, self.decoder_prompt), Capacity(self.ledger, self.store)
        return capacity.needed(request, prompt, request.params.max_new_tokens), capacity.room(request)

    # --- the loop ---

    def wait(self) -> None:
        """Until a step could do something: all that is here waits for loads."""
        while not self.scheduler.runnable():
            self.woken.get(timeout=30)

    def wait_for(self, key: PrefixKey) -> None:
        """Until ``key`` has been loaded, or that has failed."""
        while key in self.store._loader._asked and self.store._loader.outcome(key) is None:
            self.woken.get(timeout=30)

    def abort(self, group: Group) -> None:
        """As ``Engine.abort``."""
        self._note_end(group, "aborted")
        self.scheduler.update([Outcome(group, finished=True)])

    def step(self) -> StepPlan:
        """Schedule, check, compute, choose."""
        self.steps += 1
        plan = self.scheduler.schedule()
        outcomes = [Outcome(group, error=error) for group, error in plan.failed]
        for group, error in plan.failed:
            self._note_end(group, error.code)
        self._check(plan)
        seconds = self._encode(plan.encode) if plan.encode else None
        self._compute(plan)
        outcomes += self._choose(plan)
        self.scheduler.update(outcomes, plan, encoder_seconds=seconds, decoder_seconds=self._decoder_seconds(plan))
        self.ledger.check([*self.scheduler.holdings(), *self.store.holdings()])
        return plan

    def run(self, limit: int = 2000) -> None:
        """To the end of all; AssertionError after ``limit`` steps."""
        while self.scheduler.waiting or self.scheduler.running:
            self.wait()
            self.step()
            assert self.steps < limit, "no end in sight"
        self.ledger.check(self.store.holdings())
        assert self.store.idle()

    def close(self) -> None:
        self.store.close()

    # --- inside ---

    def _check(self, plan: StepPlan) -> None:
        assert sum(row.count for row in plan.rows) <= self.config.max_step_tokens
        assert len(plan.rows) <= self.config.max_rows
        running = sum(group.request.params.rows for group in self.scheduler.running)
        assert running == self.scheduler._entrance.rows.total <= self.config.max_rows
        assert all(row.count > 0 for row in plan.rows)
        assert len({row.row for row in plan.rows}) == len(plan.rows)
        targets = [target for _, target in plan.copies]
        assert len(set(targets)) == len(targets)
        written = [block for row in plan.rows for block in self._written(row.row, row.start, row.count)]
        assert len(set(written)) == len(written), "two rows write into one block"
        assert not any(self.ledger.shared(block) for block in written), "a write would be seen by another holder"
        assert not {source for source, _ in plan.copies} & set(targets), "a source is overwritten before it is copied"

    def _encode(self, work: EncoderWork) -> float:
        self.encoder_calls.append(work)
        assert len({id(group) for group in work.groups}) == len(work.groups) and len(work.units) > 0
        for group, encoded in zip(work.groups, work.inputs, strict=True):
            assert encoded is group.input and encoded.done == work.units.start, "an input is not where its call is"
            assert not any(self.ledger.shared(block) for block in encoded.blocks), "another holder would see it"
            for position in range(len(encoded.token_ids)):
                block, offset = encoded.blocks[position // self.size], position % self.size
                if work.units.start:
                    wanted = (group.chain_root, position, work.units.start)
                    assert self.contents[block][offset] == wanted, "a paused input was written over"
                self.contents[block][offset] = (group.chain_root, position, work.units.stop)
        assert work.units.start >= self.layers or work.units.stop <= self.layers, "two kinds of work in one call"
        each = 1.0 if work.units.start < self.layers else 1 / 6
        self.encoder_seconds.append(work.tokens * len(work.units) * each)
        return self.encoder_seconds[-1]

    def _written(self, row: Row, start: int, count: int) -> list[int]:
        return row.blocks[start // self.size : (start + count - 1) // self.size + 1]

    def _decoder_seconds(self, plan: StepPlan) -> float | None:
        if not plan.rows:
            return None
        each = self.token_seconds * sum(row.count for row in plan.rows)
        return each + self.call_seconds * any(row.count == 1 for row in plan.rows)

    def _compute(self, plan: StepPlan) -> None:
        for source, target in plan.copies:
            self.contents[target] = list(self.contents[source])
        for scheduled in plan.rows:
            tokens = scheduled.row.token_ids
            for position in range(scheduled.start, scheduled.end):
                block = scheduled.row.blocks[position // self.size]
                content = (scheduled.group.chain_root, tuple(tokens[: position + 1]))
                self.contents[block][position % self.size] = content
            self.computed_tokens += scheduled.count
        for scheduled in plan.rows:  # after all writes: what the kernels would read
            self._check_context(scheduled.group, scheduled.row, scheduled.end)

    def _check_context(self, group: Group, row: Row, length: int) -> None:
        for position in range(length):
            content = self.contents[row.blocks[position // self.size]][position % self.size]
            assert content == (group.chain_root, tuple(row.token_ids[: position + 1])), "another row's context"
        if group.prompt.encoder_ids:
            assert group.input is not None and group.input.complete, "a row runs ahead of its input"
            for position in range(len(group.prompt.encoder_ids)):
                content = self.contents[group.input.blocks[position // self.size]][position % self.size]
                assert content == (group.chain_root, position, group.input.units), "another request's input"
        if group.request.prefix:
            prefix = self.prefixes[group.request.prefix]
            blocks = group.prefix_blocks["decoder"]
            assert len(blocks) == self.ledger.blocks_for(prefix.spec.length("decoder"))
            for block in blocks:
                assert self.contents[block] == [id(prefix)] * self.size, "another task's prefix"

    def _choose(self, plan: StepPlan) -> list[Outcome]:
        outcomes = self.choices.choose(plan)
        for outcome in outcomes:
            if outcome.finished:
                self._note_end(outcome.group, "finished")
        return outcomes

    def _note_end(self, group: Group, how: str) -> None:
        assert group.request.request_id not in self.ended
        self.ended[group.request.request_id] = how


Make = Callable[..., Machine]
