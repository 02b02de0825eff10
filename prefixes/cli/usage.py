"""``prefixd usage``: what tenants used, on a registry or through a server. Owns its output: a table, CSV or JSON."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from prefixes.cli import show
from prefixes.cli.key_option import key_of_command
from prefixes.cli.target import JsonOption, RegistryOption, ServerOption, application, command, place_of, telling
from prefixes.registry import open_registry
from prefixes.remote_usage import RemoteUsage
from prefixes.spec import check_name
from prefixes.usage.model import DAYS_KEPT, asked_days
from prefixes.usage.prices import PriceTable, read_prices
from prefixes.usage.table import BY, parse_by, priced, summed

usage_app = application("Show what tenants used, and what it costs.")

REQUESTS: Final = ("requests", "input_tokens", "prefix_tokens", "output_tokens")
TRAINING: Final = ("jobs", "training_steps", "training_tokens", "training_seconds")
NUMBERS: Final = (*REQUESTS, *TRAINING)


@command(usage_app, "usage")
def usage(
    by: Annotated[
        str, typer.Option(metavar="LIST", help=f"What to tell apart, with commas: {', '.join(BY)}.")
    ] = "task",
    first: Annotated[
        str | None, typer.Option("--from", metavar="DAY", help="In UTC; default: the first of this month.")
    ] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="DAY", help="In UTC, included; default: today.")] = None,
    tenant: Annotated[str | None, typer.Option(metavar="NAME", help="Only this tenant's.")] = None,
    price_file: Annotated[
        Path | None,
        typer.Option(help="Prices, in TOML or JSON: shows costs. A server may have its own."),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show requests, tokens and training of whole days in UTC, and what they cost.

    On a registry that is everybody's, through a server one's own tenant's or, with an operator's key, everybody's.
    """
    if as_csv and as_json:
        raise typer.BadParameter("expected one of --csv and --json, got both")
    prices = None if price_file is None else read_prices(price_file)
    days, names = asked_days(first, last), parse_by(by)
    if tenant is not None:
        check_name("tenant", tenant)
    answer = _answer(registry, server, days, names, tenant, prices)
    if as_json:
        show.show_json(answer)
    elif as_csv:
        _show_csv(answer)
    else:
        _show_table(answer)


def _answer(
    registry: str | None,
    server: str | None,
    days: tuple[str, str],
    by: Sequence[str],
    tenant: str | None,
    prices: PriceTable | None,
) -> dict[str, Any]:
    registry, server = place_of(registry, server)
    if server is not None:
        with closing(RemoteUsage(server, api_key=key_of_command())) as remote:
            if prices is None:
                return remote.usage(*days, by, tenant)
            wider = tuple(dict.fromkeys((*by, "tenant", "task")))  # what prices depend on
            return priced(remote.usage(*days, wider, tenant), by, prices)
    with telling(registry) as url, closing(open_registry(url, create=False)) as store:
        return summed(store.usage.read(*days, tenant), *days, by=by, tenant=tenant, prices=prices)


def _show_csv(answer: Mapping[str, Any]) -> None:
    costs = [f"cost_{answer['currency']}"] if answer["currency"] else []
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*answer["by"], *NUMBERS, *costs])
    for row in answer["rows"]:
        writer.writerow([*_names(row, answer["by"], ""), *(row[name] for name in NUMBERS), *_cost(row)])


def _show_table(answer: Mapping[str, Any]) -> None:
    total = answer["total"]
    numbers = [name for kind in (REQUESTS, TRAINING) if total[kind[0]] or kind is REQUESTS for name in kind]
    whose = answer["tenant"] or "all tenants"
    typer.echo(f"{whose}, {answer['from']} to {answer['to']} (UTC; {DAYS_KEPT} days are kept)")
    costs = [f"cost ({answer['currency']})"] if answer["currency"] else []
    rows = [[*_names(row, answer["by"], "-"), *_shown(row, numbers), *_cost(row)] for row in answer["rows"]]
    rows.append(["total", *[""] * (len(answer["by"]) - 1), *_shown(total, numbers), *_cost(total)])
    show.show_table([*answer["by"], *(name.replace("_", " ") for name in numbers), *costs], rows)
    if answer["of_shared"]:
        by = [name for name in answer["by"] if name in answer["of_shared"][0]] or ["task"]
        typer.echo("\nof shared tasks, by other tenants:")
        shared = [[*_names(row, by, "-"), *_shown(row, REQUESTS)] for row in answer["of_shared"]]
        show.show_table([*by, *(name.replace("_", " ") for name in REQUESTS)], shared)


def _names(row: Mapping[str, Any], by: Sequence[str], absent: str) -> list[str]:
    return [absent if row[name] is None else str(row[name]) for name in by]


def _shown(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{row[name]:,}" for name in names]


def _cost(row: Mapping[str, Any]) -> list[str]:
    return [row["cost"]] if "cost" in row else []
