"""``prefixd datasets upload | list | delete``, and how ``jobs submit`` sends its files.

Owns the check before an upload: it reads the file once for its digest and for bad lines, so that no bad file is sent
and none is sent twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from prefixes.cli import show
from prefixes.cli.target import JsonOption, application, command
from prefixes.errors import InvalidName
from prefixes.spec import check_name
from trainer.cli.jobs.target import TenantOption, TrainerOption, note, opened
from trainer.cli.options import named_errors
from trainer.client.client import CHUNK, TrainerClient
from trainer.data.files import check_digest
from trainer.data.lines import InvalidData, LineReader

app = application("The datasets of a running trainer: JSONL files that jobs train on, named by their content.")

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Checked:
    """A file without bad lines, and its dataset's digest."""

    digest: str
    size: int
    lines: int


@command(app, "upload", errors=named_errors)
def upload(
    file: Annotated[Path, typer.Argument(metavar="FILE", help='JSONL of {"input", "target"}.', show_default=False)],
    trainer: TrainerOption = None,
) -> None:
    """Upload a dataset and print its id, sha256:…; nothing is sent if the trainer has it.

    \b
    Examples:
      prefixd datasets upload e2e.jsonl
      prefixd jobs submit --task e2e --data sha256:…
    """
    with opened(trainer) as client:
        typer.echo(send_dataset(client, str(file)))


@command(app, "list", errors=named_errors)
def list_datasets(
    tenant: TenantOption = None, trainer: TrainerOption = None, as_json: JsonOption = False
) -> None:
    """List datasets, the newest first. An operator sees those of all tenants."""
    with opened(trainer) as client:
        found = client.datasets(tenant=tenant)
    if as_json:
        show.show_json({"datasets": found})
        return
    rows = [
        [item["dataset"], str(item.get("tenant")), str(item.get("name") or "-"), str(item.get("lines")),
         show.size(int(item.get("bytes") or 0)), str(item.get("created_at"))]
        for item in found
    ]  # fmt: skip
    show.show_table(["dataset", "tenant", "name", "lines", "size", "uploaded"], rows)


@command(app, "delete", errors=named_errors)
def delete(
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Its id, sha256:…", show_default=False)],
    tenant: TenantOption = None,
    trainer: TrainerOption = None,
) -> None:
    """Delete a dataset that no queued or running job needs."""
    with opened(trainer) as client:
        client.delete_dataset(dataset, tenant=tenant)
    note(f"deleted {dataset}")


def send_dataset(client: TrainerClient, data: str) -> str:
    """Return the dataset id for ``data``, an id ``sha256:…`` or a file. Send the file if the trainer lacks it.

    Raises InvalidData for a file that is missing, has a bad line, or changes meanwhile.
    """
    if data.startswith("sha256:"):
        return check_digest(data)
    path = Path(data)
    if not path.is_file():
        raise InvalidData(f"{path}: expected a JSONL file, got {'something else' if path.exists() else 'none'}")
    with _bar(f"checking {path.name}", path.stat().st_size) as advance:
        checked = check_file(path, advance)
    known = client.dataset(checked.digest)
    if known is not None:
        note(f"{path.name}: the trainer has it ({checked.lines} lines)")
        return checked.digest
    with _bar(f"sending {path.name}", checked.size) as advance:
        sent = str(client.upload(path, checked.size, name=_name(path), sent=advance)["dataset"])
    if sent != checked.digest:
        raise InvalidData(f"{path}: expected {checked.digest}, as it was checked, sent {sent}: it changed meanwhile")
    note(f"{path.name}: sent {checked.lines} lines, {show.size(checked.size)}")
    return sent


def check_file(path: Path, advance: Advance = lambda count: None) -> Checked:
    """Read a file once, with a chunk and a line in memory. Raises InvalidData, which names line and field."""
    reader, digest, size = LineReader(path.name), hashlib.sha256(), 0
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                for _ in reader.feed(chunk):
                    pass
                advance(len(chunk))
    except OSError as error:
        raise InvalidData(f"{path}: expected a file, got {error.strerror or error}") from error
    for _ in reader.finish():
        pass
    return Checked(f"sha256:{digest.hexdigest()}", size, reader.examples)


@contextmanager
def _bar(text: str, size: int) -> Iterator[Advance]:
    """Show a bar of bytes on stderr if it is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task(text, total=size)
        yield lambda count: progress.advance(bar, count)


def _name(path: Path) -> str | None:
    """Return the file's name for lists, or None if it is no valid name."""
    try:
        return check_name("dataset", path.stem.lower())
    except InvalidName:
        return None
