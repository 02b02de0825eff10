"""Backs up a registry in Redis, loses a part of it, and restores it, also in a way that is cut short. Knows no test."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.transfer import Outcome, Report, open_target, transfer
from tests.support.redis_server import RedisServer


def back_up(registry: Store, folder: Path) -> Store:
    """A backup of the registry, open."""
    backup = open_registry(f"disk://{folder / 'backup'}", registry_id=registry.id)
    assert transfer(registry, backup, mirror=True).bad == 0
    return backup


def restore(url: str, backup: Store, *, dry_run: bool = False) -> Report:
    """Restore ``backup`` to ``url``."""
    target = open_target(url, backup.id, dry_run=dry_run)
    assert target is not None
    with closing(target):
        return transfer(backup, target, dry_run=dry_run)


def cut_short(url: str, backup: Store, after: int = 1) -> None:
    """A restore that ends with its process, ``after`` so many tasks."""

    def cut(outcome: Outcome, done: int, due: int) -> None:
        if done == after:
            raise KeyboardInterrupt

    target = open_target(url, backup.id)
    assert target is not None
    with closing(target), pytest.raises(KeyboardInterrupt):
        transfer(backup, target, progress=cut)


def lose(server: RedisServer, tag: str) -> None:
    """Everything under a hash tag is gone, as with the node that had it."""
    with server.client() as client:
        client.delete(*client.scan_iter(match=f"*{{{tag}}}*", count=1000))


def snapshot(server: RedisServer) -> dict[bytes, bytes]:
    """Every key and its content."""
    with server.client() as client:
        return {key: client.dump(key) for key in client.scan_iter(count=1000)}


def results(report: Report) -> dict[str, str]:
    """Each task's result."""
    return {outcome.task: outcome.result for outcome in report.outcomes}
