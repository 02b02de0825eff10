"""May this request run in this engine at all? Torch-free.

Owns the checks against window, rows and memory; knows no queue. Called from any thread.
"""

from __future__ import annotations

from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.spec import BackboneSpec
from server.engine.config import EngineConfig
from server.engine.row import Prompt
from server.engine.scheduling.capacity import Capacity
from server.engine.types import GenerationRequest


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
        self._check_memory(request)

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

    def _check_memory(self, request: GenerationRequest) -> None:
        if request.prefix and request.prefix_spec:
            limit = self._prefixes.max_blocks - self._prefixes.pinned_blocks_beside(request.prefix)
            got = self._prefixes.block_count(request.prefix_spec)
            if got > limit:
                raise InputTooLong(
                    f"prefix: expected at most {limit} blocks (max_prefix_bytes less pinned prefixes), got {got}",
                    expected=limit,
                    got=got,
                )
        prompt = self._prompt(request)
        limit = output_limit(request, prompt, self._spec)
        needed, room = self._capacity.needed(request, prompt, limit), self._capacity.room(request)
        if needed > room:
            raise InputTooLong(
                f"memory: the request may need {needed} blocks of {self._config.block_size} tokens, there are "
                f"{room}; ask for fewer tokens or rows",
                expected=room,
                got=needed,
            )

    def _prompt(self, request: GenerationRequest) -> Prompt:
        return Prompt.of(request, self._decoder_prompt)
