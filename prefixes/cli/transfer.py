"""``prefixd prefixes publish | import | export``: artifacts and other formats, in and out.

Owns these commands; the formats themselves are ``prefixes.artifact`` and ``prefixes.formats``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixes.actor import local_actor
from prefixes.cli import show
from prefixes.cli.target import (
    JsonOption,
    RefArgument,
    RegistryOption,
    ServerOption,
    application,
    command,
    fetch,
    json_object,
    loaded,
    opened,
    reference,
    task_of,
)
from prefixes.files import write_new
from prefixes.spec import DEFAULT_ALIAS, INPUT_SLOT

if TYPE_CHECKING:
    from prefixes.artifact import Prefix
    from prefixes.backbone import Backbone

app = application("Bring prefixes in and take them out.")
import_app = application("Import prefixes made elsewhere.")
export_app = application("Export a version: the artifact itself, or for other tools.")
app.add_typer(import_app, name="import")
app.add_typer(export_app, name="export")

TaskOption = Annotated[
    str, typer.Option("--task", metavar="NAME", help="[TENANT/]NAME to publish under.", show_default=False)
]
AliasesOption = Annotated[
    str | None, typer.Option("--alias", help="The alias to move to it.", show_default="production")
]
NoAliasOption = Annotated[bool, typer.Option("--no-alias", help="Publish without moving an alias.")]
RecordOption = Annotated[
    str, typer.Option("--record", metavar="JSON", help="What to keep beside the version: scores, times, who.")
]
BackboneOption = Annotated[
    str,
    typer.Option(
        "--backbone",
        metavar="NAME",
        help="The model it was trained on: a name of `prefixd backbones list`, a folder, FOLDER/NAME.gguf or a hub id.",
        show_default=False,
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        help="The prompt around the input, which no format holds; the paper's GPT-2 code used "
        "'{input} <|endoftext|>'. [default: the backbone's own: <s>{input}</s> for BART, else {input}]",
        show_default=False,
    ),
]
DefaultsOption = Annotated[str, typer.Option(metavar="JSON", help="Default decoding parameters.")]


@command(app, "publish")
def publish(
    file: Annotated[Path, typer.Argument(help="The artifact, a .safetensors file.", show_default=False)],
    task: TaskOption,
    alias: AliasesOption = None,
    no_alias: NoAliasOption = False,
    record: RecordOption = "{}",
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish an artifact as a new version of a task, and point an alias at it."""
    target = _Target(task, alias, no_alias, record)
    target.publish(file.read_bytes(), registry, server, as_json)


@command(import_app, "peft")
def import_peft(
    folder: Annotated[Path, typer.Argument(help="A folder that PEFT saved.", show_default=False)],
    task: TaskOption,
    backbone: BackboneOption,
    template: TemplateOption = None,
    defaults: DefaultsOption = "{}",
    alias: AliasesOption = None,
    no_alias: NoAliasOption = False,
    record: RecordOption = "{}",
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import a prefix-tuning or cartridge folder of PEFT's and publish it."""
    target = _Target(task, alias, no_alias, record)
    parameters = json_object("--defaults", defaults)
    from prefixes.artifact import write_prefix
    from prefixes.formats.peft import import_peft as read_folder

    found = loaded(backbone)
    prefix = read_folder(folder, found.spec, template=_template(template, found), defaults=parameters)
    target.publish(write_prefix(prefix), registry, server, as_json)


@command(import_app, "cartridge")
def import_cartridge(
    file: Annotated[Path, typer.Argument(help="A safetensors file of a cartridge.", show_default=False)],
    task: TaskOption,
    backbone: BackboneOption,
    interleaved: Annotated[
        bool,
        typer.Option("--interleaved", help="Its keys rotate neighbours, as torchtitan's Llama 3 does, not halves."),
    ] = False,
    template: TemplateOption = None,
    defaults: DefaultsOption = "{}",
    alias: AliasesOption = None,
    no_alias: NoAliasOption = False,
    record: RecordOption = "{}",
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import a cartridge with a key and a value per layer, as torchtitan's prefix adapters save it, and publish it."""
    target = _Target(task, alias, no_alias, record)
    parameters = json_object("--defaults", defaults)
    from prefixes.artifact import write_prefix
    from prefixes.formats.cartridge import import_cartridge as read_file

    found = loaded(backbone)
    prefix = read_file(
        file, found.spec, interleaved=interleaved, template=_template(template, found), defaults=parameters
    )
    target.publish(write_prefix(prefix), registry, server, as_json)


@command(import_app, "paper")
def import_paper(
    path: Annotated[
        Path,
        typer.Argument(
            help="What the code saved: a folder, its pytorch_model.bin or a .ckpt file.", show_default=False
        ),
    ],
    task: TaskOption,
    backbone: BackboneOption,
    template: TemplateOption = None,
    defaults: DefaultsOption = "{}",
    alias: AliasesOption = None,
    no_alias: NoAliasOption = False,
    record: RecordOption = "{}",
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import a checkpoint of the prefix-tuning paper's published code, its MLP folded, and publish it."""
    target = _Target(task, alias, no_alias, record)
    parameters = json_object("--defaults", defaults)
    from prefixes.artifact import write_prefix
    from prefixes.formats.paper import import_paper as read_checkpoint

    found = loaded(backbone)
    prefix = read_checkpoint(path, found.spec, template=_template(template, found), defaults=parameters)
    target.publish(write_prefix(prefix), registry, server, as_json)


@command(export_app, "artifact")
def export_artifact(
    ref: RefArgument,
    file: Annotated[Path, typer.Argument(help="Where to write it; never over a file that exists.", show_default=False)],
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version's artifact to a file."""
    from prefixes.artifact import read_prefix

    version, data = _fetched(ref, registry, server)
    read_prefix(data, expected_version=version)
    write_new(file, data)
    _exported(version, file, as_json)


@command(export_app, "peft")
def export_peft(
    ref: RefArgument,
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", show_default=False)],
    backbone: BackboneOption,
    peft_type: Annotated[str, typer.Option("--type", help="PREFIX_TUNING or CARTRIDGE.")] = "PREFIX_TUNING",
    base_model: Annotated[
        str | None, typer.Option(help="What PEFT is to note as the model's name.", show_default=False)
    ] = None,
    num_frozen_tokens: Annotated[
        int | None,
        typer.Option(
            help="For cartridges: first tokens that training leaves alone.", show_default="as imported, else 1"
        ),
    ] = None,
    registry: RegistryOption = None,
    server: ServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version as a folder that PEFT loads, if it has a shifted prefix at the decoder and no other.

    Template and default parameters have no place there.
    """
    from prefixes.artifact import read_prefix
    from prefixes.formats.peft import PEFT_TYPES
    from prefixes.formats.peft_export import export_peft as write_folder

    chosen = next((known for known in PEFT_TYPES if known == peft_type), None)
    if chosen is None:
        raise typer.BadParameter(f"--type: expected {' or '.join(PEFT_TYPES)}, got {peft_type!r}")
    version, data = _fetched(ref, registry, server)
    prefix = read_prefix(data, expected_version=version)
    spec = loaded(backbone).spec
    write_folder(prefix, folder, spec, peft_type=chosen, base_model=base_model, num_frozen_tokens=num_frozen_tokens)
    _warn_of_losses(prefix)
    _exported(version, folder, as_json)


class _Target:
    """Where a new version goes. Wrong usage raises here, before anything is read or loaded."""

    def __init__(self, task: str, alias: str | None, no_alias: bool, record: str) -> None:
        if alias is not None and no_alias:
            raise typer.BadParameter("expected one of --alias and --no-alias, got both")
        task_of(task)
        self._task = task
        self._alias = None if no_alias else alias or DEFAULT_ALIAS
        self._record = json_object("--record", record)

    def publish(self, data: bytes, registry: str | None, server: str | None, as_json: bool) -> None:
        with opened(registry, server, create=True) as target:
            ref = task_of(self._task, target)
            tenant, name = ref.tenant, ref.name
            info = target.publish(tenant, name, data, alias=self._alias, record=self._record, actor=local_actor())
            show.published(target.inspect(tenant, name), info.version, as_json=as_json)


def _template(chosen: str | None, backbone: Backbone) -> str:
    """Raises InvalidParameter for a mark that the backbone's tokenizer does not know."""
    template = backbone.input_template if chosen is None else chosen
    backbone.prompt_encoder.check_marks(template)
    return template


def _fetched(ref: str, registry: str | None, server: str | None) -> tuple[str, bytes]:
    with opened(registry, server) as source:
        found = source.resolve(reference(ref, source))
        return found.version, fetch(source, found.tenant, found.name, found.version)


def _warn_of_losses(prefix: Prefix) -> None:
    lost: dict[str, Any] = {}
    if prefix.spec.template != INPUT_SLOT:
        lost["template"] = prefix.spec.template
    if prefix.spec.defaults:
        lost["defaults"] = dict(prefix.spec.defaults)
    if lost:
        typer.echo(f"note: PEFT has no place for {lost}; pass it to `import` when it comes back", err=True)


def _exported(version: str, path: Path, as_json: bool) -> None:
    if as_json:
        show.show_json({"version": version, "path": str(path)})
    else:
        typer.echo(f"wrote {version} to {path}")
