"""``python3 -m tests.docker``: build the images, compose the services, check every promise, take it all down.

Needs nothing but the standard library, and a container engine (``engines.find_engine``). ``--keep`` leaves the services
running for a look at them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Final

from tests.docker.checks import SEEN_AT_FIRST, SEEN_AT_LAST
from tests.docker.engines import CannotTest, find_engine
from tests.docker.failures import FAILURES
from tests.docker.stack import NotChecked, Stack
from tests.docker.training import TRAINING

CHECKS: Final = (*SEEN_AT_FIRST, *TRAINING, *FAILURES, *SEEN_AT_LAST)


def main() -> int:
    """The exit code: 0 if all holds, 1 if not, 2 if it cannot be tested here."""
    parser = argparse.ArgumentParser(prog="tests.docker", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", action="store_true", help="leave the services running")
    parser.add_argument("--only", default="", help="run the checks whose name contains this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prefixd-docker-") as folder:
        try:
            engine = find_engine()
            _say(f"with {engine.name}: building images")
            stack = Stack(engine, Path(folder))
            stack.__enter__()
        except CannotTest as error:
            _say(str(error))
            return 2
        try:
            return _check(stack, arguments.only)
        finally:
            if arguments.keep:
                _say(f"still running at {stack.url}")
            else:
                stack.__exit__()


def _check(stack: Stack, only: str) -> int:
    failed = 0
    for check in (check for check in CHECKS if only in check.__name__):
        begun, name = time.monotonic(), check.__name__.replace("_", " ")
        try:
            check(stack)
        except NotChecked as reason:
            _say(f"--     {name}: not checked: {reason}")
        except Exception:
            failed += 1
            _say(f"FAILED {name}\n{traceback.format_exc()}")
            for service in stack.services:
                for container in stack.containers(service, stopped=True):
                    _say(f"--- {container}\n{stack.logs(container)[-2500:]}")
        else:
            _say(f"ok     {name} ({time.monotonic() - begun:.1f} s)")
    _say(f"{failed} failed" if failed else "all hold")
    return 1 if failed else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
