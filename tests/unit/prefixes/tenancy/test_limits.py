"""How limits of a tenant, of a key and by default go together."""

from __future__ import annotations

from prefixes.tenancy.limits import NO_LIMITS, TENANT_LIMITS, Limits, effective


def test_a_tenant_without_limits_has_the_defaults() -> None:
    assert effective(NO_LIMITS) == TENANT_LIMITS


def test_a_tenants_own_limit_takes_the_place_of_a_default_and_adds_to_the_others() -> None:
    found = effective(Limits(requests_per_minute=60, registry_tasks=0))
    assert (found.requests_per_minute, found.registry_tasks) == (60, 0)
    assert found.registry_bytes == TENANT_LIMITS.registry_bytes


def test_a_key_has_no_more_than_its_tenant() -> None:
    key, tenant = Limits(requests_per_minute=90, num_beams=2), Limits(requests_per_minute=60, num_beams=4, open_jobs=1)
    assert key.within(tenant) == Limits(requests_per_minute=60, num_beams=2, open_jobs=1)
    assert Limits(num_beams=0).within(Limits(num_beams=5)).num_beams == 0
    assert Limits(num_beams=3).within(NO_LIMITS) == Limits(num_beams=3)
