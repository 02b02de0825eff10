"""ChangeLog: a tenant's audit on disk, which agrees with its tasks even after a writer was killed.

    tenants/<tenant>/audit.jsonl        one JSON object per change, oldest first
    tenants/<tenant>/last-change.json   the last change, begun or made: its entry, the task's file after it, and how
                                        much the tenant has, if somebody has counted

Owns these two files. A change has three steps: ``begin`` writes last-change.json, the writer writes or removes the
task's file, ``finish`` appends the entry to the audit. The second step makes the change. A writer that finds a last
change without its entry compares the task's file: if it is as after the change, the change was made and its entry is
due; if it is not, nothing happened. A file that grows beyond AUDIT_BYTES keeps its latest half.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import chain, islice
from typing import Any, Final

from prefixes.errors import InvalidName, PrefixdError, RegistryUnavailable
from prefixes.registry.base import AuditEntry
from prefixes.registry.disk.files import Files
from prefixes.registry.limits import AUDIT_BYTES
from prefixes.registry.quota import Kept
from prefixes.registry.records import audit_from_dict, audit_to_dict
from prefixes.spec import check_name
from prefixes.spec_json import canonical_json

_TAIL: Final = 1 << 16  # bytes read at a time from the end of the audit; a line is far shorter


@dataclass(frozen=True)
class LastChange:
    """The content of last-change.json. ``finish`` removes the files of one list or of the other."""

    line: dict[str, Any]
    name: str
    after: str | None  # sha256 of the task's file after the change, None where it is removed
    remove_if_made: tuple[tuple[str, ...], ...]
    remove_if_not: tuple[tuple[str, ...], ...]
    kept: tuple[Kept, Kept] | None  # what the tenant has without the change, and with it


class ChangeLog:
    """``begin`` and ``finish`` are for the tenant's only writer; anybody may read."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def begin(
        self,
        tenant: str,
        entry: AuditEntry,
        name: str,
        after: str | None,
        *,
        remove_if_made: Sequence[tuple[str, ...]] = (),
        remove_if_not: Sequence[tuple[str, ...]] = (),
        kept: tuple[Kept, Kept] | None = None,
    ) -> None:
        """Write down a change of task ``name``. ``after`` is the digest of its file after the change, None no file.

        ``kept`` is what the tenant has without the change and with it, None where nobody has counted.
        """
        raw = {
            "line": {"id": uuid.uuid4().hex, **audit_to_dict(entry)},
            "name": name,
            "after": after,
            "remove_if_made": list(remove_if_made),
            "remove_if_not": list(remove_if_not),
            **({"kept": [astuple(one) for one in kept]} if kept else {}),
        }
        self._files.write(canonical_json(raw).encode(), *_last(tenant))

    def finish(self, tenant: str) -> None:
        """Finish the last change: after it was made, or as the next writer after a crash."""
        last = self._last_change(tenant)
        if last is None or next(self._lines(tenant), None) == last.line:
            return
        made = self._is_made(tenant, last)
        for parts in last.remove_if_made if made else last.remove_if_not:
            self._files.remove(*parts)
        if made:
            self._files.append_line(canonical_json(last.line).encode(), *_audit(tenant))
            with suppress(PrefixdError):  # the change is made; the next one tries again
                self._bound(tenant)
        else:
            self._files.remove(*_last(tenant))

    def replace(self, tenant: str, entries: Sequence[AuditEntry]) -> None:
        """Make the audit these entries, oldest first. The last change must be finished; from now on there is none."""
        lines = [canonical_json({"id": uuid.uuid4().hex, **audit_to_dict(entry)}).encode() for entry in entries]
        self._files.remove(*_last(tenant))
        self._files.write(b"\n".join([*lines, b""]), *_audit(tenant))
        self._bound(tenant)

    def _bound(self, tenant: str) -> None:
        if self._files.size(*_audit(tenant)) <= AUDIT_BYTES:
            return
        kept, size = list[bytes](), 0
        for line in self._files.lines_reversed(_TAIL, *_audit(tenant)):
            size += len(line) + 1
            if size > AUDIT_BYTES // 2:
                break
            kept.append(line)
        self._files.write(b"\n".join([*reversed(kept), b""]), *_audit(tenant))

    def entries(self, tenant: str, limit: int) -> list[AuditEntry]:
        """The last ``limit`` entries, the latest first, with the entry that is due."""
        while True:
            last, lines = self._last_change(tenant), self._lines(tenant)
            newest = next(lines, None)
            due = [last.line] if last and last.line != newest and self._is_made(tenant, last) else []
            if self._last_change(tenant) == last:  # else a writer went on: an entry could be missed, or come twice
                found = chain(due, [newest] if newest else [], lines)
                return [audit_from_dict(line) for line in islice(found, limit)]

    def kept(self, tenant: str) -> Kept | None:
        """What the tenant has, None where nobody has counted since an older release made a change."""
        last = self._last_change(tenant)
        if last is None or last.kept is None:
            return None
        without, with_it = last.kept
        return with_it if self._is_made(tenant, last) else without

    def leftovers(self, tenant: str) -> frozenset[tuple[str, ...]]:
        """Files that ``finish`` would remove; readers ignore them."""
        last = self._last_change(tenant)
        if last is None:
            return frozenset()
        return frozenset(last.remove_if_made if self._is_made(tenant, last) else last.remove_if_not)

    def _is_made(self, tenant: str, last: LastChange) -> bool:
        return self.digest(tenant, last.name) == last.after

    def digest(self, tenant: str, name: str) -> str | None:
        """The digest of a task's file, None where there is none."""
        try:
            return digest_of(self._files.read("tenants", tenant, "tasks", f"{name}.json"))
        except FileNotFoundError:
            return None

    def _last_change(self, tenant: str) -> LastChange | None:
        try:
            raw = json.loads(self._files.read(*_last(tenant)))
            removals = [tuple(_removable(tenant, parts) for parts in raw[key]) for key in _REMOVALS]
            audit_from_dict(raw["line"])
            name, kept = check_name("task", raw["name"]), _kept(raw.get("kept"))
            return LastChange(raw["line"], name, raw["after"], removals[0], removals[1], kept)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError, InvalidName) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise RegistryUnavailable(f"registry: {'/'.join(_last(tenant))}: {reason}") from None

    def _lines(self, tenant: str) -> Iterator[dict[str, Any]]:
        """The audit's lines from the last to the first, without lines that a power cut tore."""
        for data in self._files.lines_reversed(_TAIL, *_audit(tenant)):
            try:
                line = json.loads(data)
                audit_from_dict(line)
            except (ValueError, RecursionError):
                continue
            yield line


def digest_of(data: bytes) -> str:
    """The digest of a task's file."""
    return hashlib.sha256(data).hexdigest()


_REMOVALS: Final = ("remove_if_made", "remove_if_not")
_PART: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._@-]*")  # no way up, nothing hidden


def _removable(tenant: str, parts: Any) -> tuple[str, ...]:
    """A path that a change may remove. Raises ValueError for any other."""
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ValueError("expected the parts of a path")
    folder, inner = tuple(parts[:3]), parts[3:]
    depths = {("tenants", tenant, "deleted"): 1, ("tenants", tenant, "references"): 2}
    if depths.get(folder) != len(inner) or not all(_PART.fullmatch(part) for part in inner):
        raise ValueError(f"expected a file among the tenant's deleted tasks or references, got {'/'.join(parts)}")
    return tuple(parts)


def _kept(raw: Any) -> tuple[Kept, Kept] | None:
    """The two counts of a change. Raises ValueError, TypeError."""
    if raw is None:
        return None
    without, with_it = (Kept(*(int(count) for count in one)) for one in raw)
    return without, with_it


def _last(tenant: str) -> tuple[str, ...]:
    return ("tenants", tenant, "last-change.json")


def _audit(tenant: str) -> tuple[str, ...]:
    return ("tenants", tenant, "audit.jsonl")
