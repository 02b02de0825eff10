"""Where the trainer's datasets and their descriptions lie: one folder that several machines may share.

    tenants/<tenant>/datasets/<hex>.jsonl       a dataset as it was uploaded, named by the sha256 of its bytes
    tenants/<tenant>/datasets/<hex>.json        its description; a dataset exists when this file does
    tenants/<tenant>/datasets/.upload-<random>  an upload that is under way, or was cut short

Owns this layout, the JSON beside a dataset and the errors of the disk; takes no uploads. Torch-free.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Final

from prefixes.errors import NO_ROOM, DiskFull, InvalidName, PrefixdError
from prefixes.registry.disk.files import Files
from prefixes.spec import check_name

UPLOAD: Final = ".upload-"
UPLOAD_S: Final = 86400.0
"""Seconds after its last write when an upload counts as abandoned."""
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


class DatasetNotFound(PrefixdError):
    """The tenant has no such dataset, whether or not another tenant has it."""

    code = "dataset_not_found"

    def __init__(self, digest: str) -> None:
        super().__init__(f"dataset {digest}: expected one of the tenant's datasets, found none", dataset=digest)


class DatasetTooLarge(PrefixdError):
    """An upload is larger than the service takes."""

    code = "body_too_large"


class DatasetsUnavailable(PrefixdError):
    """The disk with the datasets cannot be reached, read or written, or holds something else."""

    code = "datasets_unavailable"


@dataclass(frozen=True)
class DatasetInfo:
    """The description of a dataset. ``digest`` is its id within the tenant, the sha256 of its bytes."""

    tenant: str
    digest: str  # "sha256:<hex>"
    lines: int  # those with an example, not blank ones
    bytes: int
    created_at: str  # UTC, ISO 8601
    name: str | None = None
    key_id: str | None = None  # with which it was uploaded

    def as_dict(self) -> dict[str, Any]:
        """As plain JSON values, for an answer; the tenant is the caller's."""
        values = asdict(self)
        del values["tenant"], values["key_id"]
        return values


class DatasetFiles(Files):
    """The files of datasets; their failures are DatasetsUnavailable, and DiskFull where there is no room."""

    def failed(self, message: str, error: OSError | None = None) -> PrefixdError:
        if error is not None and error.errno in NO_ROOM:
            return DiskFull(f"expected room on the disk for the dataset, got: {error.strerror}")
        return DatasetsUnavailable(f"datasets: {message}")

    def info(self, tenant: str, digest: str) -> DatasetInfo:
        """The description of a dataset. Raises DatasetNotFound."""
        parts = info_parts(tenant, digest)
        try:
            return _info_from(json.loads(self.read(*parts)), tenant, digest)
        except FileNotFoundError:
            raise DatasetNotFound(digest) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise self.failed(f"{'/'.join(parts)} tells of no dataset: {reason}") from None

    def known(self, tenant: str, *, apart_from: str | None = None) -> list[DatasetInfo]:
        """The descriptions of all of the tenant's datasets, apart from one if it is named, in no order."""
        found = []
        for file in self.names(*folder(tenant)):
            digest = f"sha256:{file.removesuffix('.json')}"
            if file.endswith(".json") and _DIGEST.fullmatch(digest) and digest != apart_from:
                try:
                    found.append(self.info(tenant, digest))
                except DatasetNotFound:  # deleted since the folder was listed
                    continue
        return found

    def write_info(self, info: DatasetInfo) -> None:
        """Write the description of a dataset whose bytes are there."""
        key = {} if info.key_id is None else {"key": info.key_id}
        text = json.dumps({**info.as_dict(), **key}, indent=1)
        self.write(text.encode(), *info_parts(info.tenant, info.digest))

    def tidy(self, tenant: str) -> None:
        """Remove what killed writers left half-done. Call it under the folder's lock."""
        self.sweep(*folder(tenant))
        names = frozenset(self.names(*folder(tenant)))
        for file in names:
            stem = file.removesuffix(".jsonl")
            if file.endswith(".jsonl") and _DIGEST.fullmatch(f"sha256:{stem}") and f"{stem}.json" not in names:
                self.remove(*folder(tenant), file)


def check_digest(digest: str) -> str:
    """Return ``digest`` if it reads ``sha256:<64 hex>``, else raise InvalidName."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidName(f"dataset: expected sha256:<64 hex digits>, got {digest[:80]!r}", got=digest[:80])
    return digest


def folder(tenant: str) -> tuple[str, ...]:
    """Where the tenant's datasets lie. Raises InvalidName."""
    return ("tenants", check_name("tenant", tenant), "datasets")


def data_parts(tenant: str, digest: str) -> tuple[str, ...]:
    """Where a dataset's bytes lie. Raises InvalidName."""
    return (*folder(tenant), f"{check_digest(digest).removeprefix('sha256:')}.jsonl")


def info_parts(tenant: str, digest: str) -> tuple[str, ...]:
    """Where a dataset's description lies. Raises InvalidName."""
    return (*folder(tenant), f"{check_digest(digest).removeprefix('sha256:')}.json")


def _info_from(raw: Any, tenant: str, digest: str) -> DatasetInfo:
    info = DatasetInfo(
        tenant, raw["digest"], raw["lines"], raw["bytes"], raw["created_at"], raw["name"], raw.get("key")
    )
    counts = all(isinstance(value, int) and not isinstance(value, bool) for value in (info.lines, info.bytes))
    texts = isinstance(info.created_at, str) and all(isinstance(text, str | None) for text in (info.name, info.key_id))
    if info.digest != digest or not counts or not texts:
        raise ValueError("expected digest, lines, bytes, created_at and name")
    return info
