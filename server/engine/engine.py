"""The engine: ``step()`` schedules, runs and postprocesses, for all requests at once.

Owns the life of a request between ``add`` and its terminal event. Knows no HTTP, no registry and no asyncio. One thread
calls it; any thread may call ``check``, ``waiting``, ``stats`` and ``residents``.

A request's life: ``check`` (can it run at all) -> ``add`` (it waits; its prefix loads in another thread) -> admission
by the scheduler (prefix and prompt get blocks) -> the encoder, if any, in groups of layers -> prefill in chunks -> one
token a step -> ``Finished`` or ``Failed``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable

import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.errors import EngineFailure, InvalidParameter
from prefixes.spec import PrefixSpec
from server.engine.config import EngineConfig
from server.engine.decoding.token_rules import TokenRules
from server.engine.grouping import GroupMaker
from server.engine.kernels.base import Kernels
from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse
from server.engine.memory.shares import Shares
from server.engine.observer import EngineObserver, GuardedObserver, SilentObserver
from server.engine.postprocess import Postprocess
from server.engine.prefixes.placement import Placement
from server.engine.prefixes.store import PrefixStore
from server.engine.reporter import Reporter
from server.engine.row import Group
from server.engine.runner import Runner, StepResult
from server.engine.scheduling.admission import Admission
from server.engine.scheduling.encoding import EncoderBudget
from server.engine.scheduling.plan import Outcome, StepPlan
from server.engine.scheduling.prefill import PrefillBudget
from server.engine.scheduling.scheduler import Scheduler
from server.engine.types import EngineStats, Event, Failed, GenerationRequest, PrefixKey

log = logging.getLogger(__name__)


class Engine:
    """One backbone, many tasks."""

    def __init__(
        self,
        backbone: Backbone,
        kernels: Kernels,
        config: EngineConfig,
        load_prefix: Callable[[PrefixKey], Prefix],
        observer: EngineObserver | None = None,
    ) -> None:
        """``load_prefix`` fetches and verifies a prefix; it is called in worker threads."""
        rules = TokenRules(
            frozenset(backbone.eos_token_ids), backbone.forced_first, backbone.forced_last,
            backbone.suppressed, backbone.suppressed_first,
        )  # fmt: skip
        observer = GuardedObserver(observer or SilentObserver())
        self._runner = Runner(backbone, kernels, config)
        if self._runner.blocks < 2:
            raise ValueError(
                f"kv_cache_bytes: expected at least {2 * self._runner.bytes_per_block} for two blocks of this "
                f"backbone, got {config.kv_cache_bytes}"
            )
        self._ledger = BlockLedger(self._runner.blocks, config.block_size, Shares(config.weight_of))
        self._wake: Callable[[], None] = lambda: None
        self._prefixes = PrefixStore(
            self._ledger, load_prefix,
            Placement(self._ledger, self._runner.write_prefix, self._runner.read_prefix),
            bytes_per_block=self._runner.bytes_per_block,
            max_bytes=config.max_prefix_bytes,
            max_claimed_bytes=config.preempted_prefix_bytes,
            workers=config.load_workers,
            max_staged_bytes=config.max_staged_bytes,
            observer=observer,
            wake=lambda: self._wake(),
        )  # fmt: skip
        reuse = PromptReuse(self._ledger) if config.reuse_prompts else None
        encoder = EncoderBudget(
            self._runner.encoder_layers, self._runner.encoder_units, backbone.spec.hidden_size, config
        )
        prefill = PrefillBudget(self._runner.decoder_layers, backbone.spec.hidden_size, config)
        self._scheduler = Scheduler(self._ledger, self._prefixes, reuse, config, observer, encoder, prefill)
        self._admission = Admission(backbone.spec, backbone.decoder_prompt, config, self._scheduler.capacity)
        self._postprocess = Postprocess(rules, kernels.top_log_probs)
        self._reporter = Reporter(backbone.tokenizer.backend_tokenizer, rules.eos, observer)
        self._make_group = GroupMaker(backbone, rules)
        self._groups: dict[str, Group] = {}
        self._ended_none = False  # the step before met a fault, and there was no request to end for it

    # --- requests ---

    def check(self, request: GenerationRequest) -> None:
        """Raise InputTooLong or InvalidParameter unless ``request`` can run to its end in this engine."""
        self._admission.check(request)

    def check_prefix(self, spec: PrefixSpec, shortest: tuple[int, ...]) -> None:
        """Raise InputTooLong unless some request with a prefix of ``spec`` can run here. ``shortest``: its prompt.

        Any thread may call it.
        """
        self._admission.check_prefix(spec, shortest)

    def add(self, request: GenerationRequest, submitted_at: float | None = None) -> None:
        """Queue a checked request.

        Raises InvalidParameter if a request with this ``request_id`` has not ended, InputTooLong if a pin has taken its
        room since the check.
        """
        if request.request_id in self._groups:
            raise InvalidParameter(f"request id {request.request_id!r} is already in use")
        self._admission.check_memory(request)
        group = self._make_group(request, submitted_at)
        try:
            self._scheduler.add(group)
        except Exception:
            self._scheduler.drop([group])
            raise
        self._groups[request.request_id] = group

    def abort(self, request_id: str) -> list[Event]:
        """End a request now, with the output it has. Does nothing if it has ended."""
        events: list[Event] = []
        if group := self._groups.get(request_id):
            try:
                self._apply([self._postprocess.abort(group)], events)
            except Exception as error:
                events += self._end_with_error([group], error)
        return events

    def reserve_pin(self, key: PrefixKey, spec: PrefixSpec) -> None:
        """Count a prefix as pinned from now on; ``pin`` loads it.

        Raises InvalidParameter if there is no room beside the other pins and each request that has not ended.
        """
        self._admission.check_pin(key, spec, (group.request for group in self._groups.values()))
        self._prefixes.reserve(key, spec)

    def pin(self, key: PrefixKey, spec: PrefixSpec) -> None:
        """Load a prefix and never evict it. Raises as ``reserve_pin``.

        If it cannot be loaded it keeps its room; the next request for it, or another ``pin``, tries again.
        """
        self.reserve_pin(key, spec)
        self._prefixes.pin(key, spec)

    def unpin(self, key: PrefixKey) -> None:
        """Let a prefix be evicted again."""
        self._prefixes.unpin(key)

    # --- the loop ---

    def on_wake(self, wake: Callable[[], None]) -> None:
        """Set ``wake``: a loader thread calls it when a load has ended, since ``step`` may have work then."""
        self._wake = wake

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has something to do now; False while all requests wait for their prefixes to load.

        A fault in looking counts as work: ``step`` looks again, and ends what it meets.
        """
        try:
            return self._scheduler.runnable()
        except Exception:
            log.exception("the engine could not see whether it has work")
            return True

    @property
    def requests(self) -> int:
        """Requests that have not ended."""
        return len(self._groups)

    @property
    def forwards(self) -> dict[str, int]:
        """Calls of the model so far, per stage."""
        return dict(self._runner.forwards)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Run one step: at most one call per stage over all scheduled rows. Returns the events.

        No fault leaves it. One that is not a row's or a call's own ends what runs; what waits goes on waiting.
        """
        events: list[Event] = []
        try:
            began = time.monotonic()
            plan = self._scheduler.schedule()
            self._reporter.admitted(plan)
            result = self._runner.run(plan)
            outcomes = self._postprocess(plan, result)
            self._apply(outcomes, events, plan, result)
            self._reporter.stepped(plan, result.calls, time.monotonic() - began)
            self._ended_none = False
        except Exception as error:
            events += self._end_running(error)
        return events

    def end_all(self, error: BaseException) -> list[Event]:
        """End every request with what it has taken, since nobody steps this engine any more."""
        return self._end_with_error(list(self._groups.values()), error)

    def _apply(
        self,
        outcomes: list[Outcome],
        events: list[Event],
        plan: StepPlan | None = None,
        result: StepResult | None = None,
    ) -> None:
        """The one place where a step's outcomes take effect: events first, then the rows' blocks, then groups end.

        The events count once they are in ``events``: all of them, or after a fault none.
        """
        made = [event for outcome in outcomes for event in self._events(outcome)]
        ran = result or StepResult()
        failed = self._scheduler.update(
            outcomes, plan, encoder_seconds=ran.encoder_seconds, decoder_seconds=ran.decoder_seconds
        )
        ended = [outcome for outcome in outcomes if outcome.ends_group]
        for group, error in failed.items():
            ended.append(Outcome(group, error=EngineFailure.unexpected(error)))
            made += self._events(ended[-1])
        if len(ended) == len(self._groups):
            self._runner.forget_encoding()  # there may be no further step to do it
        events += made
        for outcome in ended:
            del self._groups[outcome.group.request.request_id]

    def _end_running(self, error: Exception) -> list[Event]:
        """After a fault that may be anybody's: end all that runs or was in hand.

        Where that is nothing, one more try may do; if it meets a fault too, what waits is the cause, and ends.
        """
        waiting = set(self._scheduler.waiting)
        met = [group for group in self._groups.values() if group not in waiting]
        if not met and self._ended_none:
            met = list(self._groups.values())
        self._ended_none = not met
        return self._end_with_error(met, error)

    def _end_with_error(self, groups: list[Group], error: BaseException) -> list[Event]:
        """End groups that a fault has met between two changes."""
        facts = {"request_ids": [group.request.request_id for group in groups]}
        log.error("the engine met a fault; %d requests end", len(groups), exc_info=error, extra={"facts": facts})
        self._scheduler.drop(groups)
        self._runner.forget_encoding()
        events = [e for group in groups for e in self._events(Outcome(group, error=EngineFailure.unexpected(error)))]
        for group in groups:
            del self._groups[group.request.request_id]
        return events

    def _events(self, outcome: Outcome) -> list[Event]:
        """The outcome's events. Where they cannot be made the group ends with an error: none is left without an end."""
        try:
            return self._reporter.events(outcome)
        except Exception as error:
            request_id = outcome.group.request.request_id
            facts = {"request_id": request_id}
            log.exception("events could not be made; the request ends with an error", extra={"facts": facts})
            outcome.error = EngineFailure.unexpected(error)
            return [Failed(request_id, outcome.error)]

    def waiting(self, caller: str | None = None, key: str | None = None) -> int:
        """Requests that wait for their turn, of all, of ``caller`` or of one of its keys. Any thread may call it."""
        return len(self._scheduler.waiting) if caller is None else self._scheduler.waiting.count(caller, key)

    def stats(self) -> EngineStats:
        """Gauges. Any thread may call it; the values may come from different moments of a step."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self.waiting(),
            kv_usage=self._ledger.held / self._ledger.capacity,
            resident_prefixes=self._prefixes.resident_count,
            resident_prefix_bytes=self._prefixes.resident_bytes,
            resident_prefix_limit_bytes=self._prefixes.limit_bytes,
            staged_prefix_bytes=self._prefixes.staged_bytes,
            preempted_prefix_bytes=self._prefixes.copy_bytes,
            running_by_caller=Counter(group.request.caller for group in tuple(self._scheduler.running)),
            waiting_by_caller=self._scheduler.waiting.counts(),
        )

    def residents(self) -> frozenset[PrefixKey]:
        """Prefixes in blocks now. Any thread may call it."""
        return self._prefixes.residents()

    def check_integrity(self) -> None:
        """Raise AssertionError if blocks' holders do not match, or if a prefix is in use although nothing runs."""
        self._ledger.check([*self._scheduler.holdings(), *self._prefixes.holdings()])
        assert self._groups or self._prefixes.idle(), "a prefix is held although nothing runs"

    def close(self) -> None:
        """Stop the loader threads."""
        self._prefixes.close()
