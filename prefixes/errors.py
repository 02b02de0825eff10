"""The named errors of prefixd. Each has a stable code that users may rely on.

Owns codes and messages; knows no HTTP (``server/web/errors.py`` maps codes to statuses).
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar, Final

NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where a disk or a quota is full."""


class PrefixdError(Exception):
    """Base of every error that prefixd raises on purpose.

    ``code`` is stable and machine-readable, ``message`` is for people and says expected and got,
    ``detail`` holds the same facts as JSON-serialisable values.
    """

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, **detail: Any) -> None:
        super().__init__(message)
        self.message = message
        self.detail: dict[str, Any] = detail


class InvalidName(PrefixdError):
    """A tenant, task or alias name, or a task reference, is not well-formed."""

    code = "invalid_name"


class InvalidArtifact(PrefixdError):
    """The bytes are not a prefix artifact: truncated, foreign, NaN, wrong shape or wrong digest."""

    code = "invalid_artifact"


class IncompatiblePrefix(PrefixdError):
    """A well-formed prefix, made for another backbone."""

    code = "incompatible_prefix"


class TaskNotFound(PrefixdError):
    """No such task, alias or version within the tenant."""

    code = "task_not_found"


class Conflict(PrefixdError):
    """The state is not what the caller expected (compare-and-set, nothing to roll back to)."""

    code = "conflict"


class LimitReached(PrefixdError):
    """The registry keeps no more of this kind: somebody has to make room first."""

    code = "limit_reached"


class DiskFull(PrefixdError):
    """There is no room or quota for a file. No half-written file is left."""

    code = "disk_full"


class RegistryUnavailable(PrefixdError):
    """The registry cannot be reached or read just now."""

    code = "registry_unavailable"


class RegistryFull(RegistryUnavailable):
    """The registry has no room: a retry helps once somebody has made some."""

    code = "disk_full"


class WrongRegistry(RegistryUnavailable):
    """The registry that answers is not the one that was opened, or was emptied. Its tasks do not count as deleted."""


class RegistryMissing(WrongRegistry):
    """The place was reached but holds no registry: not yet, or no longer."""


class RegistryRestoring(RegistryUnavailable):
    """A restore of the registry is running or was cut short. A task that is missing now may still come."""


class BackboneError(PrefixdError):
    """The backbone cannot be loaded: unknown family, missing files, no tokenizer."""

    code = "backbone_error"


class InvalidParameter(PrefixdError):
    """A request's parameter is unknown, out of range, or contradicts another."""

    code = "invalid_parameter"


class InputTooLong(PrefixdError):
    """The input leaves no room for one token in the window or in memory."""

    code = "input_too_long"


class RateLimited(PrefixdError):
    """A limit of a minute is used up; ``detail['retry_after_s']`` says when to come back."""

    code = "rate_limited"


class QuotaExceeded(PrefixdError):
    """A tenant or a key has all that its limit allows; of one of a day or month ``detail['resets_in_s']`` says when it
    is new.
    """

    code = "quota_exceeded"


class QueueFull(PrefixdError):
    """More requests wait than the server accepts; ``detail['retry_after_s']`` says when to come back."""

    code = "queue_full"


class ShuttingDown(PrefixdError):
    """The server drains: running rows finish, nothing new is admitted."""

    code = "shutting_down"


class NotReady(PrefixdError):
    """The server cannot serve just now."""

    code = "not_ready"


class EngineFailure(PrefixdError):
    """A row failed inside the engine; its neighbours did not."""

    code = "engine_failure"

    @classmethod
    def unexpected(cls, error: BaseException) -> EngineFailure:
        """What a user may see of an unexpected error: its kind, not its text, which may quote the request."""
        return cls(f"the engine failed with {type(error).__name__}")
