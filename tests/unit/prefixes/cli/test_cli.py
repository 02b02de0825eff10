"""``prefixd prefixes`` on a registry: every command does what it says, and says what went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from prefixes.artifact import read_prefix, version_of, write_prefix
from prefixes.backbone import load_backbone
from prefixes.cli import app
from prefixes.errors import RegistryUnavailable
from prefixes.files.folder import TEMPORARY
from prefixes.formats.peft_export import export_peft
from prefixes.registry import open_registry
from prefixes.registry.disk.registry import DiskRegistry
from tests.support.bart import save_tiny_bart
from tests.support.llama import save_tiny_llama
from tests.support.paper import PublishedPrefix
from tests.support.prefixes import make_prefix, save_tiny_gpt2

PREFIXES = [make_prefix(seed=seed, defaults={"num_beams": 5}) for seed in range(3)]
VERSIONS = [version_of(prefix) for prefix in PREFIXES]


class Shell:
    """Runs commands on one registry, with nothing of the user's in the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"disk://{folder}/registry"
        self.env: dict[str, str | None] = {
            "PREFIXD_REGISTRY": self.url,
            "PREFIXD_SERVER": None,
            "XDG_DATA_HOME": str(folder / "data"),
        }

    def run(self, *arguments: str, code: int = 0, **options: Any) -> Any:
        result = CliRunner().invoke(app, list(arguments), env=self.env, **options)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def json(self, *arguments: str, **options: Any) -> Any:
        return json.loads(self.run(*arguments, "--json", **options).stdout)

    def error(self, *arguments: str) -> str:
        """The one line on stderr of a command that fails."""
        result = self.run(*arguments, code=1)
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return str(result.stderr)

    def file(self, index: int) -> str:
        path = self.folder / f"{index}.safetensors"
        path.write_bytes(write_prefix(PREFIXES[index]))
        return str(path)

    def publish(self, *indices: int, task: str = "e2e") -> None:
        for index in indices:
            self.run("publish", self.file(index), "--task", task)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_publish_list_and_inspect(shell: Shell) -> None:
    published = shell.json("publish", shell.file(0), "--task", "acme/e2e", "--record", '{"bleu": 68.2}')
    assert (published["task"], published["version"]) == ("acme/e2e", VERSIONS[0])
    assert published["aliases"] == {"production": VERSIONS[0]}
    assert published["record"] == {"bleu": 68.2}
    listed = shell.json("list")
    assert listed == {
        "prefixes": [
            {
                "task": "acme/e2e",
                "aliases": {"production": VERSIONS[0]},
                "version": VERSIONS[0],
                "versions": 1,
                "prefix_tokens": 3,
            }
        ]
    }
    inspected = shell.json("inspect", "acme/e2e")
    assert inspected["versions"][0]["spec"]["sites"]["decoder"]["length"] == 3
    assert [move["action"] for move in inspected["history"]["production"]] == ["publish"]


def test_tables_show_digests_that_commands_take_back(shell: Shell) -> None:
    shell.publish(0, 1)
    assert VERSIONS[1][:19] in shell.run("list").stdout
    assert VERSIONS[0][:19] in shell.run("inspect", "e2e").stdout
    assert "num_beams" in shell.run("inspect", "e2e").stdout
    assert f"e2e@production is {VERSIONS[0]}" in shell.run("promote", f"e2e@{VERSIONS[0][:19]}").stdout
    assert "expected one version that begins so, found 0" in shell.error("promote", "e2e@sha256:0000")


def test_list_of_one_tenant(shell: Shell) -> None:
    shell.publish(0, task="acme/a")
    shell.publish(0, task="globex/b")
    assert [item["task"] for item in shell.json("list", "--tenant", "acme")["prefixes"]] == ["acme/a"]
    assert len(shell.json("list")["prefixes"]) == 2


def test_aliases_move_by_promote_and_rollback(shell: Shell) -> None:
    shell.publish(0, 1)
    shell.run("publish", shell.file(2), "--task", "e2e", "--alias", "canary")
    assert shell.json("promote", "e2e@canary")["aliases"]["production"] == VERSIONS[2]
    assert shell.json("rollback", "e2e")["aliases"]["production"] == VERSIONS[1]
    assert shell.json("rollback", "e2e")["aliases"]["production"] == VERSIONS[0]
    assert "expected an earlier version" in shell.error("rollback", "e2e")
    assert "got" in shell.error("promote", "e2e@canary", "--expected-current", VERSIONS[1])
    assert shell.json("promote", "e2e@canary", "--alias", "nightly")["aliases"]["nightly"] == VERSIONS[2]


def test_a_rollback_whose_answer_was_lost_says_how_to_repeat_it(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.publish(0, 1, 2)
    made = DiskRegistry.rollback

    def lost(*arguments: Any, **options: Any) -> None:
        made(*arguments, **options)
        raise RegistryUnavailable("registry: it did not answer in time")

    monkeypatch.setattr(DiskRegistry, "rollback", lost)
    advice = f"--expected-current {VERSIONS[2]}"
    assert advice in shell.error("rollback", "e2e")
    monkeypatch.undo()
    refused = shell.error("rollback", "e2e", *advice.split())
    assert f"expected it at {VERSIONS[2]}, got {VERSIONS[1]}" in refused
    assert shell.json("inspect", "e2e")["aliases"]["production"] == VERSIONS[1]


def test_a_rollback_moves_nothing_that_moved_since_it_was_looked_at(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.publish(0, 1, 2)
    made = DiskRegistry.rollback

    def overtaken(registry: DiskRegistry, *arguments: Any, **options: Any) -> Any:
        registry.promote("default", "e2e", VERSIONS[0])
        return made(registry, *arguments, **options)

    monkeypatch.setattr(DiskRegistry, "rollback", overtaken)
    assert f"expected it at {VERSIONS[2]}, got {VERSIONS[0]}" in shell.error("rollback", "e2e")
    assert shell.json("inspect", "e2e")["aliases"]["production"] == VERSIONS[0]


def test_inspect_cuts_long_texts_for_people_alone(shell: Shell) -> None:
    shell.run("publish", shell.file(0), "--task", "e2e", "--record", json.dumps({"seen": {"digests": "A" * 9000}}))
    assert "A" * 100 in (shown := shell.run("inspect", "e2e").stdout) and len(shown) < 3000
    assert shell.json("inspect", "e2e")["versions"][0]["record"]["seen"]["digests"] == "A" * 9000


def test_inspect_shows_what_a_later_publish_replaced_in_a_record(shell: Shell) -> None:
    for score in (68.2, 70.1):
        shell.run("publish", shell.file(0), "--task", "e2e", "--record", json.dumps({"bleu": score}))
    (version,) = shell.json("inspect", "e2e")["versions"]
    assert version["record"] == {"bleu": 70.1}
    (replaced,) = version["replaced"]
    assert (replaced["entry"], replaced["value"]) == ("bleu", 68.2)
    assert f'until {replaced["at"]} its record had {{"bleu": 68.2}}' in shell.run("inspect", "e2e").stdout


def test_publish_without_an_alias_moves_none(shell: Shell) -> None:
    assert shell.json("publish", shell.file(0), "--task", "e2e", "--no-alias")["aliases"] == {}
    assert shell.json("list")["prefixes"][0]["version"] is None
    assert "alias 'production'" in shell.error("promote", "e2e@production", "--alias", "x")


def test_delete_asks_first(shell: Shell) -> None:
    shell.publish(0)
    assert "Delete default/e2e and its 1 version(s)?" in shell.run("delete", "e2e", input="n\n", code=1).stderr
    assert len(shell.json("list")["prefixes"]) == 1
    shell.run("delete", "e2e", code=1, input="")
    shell.run("delete", "e2e", input="y\n")
    assert shell.json("list") == {"prefixes": []}
    shell.publish(0)
    assert shell.json("delete", "e2e", "--yes") == {"task": "default/e2e", "deleted": True}
    assert "expected a published task" in shell.error("delete", "e2e", "--yes")


def test_export_of_the_artifact_is_the_artifact(shell: Shell) -> None:
    shell.publish(0, 1)
    target = shell.folder / "out.safetensors"
    assert shell.json("export", "artifact", f"e2e@{VERSIONS[0]}", str(target))["version"] == VERSIONS[0]
    assert target.read_bytes() == write_prefix(PREFIXES[0])
    assert "File exists" in shell.error("export", "artifact", "e2e", str(target))
    assert target.read_bytes() == write_prefix(PREFIXES[0])
    assert not list(shell.folder.glob(f"{TEMPORARY}*"))
    assert "No such file" in shell.error("export", "artifact", "e2e", str(shell.folder / "no" / "x"))


def test_peft_goes_out_and_comes_back(shell: Shell, tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path / "backbone")
    spec = load_backbone(str(tmp_path / "backbone")).spec
    prefix = make_prefix(spec, length=4, template="{input} =>")
    export_peft(prefix, tmp_path / "adapter", spec)
    imported = shell.json(
        "import", "peft", str(tmp_path / "adapter"), "--task", "e2e", "--backbone", str(tmp_path / "backbone"),
        "--template", "{input} =>", "--defaults", '{"num_beams": 5}', "--record", '{"from": "peft"}',
    )  # fmt: skip
    assert imported["spec"]["template"] == "{input} =>"
    assert imported["spec"]["defaults"] == {"num_beams": 5}
    registry = open_registry(shell.url)
    read = read_prefix(registry.fetch("default", imported["version"]), expected_version=imported["version"])
    assert all(torch.equal(read.tensors[name], prefix.tensors[name]) for name in prefix.tensors)
    backbone = ["--backbone", str(tmp_path / "backbone")]
    result = shell.run("export", "peft", "e2e", str(tmp_path / "again"), "--type", "CARTRIDGE", *backbone)
    assert "PEFT has no place for {'template': '{input} =>'" in result.stderr
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["peft_type"] == "CARTRIDGE"
    assert "expected a new or empty folder" in shell.error("export", "peft", "e2e", str(tmp_path / "again"), *backbone)
    shell.run("export", "peft", "e2e", str(tmp_path / "other"), "--type", "LORA", *backbone, code=2)
    shell.run("export", "peft", "e2e", str(tmp_path / "other"), code=2)
    assert not (tmp_path / "other").exists()


def test_a_cartridge_is_published_as_the_file_says_or_with_its_keys_put_in_order(shell: Shell, tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "backbone")
    geometry = load_backbone(str(tmp_path / "backbone")).spec.sites["decoder"]
    layers = [f"layers.{layer}.attention.prefix" for layer in range(geometry.layers)]
    names = [f"{layer}.{part}" for layer in layers for part in ("keys", "values")]
    heads = torch.arange(geometry.head_dim).expand(1, 3, geometry.kv_heads, -1).float()
    save_file({name: heads.clone() for name in names}, tmp_path / "x.safetensors")
    backbone = ["--task", "mine", "--backbone", str(tmp_path / "backbone")]
    for options, order in (([], [0, 1, 2, 3, 4, 5, 6, 7]), (["--interleaved"], [0, 2, 4, 6, 1, 3, 5, 7])):
        imported = shell.json("import", "cartridge", str(tmp_path / "x.safetensors"), *backbone, *options)
        assert imported["spec"]["sites"]["decoder"]["positions"] == "shifted"
        read = read_prefix(open_registry(shell.url).fetch("default", imported["version"]))
        assert read.tensors["decoder.key"][0, 0, 0].tolist() == order
        assert read.tensors["decoder.value"][0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_a_prefix_on_several_sites_does_not_go_out_to_peft(shell: Shell, tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    save_tiny_bart(folder)
    prefix = make_prefix(load_backbone(str(folder)).spec, sites=("encoder", "decoder", "cross"))
    (tmp_path / "a.safetensors").write_bytes(write_prefix(prefix))
    shell.run("publish", str(tmp_path / "a.safetensors"), "--task", "sum")
    message = shell.error("export", "peft", "sum", str(tmp_path / "out"), "--backbone", str(folder))
    assert "the decoder alone, which is all that PEFT holds; got one at cross, decoder, encoder" in message
    assert not (tmp_path / "out").exists()


def save_paper(folder: Path, backbone: Path) -> PublishedPrefix:
    published = PublishedPrefix(load_backbone(str(backbone)).spec)
    folder.mkdir()
    torch.save(published.state_dict(), folder / "pytorch_model.bin")
    return published


@pytest.mark.parametrize(
    ("save", "template"), [(save_tiny_gpt2, "{input}"), (save_tiny_bart, "<s>{input}</s>")], ids=["gpt2", "bart"]
)
def test_an_import_without_a_template_takes_the_backbones_own(
    save: Callable[[Path], Any], template: str, shell: Shell, tmp_path: Path
) -> None:
    """An encoder-decoder's input stands between its tokens for begin and end, as transformers' tokenizer put it."""
    backbone = tmp_path / "backbone"
    save(backbone)
    spec = load_backbone(str(backbone)).spec
    save_paper(tmp_path / "paper", backbone)
    export_peft(make_prefix(spec), tmp_path / "peft", spec)
    for kind in ("paper", "peft"):
        arguments = ["import", kind, str(tmp_path / kind), "--task", kind, "--backbone", str(backbone)]
        assert shell.json(*arguments)["spec"]["template"] == template
        assert shell.json(*arguments, "--template", " {input} =>")["spec"]["template"] == " {input} =>"
        assert "got <|sep|>, which it takes for plain text" in shell.error(*arguments, "--template", "{input}<|sep|>")


def test_the_papers_checkpoint_is_published_folded(shell: Shell, tmp_path: Path) -> None:
    save_tiny_bart(tmp_path / "backbone")
    published = save_paper(tmp_path / "checkpointepoch=1.ckpt", tmp_path / "backbone")
    imported = shell.json(
        "import", "paper", str(tmp_path / "checkpointepoch=1.ckpt"), "--task", "acme/xsum", "--alias", "canary",
        "--backbone", str(tmp_path / "backbone"), "--defaults", '{"num_beams": 6}', "--record", '{"from": "them"}',
    )  # fmt: skip
    assert imported["spec"]["sites"].keys() == {"decoder", "encoder", "cross"}
    assert (imported["spec"]["defaults"], imported["record"]) == ({"num_beams": 6}, {"from": "them"})
    assert imported["aliases"] == {"canary": imported["version"]}
    read = read_prefix(
        open_registry(shell.url).fetch("acme", imported["version"]), expected_version=imported["version"]
    )
    for layer, (key, _) in enumerate(published.prompt("cross")):
        torch.testing.assert_close(read.tensors["cross.key"][layer], key[0].transpose(0, 1))


def test_a_checkpoint_that_is_refused_publishes_nothing(shell: Shell, tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path / "backbone")
    torch.save({"wte.weight": torch.ones(3, 32)}, tmp_path / "x.bin")
    arguments = ["--task", "e2e", "--backbone", str(tmp_path / "backbone")]
    assert "got a prefix of embeddings (wte alone)" in shell.error(
        "import", "paper", str(tmp_path / "x.bin"), *arguments
    )
    assert "expected a folder with pytorch_model.bin" in shell.error("import", "paper", "/nowhere/x", *arguments)
    assert not (shell.folder / "registry").exists()


def test_verify_finds_the_damaged_one(shell: Shell) -> None:
    shell.publish(0, 1)
    shell.publish(2, task="other")
    assert shell.run("verify").stdout.splitlines()[-1] == "3 version(s), 0 bad"
    blob = next(shell.folder.rglob(f"{VERSIONS[1].removeprefix('sha256:')}.safetensors"))
    blob.write_bytes(write_prefix(PREFIXES[0]))
    result = shell.run("verify", code=1)
    assert f"bad default/e2e@{VERSIONS[1]}: digest: expected {VERSIONS[1]}, got {VERSIONS[0]}" in result.stdout
    assert f"ok  default/e2e@{VERSIONS[0]}" in result.stdout
    assert result.stdout.splitlines()[-1] == "3 version(s), 1 bad"
    blob.write_bytes(blob.read_bytes()[:100])
    assert shell.json("verify", "e2e", code=1)["bad"] == 1
    blob.unlink()
    assert "artifact is missing" in shell.run("verify", code=1).stdout
    assert shell.json("verify", "other")["bad"] == 0


def test_verify_compares_with_a_backbone(shell: Shell, tmp_path: Path) -> None:
    save_tiny_gpt2(tmp_path / "backbone")
    folder = str(tmp_path / "backbone")
    (tmp_path / "fits.safetensors").write_bytes(write_prefix(make_prefix(load_backbone(folder).spec)))
    shell.run("publish", str(tmp_path / "fits.safetensors"), "--task", "fits")
    assert shell.json("verify", "--backbone", folder)["bad"] == 0
    shell.publish(0)
    result = shell.json("verify", "--backbone", folder, code=1)
    assert {item["task"]: item["error"] is None for item in result["versions"]} == {
        "default/fits": True,
        "default/e2e": False,
    }


def test_the_default_registry_is_the_users_own(shell: Shell) -> None:
    shell.env["PREFIXD_REGISTRY"] = None
    assert "expected a registry.json in the folder, found none" in shell.error("list")
    assert not (shell.folder / "data").exists()
    shell.publish(0)
    assert (shell.folder / "data/prefixd/registry/registry.json").is_file()
    assert len(shell.json("list")["prefixes"]) == 1


def test_a_flag_wins_over_the_environment(shell: Shell) -> None:
    shell.publish(0)
    shell.env["PREFIXD_SERVER"] = "http://127.0.0.1:9"
    shell.run("list", code=2)
    assert len(shell.json("list", "--registry", shell.url)["prefixes"]) == 1
    assert "cannot reach the server" in shell.error("list", "--server", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--registry", "x", "--server", "http://x"],
        ["publish", "FILE"],
        ["publish", "FILE", "--task", "e2e", "--alias", "a", "--no-alias"],
        ["publish", "FILE", "--task", "e2e", "--record", "[1]"],
        ["publish", "FILE", "--task", "e2e", "--record", "{"],
        ["publish", "FILE", "--task", "e2e@canary"],
        ["promote", "e2e"],
        ["inspect", "e2e@canary"],
        ["list", "--nonsense"],
        ["nonsense"],
    ],
)
def test_wrong_usage_exits_with_2(shell: Shell, arguments: list[str]) -> None:
    shell.run(*(shell.file(0) if argument == "FILE" else argument for argument in arguments), code=2)
    assert not (shell.folder / "registry").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nothing"], "task default/nothing: expected a published task"),
        (["inspect", "Not A Name"], "task name: expected 1 to 64"),
        (["publish", "/nowhere/x", "--task", "e2e"], "/nowhere/x: No such file or directory"),
        (["publish", __file__, "--task", "e2e"], "header length: expected"),
        (["list", "--registry", "s3://bucket"], "got the scheme 's3'"),
        (["list", "--registry", "redis://:secret@127.0.0.1:9"], "(redis://127.0.0.1:9)"),
        (["list", "--server", "localhost:8000"], "expected http://host[:port]"),
        (["import", "peft", "/nowhere", "--task", "e2e", "--backbone", "/nowhere"], "expected a folder or FOLDER"),
    ],
)
def test_errors_are_one_line_on_stderr(shell: Shell, arguments: list[str], message: str) -> None:
    shell.publish(0)
    assert message in shell.error(*arguments)
