"""RedisTenancy: tenants and keys beside a registry in Redis.

Owns what a call of ``TenancyStore`` means in Redis. Each is one script, so that the registry's id, whether it is closed
and the document are of one moment.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import redis
from redis.cluster import RedisCluster

from prefixes.registry.redis import scripts
from prefixes.registry.redis.errors import guarded
from prefixes.registry.redis.identity import RedisIdentity
from prefixes.registry.redis.keys import DENIALS, REGISTRY, TENANCY, TENANCY_USED
from prefixes.spec import check_name
from prefixes.tenancy.denial import DENIALS_KEPT, Denial, denial_to_json, denials_from_json
from prefixes.tenancy.records import revision_of
from prefixes.tenancy.store import Stored


class RedisTenancy:
    """See ``store.TenancyStore``."""

    def __init__(self, client: redis.Redis | RedisCluster, identity: RedisIdentity) -> None:
        self._client, self._identity = client, identity
        self._read, self._replace, self._note, self._note_denials = (
            client.register_script(text)
            for text in (scripts.READ_TENANCY, scripts.REPLACE_TENANCY, scripts.NOTE_USED, scripts.NOTE_DENIALS)
        )

    def read(self, known: Stored | None = None) -> Stored:
        with guarded():
            raw, revision, data = self._read(keys=[REGISTRY], args=[known.revision if known else "-", TENANCY])
        mark = self._identity.check_mark(self._identity.parse(raw))
        if known and revision.decode() == known.revision:
            return known if mark.closed == known.closed else Stored(mark.closed, known.revision, known.data)
        return Stored(mark.closed, revision.decode(), data)

    def replace(self, data: bytes, planned_on: str, *, closing: bool = False) -> bool:
        self._identity.check()
        with guarded():
            made = self._replace(
                keys=[REGISTRY, TENANCY],
                args=[self._identity.id, planned_on, revision_of(data), data, "1" if closing else "0"],
            )
        return self._made(made)

    def used(self) -> dict[str, str]:
        with guarded():
            found = self._client.hgetall(TENANCY_USED)
        self._identity.check()
        return {key.decode(): time.decode() for key, time in found.items()}

    def note_used(self, times: Mapping[str, str]) -> None:
        if times:
            pairs = [text for pair in times.items() for text in pair]
            with guarded():
                self._made(self._note(keys=[REGISTRY, TENANCY_USED], args=[self._identity.id, *pairs]))

    def forget_used(self, keys: Collection[str]) -> None:
        self._identity.check()
        with guarded():
            self._client.hdel(TENANCY_USED, *keys)

    def note_denials(self, tenant: str | None, denials: Sequence[Denial]) -> None:
        lines = [denial_to_json(denial) for denial in denials]
        with guarded():
            self._made(
                self._note_denials(keys=[REGISTRY, _denials(tenant)], args=[self._identity.id, DENIALS_KEPT, *lines])
            )

    def denials(self, tenant: str | None) -> list[Denial]:
        with guarded():
            lines = self._client.lrange(_denials(tenant), 0, -1)
        self._identity.check()
        return denials_from_json(lines)

    def _made(self, answer: int) -> bool:
        if answer < 0:
            self._identity.check()
            raise self._identity.lost()
        return bool(answer)


def _denials(tenant: str | None) -> str:
    return DENIALS if tenant is None else f"{DENIALS}:{check_name('tenant', tenant)}"
