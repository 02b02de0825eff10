"""Turns what a caller asks into a running request. Every route admits its requests here.

Owns the order of admission: who, which version, which parameters, which tokens, is it within the caller's limits, does
it fit, is there room. Each step raises its own named error. Only the last two change anything, and what was reserved is
given back where the last one refuses. Knows no HTTP.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixes.backbone import Backbone
from prefixes.errors import InputTooLong, InvalidParameter
from prefixes.registry.base import Resolved
from prefixes.spec import PrefixSpec, TaskRef
from server.answers import Identity
from server.engine.async_engine import AsyncEngine, EventStream
from server.engine.row import Prompt
from server.engine.types import GenerationRequest, PrefixKey, SamplingParams
from server.parameters import ParameterLimits, merge_parameters
from server.registry.catalog import Catalog
from server.reservations import Reservation, Reservations, Told
from server.tokenizing import Tokenizing
from server.web.auth import Action, Caller, authorize


@dataclass(frozen=True)
class Prepared:
    """A request with everything resolved, validated and tokenised; not yet submitted."""

    identity: Identity
    request: GenerationRequest


@dataclass(frozen=True)
class Running:
    """A request that the engine has accepted. Its holder must read ``stream`` to its end or abort it."""

    identity: Identity
    stream: EventStream
    params: SamplingParams
    prompt_ids: tuple[int, ...]  # that its outputs stand behind


class GenerationService:
    """Admits requests for one backbone and one engine."""

    def __init__(
        self,
        backbone: Backbone,
        catalog: Catalog,
        engine: AsyncEngine,
        limits: ParameterLimits,
        tokenizing: Tokenizing,
        reservations: Reservations,
    ) -> None:
        self.backbone = backbone
        self._catalog = catalog
        self._engine = engine
        self.limits = limits
        self._tokenizing = tokenizing
        self._reservations = reservations
        self._numbers = itertools.count()

    async def prepare(
        self, caller: Caller, task: str | None, text: str, parameters: Mapping[str, Any], request_id: str
    ) -> Prepared:
        """Do every step of the admission that changes nothing.

        Raises InvalidName, Forbidden, TaskNotFound, RegistryUnavailable, IncompatiblePrefix, InvalidParameter,
        InputTooLong, QueueFull.
        """
        resolved = await self._resolve(caller, task)
        spec = resolved.spec if resolved else None
        key = PrefixKey(resolved.tenant, resolved.version) if resolved else None
        if key:
            self._catalog.require_loadable(key, lambda: key in self._engine.residents())
        params, truncate = merge_parameters(
            parameters,
            spec.defaults if spec else {},
            self.backbone.generation_defaults,
            self._reservations.parameter_limits(caller, self.limits),
        )
        token_ids, truncated = await self._tokenize(spec, text, truncate)
        label = f"{resolved.tenant}/{resolved.name}" if resolved else None
        request = GenerationRequest(
            request_id=f"{request_id}#{next(self._numbers)}",  # a caller may send one id twice
            caller=caller.tenant,
            token_ids=token_ids,
            params=params,
            prefix=key,
            prefix_spec=spec,
            task=label,
            key=caller.key_id,
        )
        return Prepared(Identity(request_id, label, resolved.version if resolved else None, truncated), request)

    async def reserve(self, caller: Caller, prepared: Sequence[Prepared], told: Told) -> Reservation:
        """Take from the caller's limits what they may need together, see ``Reservations.reserve``."""
        return await self._reservations.reserve(caller, [one.request for one in prepared], told)

    def submit(self, prepared: Prepared, reservation: Reservation) -> Running:
        """Submit it to the engine, within the ``with`` of its reservation.

        Raises QueueFull, ShuttingDown, InputTooLong, InvalidParameter.
        """
        stream = self._engine.submit(prepared.request, reservation.ended)
        reservation.begun()
        prompt = Prompt.of(prepared.request, self.backbone.decoder_prompt)
        return Running(prepared.identity, stream, prepared.request.params, prompt.decoder_ids)

    async def admit(
        self, caller: Caller, task: str | None, text: str, parameters: Mapping[str, Any], request_id: str, told: Told
    ) -> Running:
        """``prepare``, ``reserve`` and ``submit``."""
        prepared = await self.prepare(caller, task, text, parameters, request_id)
        with await self.reserve(caller, [prepared], told) as reservation:
            return self.submit(prepared, reservation)

    async def _resolve(self, caller: Caller, task: str | None) -> Resolved | None:
        if task is None:
            authorize(caller, Action.GENERATE, None)
            return None
        ref = TaskRef.parse(task, caller.tenant)
        authorize(caller, Action.GENERATE, ref.tenant, ref.name)
        return await self._catalog.resolve(ref, caller.tenant)

    async def _tokenize(self, spec: PrefixSpec | None, text: str, truncate: bool) -> tuple[tuple[int, ...], bool]:
        """Token ids of the prompt, and whether the input's end was cut off to fit the window."""
        template = spec.template if spec else self.backbone.input_template
        room = self.backbone.spec.input_room(spec)
        fitted = await self._tokenizing.fit(self.backbone.prompt_encoder, template, text, room, truncate)
        if fitted.got == 0:
            raise InvalidParameter("input: expected at least one token, got none", parameter="input")
        if fitted.token_ids is None:
            raise InputTooLong(
                f"input: expected at most {room} tokens ({self.backbone.spec.input_limit(spec)}), got "
                f"{fitted.shown} with the task's template"
                + ("" if truncate else "; parameters.truncate cuts it"),
                expected=room,
                got=fitted.got,
            )
        return fitted.token_ids, fitted.truncated
