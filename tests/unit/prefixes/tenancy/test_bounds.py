"""The document of tenants is one for all of them: what one tenant puts into it leaves room for the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prefixes.errors import Conflict
from prefixes.tenancy import changes
from prefixes.tenancy.changes import with_key, with_revocation, with_share
from prefixes.tenancy.model import Key, Scope, Secret, Share, Tenancy

AT = "2030-01-01T00:00:00.000Z"
LATER = "2030-02-01T00:00:00.000Z"


def a_key(number: int, tenant: str = "acme", *, scope: Scope = Scope.READ, at: str = AT, end: str | None = None) -> Key:
    return Key(f"{tenant}-{number:06}", tenant, "x", frozenset({scope}), at, "t", (Secret("0" * 64),), end)


def full_of_keys(monkeypatch: pytest.MonkeyPatch, *keys: Key) -> Tenancy:
    monkeypatch.setattr(changes, "MAX_KEYS_OF_A_TENANT", len(keys))
    state = Tenancy()
    for key in keys:
        state = with_key(state, key)
    return state


def test_a_tenant_has_so_many_keys_and_others_have_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    state = full_of_keys(monkeypatch, a_key(1), a_key(2))
    with pytest.raises(Conflict, match="keys of acme: expected at most 2, got 3; revoke one"):
        with_key(state, a_key(3))
    assert len(with_key(state, a_key(3, "globex")).keys) == 3


def test_a_new_key_takes_the_place_of_the_oldest_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    state = full_of_keys(monkeypatch, a_key(1), a_key(2), a_key(3, end=LATER), a_key(4))
    for number in (4, 2):
        state = with_revocation(state, f"acme-{number:06}", at=AT, actor="t")
    for new, left in ((5, [1, 3, 4, 5]), (6, [1, 3, 5, 6])):
        state = with_key(state, a_key(new))
        assert sorted(state.keys) == [f"acme-{number:06}" for number in left]
    with pytest.raises(Conflict):
        with_key(state, a_key(7))
    assert "acme-000003" not in with_key(state, a_key(7, at=LATER)).keys


def test_a_key_for_the_service_stays_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash may still lie in a file of a server, which would make it again."""
    state = full_of_keys(monkeypatch, a_key(1, scope=Scope.OPERATOR), a_key(2, scope=Scope.METRICS))
    for key_id in tuple(state.keys):
        state = with_revocation(state, key_id, at=AT, actor="t")
    with pytest.raises(Conflict):
        with_key(state, a_key(3))


def test_a_tenant_shares_so_much_and_others_have_their_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A share of a task counts for one, and for one more with each tenant that it names."""
    monkeypatch.setattr(changes, "MAX_SHARES_OF_A_TENANT", 4)
    state = Tenancy()

    def share(task: str, *tenants: str) -> Tenancy:
        return with_share(state, task, Share(not tenants, frozenset(tenants)), at=AT, actor="t")

    state = share("acme/a", "x", "y")
    with pytest.raises(Conflict, match="shares of acme: expected at most 4"):
        share("acme/b", "x")
    state = share("acme/b")
    with pytest.raises(Conflict):
        share("acme/c")
    assert share("acme/a", "y", "z").shares["acme/a"].tenants == {"y", "z"}
    assert "globex/c" in share("globex/c", "x").shares
    state = with_share(state, "acme/a", Share(), at=AT, actor="t")
    assert "acme/c" in share("acme/c", "x").shares


def test_a_busy_tenant_pushes_out_its_own_changes_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """So nobody hides what was done to keys by changing a share to and fro."""
    monkeypatch.setattr(changes, "CHANGES_KEPT", 6)
    state = with_key(Tenancy(), a_key(1, "globex"))
    state = with_revocation(state, "globex-000001", at=AT, actor="thief")
    for number in range(20):
        state = with_share(state, "acme/a", Share(True, download=bool(number % 2)), at=f"{number:02}", actor="t")
    assert [change.action for change in state.changes if change.tenant == "globex"] == [
        "tenant-create", "key-create", "key-revoke",
    ]  # fmt: skip
    assert [change.at for change in state.changes if change.tenant == "acme"] == ["17", "18", "19"]
    assert len(replace(state).changes) == 6
