"""One story of a registry, told to 3b858cc's stores: see ``write.py``, which runs it.

Owns what the registry holds and how its killed writers were killed; knows not where it is stored.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.registry import open_registry
from prefixes.registry.base import Store
from prefixes.registry.disk_writer import DiskWriter
from prefixes.registry.files import Files
from prefixes.registry.records import audit_to_dict, deleted_to_dict, task_to_dict
from prefixes.registry.redis import RedisRegistry
from prefixes.registry.redis_writer import RedisWriter
from tests.support.prefixes import make_backbone_spec, make_encoder_decoder_spec, make_prefix

TENANTS = ("acme", "default", "initech")
TINY = make_backbone_spec(layers=1, kv_heads=1, head_dim=2)
SMALL = [write_prefix(make_prefix(TINY, length=2, seed=seed, origin={"seed": seed})) for seed in range(4)]
VERSIONS = [version_of(read_prefix(data)) for data in SMALL]
ORPHAN = write_prefix(make_prefix(TINY, length=1, seed=4))
RICH = write_prefix(
    make_prefix(
        make_encoder_decoder_spec(), length=1, seed=5, dtype=torch.bfloat16, sites=("decoder", "encoder", "cross"),
        positions="unshifted", template="<s>{input}</s>", defaults={"num_beams": 4, "max_new_tokens": 32},
    )
)  # fmt: skip


def tell_registry(registry: Store, url: str, job: str, work: Path) -> None:
    """Tasks, versions, moves, deletions and leftovers; ``job`` is the id of a job that has published."""
    by, publish = "tenant:acme", registry.publish
    publish("acme", "spent", SMALL[3], record={}, actor=by)
    registry.delete("acme", "spent", actor=by)
    registry.gc(retention_s=0, actor="admin")

    first = publish("acme", "e2e", SMALL[0], record={"scores": {"bleu": 68.2}}, actor=by, once="run-1").version
    second = publish("acme", "e2e", SMALL[1], record={"scores": {"bleu": 70.1}, "job": job}, actor=by, once=job).version
    registry.promote("acme", "e2e", first, expected_current=second, actor="admin")
    registry.rollback("acme", "e2e", actor="admin")
    publish("acme", "e2e", SMALL[2], alias="canary", record={}, actor=by, once="run-3")
    publish("acme", "e2e", RICH, alias=None, record={"note": "ä ☕"}, actor=by)
    publish("acme", "e2e", SMALL[0], record={"checked": True}, actor=by)

    publish("acme", "gone", SMALL[1], record={}, actor=by, once="run-1")
    publish("acme", "gone", SMALL[3], record={"cost": 0.5}, actor=by)
    registry.delete("acme", "gone", actor=by)
    publish("acme", "replaced", SMALL[0], record={}, actor=by)
    registry.delete("acme", "replaced", actor=by)
    publish("acme", "replaced", SMALL[1], record={}, actor=by)
    publish("acme", "back", SMALL[2], record={}, actor=by)
    registry.delete("acme", "back", actor=by)
    registry.undelete("acme", "back", actor="admin")
    with closing(open_registry(f"{work}/other")) as other:
        other.publish("acme", "copied", SMALL[2], record={"from": "elsewhere"}, actor=by)
        registry.adopt(other.inspect("acme", "copied"), lambda version: other.fetch("acme", version), actor="admin")
    publish("default", "e2e", SMALL[0], record={}, actor="local")
    publish("default", "e2e", SMALL[1], record={}, actor="local")

    # What writers left that were killed. The last one in each tenant's folder still lies there.
    disk = url.startswith("disk:")
    writer = DiskWriter if disk else RedisWriter
    killed(url, writer, "edit", lambda store: store.publish("acme", "orphan", ORPHAN, record={}))
    blob_kept = (os, "replace") if disk else (RedisRegistry, "write_blob")
    killed(url, *blob_kept, lambda store: store.publish("initech", "e2e", SMALL[0], record={}))
    if disk:
        killed(url, Files, "append_line", lambda store: move_canary(store, second))  # made, and not yet in the audit
        killed(url, Files, "remove", lambda store: store.delete("default", "e2e"))  # announced, and never made
    else:
        move_canary(registry, second)


def move_canary(registry: Store, version: str) -> None:
    registry.promote("acme", "e2e", version, alias="canary", actor="late")


def tell_restoring(url: str, source: Store) -> None:
    """A registry that is being restored by one who was killed: a tenant is back, half of another."""
    with closing(open_registry(url, registry_id=source.id, restoring=True)) as registry:
        adopt(registry, source, "acme", "copied")
    writer = DiskWriter if url.startswith("disk:") else RedisWriter
    killed(url, writer, "edit", lambda store: adopt(store, source, "default", "e2e"), restoring=True)


def adopt(registry: Store, source: Store, tenant: str, name: str) -> None:
    registry.adopt(source.inspect(tenant, name), lambda version: source.fetch(tenant, version), actor="admin")


def killed(url: str, owner: Any, method: str, change: Callable[[Store], object], **options: Any) -> None:
    """A process of its own makes ``change`` and is killed where it first calls ``method``."""
    child = os.fork()
    if not child:
        setattr(owner, method, lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL))
        change(open_registry(url, **options))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def registry_as_read(registry: Store) -> dict[str, Any]:
    tasks = registry.tasks()
    kept = [*tasks, *(item.task for item in registry.deleted())]
    named = sorted({(task.tenant, info.version) for task in kept for info in task.versions})
    return {
        "id": registry.id,
        "tenants": registry.tenants(),
        "tasks": [task_to_dict(task) for task in tasks],
        "deleted": [deleted_to_dict(item) for item in registry.deleted()],
        "audit": {tenant: [audit_to_dict(entry) for entry in registry.audit(tenant)] for tenant in TENANTS},
        "artifacts": {
            f"{tenant}/{version}": hashlib.sha256(registry.fetch(tenant, version)).hexdigest()
            for tenant, version in named
        },
    }
