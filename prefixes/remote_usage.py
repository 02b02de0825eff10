"""RemoteUsage: what was used, as a running server answers it. Owns the caller's side of ``GET /usage``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from prefixes.errors import RegistryUnavailable
from prefixes.remote import Remote


class RemoteUsage:
    """Raises the server's own errors, by their codes."""

    def __init__(self, url: str, *, api_key: str | None = None, client: httpx.Client | None = None) -> None:
        """``url`` is the server's. Raises RegistryUnavailable for one that is none."""
        self._server = Remote("server", RegistryUnavailable, url, api_key=api_key, client=client)

    def usage(self, first: str, last: str, by: Sequence[str], tenant: str | None) -> dict[str, Any]:
        """The answer for these days, of one tenant or of all that the caller may see."""
        asked = {"from": first, "to": last, "by": ",".join(by), **({"tenant": tenant} if tenant else {})}
        return dict(self._server.json("GET", "/usage", params=asked))

    def close(self) -> None:
        """Release the connections."""
        self._server.close()
