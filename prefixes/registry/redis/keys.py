"""Every key of the registry in Redis, in one place.

    {prefixd}:registry              JSON: format, and the registry's own random id
    {prefixd}:tenants               set of tenants that ever published
    prefixd:{<tenant>}:id           the registry's id again: absent where this tenant's part of the data was lost
    prefixd:{<tenant>}:unfinished   beside it while the tenant is being restored: there may be more to come
    prefixd:{<tenant>}:tasks        set of the tenant's task names
    prefixd:{<tenant>}:task:<name>  JSON: aliases, history, versions with spec and record
    prefixd:{<tenant>}:deleted      hash: <name>@<time> -> the same, once deleted, until it is cleaned away
    prefixd:{<tenant>}:blobs        set of the digests that have an artifact
    prefixd:{<tenant>}:blob:<hex>   an artifact, immutable, each tenant's own
    prefixd:{<tenant>}:names:<hex>  set of the tasks, deleted ones too, that name an artifact
    prefixd:{<tenant>}:lease:<hex>  sorted set of publishers at work on an artifact, by when their leases end
    prefixd:{<tenant>}:audit        stream of the tenant's changes
    prefixd:{<tenant>}:done:<id>    a change that was made, for a while: so that no repetition makes it twice

What a change touches lies under one hash tag, ``{<tenant>}``, and so in one slot of a Cluster. No two names of tenants,
tasks or digests make the same key: none of them can hold a colon or a brace.
"""

from __future__ import annotations

from typing import Final

REGISTRY: Final = "{prefixd}:registry"
TENANTS: Final = "{prefixd}:tenants"
EVERY_TENANTS_ID: Final = "prefixd:{*}:id"
"""As a pattern of Redis: no key of another kind ends so."""
CHANGES: Final = "prefixd:changes"
"""The channel on which every change says ``<tenant>/<name>``."""


class TenantKeys:
    """The keys of one tenant."""

    def __init__(self, tenant: str) -> None:
        base = f"prefixd:{{{tenant}}}:"
        self._base = base
        self.id, self.tasks, self.deleted = f"{base}id", f"{base}tasks", f"{base}deleted"
        self.blobs, self.audit = f"{base}blobs", f"{base}audit"
        self.unfinished = f"{base}unfinished"

    @staticmethod
    def tenant_of(key: str) -> str:
        """The tenant whose key that is."""
        return key.partition("{")[2].partition("}")[0]

    def task(self, name: str) -> str:
        return f"{self._base}task:{name}"

    def blob(self, version: str) -> str:
        return f"{self._base}blob:{_hex(version)}"

    def names(self, version: str) -> str:
        return f"{self._base}names:{_hex(version)}"

    def lease(self, version: str) -> str:
        return f"{self._base}lease:{_hex(version)}"

    def done(self, change: str) -> str:
        return f"{self._base}done:{change}"


def _hex(version: str) -> str:
    return version.removeprefix("sha256:")
