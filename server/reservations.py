"""Reservations: what requests may need at most is taken from their callers' limits before they begin, and settled.

Owns how many tokens a request may need, the errors of limits, which reservations are open, and when the limiter is
asked: once at admission and once at the end, off the event loop if that waits for a network. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from typing import Final, ParamSpec, Self, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from prefixes.errors import InvalidParameter, PrefixdError, QuotaExceeded, RateLimited
from prefixes.limiter.base import Charge, Limiter, Refused, State, Taken, Window
from prefixes.limiter.charges import charges_for, name_of
from prefixes.tenancy.keyring import Keyring
from server.engine.types import Failed, Finished, GenerationRequest
from server.parameters import ParameterLimits
from server.web.auth import Caller

TTL_S: Final = 600.0
"""How long after this process died its reservations are given back."""
RENEW_S: Final = 200.0
THREADS: Final = 16
"""Calls of a remote limiter at once."""
CLOSE_S: Final = 3.0
"""How long the last settlements may take."""

Told = Callable[[Sequence[State]], None]
"""Told how a request's limits stand, once they were asked."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_log = logging.getLogger("prefixd.limits")


class Reservation:
    """What one or several requests of a caller have taken together.

    In a ``with`` block these are submitted. What was not when it ends is given back. When the last one that was has
    ended, what they computed is settled, once.
    """

    def __init__(self, settle: Callable[[dict[str, int]], None] | None) -> None:
        """``settle`` takes what was used of each counter; None where there is nothing to settle."""
        self._settle = settle
        self._begun = self._ended = self._tokens = 0
        self._closed = False

    def begun(self) -> None:
        """One more request was submitted."""
        self._begun += 1

    def ended(self, event: Finished | Failed) -> None:
        """One of them has ended; to be called once for each."""
        self._ended += 1
        if event.usage is not None:
            self._tokens += event.usage.input_tokens + event.usage.prefix_tokens + event.usage.output_tokens
        self._settle_at_end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True
        self._settle_at_end()

    def _settle_at_end(self) -> None:
        if self._settle is not None and self._closed and self._ended == self._begun:
            self._settle({"requests": self._begun, "tokens": self._tokens})


class Reservations:
    """Reserves for the callers of one server. Its methods run on the event loop.

    Where nobody needs a key nothing is limited.
    """

    def __init__(self, limiter: Limiter, keyring: Keyring) -> None:
        self._limiter, self._keyring = limiter, keyring
        self._process = uuid.uuid4().hex  # a client may send one request id to two replicas
        self._threads = anyio.CapacityLimiter(THREADS)
        self._open: dict[str, str] = {}  # id of a reservation -> tenant
        self._settling: set[asyncio.Task[None]] = set()

    def parameter_limits(self, caller: Caller, limits: ParameterLimits) -> ParameterLimits:
        """``limits``, lowered to the caller's own."""
        if caller.key_id is None:
            return limits
        for own in self._keyring.both_limits_of(caller.tenant, caller.key_id):
            limits = limits.within(own.max_new_tokens, own.num_beams)
        return limits

    async def reserve(self, caller: Caller, requests: Sequence[GenerationRequest], told: Told) -> Reservation:
        """Take from all limits of the caller what ``requests`` may need at most, or nothing.

        Raises RateLimited, QuotaExceeded, InvalidParameter for what is above a whole limit.
        """
        charges = self._charges(caller, requests)
        if not charges:
            return Reservation(None)
        for charge in charges:
            if charge.is_impossible:
                raise _above(charge)
        reservation_id = f"{self._process}:{requests[0].request_id}"
        answer = await self._take(caller.tenant, reservation_id, charges)
        told(answer.states)
        if isinstance(answer, Refused):
            raise _refused(answer)
        self._open[reservation_id] = caller.tenant
        return Reservation(lambda used: self._settle(caller.tenant, reservation_id, used))

    async def keep(self) -> None:
        """Until cancelled, renew what is open."""
        while True:
            await asyncio.sleep(RENEW_S)
            await self.renew()

    async def renew(self) -> None:
        """Renew what is open, so that it expires only with this process."""
        by_tenant: dict[str, list[str]] = {}
        for reservation_id, tenant in self._open.items():
            by_tenant.setdefault(tenant, []).append(reservation_id)
        for tenant, ids in by_tenant.items():
            with contextlib.suppress(PrefixdError):
                await self._call(self._limiter.renew, tenant, ids, TTL_S)

    async def close(self) -> None:
        """Wait for the last settlements, and close the limiter."""
        if self._settling:
            _, late = await asyncio.wait(self._settling, timeout=CLOSE_S)
            if late:
                _log.warning("settlements were left behind", extra={"facts": {"count": len(late)}})
        await anyio.to_thread.run_sync(self._limiter.close)

    def _charges(self, caller: Caller, requests: Sequence[GenerationRequest]) -> tuple[Charge, ...]:
        if caller.key_id is None:
            return ()
        of_tenant, of_key = self._keyring.both_limits_of(caller.tenant, caller.key_id)
        amounts = {"requests": len(requests), "tokens": sum(map(most_tokens, requests))}
        return charges_for(amounts, of_tenant, caller.key_id, of_key)

    async def _take(self, tenant: str, reservation_id: str, charges: Sequence[Charge]) -> Taken | Refused:
        answer = await self._call(self._limiter.take, tenant, reservation_id, charges, TTL_S)
        if self._limiter.remote and isinstance(answer, Taken):
            try:
                await anyio.lowlevel.checkpoint_if_cancelled()  # a thread cannot be cancelled, its request can
            except BaseException:
                self._settle(tenant, reservation_id, {"requests": 0, "tokens": 0})
                raise
        return answer

    async def _call(self, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not self._limiter.remote:
            return function(*args, **kwargs)
        return await anyio.to_thread.run_sync(lambda: function(*args, **kwargs), limiter=self._threads)

    def _settle(self, tenant: str, reservation_id: str, used: dict[str, int]) -> None:
        self._open.pop(reservation_id, None)
        if not self._limiter.remote:
            self._limiter.settle(tenant, reservation_id, used)
            return
        task = asyncio.create_task(self._call(self._limiter.settle, tenant, reservation_id, used))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)


def most_tokens(request: GenerationRequest) -> int:
    """The most tokens that a request may be billed for: input, prefix, and ``max_new_tokens`` of each row."""
    sites = request.prefix_spec.sites.values() if request.prefix_spec else ()
    prefix = sum(site.length for site in sites)
    return len(request.token_ids) + prefix + request.params.rows * request.params.max_new_tokens


def _whose(charge: Charge) -> dict[str, str]:
    return {"limit": name_of(charge), "of": "key" if charge.key else "tenant"}


def _above(charge: Charge) -> InvalidParameter:
    whose = _whose(charge)
    return InvalidParameter(
        f"{whose['limit']} of the {whose['of']}: expected a request of at most {charge.limit} {charge.counter}, got "
        f"one that may take {charge.amount}: its input, its prefix, and max_new_tokens of each row",
        parameter="max_new_tokens",
        **whose,
        expected=charge.limit,
        got=charge.amount,
    )


def _refused(answer: Refused) -> RateLimited | QuotaExceeded:
    state = answer.by
    charge, got = state.charge, state.used + state.charge.amount
    whose = _whose(charge)
    facts = {**whose, "expected": charge.limit, "got": got}
    message = (
        f"{whose['limit']} of the {whose['of']}: expected at most {charge.limit}, got {got}: {state.used} used or "
        f"reserved, and {charge.amount} for this request"
    )
    if charge.window is Window.MINUTE:
        return RateLimited(message, **facts, retry_after_s=state.wait_s)
    return QuotaExceeded(message, **facts, resets_in_s=round(state.reset_s))
