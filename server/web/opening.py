"""What a service does about keys before it listens: it makes those it was given, and is never open to strangers.

Owns these two decisions. Knows no request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from prefixes.tenancy.hash_file import adopt
from prefixes.tenancy.keyring import Keyring
from prefixes.tenancy.store import TenancyStore
from server.web.access_settings import AccessSettings
from server.web.errors import Forbidden
from server.web.origins import is_loopback

_log = logging.getLogger("prefixd.keys")


def open_keyring(store: TenancyStore, settings: AccessSettings, hosts: Sequence[str]) -> Keyring:
    """The keys of a service that is about to listen on ``hosts``, its operator's and its monitor's among them.

    Raises Forbidden where it would be open beyond this machine, InvalidKey for a file that holds no hash.
    """
    adopt(store, settings.operator_hash_file, settings.metrics_hash_file)
    keyring = Keyring(store, settings.max_stale_auth_s)
    if keyring.closed:
        _log.info("keys are needed", extra={"facts": {"keys": len(keyring.known.tenancy.keys)}})
        return keyring
    far = [host for host in hosts if not is_loopback(host)]
    if far and not settings.open_access:
        raise Forbidden(
            f"no key was ever made, and {far[0]} is reached from other machines: make one first (`prefixd keys create "
            "--scopes operator --registry URL`), listen on 127.0.0.1, or give --open-access"
        )
    log = _log.warning if far else _log.info
    log("open: no key was ever made, so whoever reaches this service may do everything")
    return keyring
