"""The engine: ``step()`` schedules, runs and postprocesses, for all requests at once.

Owns the life of a request between ``add`` and its terminal event. Knows no HTTP, no registry and no asyncio. One thread
calls it; any thread may call ``check``, ``waiting``, ``stats`` and ``residents``.

A request's life: ``check`` (can it run at all) -> ``add`` (it waits; its prefix loads in another thread) -> admission
by the scheduler (prefix and prompt get blocks) -> the encoder, if any, in groups of layers -> prefill in chunks -> one
token a step -> ``Finished`` or ``Failed``.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from prefixes.artifact import Prefix
from prefixes.backbone import Backbone
from prefixes.errors import EngineFailure, InvalidParameter
from prefixes.spec import PrefixSpec
from server.engine.config import EngineConfig
from server.engine.decoding.beams import BeamSearch
from server.engine.decoding.detokenizer import Detokenizer
from server.engine.decoding.state import DecodingState
from server.engine.decoding.token_rules import TokenRules
from server.engine.kernels.base import Kernels
from server.engine.memory.blocks import BlockLedger
from server.engine.memory.prompt_reuse import PromptReuse, chain_root
from server.engine.observer import EngineObserver, SilentObserver
from server.engine.postprocess import Postprocess
from server.engine.prefixes.placement import Placement
from server.engine.prefixes.store import PrefixStore
from server.engine.reporter import Reporter
from server.engine.row import Group, Prompt, Row
from server.engine.runner import Runner, StepResult
from server.engine.scheduling.admission import Admission, output_limit
from server.engine.scheduling.encoding import EncoderBudget
from server.engine.scheduling.plan import Outcome, StepPlan
from server.engine.scheduling.prefill import PrefillBudget
from server.engine.scheduling.scheduler import Scheduler
from server.engine.types import Event, Failed, GenerationRequest, PrefixKey

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for gauges. ``kv_usage`` is the share of blocks that rows and resident prefixes hold, 0 to 1.

    Staged prefixes are loaded and wait in host memory for their blocks. Preempted ones have left their blocks for host
    memory, because requests that were preempted need them again.
    """

    running: int
    waiting: int
    kv_usage: float
    resident_prefixes: int
    resident_prefix_bytes: int
    resident_prefix_limit_bytes: int
    staged_prefix_bytes: int
    preempted_prefix_bytes: int


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
        self._spec = backbone.spec
        self._tokenizer = backbone.tokenizer.backend_tokenizer
        self._decoder_prompt = backbone.decoder_prompt
        self._rules = TokenRules(
            frozenset(backbone.eos_token_ids), backbone.forced_first, backbone.forced_last,
            backbone.suppressed, backbone.suppressed_first,
        )  # fmt: skip
        self._observer = observer or SilentObserver()
        self._runner = Runner(backbone, kernels, config)
        if self._runner.blocks < 2:
            raise ValueError(
                f"kv_cache_bytes: expected at least {2 * self._runner.bytes_per_block} for two blocks of this "
                f"backbone, got {config.kv_cache_bytes}"
            )
        self._ledger = BlockLedger(self._runner.blocks, config.block_size)
        self._wake: Callable[[], None] = lambda: None
        self._prefixes = PrefixStore(
            self._ledger,
            load_prefix,
            Placement(self._ledger, self._runner.write_prefix, self._runner.read_prefix),
            bytes_per_block=self._runner.bytes_per_block,
            max_bytes=config.max_prefix_bytes,
            max_claimed_bytes=config.preempted_prefix_bytes,
            workers=config.load_workers,
            max_staged_bytes=config.max_staged_bytes,
            observer=self._observer,
            wake=lambda: self._wake(),
        )
        reuse = PromptReuse(self._ledger) if config.reuse_prompts else None
        encoder = EncoderBudget(
            self._runner.encoder_layers, self._runner.encoder_units, backbone.spec.hidden_size, config
        )
        prefill = PrefillBudget(self._runner.decoder_layers, backbone.spec.hidden_size, config)
        self._scheduler = Scheduler(self._ledger, self._prefixes, reuse, config, self._observer, encoder, prefill)
        self._admission = Admission(backbone.spec, self._decoder_prompt, config, self._scheduler.capacity)
        self._postprocess = Postprocess(self._rules, kernels.top_log_probs)
        self._reporter = Reporter(self._tokenizer, self._rules.eos, self._observer)
        self._groups: dict[str, Group] = {}

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
        params = request.params
        if request.request_id in self._groups:
            raise InvalidParameter(f"request id {request.request_id!r} is already in use")
        self._admission.check_memory(request)
        prompt = Prompt.of(request, self._decoder_prompt)
        max_new_tokens = output_limit(request, prompt, self._spec)
        beams = BeamSearch(params, max_new_tokens, self._rules) if params.num_beams > 1 else None
        state = self._decoding_state(prompt, request)
        group = Group(
            request=request,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            submitted_at=time.monotonic() if submitted_at is None else submitted_at,
            chain_root=chain_root(request, prompt.encoder_ids),
            rows=[Row(state.fork(index)) for index in range(1 if beams else params.rows)],
            beams=beams,
        )
        self._scheduler.add(group)
        self._groups[request.request_id] = group

    def abort(self, request_id: str) -> list[Event]:
        """End a request now, with the output it has. Does nothing if it has ended."""
        group = self._groups.get(request_id)
        return self._apply([self._postprocess.abort(group)]) if group else []

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
        """Whether ``step`` has something to do now; False while all requests wait for their prefixes to load."""
        return self._scheduler.runnable()

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
        """Run one step: at most one call per stage over all scheduled rows. Returns the events."""
        began = time.monotonic()
        plan = self._scheduler.schedule()
        self._reporter.admitted(plan)
        result = self._runner.run(plan)
        outcomes = self._postprocess(plan, result)
        events = self._apply(outcomes, plan, result)
        self._reporter.stepped(plan, result.calls, time.monotonic() - began)
        return events

    def _apply(
        self, outcomes: list[Outcome], plan: StepPlan | None = None, result: StepResult | None = None
    ) -> list[Event]:
        """The one place where a step's outcomes take effect: events first, then the rows' blocks, then groups end."""
        events = [event for outcome in outcomes for event in self._events(outcome)]
        ran = result or StepResult()
        failed = self._scheduler.update(
            outcomes, plan, encoder_seconds=ran.encoder_seconds, decoder_seconds=ran.decoder_seconds
        )
        ended = [outcome for outcome in outcomes if outcome.ends_group]
        for group, error in failed.items():
            ended.append(Outcome(group, error=EngineFailure.unexpected(error)))
            events += self._events(ended[-1])
        for outcome in ended:
            del self._groups[outcome.group.request.request_id]
        if not self._groups:
            self._runner.forget_encoding()  # there may be no further step to do it
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

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn. Any thread may call it."""
        return len(self._scheduler.waiting)

    def stats(self) -> EngineStats:
        """Gauges. Any thread may call it; the values may come from different moments of a step."""
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self.waiting,
            kv_usage=self._ledger.held / self._ledger.capacity,
            resident_prefixes=self._prefixes.resident_count,
            resident_prefix_bytes=self._prefixes.resident_bytes,
            resident_prefix_limit_bytes=self._prefixes.limit_bytes,
            staged_prefix_bytes=self._prefixes.staged_bytes,
            preempted_prefix_bytes=self._prefixes.copy_bytes,
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

    def _decoding_state(self, prompt: Prompt, request: GenerationRequest) -> DecodingState:
        """The state that each output of ``request`` begins with."""
        beams = request.params.num_beams > 1
        detokenizer = None if beams else Detokenizer(self._tokenizer, request.params.stop)
        return DecodingState(0, list(prompt.decoder_ids), len(prompt.decoder_ids), detokenizer)
