"""Every key of the registry in Redis, in one place.

    {prefixd}:registry              JSON: format, the registry's own random id, and whether it is closed
    {prefixd}:tenants               set of tenants that ever published
    {prefixd}:tenancy               hash: revision and document of tenants and keys
    {prefixd}:tenancy-used          hash: id of a key -> when it was last used
    {prefixd}:replicas:<service>    sorted set of the running replicas of a service, by the end of their announcement
    {prefixd}:denials               list: callers without a known key that were refused, oldest first
    {prefixd}:denials:<tenant>      list: likewise, of one tenant's callers
    {prefixd}:usage                 sorted set of <day>:<tenant> that have usage
    {prefixd}:usage:<day>:<tenant>  hash: what is summed -> its counts, until the day is no longer kept
    {prefixd}:usage-batches:<day>   hash: a writer -> the number of its last batch of the day, as long
    prefixd:{<tenant>}:id           the registry's id again: absent where this tenant's data was lost
    prefixd:{<tenant>}:unfinished   beside it while the tenant is being restored: some data may be missing
    prefixd:{<tenant>}:tasks        set of the tenant's task names
    prefixd:{<tenant>}:task:<name>  JSON: aliases, history, versions with spec and record
    prefixd:{<tenant>}:deleted      hash: <name>@<time> -> the JSON of a deleted task, until a clean-up takes it
    prefixd:{<tenant>}:blobs        set of the digests that have an artifact
    prefixd:{<tenant>}:blob:<hex>   an artifact, immutable, each tenant's own
    prefixd:{<tenant>}:pieces:<hex>:<id>  the pieces of a large artifact on its way, for 600 s after the last one
    prefixd:{<tenant>}:names:<hex>  set of the tasks and deleted tasks that have an artifact
    prefixd:{<tenant>}:lease:<hex>  sorted set of publishers that hold a lease on an artifact, by its end
    prefixd:{<tenant>}:audit        stream of the tenant's changes
    prefixd:{<tenant>}:counters     hash: <key or none>/<counter>/<window> -> what was used; left: by the last sweep
    prefixd:{<tenant>}:reservations  hash: id of a reservation -> what it has taken of the counters
    prefixd:{<tenant>}:reserved     sorted set of these ids, by their end
    prefixd:{<tenant>}:total        hash: tasks, versions and bytes of all of it after the change "at" in that stream
    prefixd:{<tenant>}:done:<id>    the id of a change that was made, for 600 s: a repetition does not make it twice

All keys of a change have one hash tag, ``{<tenant>}``, and so lie in one slot of a Cluster. No two tenants, tasks or
digests make the same key: their names hold no colon and no brace.
"""

from __future__ import annotations

from typing import Final

REGISTRY: Final = "{prefixd}:registry"
TENANTS: Final = "{prefixd}:tenants"
TENANCY: Final = "{prefixd}:tenancy"
TENANCY_USED: Final = "{prefixd}:tenancy-used"
DENIALS: Final = "{prefixd}:denials"
USAGE: Final = "{prefixd}:usage"
EVERY_TENANTS_ID: Final = "prefixd:{*}:id"
"""A pattern of Redis for ``TenantKeys.id`` of every tenant; no other key matches."""
CHANGES: Final = "prefixd:changes"
"""The channel of changes; a message is ``<tenant>/<name>``."""


def usage_of(member: str) -> str:
    """The usage of a day and tenant, by its name in ``USAGE``."""
    return f"{USAGE}:{member}"


def usage_batches(day: str) -> str:
    """The batches that made a day's usage."""
    return f"{{prefixd}}:usage-batches:{day}"


class TenantKeys:
    """The keys of one tenant."""

    def __init__(self, tenant: str) -> None:
        base = f"prefixd:{{{tenant}}}:"
        self._base = base
        self.id, self.tasks, self.deleted = f"{base}id", f"{base}tasks", f"{base}deleted"
        self.blobs, self.audit, self.total = f"{base}blobs", f"{base}audit", f"{base}total"
        self.unfinished = f"{base}unfinished"
        self.counters, self.reservations = f"{base}counters", f"{base}reservations"
        self.reserved = f"{base}reserved"

    @staticmethod
    def tenant_of(key: str) -> str:
        """The tenant that ``key`` belongs to."""
        return key.partition("{")[2].partition("}")[0]

    def task(self, name: str) -> str:
        return f"{self._base}task:{name}"

    def blob(self, version: str) -> str:
        return f"{self._base}blob:{_hex(version)}"

    def pieces(self, version: str, writer: str) -> str:
        return f"{self._base}pieces:{_hex(version)}:{writer}"

    def names(self, version: str) -> str:
        return f"{self._base}names:{_hex(version)}"

    def lease(self, version: str) -> str:
        return f"{self._base}lease:{_hex(version)}"

    def done(self, change: str) -> str:
        return f"{self._base}done:{change}"


def replicas_key(service: str) -> str:
    """The running replicas of a service."""
    return f"{{prefixd}}:replicas:{service}"


def _hex(version: str) -> str:
    return version.removeprefix("sha256:")
