"""The images' health check: ``python healthcheck.py VARIABLE``, the environment variable with the port to ask.

Exit code 0 when the process's own ``/health`` answers 200, else 1 and why. Asks whether it is alive, not whether the
registry or the place of the jobs is: restarting it helps the former only. Knows the standard library alone.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 4


def main(variable: str) -> int:
    """Ask once."""
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ[variable]), timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        sys.stderr.write(f"no answer: {error}\n")
        return 1
    finally:
        connection.close()
    if status != http.HTTPStatus.OK:
        sys.stderr.write(f"expected 200, got {status}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
