"""The routes that an application has, for tables that must name each of them."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, FastAPI
from starlette.routing import Route


def routes(port: str, routed: FastAPI | APIRouter) -> Iterator[tuple[str, str, str]]:
    """Every route there is, also what the document leaves out."""
    for route in routed.routes:
        if isinstance(route, Route):
            yield from ((port, method, route.path) for method in (route.methods or set()) - {"HEAD"})
        else:
            yield from routes(port, route.original_router)  # type: ignore[attr-defined]
