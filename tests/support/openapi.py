"""Compares what a service answers with its OpenAPI documents: schemathesis, with all checks.

Sends cases made from a document, valid and invalid, and compares every answer with it: status, code, content type,
headers and schema. What a schema cannot say (two parameters contradict each other, random bytes are no artifact) is
refused with a code that is not one of form, see ``SEMANTIC``.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

import pytest
import schemathesis
from schemathesis import engine
from schemathesis.config import SchemathesisConfig
from schemathesis.engine.events import FatalError, NonFatalError, ScenarioFinished

from tests.support.server import ServerProcess

NUMBERS = (
    pytest.param(300, marks=pytest.mark.faults, id="300"),
    pytest.param(5000, marks=pytest.mark.slow, id="5000"),
)
SEMANTIC: Final = frozenset({"invalid_parameter", "input_too_long", "invalid_artifact", "invalid_data"})
"""The codes that a request of the documented form may be refused with."""
ALLOWED: Final = ["2xx", "403", "404", "409", "429", "400", "422"]
"""The statuses of a request of the documented form. 400 and 422 have to have one of the codes above. 403: key routes,
where no key was ever made, and the service's scopes."""
REFUSED: Final = ["400", "403", "404", "405", "409", "413", "422", "429"]
"""The statuses of a request of another form. 413: a text that is too long may make the body too large before it."""
ENDING: Final = "/(block|rotate)$"
THOROUGH: Final = 500
"""From so many cases on, schemathesis's systematic phases run too. The random ones are then fewer."""


@schemathesis.serializer("application/x-ndjson")
def lines(context: Any, value: Any) -> bytes:
    """One JSON value in each line."""
    items = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


@schemathesis.check
def refused_for_its_meaning_alone(context: Any, response: Any, case: Any) -> None:
    """A request of the documented form is not refused for its form."""
    if case.meta is None or not case.meta.generation.mode.is_positive or response.status_code not in (400, 422):
        return
    code = response.json()["error"]["code"]
    assert code in SEMANTIC, f"{code}: {response.json()['error']['message']}"


def check(process: ServerProcess, cases: int, *, waiting: bool = False) -> None:
    """Send at least ``cases`` cases, a tenth of them to the admin port, and fail with every finding."""
    sent, findings = 0, set[str]()
    for url, share in ((process.admin_url, cases // 10), (process.url, cases)):
        done, found = run(f"{url}/openapi.json", share, waiting=waiting)
        sent += done
        findings |= found
    assert not findings, "\n\n".join(sorted(findings))
    assert sent >= cases, f"expected at least {cases} cases, got {sent}"
    assert process.process.poll() is None


def run(
    url: str, cases: int, *, waiting: bool, headers: dict[str, str] | None = None, tags: list[str] | None = None
) -> tuple[int, set[str]]:
    """Send some ``cases`` cases, the same in every run. Returns how many, and what is wrong.

    With ``tags`` and ``headers`` nothing that ends a key: it would find the one that is asked with.
    """

    def loaded(given: dict[str, Any]) -> Any:
        given = {**given, "headers": headers} if headers else given
        schema = schemathesis.openapi.from_url(url, config=SchemathesisConfig.from_dict(given), headers=headers or {})
        return schema.include(tag=tags).exclude(method="DELETE").exclude(path_regex=ENDING) if tags else schema

    operations = loaded(settings(1, thorough=False, waiting=waiting)).statistic.operations.selected
    share = 0.8 if cases >= THOROUGH else 1.0  # of the random ones
    chosen = settings(math.ceil(share * cases / operations), thorough=cases >= THOROUGH, waiting=waiting)
    if headers:
        chosen["phases"]["stateful"] = {"enabled": False}
    schema = loaded(chosen)
    sent, findings = 0, set[str]()
    for event in engine.from_schema(schema).execute():
        if isinstance(event, ScenarioFinished):
            sent += len(event.recorder.cases)
            for nodes in event.recorder.checks.values():
                findings |= {described(event, node) for node in nodes if node.failure_info is not None}
        elif isinstance(event, NonFatalError):
            findings.add(f"{event.label}: {event.value!r}")
        elif isinstance(event, FatalError):
            raise event.exception
    return sent, findings


def settings(examples: int, *, thorough: bool, waiting: bool) -> dict[str, Any]:
    """schemathesis's settings: every check on, nothing by chance, ``examples`` random cases of each operation.

    ``thorough`` adds each bound of each schema, methods that a path has not, and sequences of operations. ``waiting``:
    of a stream, the first event is read. The events of a job that waits for a worker have no end.
    """
    return {
        "seed": 12,
        "suppress-health-check": ["all"],
        "request-timeout": 10.0 if waiting else 60.0,
        "max-stream-events": 1 if waiting else 10_000,
        "generation": {"max-examples": examples, "deterministic": True, "database": "none", "no-shrink": True},
        "checks": {
            "enabled": True,
            "positive_data_acceptance": {"expected-statuses": ALLOWED},
            "negative_data_rejection": {"expected-statuses": REFUSED},
        },
        "phases": {
            "coverage": {"enabled": thorough},
            "stateful": {"enabled": thorough, "generation": {"max-examples": 50}},
        },
    }


def described(event: ScenarioFinished, node: Any) -> str:
    """One finding, with the request that shows it."""
    told = node.failure_info
    title, message = told.failure.title, told.failure.message[:1500]
    return f"{event.label}: {node.name}: {title}\n{message}\n{told.code_sample[:1500]}"
