"""RedisUsage: what tenants used, beside a registry in Redis.

Owns what a call of ``UsageStore`` means in Redis. A batch is one script: the registry's id, the batch's number and its
counts are of one moment. All its keys have the registry's hash tag and so lie in one slot of a Cluster. Redis itself
ends what is past its days.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from typing import Final

import redis
from redis.cluster import RedisCluster

from prefixes.errors import RegistryUnavailable
from prefixes.registry.redis import usage_scripts as scripts
from prefixes.registry.redis.errors import guarded
from prefixes.registry.redis.identity import RedisIdentity
from prefixes.registry.redis.keys import REGISTRY, USAGE, usage_batches, usage_of
from prefixes.usage.model import DAYS_KEPT, MAX_ROWS, Batch, Counts, DayOfUsage, Row, Subject, first_kept
from prefixes.usage.records import counts_from_text, counts_to_text, subject_from_text, subject_to_text

_CHUNK: Final = 20  # tenants' days read by one pipeline
_TRIES: Final = 100  # to read a day while nobody adds to it


class RedisUsage:
    """See ``store.UsageStore``."""

    def __init__(self, client: redis.Redis | RedisCluster, identity: RedisIdentity) -> None:
        self._client, self._identity = client, identity
        self._add, self._put, self._put_batches = (
            client.register_script(text)
            for text in (scripts.ADD_USAGE, scripts.PUT_USAGE, scripts.PUT_USAGE_BATCHES)
        )

    def add(self, batch: Batch) -> bool:
        if batch.day < first_kept():
            return False
        by_tenant: dict[str, list[tuple[str, str, tuple[str, ...]]]] = defaultdict(list)
        for subject, counts in batch.counts.items():
            numbers = tuple(map(str, counts.values()))
            by_tenant[subject.tenant].append((subject_to_text(subject), subject_to_text(subject.folded), numbers))
        members = [_member(batch.day, tenant) for tenant in by_tenant]
        with guarded():
            added = self._add(
                keys=[REGISTRY, USAGE, usage_batches(batch.day), *(usage_of(member) for member in members)],
                args=[
                    *self._asking, batch.writer, batch.number, _end_of(batch.day), f"({first_kept()}", MAX_ROWS,
                    json.dumps(list(zip(members, by_tenant.values(), strict=True))),
                ],
            )  # fmt: skip
        return self._made(added)

    def read(self, first: str, last: str, tenant: str | None = None) -> Iterator[Row]:
        found = [one for one in self._members(first, last) if tenant in (None, _tenant_of(one))]
        for begin in range(0, len(found), _CHUNK):
            for member, sums in self._sums(found[begin : begin + _CHUNK]):
                yield from (Row(_day_of(member), subject, counts) for subject, counts in sums.items())
        self._identity.check()

    def days(self) -> list[str]:
        found = sorted({_day_of(member) for member in self._members(first_kept(), "9999-12-31")})
        self._identity.check()
        return found

    def day(self, day: str) -> DayOfUsage:
        before = self._batches(day)
        for _ in range(_TRIES):
            sums: dict[Subject, Counts] = {row.subject: row.counts for row in self.read(day, day)}
            batches, before = before, self._batches(day)
            if batches == before:
                return DayOfUsage(day, batches, sums)
        raise RegistryUnavailable(f"registry: its usage of {day} changes too quickly to be copied; try again")

    def put(self, found: DayOfUsage) -> None:
        by_tenant: dict[str, list[str]] = {_tenant_of(member): [] for member in self._members(found.day, found.day)}
        for subject, counts in found.counts.items():
            by_tenant.setdefault(subject.tenant, []).extend((subject_to_text(subject), counts_to_text(counts)))
        end = _end_of(found.day)
        with guarded():
            for tenant, pairs in by_tenant.items():
                member = _member(found.day, tenant)
                keys = [REGISTRY, USAGE, usage_of(member)]
                self._made(self._put(keys=keys, args=[*self._asking, end, member, *pairs]))
            numbers = [part for pair in found.batches.items() for part in pair]
            keys = [REGISTRY, usage_batches(found.day)]  # the batches last: a copy that was cut short covers nothing
            self._made(self._put_batches(keys=keys, args=[*self._asking, end, *numbers]))

    def _batches(self, day: str) -> dict[str, int]:
        with guarded():
            found = self._client.hgetall(usage_batches(day))
        return {writer.decode(): int(number) for writer, number in found.items()}

    @property
    def _asking(self) -> tuple[str, str]:
        return self._identity.id, "1" if self._identity.restoring else "0"

    def _members(self, first: str, last: str) -> list[str]:
        with guarded():
            found = self._client.zrangebylex(USAGE, f"[{first}:", f"({last};")  # ";" comes right after ":"
        return [member.decode() for member in found]

    def _sums(self, members: Sequence[str]) -> Iterator[tuple[str, dict[Subject, Counts]]]:
        with guarded(), self._client.pipeline(transaction=False) as batch:
            for member in members:
                batch.hgetall(usage_of(member))
            answers = batch.execute()
        for member, rows in zip(members, answers, strict=True):
            tenant = _tenant_of(member)
            yield member, {
                subject_from_text(tenant, field.decode()): counts_from_text(counts.decode())
                for field, counts in rows.items()
            }

    def _made(self, answer: int) -> bool:
        if answer < 0:
            self._identity.check()
            raise self._identity.lost()
        return bool(answer)


def _member(day: str, tenant: str) -> str:
    return f"{day}:{tenant}"


def _day_of(member: str) -> str:
    return member.partition(":")[0]


def _tenant_of(member: str) -> str:
    return member.partition(":")[2]


def _end_of(day: str) -> int:
    """When a day is no longer kept, in seconds of Unix time."""
    end = date.fromisoformat(day) + timedelta(days=DAYS_KEPT)
    return int(datetime.combine(end, time(), UTC).timestamp())
