"""docs/tenants.md says which limits there are and what holds by default."""

from __future__ import annotations

from prefixes.tenancy.limits import DESCRIPTIONS, NAMES, TENANT_LIMITS
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "tenants.md").read_text()


def test_the_table_of_limits_is_that_of_the_code() -> None:
    section = PAGE.partition("\n## Limits\n")[2].partition("\n##")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    defaults = dict(TENANT_LIMITS.given())
    shown = {name: f"{defaults[name]:,}" if name in defaults else "none" for name in NAMES}
    assert {name.strip("`"): default for name, default, _ in rows} == shown
    assert [name.strip("`") for name, _, _ in rows] == list(NAMES) == list(DESCRIPTIONS)
    told = {name.strip("`"): what.lower() for name, _, what in rows}
    assert told == {name: text.rstrip(".").lower() for name, text in DESCRIPTIONS.items()}
