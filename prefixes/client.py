"""RemoteRegistry: the registry of a running server, over HTTP, behind the same Protocol as any other.

Owns the caller's side of the HTTP contract of ``serve``. Knows no store. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import httpx

from prefixes.errors import PrefixdError, RegistryUnavailable, TaskNotFound
from prefixes.registry.base import UNKNOWN_ACTOR, Resolved, TaskInfo, VersionInfo
from prefixes.registry.records import task_from_dict
from prefixes.registry.transitions import resolved, version_of_task
from prefixes.remote import Remote, RemoteError
from prefixes.spec import DEFAULT_ALIAS, TaskRef, check_name, check_version
from prefixes.tenancy.limits import Limits

__all__ = ["RemoteError", "RemoteRegistry"]


class RemoteRegistry:
    """Implements ``base.Registry``. Raises the server's own errors, by their codes.

    ``fetch`` searches for the task that has the version. ``download`` is given the task and is cheaper.
    """

    def __init__(self, url: str, *, api_key: str | None = None, client: httpx.Client | None = None) -> None:
        """``url`` is the server's, such as ``http://localhost:8000``. Raises RegistryUnavailable for any other form."""
        self._server = Remote("server", RegistryUnavailable, url, api_key=api_key, client=client)

    @cached_property
    def own_tenant(self) -> str:
        """The tenant as which the server knows the caller: names without one belong to it."""
        found = self._server.json("GET", "/caller")
        tenant = found.get("tenant") if isinstance(found, dict) else None
        if not isinstance(tenant, str):
            raise self._server.foreign("a tenant")
        return check_name("tenant", tenant)

    def summaries(self) -> list[dict[str, Any]]:
        """The list of ``GET /prefixes``: task, aliases, version, versions, prefix_tokens, resident."""
        listed = self._server.json("GET", "/prefixes")
        prefixes = listed.get("prefixes") if isinstance(listed, dict) else None
        if not isinstance(prefixes, list) or not all(isinstance(item, dict) and "task" in item for item in prefixes):
            raise self._server.foreign("a list of prefixes")
        return prefixes

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        """As in the Protocol. Sends one request per task."""
        names = (str(item["task"]).partition("/") for item in self.summaries())
        found = sorted((owner, name) for owner, _, name in names if tenant in (None, owner))
        return [self.inspect(owner, name) for owner, name in found]

    def inspect(self, tenant: str, name: str) -> TaskInfo:
        return self._task(self._server.json("GET", _path(tenant, name)))

    def resolve(self, ref: TaskRef) -> Resolved:
        return resolved(self.inspect(ref.tenant, ref.name), ref)

    def fetch(self, tenant: str, version: str) -> bytes:
        check_version(version)
        for task in self.tasks(check_name("tenant", tenant)):
            if any(info.version == version for info in task.versions):
                return self.download(tenant, task.name, version)
        raise TaskNotFound(f"version {version}: expected one of tenant {tenant!r}, found none", version=version)

    def download(self, tenant: str, name: str, version: str) -> bytes:
        """The bytes of one version of a task."""
        return self._server.send("GET", f"{_path(tenant, name)}/versions/{check_version(version)}").content

    def publish(
        self,
        tenant: str,
        name: str,
        data: bytes,
        *,
        alias: str | None = DEFAULT_ALIAS,
        expected_current: str | None = None,
        record: Mapping[str, Any],
        actor: str = UNKNOWN_ACTOR,
        idempotency_key: str | None = None,
        note: str | None = None,
        quota: Limits | None = None,
    ) -> VersionInfo:
        """As in the Protocol. The server knows the caller by the API key, so no method sends ``actor`` or ``quota``."""
        _path(tenant, name)
        fields = {"task": f"{tenant}/{name}", "alias": alias or "", "record": json.dumps(dict(record))}
        if expected_current is not None:
            fields["expected_current"] = expected_current
        if idempotency_key is not None:
            fields["once"] = check_name("publish key", idempotency_key)
        if note is not None:
            fields["note"] = note
        file = (f"{name}.safetensors", data, "application/octet-stream")
        answer = self._server.json("POST", "/prefixes", data=fields, files={"file": file})
        if not isinstance(answer, dict) or not isinstance(answer.get("version"), str):
            raise self._server.foreign("a published version")
        return version_of_task(self.inspect(tenant, name), answer["version"])

    def promote(
        self,
        tenant: str,
        name: str,
        version: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expected_current: str | None = None,
        actor: str = UNKNOWN_ACTOR,
    ) -> TaskInfo:
        body = {"version": check_version(version), "alias": alias}
        if expected_current is not None:
            body["expected_current"] = expected_current
        return self._task(self._server.json("POST", f"{_path(tenant, name)}/promote", json=body))

    def rollback(
        self,
        tenant: str,
        name: str,
        *,
        alias: str = DEFAULT_ALIAS,
        expected_current: str | None = None,
        actor: str = UNKNOWN_ACTOR,
    ) -> TaskInfo:
        body = {"alias": alias}
        if expected_current is not None:
            body["expected_current"] = expected_current
        return self._task(self._server.json("POST", f"{_path(tenant, name)}/rollback", json=body))

    def delete(self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR) -> None:
        self._server.send("DELETE", _path(tenant, name))

    def delete_version(self, tenant: str, name: str, version: str, *, actor: str = UNKNOWN_ACTOR) -> None:
        self._server.send("DELETE", f"{_path(tenant, name)}/versions/{check_version(version)}")

    def undelete(
        self, tenant: str, name: str, *, actor: str = UNKNOWN_ACTOR, quota: Limits | None = None
    ) -> TaskInfo:
        return self._task(self._server.json("POST", f"{_path(tenant, name)}/undelete"))

    def check(self) -> None:
        """Raise RegistryUnavailable unless the server is ready."""
        self._server.send("GET", "/ready")

    def fingerprint(self) -> str:
        """The fingerprint of the backbone that the server serves. Raises RegistryUnavailable unless it is ready."""
        told = self._server.json("GET", "/ready")
        if not isinstance(told, dict) or not isinstance(told.get("fingerprint"), str):
            raise self._server.foreign("its backbone's fingerprint")
        return str(told["fingerprint"])

    def close(self) -> None:
        self._server.close()

    def _task(self, raw: Any) -> TaskInfo:
        try:
            return task_from_dict(raw)
        except (ValueError, PrefixdError) as error:
            raise self._server.foreign(f"a task ({str(error)[:200]})") from None


def _path(tenant: str, name: str) -> str:
    return f"/prefixes/{check_name('tenant', tenant)}/{check_name('task', name)}"
