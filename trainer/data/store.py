"""DatasetStore: the datasets that tenants uploaded to the trainer, each named by the digest of its content.

Owns when a dataset exists: its bytes are written first, its description last, both whole, under the tenant's lock.
Knows no HTTP and no job. Calls are synchronous, and safe for threads, processes and machines that share the folder.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from prefixes.errors import PrefixdError
from prefixes.registry.transitions import now
from prefixes.spec import check_name
from trainer.data.files import (
    UPLOAD,
    UPLOAD_S,
    DatasetFiles,
    DatasetInfo,
    DatasetNotFound,
    data_parts,
    folder,
    info_parts,
)
from trainer.data.quota import NO_QUOTA, ByteQuota
from trainer.data.upload import Upload

__all__ = ["DatasetInfo", "DatasetNotFound", "DatasetStore", "Upload"]


class DatasetStore:
    """Every method raises DatasetsUnavailable if the disk fails, and InvalidName for a bad name."""

    def __init__(self, root: Path, *, lock_timeout_s: float = 30.0) -> None:
        """The store in ``root``, which the first upload makes."""
        self._files = DatasetFiles(root, lock_timeout_s)

    def begin(
        self, tenant: str, *, max_bytes: int, name: str | None = None, quota: ByteQuota = NO_QUOTA
    ) -> Upload:
        """Begin an upload of at most ``max_bytes``. Lists show ``name``, which has the form of a task's name.

        A dataset that is new must have room within ``quota``, which is looked at once its bytes are there. Raises
        DiskFull.
        """
        if name is not None:
            check_name("dataset", name)
        self._files.sweep(*folder(tenant), prefix=UPLOAD, older_s=UPLOAD_S)

        def keep(source: tuple[str, ...], digest: str, lines: int, size: int) -> DatasetInfo:
            return self._keep(source, DatasetInfo(tenant, digest, lines, size, now(), name, quota.key_id), quota)

        return Upload(self._files, tenant, max_bytes=max_bytes, quota=quota, keep=keep)

    def info(self, tenant: str, digest: str) -> DatasetInfo:
        """The description of a dataset. Raises DatasetNotFound for an unknown one, or another tenant's."""
        return self._files.info(tenant, digest)

    def list(self, tenant: str | None) -> list[DatasetInfo]:
        """Every dataset of a tenant or of all, the newest first."""
        tenants = [tenant] if tenant is not None else self._files.names("tenants")
        found = [info for tenant in tenants for info in self._files.known(tenant)]
        return sorted(found, key=lambda info: (info.created_at, info.tenant, info.digest), reverse=True)

    def path(self, tenant: str, digest: str) -> Path:
        """The file with a dataset's bytes, for this machine alone. Raises DatasetNotFound as ``info`` does.

        Only its size is checked. A reader of the whole file checks the digest, which ``read_dataset`` returns.
        """
        info = self.info(tenant, digest)
        parts = data_parts(tenant, digest)
        size = self._files.size(*parts)
        if size != info.bytes:
            self.info(tenant, digest)  # raises DatasetNotFound if it was deleted meanwhile
            raise self._damaged(parts, f"expected {info.bytes} bytes, found {size}")
        return self._files.root.joinpath(*parts)

    def delete(self, tenant: str, digest: str) -> None:
        """Remove a dataset; a reader that has it open reads on. Raises DatasetNotFound as ``info`` does."""
        parts = info_parts(tenant, digest)
        self.info(tenant, digest)  # raises before the lock makes a folder for an unknown tenant
        with self._files.lock(*folder(tenant)):
            self.info(tenant, digest)
            self._files.remove(*parts)
            self._files.tidy(tenant)

    def _keep(self, source: tuple[str, ...], info: DatasetInfo, quota: ByteQuota) -> DatasetInfo:
        """Make the synced file ``source`` a dataset, or keep the same dataset that is already there.

        Uploads of a tenant come here one after the other, so that none passes beside another.
        """
        with self._files.lock(*folder(info.tenant)):
            self._files.tidy(info.tenant)
            parts = data_parts(info.tenant, info.digest)
            try:
                known = self._files.info(info.tenant, info.digest)
                if self._files.size(*parts) == info.bytes == known.bytes:
                    return known
            except PrefixdError:
                pass  # there is none, or it is damaged: this upload repairs it
            if quota.bounded:
                quota.check(info.bytes, self._files.known(info.tenant, apart_from=info.digest))
            try:
                self._files.place(source[-1], *parts)
                self._files.write_info(info)
            except BaseException:
                with suppress(PrefixdError):
                    self._files.tidy(info.tenant)  # removes bytes that have no description
                raise
            return info

    def _damaged(self, parts: tuple[str, ...], what: str) -> PrefixdError:
        return self._files.failed(f"{'/'.join(parts)}: {what}")
