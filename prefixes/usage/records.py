"""The text of a row's subject and counts, as stores keep it. Owns its form; what it says is ``model``'s."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from prefixes.errors import RegistryUnavailable
from prefixes.spec_json import canonical_json
from prefixes.usage.model import COUNTS, Counts, DayOfUsage, Kind, Outcome, Subject

FORMAT: Final = 1


def subject_to_text(subject: Subject) -> str:
    """One text for each subject of a tenant."""
    return json.dumps(_parts(subject), separators=(",", ":"))


def subject_from_text(tenant: str, text: str) -> Subject:
    """What ``subject_to_text`` wrote. Raises RegistryUnavailable for anything else."""
    try:
        return _subject(tenant, json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(f"a row of {tenant}", error) from None


def counts_to_text(counts: Counts) -> str:
    """Numbers in the order of ``COUNTS``."""
    return " ".join(map(str, counts.values()))


def counts_from_text(text: str) -> Counts:
    """What ``counts_to_text`` wrote. Raises RegistryUnavailable for anything else."""
    try:
        return _counts(text.split(" "))
    except (ValueError, TypeError) as error:
        raise _damaged("counts", error) from None


def day_to_json(found: DayOfUsage) -> bytes:
    """A day as one document."""
    rows = [[subject.tenant, *_parts(subject), *counts.values()] for subject, counts in found.counts.items()]
    return canonical_json({"format": FORMAT, "batches": dict(found.batches), "rows": rows}).encode()


def day_from_json(day: str, data: bytes) -> DayOfUsage:
    """What ``day_to_json`` wrote. Raises RegistryUnavailable for anything else."""
    try:
        raw = json.loads(data)
        if raw["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {str(raw['format'])[:20]}")
        batches: Mapping[str, int] = {str(writer): int(number) for writer, number in raw["batches"].items()}
        counts = {_subject(tenant, rest[:5]): _counts(rest[5:]) for tenant, *rest in raw["rows"]}
        return DayOfUsage(day, batches, counts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _damaged(day, error) from None


def _parts(subject: Subject) -> list[str | None]:
    return [subject.kind.value, subject.key, subject.task, subject.version, subject.outcome.value]


def _subject(tenant: str, parts: Any) -> Subject:
    kind, key, task, version, outcome = parts
    return Subject(Kind(kind), tenant, key, task, version, Outcome(outcome))


def _counts(values: Iterable[Any]) -> Counts:
    numbers = [int(value) for value in values]
    if len(numbers) != len(COUNTS) or min(numbers) < 0:
        raise ValueError(f"expected {len(COUNTS)} counts")
    return Counts(*numbers)


def _damaged(where: str, error: Exception) -> RegistryUnavailable:
    return RegistryUnavailable(f"registry: its usage: {where}: {type(error).__name__}: {str(error)[:200]}")
