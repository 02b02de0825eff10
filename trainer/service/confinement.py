"""What a job's process may reach: an allow-list, which it puts on itself before it reads data or imports torch.

Owns the list. The process gets the libraries, its backbone, its own dataset files, its tenant's cache, and its own
folder. All else is refused to it and to what it starts: other tenants' data, the registry, passwords, the trainer.
Does not know how the system refuses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from prefixes.checkpoint_folder import Place, checkpoint_place
from prefixes.errors import BackboneError
from trainer.service.landlock import Access, Rule, restrict, version
from trainer.service.request import REQUEST

READ: Final = Access.READ_FILE | Access.READ_DIR | Access.EXECUTE
FILES: Final = (
    READ | Access.WRITE_FILE | Access.TRUNCATE | Access.REFER
    | Access.MAKE_REG | Access.MAKE_DIR | Access.REMOVE_FILE | Access.REMOVE_DIR
)  # fmt: skip
"""To write plain files and folders. No links: the trainer follows them when it reads a job's results."""
HUB: Final = FILES | Access.MAKE_SYM  # its cache has links
DEVICE: Final = Access.READ_FILE | Access.READ_DIR | Access.WRITE_FILE | Access.IOCTL_DEV

HTTPS: Final = 443
CACHES: Final = {
    "NUMBA_CACHE_DIR": "numba", "MPLCONFIGDIR": "matplotlib", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda",
}  # fmt: skip
"""Variable -> the part of a tenant's cache that it names for the tenant's jobs."""
OURS: Final = ("prefixes", "server", "trainer")
SYSTEM: Final = (
    "/usr", "/lib*", "/bin", "/sbin", "/opt", "/nix/store", "/proc", "/sys", "/var/cache/fontconfig",
)  # fmt: skip
ETC: Final = (
    "ld.so.*", "localtime", "timezone", "locale*", "passwd", "group", "nsswitch.conf", "hosts", "host.conf",
    "resolv.conf", "gai.conf", "services", "protocols", "mime.types", "os-release", "alternatives", "fonts", "java*",
    "ssl/openssl.cnf", "ssl/certs", "pki/tls/certs", "pki/tls/openssl.cnf", "pki/ca-trust", "pki/java",
    "ca-certificates*", "crypto-policies", "nvidia*", "OpenCL",
)  # fmt: skip
"""Of ``/etc``: what libraries read. Passwords of services lie there too."""
DEVICES: Final = (
    "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/nvidia*", "/dev/nvhost*", "/dev/nvmap",
    "/dev/dri", "/dev/kfd", "/dev/dxg",
)  # fmt: skip
"""Not all of ``/dev``: where the trainer runs as root, disks are there."""


def confine(folder: Path) -> None:
    """Let this process, which has one thread, do what the job in ``folder`` needs and no more. Raises OSError.

    Nothing changes where the system does not know how; the trainer says so when it starts.
    """
    if not version():
        return
    request = json.loads((folder / REQUEST).read_text())
    cache = cache_of(request["tenant"], os.environ)
    rules, ports = allowed(folder, request, os.environ)
    os.environ.update({name: str(cache / part) for name, part in CACHES.items()})
    restrict(rules, ports)


def cache_of(tenant: str, environment: Mapping[str, str]) -> Path:
    """Where the jobs of a tenant keep compiled kernels: what one's hostile code leaves there no other one's runs."""
    given = environment.get("NUMBA_CACHE_DIR")
    return (Path(given) if given else _user_cache(environment) / "prefixd") / "jobs" / tenant


def allowed(folder: Path, request: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[list[Rule], list[int]]:
    """What the job in ``folder`` needs for its ``request``: of the files, and the ports that it may connect to."""
    run = request["run"]
    gate = (request.get("gate") or {}).get("data")
    readable = [*_software(environment), *filter(None, (run["data"], run["validation"], gate))]
    writable = [Path("/dev/shm"), folder, _made(cache_of(request["tenant"], environment))]
    if temporary := environment.get("TMPDIR"):
        writable.append(Path(temporary))
    hub: list[Path] = []
    try:
        place = checkpoint_place(run["backbone"])
    except BackboneError:  # whoever loads it says so
        place = Place(str(folder))
    if place.gguf is not None:
        readable += [place.gguf, place.gguf.with_name("generation_config.json")]
    elif Path(place.folder).is_dir():
        readable += _with_targets(Path(place.folder))
    else:  # the hub's; its cache has the user's token for it
        home = environment.get("HF_HOME") or _user_cache(environment) / "huggingface"
        hub = [_made(Path(home)), _made(Path(environment.get("HF_HUB_CACHE") or home))]
    rules = [
        *_rules(READ, readable), *_rules(FILES, writable), *_rules(HUB, hub), *_rules(DEVICE, _found(DEVICES)),
    ]  # fmt: skip
    return rules, [HTTPS] if hub else []


def _made(folder: Path) -> Path:
    with contextlib.suppress(OSError):  # whoever wants to write there says so
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _rules(access: Access, paths: Iterable[str | Path]) -> list[Rule]:
    return [Rule(str(path), access) for path in paths]


def _found(patterns: Iterable[str]) -> list[str]:
    """The paths that are there, as they match the absolute ``patterns``."""
    root = Path("/")
    return [str(path) for pattern in patterns for path in root.glob(pattern.removeprefix("/"))]


def _software(environment: Mapping[str, str]) -> Iterator[str]:
    """Python, the packages, the system's libraries and programs, and Java wherever it lies."""
    ours = [folder for name in OURS for folder in import_module(name).__path__]
    yield from ours
    homes = {Path(folder).parent for folder in ours}
    checkouts = {home for home in homes if (home / "pyproject.toml").exists()}  # may have a registry in them
    yield from (path for path in sys.path if Path(path) not in checkouts)
    yield from (sys.prefix, sys.base_prefix, *filter(None, environment.get("LD_LIBRARY_PATH", "").split(":")))
    yield from _found([*SYSTEM, *(f"/etc/{name}" for name in ETC)])
    if certificates := environment.get("SSL_CERT_FILE"):
        yield certificates
    if program := shutil.which("java", path=environment.get("PATH")):
        home = Path(program).resolve().parents[1]
        if (home / "release").is_file():  # as every Java has it
            yield str(home)


def _with_targets(folder: Path) -> list[str | Path]:
    """A folder, and where links in it lead."""
    return [folder, *(path.resolve() for path in folder.rglob("*") if path.is_symlink())]


def _user_cache(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
