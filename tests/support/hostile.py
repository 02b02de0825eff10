"""Hostile code in a job's process: a library that tries what it should not, and says what came of it.

It stands in for ``torch``, the first package of others that the process imports. Every file of ours but the packages is
out of its reach, so the process gets a copy of this module, which needs Python alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ASKED, TOLD = "asked.json", "told.json"
DONE = "done"
"""What came of a try that nothing stopped; else it is an error's name, ``EACCES``."""


def install(folder: Path, asked: Mapping[str, tuple[str, str]]) -> Path:
    """Put it into ``folder``, which has to be first in ``PYTHONPATH``. ``asked``: by name what to try, and on what."""
    folder.mkdir(exist_ok=True)
    (folder / ASKED).write_text(json.dumps(asked))
    (folder / "torch.py").write_text(Path(__file__).read_text() + "\n\nmain()\n")
    return folder


def powers(status: str) -> int:
    """Root's, of a process with this ``/proc/PID/status``, as bits; without that over the modes of files."""
    held = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    return held & ~(1 << 1)


def main() -> None:
    """Try what was asked, and tell what came of it in ``told.json`` in the job's folder."""
    job = Path(sys.argv[1])
    asked = json.loads(Path(__file__).with_name(ASKED).read_text())
    with (job / TOLD).open("w") as told:
        told.write(json.dumps({name: _tried(what, target, job) for name, (what, target) in asked.items()}))
    os._exit(0)


def _tried(what: str, target: str, job: Path) -> str:
    try:
        TRIES[what](target, job)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return DONE


def _write(target: str, _: Path) -> None:
    with Path(target).open("a"):
        pass


def _make(target: str, _: Path) -> None:
    Path(target).write_text("x")
    Path(target).rename(f"{target}-2")
    Path(f"{target}-2").unlink()


def _connect(target: str, _: Path) -> None:
    with socket.socket() as made:
        made.connect(("127.0.0.1", int(target)))


def _connect_abstract(target: str, _: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.connect(f"\0{target}")


def _listen(_: str, __: Path) -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))


def _write_once_moved(target: str, job: Path) -> None:
    while job.exists():
        time.sleep(0.01)
    from prefixes.files import write_bytes

    write_bytes(job / target, b"late")


def _link_out(target: str, job: Path) -> None:
    """A link in the job's folder, through which the trainer would read."""
    link = job / "report.html"
    try:
        link.symlink_to(target)
    finally:
        with contextlib.suppress(OSError):
            link.unlink()


def _hard_link_out(target: str, job: Path) -> None:
    os.link(target, job / "hard")
    (job / "hard").unlink()


def _pipe(_: str, job: Path) -> None:
    os.mkfifo(job / "pipe")
    (job / "pipe").unlink()


def _by_child(target: str, _: Path) -> None:
    done = subprocess.run(["/bin/cat", target], capture_output=True, check=False)
    if done.returncode:
        raise PermissionError(errno.EACCES, done.stderr.decode())


def _execute(target: str, _: Path) -> None:
    subprocess.run([shutil.which(target) or target, "--version"], capture_output=True, check=False)


def _regain(_: str, __: Path) -> None:
    """Root's power over others' memory, again by a program that root starts."""
    status = subprocess.run(["/bin/cat", "/proc/self/status"], capture_output=True, check=True).stdout.decode()
    if not powers(status):
        raise PermissionError(errno.EPERM, "none")


TRIES: dict[str, Callable[[str, Path], object]] = {
    "read": lambda target, _: Path(target).read_bytes(),
    "list": lambda target, _: list(Path(target).iterdir()),
    "write": _write,
    "truncate": lambda target, _: os.truncate(target, 0),
    "make": _make,
    "remove": lambda target, _: Path(target).unlink(),
    "signal": lambda target, _: os.kill(int(target), 0),
    "connect": _connect,
    "connect abstract": _connect_abstract,
    "listen": _listen,
    "symlink": _link_out,
    "hard link": _hard_link_out,
    "pipe": _pipe,
    "read by a child": _by_child,
    "execute": _execute,
    "regain powers": _regain,
    "write once moved": _write_once_moved,
}
