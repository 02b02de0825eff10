"""Counts and times of HTTP requests, by route template.

Owns those two metrics. All paths that no route matches share one label. Knows no routes.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram

UNMATCHED: Final = "(none)"
METHODS: Final = frozenset({"GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"})
OWNERS: Final = frozenset({"tenant", "key"})
"""Whose limit may have refused a request."""


class HttpMetrics:
    """The middleware fills it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "prefixd_http_requests_total", "HTTP requests, by route, status, and whose own limit refused them.",
            ("method", "route", "status", "limit_of"), registry=registry,
        )
        self._seconds = Histogram(
            "prefixd_http_request_duration_seconds", "Until the whole answer was sent.", ("route",), registry=registry
        )

    def observe(self, method: str, route: str | None, status: int, limit_of: str | None, seconds: float) -> None:
        """Count one request that was answered, or whose client has left (status 499).

        ``limit_of`` is whose own limit refused it, one of ``OWNERS``.
        """
        known, whose = method if method in METHODS else "OTHER", limit_of if limit_of in OWNERS else ""
        self._requests.labels(known, route or UNMATCHED, str(status), whose).inc()
        self._seconds.labels(route or UNMATCHED).observe(seconds)
