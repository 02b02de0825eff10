"""Copies what tenants used from a registry to its backup and back.

Owns which days are copied. A day of the target is replaced where every batch that made it is in the source's too. So a
restore brings back what was lost, and takes nothing from a registry that has gone on since the backup.
"""

from __future__ import annotations

from prefixes.registry.base import Store


def copy_usage(source: Store, target: Store | None, *, mirror: bool, dry_run: bool) -> int:
    """How many days were copied, or would be. ``mirror`` also replaces a day that has batches of its own."""
    if target is not None and target.id != source.id:
        return 0
    copied = 0
    for day in source.usage.days():
        found = source.usage.day(day)
        there = target.usage.day(day) if target is not None else None
        if there is not None and (there.covers(found) or not (mirror or found.covers(there))):
            continue
        copied += 1
        if target is not None and not dry_run:
            target.usage.put(found)
    return copied
