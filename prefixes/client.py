"""RemoteRegistry: the registry of a running server, over HTTP, behind the same Protocol as any other.

Owns the HTTP contract from the caller's side and the way back from an error's code to its class. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

import httpx

from prefixes.errors import PrefixdError, RegistryUnavailable, TaskNotFound
from prefixes.registry.base import Resolved, TaskInfo, VersionInfo
from prefixes.registry.moves import resolved, version_of_task
from prefixes.registry.records import task_from_dict
from prefixes.spec import DEFAULT_ALIAS, TaskRef, check_name, check_version

TIMEOUT_S: Final = 120.0


class RemoteError(PrefixdError):
    """An error of the server's whose code belongs to no class here; ``code`` is the server's."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code  # type: ignore[misc]  # this one's code is known only when it arrives


class RemoteRegistry:
    """See ``base.Registry``; errors are the server's own, by their codes.

    ``fetch`` looks for the task that has the version; ``download`` asks for one of a task and is cheaper.
    """

    def __init__(self, url: str, *, api_key: str | None = None, client: httpx.Client | None = None) -> None:
        """``url`` is the server's, such as ``http://localhost:8000``. Raises RegistryUnavailable for another form."""
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            base = httpx.URL(url)
            if base.scheme not in ("http", "https") or not base.host:
                raise httpx.InvalidURL("no http:// or https:// URL")
            self._client = client or httpx.Client(base_url=base, headers=headers, timeout=TIMEOUT_S)
        except httpx.InvalidURL as error:
            raise RegistryUnavailable(f"server URL: expected http://host[:port], got {url!r}: {error}") from None
        self._shown = str(base.copy_with(userinfo=b""))

    def summaries(self) -> list[dict[str, Any]]:
        """What ``GET /prefixes`` lists: task, aliases, version, versions, prefix_tokens, resident."""
        listed = self._json("GET", "/prefixes")
        prefixes = listed.get("prefixes") if isinstance(listed, dict) else None
        if not isinstance(prefixes, list) or not all(isinstance(item, dict) and "task" in item for item in prefixes):
            raise self._foreign("a list of prefixes")
        return prefixes

    def tasks(self, tenant: str | None = None) -> list[TaskInfo]:
        """As in the Protocol; one request per task."""
        names = (str(item["task"]).partition("/") for item in self.summaries())
        found = sorted((owner, name) for owner, _, name in names if tenant in (None, owner))
        return [self.inspect(owner, name) for owner, name in found]

    def inspect(self, tenant: str, name: str) -> TaskInfo:
        return self._task(self._json("GET", _path(tenant, name)))

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
        return self._send("GET", f"{_path(tenant, name)}/versions/{check_version(version)}").content

    def publish(
        self, tenant: str, name: str, data: bytes, *, alias: str | None = DEFAULT_ALIAS, record: Mapping[str, Any]
    ) -> VersionInfo:
        _path(tenant, name)
        fields = {"task": f"{tenant}/{name}", "alias": alias or "", "record": json.dumps(dict(record))}
        file = (f"{name}.safetensors", data, "application/octet-stream")
        answer = self._json("POST", "/prefixes", data=fields, files={"file": file})
        if not isinstance(answer, dict) or not isinstance(answer.get("version"), str):
            raise self._foreign("a published version")
        return version_of_task(self.inspect(tenant, name), answer["version"])

    def promote(
        self, tenant: str, name: str, version: str, *, alias: str = DEFAULT_ALIAS, expected_current: str | None = None
    ) -> TaskInfo:
        body = {"version": check_version(version), "alias": alias}
        if expected_current is not None:
            body["expected_current"] = expected_current
        return self._task(self._json("POST", f"{_path(tenant, name)}/promote", json=body))

    def rollback(self, tenant: str, name: str, *, alias: str = DEFAULT_ALIAS) -> TaskInfo:
        return self._task(self._json("POST", f"{_path(tenant, name)}/rollback", json={"alias": alias}))

    def delete(self, tenant: str, name: str) -> None:
        self._send("DELETE", _path(tenant, name))

    def check(self) -> None:
        """Raise RegistryUnavailable unless the server is ready."""
        self._send("GET", "/ready")

    def close(self) -> None:
        self._client.close()

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            response = self._client.request(method, path, **content)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            reason = str(error) or type(error).__name__
            raise RegistryUnavailable(f"cannot reach the server at {self._shown}: {reason}") from None
        if not response.is_success:
            raise self._error(response)
        return response

    def _json(self, method: str, path: str, **content: Any) -> Any:
        response = self._send(method, path, **content)
        try:
            return response.json()
        except ValueError:
            raise self._foreign("JSON") from None

    def _task(self, raw: Any) -> TaskInfo:
        try:
            return task_from_dict(raw)
        except (ValueError, PrefixdError) as error:
            raise self._foreign(f"a task ({str(error)[:200]})") from None

    def _error(self, response: httpx.Response) -> PrefixdError:
        """The error that the server names, as its class here."""
        try:
            raw = response.json()["error"]
            code, message, detail = str(raw["code"]), str(raw["message"]), raw.get("detail")
        except (ValueError, KeyError, TypeError, AttributeError):
            return RegistryUnavailable(f"the server at {self._shown} answered {response.status_code}, without an error")
        known = next((kind for kind in _kinds(PrefixdError) if kind.code == code), None)
        error = known(message) if known else RemoteError(code, message)
        error.detail = dict(detail) if isinstance(detail, dict) else {}
        return error

    def _foreign(self, expected: str) -> RegistryUnavailable:
        return RegistryUnavailable(f"the server at {self._shown}: expected {expected}, got another answer")


def _path(tenant: str, name: str) -> str:
    return f"/prefixes/{check_name('tenant', tenant)}/{check_name('task', name)}"


def _kinds(base: type[PrefixdError]) -> Iterator[type[PrefixdError]]:
    for kind in base.__subclasses__():
        if kind is not RemoteError:
            yield kind
            yield from _kinds(kind)
