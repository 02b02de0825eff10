"""The settings of every service about slow and stuck clients.

Owns their names, defaults and help texts. Does not know what they do (``protocol``, ``intake``, ``listening``).
"""

from __future__ import annotations

from pydantic import ByteSize, Field

from server.web.settings_sources import ServiceSettings
from server.web.settings_types import Count, Seconds


class ConnectionSettings(ServiceSettings):
    """What both ports of a service grant a connection."""

    header_timeout_s: Seconds = Field(
        10.0, description="Seconds for a request's headers, from the connection or, later, from their first byte on."
    )
    body_timeout_s: Seconds = Field(
        30.0, description="Seconds for which a request's body may pause; in all, as many and one more for each KiB."
    )
    upload_timeout_s: Seconds = Field(
        14400.0, description="Seconds within which an uploaded artifact or dataset must arrive whole."
    )
    max_uploads: Count = Field(8, description="Uploads that arrive at once; more wait as long as a body may pause.")
    max_uploads_of_a_tenant: Count = Field(4, description="Those of one tenant among them.")
    write_timeout_s: Seconds = Field(
        60.0, description="Seconds for which a client may read nothing of its answer before it counts as gone."
    )
    max_unfinished_bytes: ByteSize = Field(
        ByteSize(64 << 20), gt=0, description="Memory for bodies that have not arrived whole, over all requests."
    )
    max_connections: Count = Field(4096, description="Connections on each port; fewer where open files are limited.")
