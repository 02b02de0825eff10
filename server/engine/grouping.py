"""Makes the group of a request: its prompt, its limits, and the rows that it begins with.

Owns what a new group is made of. Knows neither queues nor blocks.
"""

from __future__ import annotations

import secrets
import time

from prefixes.backbone import Backbone
from server.engine.decoding.beams import BeamSearch
from server.engine.decoding.detokenizer import Detokenizer
from server.engine.decoding.state import DecodingState
from server.engine.decoding.token_rules import TokenRules
from server.engine.memory.prompt_reuse import chain_root
from server.engine.row import Group, Prompt, Row
from server.engine.scheduling.admission import output_limit
from server.engine.types import GenerationRequest


class GroupMaker:
    """Makes groups for one backbone."""

    def __init__(self, backbone: Backbone, rules: TokenRules) -> None:
        self._spec, self._rules = backbone.spec, rules
        self._tokenizer, self._decoder_prompt = backbone.tokenizer.backend_tokenizer, backbone.decoder_prompt

    def __call__(self, request: GenerationRequest, submitted_at: float | None) -> Group:
        """The group of a checked request; ``submitted_at`` None is now."""
        params = request.params
        prompt = Prompt.of(request, self._decoder_prompt)
        max_new_tokens = output_limit(request, prompt, self._spec)
        beams = BeamSearch(params, max_new_tokens, self._rules) if params.num_beams > 1 else None
        detokenizer = None if beams else Detokenizer(self._tokenizer, params.stop, prompt.decoder_ids)
        state = DecodingState(0, list(prompt.decoder_ids), len(prompt.decoder_ids), detokenizer)
        return Group(
            request=request,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            submitted_at=time.monotonic() if submitted_at is None else submitted_at,
            chain_root=chain_root(request, prompt.encoder_ids),
            rows=[Row(state.fork(index)) for index in range(1 if beams else params.rows)],
            beams=beams,
        )
