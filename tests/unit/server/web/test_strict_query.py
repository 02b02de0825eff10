"""The queries of lists: nothing in them is passed over in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.apps import Served, with_apps
from tests.support.callers import make_callers


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/prefixes?tenant=acme", "tenant: unknown field"),
        ("/tenants?limit=3", "limit: unknown field"),
        ("/usage?by=task&by=key", "by: expected it once, got it 2 times"),
        ("/usage?from=2026-01-01&from=2026-01-01", "from: expected it once"),
        ("/audit?limit=1&limit=2", "limit: expected it once"),
        ("/keys?tenant=acme&tenant=globex", "tenant: expected it once"),
        ("/prefixes?x=1&x=2", "x: expected it once"),
    ],
)
def test_a_query_that_would_not_be_followed_is_refused(tmp_path: Path, path: str, told: str) -> None:
    async def test(served: Served) -> None:
        headers = make_callers(served.assembled.link.registry.tenancy).headers["operator"]
        served.assembled.keyring.look()
        answer = await served.public.get(path, headers=headers)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, "invalid_request"), answer.text
        assert error["message"].startswith(told) and error["detail"]["problems"][0]["field"] == told.partition(":")[0]
        plain = await served.public.get(path.partition("?")[0], headers=headers)
        assert plain.status_code == 200, plain.text

    with_apps(tmp_path, test)
