"""A job's process reaches what its job needs, and nothing else, whatever code runs in it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

import prefixes
from prefixes.files import write_json
from tests.support.hostile import DONE, TOLD, install, powers
from tests.support.paths import ROOT
from trainer.service import confinement
from trainer.service.confinement import FILES, HTTPS, allowed, confine
from trainer.service.landlock import Access, version
from trainer.service.process import started
from trainer.service.request import REQUEST

KNOWN: Final = version()
PATIENCE_S: Final = 60
confined = pytest.mark.skipif(KNOWN == 0, reason="the kernel has no Landlock, or refuses it")

Asked = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Place:
    """A trainer's folders: ``job`` is acme's job, whose process runs hostile code."""

    root: Path
    job: Path

    @property
    def data(self) -> Path:
        return self.root / "data/tenants"

    def request(self, **run: Any) -> dict[str, Any]:
        """The job's."""
        dataset = str(self.data / "acme/datasets/own.jsonl")
        told = {"data": dataset, "validation": None, "backbone": str(self.root / "backbone"), **run}
        return {"tenant": "acme", "run": told}

    def paths(self, environment: Mapping[str, str], **run: Any) -> dict[str, Access]:
        """What the job's process may reach."""
        return {rule.path: rule.access for rule in allowed(self.job, self.request(**run), environment)[0]}


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a secret\n")
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path, tmp_path / "data/tenants/acme/jobs/job-1/run-1")
    for name in (
        "run/redis_password", "home/.netrc", "registry/tenants/acme/e2e.json", "blobs/weights",
        "backbone/config.json", "data/turns.json", "data/tenants/acme/datasets/own.jsonl",
        "data/tenants/acme/datasets/further.jsonl", "data/tenants/acme/jobs/job-2/run-1/prefix.safetensors",
        "data/tenants/globex/datasets/theirs.jsonl", "data/tenants/globex/jobs/job-3/run-1/report.html",
        "data/tenants/acme/jobs/job-1/run-1/old", "home/.cache/prefixd/numba/kernel",
        "home/.cache/prefixd/jobs/globex/numba/kernel",
    ):  # fmt: skip
        put(tmp_path / name)
    (tmp_path / "backbone/model.safetensors").symlink_to("../blobs/weights")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hostile'}:{ROOT}")
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    write_json(made.job / REQUEST, made.request())
    return made


def tried(place: Place, asked: Asked, *, confine: bool, then: Any = None) -> dict[str, str]:
    """What the job's real process was let do, started as a worker starts it."""
    install(place.root / "hostile", asked)

    async def run() -> None:
        async with asyncio.timeout(PATIENCE_S), started(place.job, 1, None, confined=confine) as child:
            if then is not None:
                await asyncio.to_thread(then, place.job)
            await child.wait()

    asyncio.run(run())
    (told,) = place.root.rglob(TOLD)
    found: dict[str, str] = json.loads(told.read_text())
    assert found.keys() == asked.keys(), (told.parent / "child.log").read_text()
    return found


@pytest.fixture
def services() -> Iterator[tuple[str, str]]:
    """A port, and the name of an abstract socket, on which somebody listens."""
    with ExitStack() as stack:
        tcp, abstract = stack.enter_context(socket.socket()), stack.enter_context(socket.socket(socket.AF_UNIX))
        tcp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0prefixd-test-{os.getpid()}")
        for made in (tcp, abstract):
            made.listen()
        yield str(tcp.getsockname()[1]), f"prefixd-test-{os.getpid()}"


def refused(place: Place, services: tuple[str, str]) -> dict[str, tuple[str, str, str, int]]:
    """What hostile code would like to do: how, to what, what the system says, and since which version."""
    root, data, me, (port, abstract) = place.root, place.data, os.getpid(), services
    as_root = powers(Path("/proc/self/status").read_text())
    return {
        "a password's file": ("read", f"{root}/run/redis_password", "EACCES", 1),
        "the same by a program": ("read by a child", f"{root}/run/redis_password", "EACCES", 1),
        "a file of its user's": ("read", f"{root}/home/.netrc", "EACCES", 1),
        "the registry": ("list", f"{root}/registry", "EACCES", 1),
        "a task of its own tenant's": ("read", f"{root}/registry/tenants/acme/e2e.json", "EACCES", 1),
        "to change that": ("write", f"{root}/registry/tenants/acme/e2e.json", "EACCES", 1),
        "to empty that": ("truncate", f"{root}/registry/tenants/acme/e2e.json", "EACCES", 3),
        "a task more": ("make", f"{root}/registry/tenants/acme/more.json", "EACCES", 1),
        "who has datasets": ("list", f"{root}/data/tenants", "EACCES", 1),
        "another tenant's dataset": ("read", f"{data}/globex/datasets/theirs.jsonl", "EACCES", 1),
        "another tenant's report": ("read", f"{data}/globex/jobs/job-3/run-1/report.html", "EACCES", 1),
        "to remove that": ("remove", f"{data}/globex/jobs/job-3/run-1/report.html", "EACCES", 1),
        "a dataset beside its own": ("read", f"{data}/acme/datasets/further.jsonl", "EACCES", 1),
        "to change its own": ("write", f"{data}/acme/datasets/own.jsonl", "EACCES", 1),
        "a job beside its own": ("read", f"{data}/acme/jobs/job-2/run-1/prefix.safetensors", "EACCES", 1),
        "a delivery beside its own": ("make", f"{data}/acme/jobs/job-1/run-2", "EACCES", 1),
        "the order of jobs": ("read", f"{root}/data/turns.json", "EACCES", 1),
        "the backbone, changed": ("write", f"{root}/backbone/config.json", "EACCES", 1),
        "kernels that others run": ("write", f"{root}/home/.cache/prefixd/numba/kernel", "EACCES", 1),
        "another tenant's kernels": ("write", f"{root}/home/.cache/prefixd/jobs/globex/numba/kernel", "EACCES", 1),
        "our own code, changed": ("write", prefixes.__file__ or "", "EACCES", 1),
        "a checkout's other files": ("list", str(ROOT / "tests"), "EACCES", 1),
        "a link for the trainer to follow": ("symlink", f"{root}/run/redis_password", "EACCES", 1),
        "a second name of a secret": ("hard link", f"{root}/run/redis_password", "EXDEV", 1),
        "a pipe for the trainer to wait at": ("pipe", "", "EACCES", 1),
        "the trainer's environment": ("read", f"/proc/{me}/environ", "EACCES", 1),
        "what the trainer sees": ("list", f"/proc/{me}/cwd/", "EACCES", 1),
        "a signal to the trainer": ("signal", str(me), "EPERM", 6),
        "a service without a password": ("connect", port, "EACCES", 4),
        "a service of its own": ("listen", "", "EACCES", 4),
        "an abstract socket": ("connect abstract", abstract, "EPERM", 6),
        **({"root's powers": ("regain powers", "", "EPERM", 1)} if as_root else {}),
    }


def needed(place: Place) -> dict[str, tuple[str, str]]:
    return {
        "its dataset": ("read", f"{place.data}/acme/datasets/own.jsonl"),
        "its request": ("read", str(place.job / REQUEST)),
        "a file in its folder": ("make", str(place.job / "new")),
        "an old file there, changed": ("truncate", str(place.job / "old")),
        "its folder": ("list", str(place.job)),
        "the backbone": ("list", f"{place.root}/backbone"),
        "a file of it": ("read", f"{place.root}/backbone/config.json"),
        "a linked one": ("read", f"{place.root}/backbone/model.safetensors"),
        "compiled kernels": ("make", f"{place.root}/home/.cache/prefixd/jobs/acme/kernel"),
        "shared memory": ("make", "/dev/shm/prefixd-test"),
        "nothing": ("write", "/dev/null"),
        "chance": ("read", "/proc/sys/kernel/random/uuid"),
        "the machine": ("read", "/proc/cpuinfo"),
        "a program": ("execute", "cat"),
        "what it is itself": ("read", "/proc/self/environ"),
    }


@confined
def test_hostile_code_in_a_jobs_process_reaches_what_the_job_needs_and_nothing_else(
    place: Place, services: tuple[str, str]
) -> None:
    hostile = {name: one for name, one in refused(place, services).items() if one[3] <= KNOWN}
    found = tried(place, {name: one[:2] for name, one in hostile.items()} | needed(place), confine=True)
    assert {name: found[name] for name in needed(place)} == dict.fromkeys(needed(place), DONE)
    assert {name: found[name] for name in hostile} == {name: one[2] for name, one in hostile.items()}
    assert (place.data / "globex/jobs/job-3/run-1/report.html").read_text() == "a secret\n"


def test_hostile_code_reaches_all_of_it_where_jobs_are_not_confined(place: Place, services: tuple[str, str]) -> None:
    """So it is the confinement that refuses it, and not the way in which it is tried."""
    hostile = {name: one[:2] for name, one in refused(place, services).items()}
    found = tried(place, hostile, confine=False)
    assert found == dict.fromkeys(found, DONE)


@confined
def test_a_confined_process_whose_folder_was_taken_over_writes_nothing_under_its_old_name(place: Place) -> None:
    """What it may do follows the folder; its paths do not, and they are the fence."""

    def take_over(folder: Path) -> None:
        while not (folder / TOLD).exists():
            pass
        folder.rename(folder.with_name("run-2"))

    found = tried(place, {"late": ("write once moved", "prefix.safetensors")}, confine=True, then=take_over)
    assert found == {"late": "ENOENT"}
    assert not place.job.exists()
    assert not (place.job.with_name("run-2") / "prefix.safetensors").exists()


OLDER: Final = """
import sys
from trainer.service import landlock
from trainer.service.landlock import Access, Rule
landlock.version = lambda: int(sys.argv[1])
landlock.restrict([Rule(sys.argv[2], Access(-1)), Rule("/no/such/folder", Access.READ_FILE)], [443])
open(f"{sys.argv[2]}/new", "w").write("x")
open(sys.argv[3])
"""


@confined
@pytest.mark.parametrize("known", range(1, KNOWN + 1))
def test_of_an_older_kernel_no_more_is_asked_than_it_knows(place: Place, known: int) -> None:
    arguments = (str(known), str(place.job), str(place.root / "run/redis_password"))
    done = subprocess.run([sys.executable, "-c", OLDER, *arguments], capture_output=True, text=True, check=False)
    assert (place.job / "new").read_text() == "x", done.stderr
    assert done.stderr.splitlines()[-1].startswith("PermissionError"), done.stderr


def test_where_the_system_does_not_know_how_nothing_changes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "version", lambda: 0)
    confine(place.job)
    assert (place.root / "run/redis_password").read_text()


def test_the_list_names_files_and_no_folder_above_them(place: Place) -> None:
    may = place.paths({"TMPDIR": "/tmp/prefixd-job"}, validation=str(place.data / "acme/datasets/further.jsonl"))
    ours = {path: access for path, access in may.items() if path.startswith(str(place.root))}
    assert {path for path, access in ours.items() if not access & Access.WRITE_FILE} == {
        str(place.root / name)
        for name in (
            "data/tenants/acme/datasets/own.jsonl", "data/tenants/acme/datasets/further.jsonl", "backbone",
            "blobs/weights",
        )
    }  # fmt: skip
    assert ours[str(place.job)] == FILES
    assert not FILES & (Access.MAKE_SYM | Access.MAKE_FIFO | Access.MAKE_SOCK | Access.MAKE_CHAR | Access.MAKE_BLOCK)
    assert not {"/", "/etc", "/run", "/tmp", "/dev", "/home", "/var", str(Path.home()), str(ROOT)} & may.keys()


def test_of_a_checkout_only_our_packages_are_read_and_of_a_folder_of_packages_all(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout has `var/registry` in it; other packages lie beside ours where they are installed for one user."""
    home = place.root / "home/packages"
    home.mkdir()
    monkeypatch.setattr(confinement, "import_module", lambda name: SimpleNamespace(__path__=[str(home / name)]))
    monkeypatch.setattr(sys, "path", [f"{home}/"])
    assert {f"{home}/", str(home / "server")} <= place.paths({}).keys()
    put(home / "pyproject.toml")
    may = place.paths({}).keys()
    assert str(home / "server") in may and not {str(home), f"{home}/"} & may


@pytest.mark.parametrize("backbone", ["a folder", "demo", "nobody/model", "/no/such/folder"])
def test_the_hubs_cache_and_the_web_are_for_backbones_of_the_hub_alone(place: Place, backbone: str) -> None:
    name = str(place.root / "backbone") if backbone == "a folder" else backbone
    environment = {"HF_HOME": str(place.root / "hub")}
    rules, ports = allowed(place.job, place.request(backbone=name), environment)
    from_hub = backbone == "nobody/model"
    assert ports == ([HTTPS] if from_hub else [])
    assert (str(place.root / "hub") in {rule.path for rule in rules}) == from_hub


def test_of_a_backbone_in_a_file_that_file_is_reached_and_not_what_lies_beside_it(place: Place) -> None:
    file = put(place.root / "models/tiny.gguf")
    rules, ports = allowed(place.job, place.request(backbone=str(file)), {})
    beside = {rule.path for rule in rules if rule.path.startswith(str(place.root / "models"))}
    assert beside == {str(file), str(file.with_name("generation_config.json"))}
    assert not ports


def test_a_tenants_kernels_are_its_own_where_the_environment_says(place: Place) -> None:
    given = {"NUMBA_CACHE_DIR": str(place.root / "kernels"), "XDG_CACHE_HOME": str(place.root / "cache")}
    may = place.paths(given, backbone="nobody/model")
    assert {f"{place.root}/kernels/jobs/acme", f"{place.root}/cache/huggingface"} <= may.keys()
    assert not {*given.values(), f"{place.root}/cache/prefixd/jobs/acme"} & may.keys()
    del given["NUMBA_CACHE_DIR"]
    assert f"{place.root}/cache/prefixd/jobs/acme" in place.paths(given)


def test_java_is_reached_wherever_it_lies_and_no_folder_that_only_looks_like_it(place: Place) -> None:
    for home, real in (("jdk", True), ("scripts", False)):
        program = put(place.root / home / "bin/java")
        program.chmod(0o755)
        if real:
            put(place.root / home / "release")
        may = place.paths({"PATH": str(program.parent)})
        assert (str(place.root / home) in may) == real


def test_a_job_reads_the_inputs_of_its_gate_and_no_other_dataset(place: Place) -> None:
    gate = str(place.data / "acme/datasets/gate.jsonl")
    rules, _ = allowed(place.job, {**place.request(), "gate": {"data": gate}}, {})
    assert gate in {rule.path for rule in rules} - place.paths({}).keys()
