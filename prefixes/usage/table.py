"""Sums rows of usage by what somebody wants to see, with what that costs. Owns the answer's form; knows no store.

An answer is plain JSON, the same from a registry and over HTTP: ``rows`` by ``by``, their ``total``, and ``of_shared``,
others' use of one's own tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Any, Final

from prefixes.errors import InvalidParameter
from prefixes.usage.model import COUNTS, Counts, Kind, Outcome, Row, Subject
from prefixes.usage.prices import DIGITS, PriceTable, shown

BY: Final = ("day", "tenant", "key", "task", "version", "outcome", "kind")
"""What rows can be summed by."""
SHARED_BY: Final = ("day", "task", "version", "outcome")
"""The same for others' use of one's own tasks, whose names are not to be known."""
DEFAULT_BY: Final = ("task",)
MAX_ANSWER: Final = 10_000
"""Rows of an answer; a shorter time, or fewer names in ``by``, makes them fewer."""

Group = tuple[str | None, ...]


@dataclass
class _Sum:
    counts: Counts = field(default_factory=Counts)
    cost: Decimal = Decimal(0)

    def add(self, counts: Counts, cost: Decimal) -> None:
        self.counts = self.counts + counts
        with localcontext(prec=DIGITS):
            self.cost += cost


def parse_by(text: str) -> tuple[str, ...]:
    """Names with commas. Raises InvalidParameter."""
    names = tuple(name.strip() for name in text.split(","))
    if not set(names) <= set(BY) or len(set(names)) != len(names):
        raise InvalidParameter(f"by: expected some of {', '.join(BY)}, each once, got {text[:80]!r}", parameter="by")
    return names


def summed(
    rows: Iterable[Row],
    first: str,
    last: str,
    *,
    by: Sequence[str] = DEFAULT_BY,
    tenant: str | None = None,
    prices: PriceTable | None = None,
) -> dict[str, Any]:
    """The answer for ``rows``, which are those of ``tenant`` or of all, from ``first`` to ``last``.

    Where they are of all, nobody's use is shown as that of a shared task: it is somebody's own in ``rows``. Raises
    InvalidParameter for more than MAX_ANSWER rows.
    """
    own: dict[Group, _Sum] = {}
    shared: dict[Group, _Sum] = {}
    total = _Sum()
    shared_by = tuple(name for name in SHARED_BY if name in by or name == "task")
    for row in rows:
        if row.subject.kind is Kind.SHARED:
            if tenant is not None:
                _sum_of(shared, row, shared_by).add(row.counts, Decimal(0))
            continue
        cost = prices.cost(row.subject, row.counts) if prices else Decimal(0)
        for one in (_sum_of(own, row, by), total):
            one.add(row.counts, cost)
    return {
        "from": first,
        "to": last,
        "tenant": tenant,
        "by": list(by),
        "currency": prices.currency if prices else None,
        "rows": _shown(own, by, costs=prices is not None),
        "total": _numbers(total, costs=prices is not None),
        "of_shared": _shown(shared, shared_by, costs=False),
    }


def priced(answer: Mapping[str, Any], by: Sequence[str], prices: PriceTable) -> dict[str, Any]:
    """An answer that has tenants and tasks apart, summed by ``by`` with other prices."""
    rows = [
        Row(
            row.get("day", answer["from"]),
            Subject(
                Kind(row.get("kind", Kind.GENERATION)), row["tenant"], row.get("key"), row["task"], row.get("version"),
                Outcome(row.get("outcome", Outcome.FINISHED)),
            ),
            Counts(*(round(1000 * row["training_seconds"]) if name == "training_ms" else row[name] for name in COUNTS)),
        )
        for row in answer["rows"]
    ]  # fmt: skip
    found = summed(rows, answer["from"], answer["to"], by=by, tenant=answer["tenant"], prices=prices)
    return {**found, "of_shared": answer["of_shared"]}


def _sum_of(sums: dict[Group, _Sum], row: Row, by: Sequence[str]) -> _Sum:
    group = tuple(row.day if name == "day" else getattr(row.subject, name) for name in by)
    found = sums.get(group)
    if found is None:
        if len(sums) >= MAX_ANSWER:
            raise InvalidParameter(
                f"usage: expected at most {MAX_ANSWER} rows, got more; ask for fewer days, or for less in by",
                expected=MAX_ANSWER,
            )
        found = sums[group] = _Sum()
    return found


def _shown(sums: Mapping[Group, _Sum], by: Sequence[str], *, costs: bool) -> list[dict[str, Any]]:
    ordered = sorted(sums.items(), key=lambda item: tuple((part is not None, part or "") for part in item[0]))
    return [{**dict(zip(by, group, strict=True)), **_numbers(one, costs=costs)} for group, one in ordered]


def _numbers(one: _Sum, *, costs: bool) -> dict[str, Any]:
    counts = one.counts
    return {
        "requests": counts.requests,
        "input_tokens": counts.input_tokens,
        "prefix_tokens": counts.prefix_tokens,
        "output_tokens": counts.output_tokens,
        "jobs": counts.jobs,
        "training_steps": counts.training_steps,
        "training_tokens": counts.training_tokens,
        "training_seconds": counts.training_ms / 1000,
        **({"cost": shown(one.cost)} if costs else {}),
    }
