"""May this request run in this engine at all? Torch-free.

Owns the checks against window, rows and memory; knows no queue. Called from any thread.

What was accepted never lacks memory afterwards: pins count from the moment of asking, and one that would take the room
of an accepted request is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.spec import BackboneSpec, PrefixSpec
from server.engine.config import EngineConfig
from server.engine.row import Prompt
from server.engine.scheduling.capacity import Capacity
from server.engine.types import GenerationRequest, PrefixKey, SamplingParams


def room_for_output(request: GenerationRequest, prompt: Prompt, spec: BackboneSpec) -> int:
    """Tokens of output that the decoder's window leaves behind a shifted prefix and the prompt."""
    offset = request.prefix_spec.position_offset("decoder") if request.prefix_spec else 0
    return spec.max_positions - offset - len(prompt.decoder_ids)


def output_limit(request: GenerationRequest, prompt: Prompt, spec: BackboneSpec) -> int:
    """The most tokens that an output of ``request`` may get: what it asks for, cut to the window."""
    return min(room_for_output(request, prompt, spec), request.params.max_new_tokens)


class Admission:
    """The limits of one engine, as checks that say expected and got."""

    def __init__(
        self,
        spec: BackboneSpec,
        decoder_prompt: tuple[int, ...],
        config: EngineConfig,
        capacity: Capacity,
    ) -> None:
        self._spec, self._decoder_prompt = spec, decoder_prompt
        self._config, self._prefixes, self._capacity = config, capacity.prefixes, capacity

    def check(self, request: GenerationRequest) -> None:
        """Raise InputTooLong or InvalidParameter unless ``request`` can run to its end."""
        self._check_window(request)
        rows, most = request.params.rows, self._config.max_rows
        if rows > most:
            raise InvalidParameter(
                f"num_beams, num_return_sequences: expected at most {most} rows, got {rows}", expected=most, got=rows
            )
        self._check_rows_running(request)
        self.check_memory(request)

    def check_prefix(self, spec: PrefixSpec, shortest: tuple[int, ...]) -> None:
        """Raise InputTooLong unless a prefix of ``spec`` leaves room for one token of output behind ``shortest``.

        ``shortest`` is the shortest prompt with this prefix. Nothing else counts beside it: rows end, and a pin may go.
        """
        params = SamplingParams(max_new_tokens=1)
        request = GenerationRequest("", "", shortest, params, prefix=PrefixKey("", ""), prefix_spec=spec)
        self._check_window(request)
        self._check_beside(request, 0)

    def check_pin(self, key: PrefixKey, spec: PrefixSpec, accepted: Iterable[GenerationRequest]) -> None:
        """Raise InvalidParameter unless ``key`` can be pinned beside the other pins and each request of ``accepted``.

        The pins leave room for the shortest request.
        """
        pinned = self._prefixes.pinned_blocks_beside(key) + self._prefixes.block_count(spec)
        shortest = 2 if self._decoder_prompt else 1
        most = min(self._prefixes.max_blocks, self._capacity.ledger.capacity - shortest)
        if pinned > most:
            raise InvalidParameter(
                f"pin: expected pinned prefixes of at most {most} blocks together (kv_cache_bytes, max_prefix_bytes), "
                f"got {pinned}", expected=most, got=pinned,
            )  # fmt: skip
        added = pinned - self._prefixes.pinned_blocks
        for request in accepted:
            if request.prefix != key:
                try:
                    self.check_memory(request, added)
                except InputTooLong as error:
                    raise InvalidParameter(
                        f"pin: expected room beside each accepted request, got none beside one of them: {error.message}"
                    ) from None

    def _check_rows_running(self, request: GenerationRequest) -> None:
        """A request that alone exceeds its tenant's or its key's limit of rows would never run."""
        limits = {"tenant": self._config.limits_of(request.caller, None)}
        if request.key is not None:
            limits["key"] = self._config.limits_of(request.caller, request.key)
        for whose, of_it in limits.items():
            most, rows = of_it.rows_running, request.params.rows
            if most is not None and rows > most:
                raise InvalidParameter(
                    f"num_beams, num_return_sequences: expected at most {most} rows (rows_running of the {whose}), "
                    f"got {rows}", expected=most, got=rows,
                )  # fmt: skip

    def _check_window(self, request: GenerationRequest) -> None:
        if not request.token_ids:
            raise InvalidParameter("input: expected at least one token, got none")
        smallest, largest, vocab = min(request.token_ids), max(request.token_ids), self._spec.vocab_size
        if smallest < 0 or largest >= vocab:
            got = smallest if smallest < 0 else largest
            raise InvalidParameter(f"input: expected token ids from 0 to {vocab - 1}, got {got}", got=got)
        most, length = self._spec.input_room(request.prefix_spec), len(request.token_ids)
        if length > most:
            raise InputTooLong(
                f"input: expected at most {most} tokens ({self._spec.input_limit(request.prefix_spec)}), got {length}",
                expected=most,
                got=length,
            )
        room = room_for_output(request, self._prompt(request), self._spec)
        if room < 1:
            raise InputTooLong(f"prefix: expected to leave room for one token of output, got room for {room}", got=room)

    def check_memory(self, request: GenerationRequest, reserved: int = 0) -> None:
        """Raise InputTooLong unless the request fits beside the pins of other prefixes and ``reserved`` blocks."""
        self._check_beside(request, self._prefixes.pinned_blocks_beside(request.prefix) + reserved)

    def _check_beside(self, request: GenerationRequest, pinned: int) -> None:
        """As ``check_memory``, beside ``pinned`` blocks of other prefixes."""
        less = " less pinned prefixes" if pinned else ""
        if request.prefix and request.prefix_spec:
            setting = "kv_cache_bytes" if self._config.max_prefix_bytes is None else "max_prefix_bytes"
            limit, claims = self._prefixes.max_blocks - pinned, self._prefixes.max_claimed_blocks
            got = self._prefixes.block_count(request.prefix_spec)
            for most, names in ((limit, setting + less), (claims, "preempted_prefix_bytes")):
                if got > most:
                    raise InputTooLong(
                        f"prefix: expected at most {most} blocks ({names}), got {got}", expected=most, got=got
                    )
        prompt = self._prompt(request)
        limit = output_limit(request, prompt, self._spec)
        needed, room = self._capacity.needed(request, prompt, limit), self._capacity.ledger.capacity - pinned
        if needed > room:
            advice = "; ask for fewer tokens or rows" if limit > 1 or request.params.rows > 1 else ""
            raise InputTooLong(
                f"memory: the request may need {needed} blocks of {self._config.block_size} tokens, there are "
                f"{room} (kv_cache_bytes{less}){advice}",
                expected=room,
                got=needed,
            )

    def _prompt(self, request: GenerationRequest) -> Prompt:
        return Prompt.of(request, self._decoder_prompt)
