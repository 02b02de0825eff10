"""Types that several services' settings share: counts, seconds, addresses, comma-separated lists. Knows no setting."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import NoDecode


def _split_commas(value: Any) -> Any:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _check_address(text: str) -> str:
    if "/" in text:
        try:
            ipaddress.ip_network(text)
        except ValueError as error:
            raise ValueError(f"expected an address, or a network such as 10.117.44.0/24: {error}") from None
    return text


Count = Annotated[int, Field(ge=1, le=1 << 31)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]

Address = Annotated[str, AfterValidator(_check_address)]
"""An address to listen on, or the network, in CIDR notation, in which this machine has it (``binding``)."""

COMMA_SEPARATED = BeforeValidator(_split_commas)
"""For a tuple. With pydantic_settings.NoDecode beside it, a variable's text is not parsed as JSON."""

Names = Annotated[tuple[str, ...], NoDecode, COMMA_SEPARATED]
