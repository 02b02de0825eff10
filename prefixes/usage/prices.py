"""Prices: what usage costs. Owns the price table's file and the arithmetic, which is exact: decimals, no rounding.

A file is TOML, or JSON where its name ends so:

    currency = "EUR"
    [default]
    per_1000_input_tokens = "0.10"
    per_1000_prefix_tokens = "0.01"
    per_1000_output_tokens = "0.40"
    per_training_step = "0.002"
    [tasks."acme/e2e"]
    per_1000_output_tokens = "0.80"
    [tenants.globex]
    per_1000_input_tokens = "0.05"

A tenant's price goes before its task's, and that before the default, each price by itself. What nobody names is free.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation, localcontext
from pathlib import Path
from typing import Any, Final

from prefixes.errors import InvalidParameter
from prefixes.usage.model import Counts, Kind, Subject

PRICED: Final[Mapping[str, tuple[str, int]]] = {
    "per_1000_input_tokens": ("input_tokens", 1000),
    "per_1000_prefix_tokens": ("prefix_tokens", 1000),
    "per_1000_output_tokens": ("output_tokens", 1000),
    "per_training_step": ("training_steps", 1),
}
"""Each price: what it is for, and how many of it."""
MAX_PRICE: Final = Decimal(10**9)
PLACES: Final = 12
"""Digits behind the point that a price may have. With them and MAX_PRICE every cost has at most DIGITS digits."""
DIGITS: Final = 60

Prices = Mapping[str, Decimal]


@dataclass(frozen=True)
class PriceTable:
    """Prices by default, by task (``owner/name``) and by tenant."""

    currency: str
    default: Prices
    tasks: Mapping[str, Prices]
    tenants: Mapping[str, Prices]

    def cost(self, subject: Subject, counts: Counts) -> Decimal:
        """What ``subject`` pays; nothing for others' use of its own task."""
        if subject.kind is Kind.SHARED:
            return Decimal(0)
        tables = (self.tenants.get(subject.tenant, {}), self.tasks.get(subject.task or "", {}), self.default)
        with localcontext(prec=DIGITS):
            total = Decimal(0)
            for name, (what, many) in PRICED.items():
                price = next((table[name] for table in tables if name in table), Decimal(0))
                total += price * getattr(counts, what) / many
            return total


def read_prices(path: Path) -> PriceTable:
    """The table in a file. Raises InvalidParameter for anything else, and for a file that cannot be read."""
    try:
        text = path.read_text()
        raw = (
            json.loads(text, parse_float=Decimal, parse_constant=str)
            if path.suffix == ".json"
            else tomllib.loads(text, parse_float=Decimal)
        )
    except OSError as error:
        raise InvalidParameter(f"price file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidParameter(f"price file {path}: {str(error)[:200]}") from None
    return prices_from(raw, f"price file {path}")


def prices_from(raw: Any, where: str) -> PriceTable:
    """A table from what a file says. ``where`` is for the messages of InvalidParameter."""
    known = {"currency", "default", "tasks", "tenants"}
    fields = _table(raw, where, known)
    currency = fields.get("currency")
    if not isinstance(currency, str) or not 1 <= len(currency) <= 20 or not currency.isprintable():
        raise InvalidParameter(f"{where}: currency: expected a name such as EUR, got {str(currency)[:40]!r}")
    return PriceTable(
        currency,
        _prices(fields.get("default", {}), f"{where}: default"),
        _named(fields.get("tasks", {}), f"{where}: tasks"),
        _named(fields.get("tenants", {}), f"{where}: tenants"),
    )


def shown(amount: Decimal) -> str:
    """An amount without an exponent and without zeros at its end."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _named(raw: Any, where: str) -> Mapping[str, Prices]:
    return {name: _prices(prices, f"{where}.{name}") for name, prices in _table(raw, where).items()}


def _prices(raw: Any, where: str) -> Prices:
    return {name: _price(value, f"{where}: {name}") for name, value in _table(raw, where, set(PRICED)).items()}


def _price(value: Any, where: str) -> Decimal:
    expected = f"expected 0 to {MAX_PRICE}, with at most {PLACES} digits behind the point"
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
            raise InvalidOperation
        price = Decimal(value)
        if not price.is_finite() or not 0 <= price <= MAX_PRICE or price != round(price, PLACES):
            raise InvalidOperation
    except InvalidOperation:
        raise InvalidParameter(f"{where}: {expected}, got {str(value)[:40]!r}") from None
    return price


def _table(raw: Any, where: str, known: set[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise InvalidParameter(f"{where}: expected a table, got {type(raw).__name__}")
    if known is not None and (unknown := sorted(raw.keys() - known)):
        raise InvalidParameter(f"{where}: expected some of {', '.join(sorted(known))}, got {unknown[0][:60]!r}")
    return raw
