"""DiskTenancy: tenants and keys beside a registry in a folder.

    tenancy.json         the document, see ``prefixes.tenancy.records``
    tenancy-used.json    when keys were last used: id -> time
    denials/tenants/<tenant>.jsonl, denials/unknown.jsonl    who was refused, see ``prefixes.tenancy.denial``

Owns these files and the order of writes: the registry is closed before its first key is there. Writers hold the lock
of the registry's own folder; readers hold none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from prefixes.errors import RegistryUnavailable
from prefixes.registry.disk.files import Files
from prefixes.registry.identity import Mark, mark_to_json
from prefixes.spec import check_name
from prefixes.spec_json import canonical_json
from prefixes.tenancy.denial import DENIALS_KEPT, Denial, denial_to_json, denials_from_json
from prefixes.tenancy.records import revision_of
from prefixes.tenancy.store import Stored


class DiskTenancy:
    """See ``store.TenancyStore``. ``mark`` reads and checks what the registry says of itself."""

    def __init__(self, files: Files, mark: Callable[[], Mark]) -> None:
        self._files, self._mark = files, mark

    def read(self, known: Stored | None = None) -> Stored:
        data = self._read("tenancy.json")
        found = Stored(self._mark().closed, revision_of(data), data)  # the mark last: it is written first
        return known if known == found else found

    def replace(self, data: bytes, planned_on: str, *, closing: bool = False) -> bool:
        self._mark()  # the lock would make a folder that is away, here and below
        with self._files.lock():
            mark = self._mark()
            if revision_of(self._read("tenancy.json")) != planned_on:
                return False
            if closing and not mark.closed:
                self._write(mark_to_json(replace(mark, closed=True)), "registry.json")
            self._write(data, "tenancy.json")
        return True

    def used(self) -> dict[str, str]:
        data = self._read("tenancy-used.json")
        self._mark()
        try:
            found = {} if data is None else json.loads(data)
            return {str(key): str(time) for key, time in found.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise RegistryUnavailable(f"registry: tenancy-used.json: {str(error)[:200]}") from None

    def note_used(self, times: Mapping[str, str]) -> None:
        self._mark()
        with self._files.lock():
            before = self.used()
            after = before | {key: max(time, before.get(key, "")) for key, time in times.items()}
            if after != before:
                self._write(canonical_json(after).encode(), "tenancy-used.json")

    def forget_used(self, keys: Collection[str]) -> None:
        self._mark()
        with self._files.lock():
            before = self.used()
            after = {key: time for key, time in before.items() if key not in keys}
            if after != before:
                self._write(canonical_json(after).encode(), "tenancy-used.json")

    def note_denials(self, tenant: str | None, denials: Sequence[Denial]) -> None:
        self._mark()
        with self._files.lock():
            self._mark()
            lines = (self._read(*_denials(tenant)) or b"").splitlines()
            lines += [denial_to_json(denial).encode() for denial in denials]
            self._write(b"\n".join([*lines[-DENIALS_KEPT:], b""]), *_denials(tenant))

    def denials(self, tenant: str | None) -> list[Denial]:
        found = denials_from_json((self._read(*_denials(tenant)) or b"").splitlines())
        self._mark()
        return found

    def _read(self, *parts: str) -> bytes | None:
        try:
            return self._files.read(*parts)
        except FileNotFoundError:
            return None

    def _write(self, data: bytes, *parts: str) -> None:
        self._files.sweep(*parts[:-1])
        self._files.write(data, *parts)


def _denials(tenant: str | None) -> tuple[str, ...]:
    if tenant is None:
        return ("denials", "unknown.jsonl")
    return ("denials", "tenants", f"{check_name('tenant', tenant)}.jsonl")
