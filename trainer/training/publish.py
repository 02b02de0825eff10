"""Publishes a finished prefix, and fetches one to start from, at a registry or a running server. Asks the server before
training whether the prefix will fit it.

Owns the choice between the two, and what a gate's verdict means for the alias; ``prefixes/`` owns their protocols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from prefixes.actor import local_actor
from prefixes.client import RemoteRegistry
from prefixes.errors import Conflict, IncompatiblePrefix, InvalidParameter, PrefixdError, TaskNotFound
from prefixes.registry import open_registry
from prefixes.registry.base import NOWHERE, Registry
from prefixes.spec import DEFAULT_TENANT, PrefixSpec, TaskRef


class AliasMoved(PrefixdError):
    """The alias points at another version than the one that a gate compared with."""

    code = "conflict"


class Targets:
    """The places that a run publishes to: a registry, a server, both or none. A context manager."""

    def __init__(self, registry: str | None, server: str | None, api_key: str | None = None) -> None:
        """Open and check every target before training, which may take hours. Raises RegistryUnavailable.

        ``api_key`` is what the server is shown.
        """
        with ExitStack() as opened:
            stores: list[Registry] = []
            self._server: RemoteRegistry | None = None
            if registry:
                stores.append(opened.enter_context(closing(open_registry(registry))))
            if server:
                self._server = opened.enter_context(closing(RemoteRegistry(server, api_key=api_key)))
                stores.append(self._server)
            for store in stores:
                store.check()
            self._stores: Sequence[Registry] = stores
            self._opened = opened.pop_all()

    def __enter__(self) -> Targets:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    @property
    def own_tenant(self) -> str:
        """The tenant that names without one belong to."""
        return DEFAULT_TENANT if self._server is None else self._server.own_tenant

    def check(self, plan: PrefixSpec) -> None:
        """Raise IncompatiblePrefix if the server serves another backbone than the one ``plan`` is for."""
        served = None if self._server is None else self._server.fingerprint()
        if served not in (None, plan.fingerprint):
            raise IncompatiblePrefix(
                f"--server: expected it to serve the backbone to train for, {plan.fingerprint}, it serves {served}",
                expected=plan.fingerprint,
                got=served,
            )

    def fetch(self, ref: TaskRef) -> bytes:
        """Return the artifact that ``ref`` means now in the first target.

        Raises InvalidParameter without a target, TaskNotFound.
        """
        if not self._stores:
            raise InvalidParameter(f"{ref.task}: expected a registry or a server to fetch it from, got neither")
        store = self._stores[0]
        return store.fetch(ref.tenant, store.resolve(ref).version)

    def __len__(self) -> int:
        """How many places there are."""
        return len(self._stores)

    def current(self, ref: TaskRef) -> bytes | None:
        """Return the artifact that ``ref`` means now in the first target, None where there is no such alias."""
        try:
            return self.fetch(ref)
        except TaskNotFound:
            return None

    def publish(self, ref: TaskRef, artifact: bytes, record: Mapping[str, Any], alias: str | None) -> None:
        """Publish to every target under ``ref``'s tenant and name, and move ``alias`` as the record's gate says.

        Without a gate it moves (None moves none). Raises AliasMoved where it points at another version than the gate
        compared with.
        """
        for store in self._stores:
            how = placed(record.get("gate"), alias)
            try:
                store.publish(ref.tenant, ref.name, artifact, **how, record=record, actor=local_actor())
            except Conflict as error:
                raise_if_moved(error, record)
                raise


def placed(gate: Mapping[str, Any] | None, alias: str | None) -> dict[str, Any]:
    """Return the registry's arguments for what a gate decided about ``alias``; None is no gate."""
    if gate is None:
        return {"alias": alias}
    note = f"gate {gate['verdict']}: {gate['reason']}"
    if gate["verdict"] == "promoted":
        return {"alias": alias, "expected_current": gate["current"] or NOWHERE, "note": note}
    return {"alias": None, "note": note}


def raise_if_moved(error: Conflict, record: Mapping[str, Any]) -> None:
    """Raise AliasMoved if a publish with a gate in its ``record`` was refused for where the alias points."""
    if "gate" in record and "got" in error.detail:
        raise AliasMoved(error.message) from None
