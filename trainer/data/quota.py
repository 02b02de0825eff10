"""How many bytes of datasets a tenant and a key may have. Owns the two bounds and their error; reads no disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from prefixes.errors import QuotaExceeded
from trainer.data.files import DatasetInfo


@dataclass(frozen=True)
class ByteQuota:
    """Bytes of all datasets of a tenant, and of those that came with one key; None for any number."""

    of_tenant: int | None = None
    of_key: int | None = None
    key_id: str | None = None  # of whoever uploads

    @property
    def bounded(self) -> bool:
        """Whether there is anything to count."""
        return (self.of_tenant, self.of_key) != (None, None)

    def check(self, size: int, beside: Iterable[DatasetInfo] = ()) -> None:
        """Raise QuotaExceeded if there is no room for a dataset of ``size`` bytes beside those."""
        theirs = [(info.bytes, info.key_id == self.key_id) for info in beside]
        self._require("tenant", self.of_tenant, size, sum(size for size, _ in theirs))
        self._require("key", self.of_key, size, sum(size for size, own in theirs if own))

    def _require(self, whose: str, limit: int | None, size: int, beside: int) -> None:
        if limit is not None and beside + size > limit:
            raise QuotaExceeded(
                f"dataset_bytes: the {whose}'s limit is {limit} bytes of datasets, got {beside} and {size} more",
                limit="dataset_bytes", of=whose, expected=limit, got=beside + size,
            )  # fmt: skip


NO_QUOTA: Final = ByteQuota()
