"""An admin port that is to be on one network is open there and on the loopback, and on no other network.

Real processes in a network namespace of their own, which has two networks: this module runs itself there. So do the
containers of the deployment, each of which is in three.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.paths import ROOT
from tests.support.server import PLAIN, ServerProcess, make_world
from tests.support.trainer_process import TrainerProcess

MONITORING = "10.117.44.0/24"
OWN = "10.117.44.5"
ELSEWHERE = "10.9.9.9"
APART = ("unshare", "--map-root-user", "--net")


@pytest.mark.slow
def test_an_admin_port_on_a_network_is_open_there_and_on_the_loopback_alone(tmp_path: Path) -> None:
    if shutil.which("ip") is None or subprocess.run([*APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network of its own may be made here")
    done = subprocess.run(
        [*APART, sys.executable, "-m", "tests.e2e.test_admin_network", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def make_networks() -> None:
    """Give this machine an address in two networks."""
    for words in ("link set lo up", f"address add {OWN}/24 dev lo", f"address add {ELSEWHERE}/24 dev lo"):
        subprocess.run(["ip", *words.split()], check=True)


def open_at(port: int) -> set[str]:
    """The addresses at which somebody answers."""
    found = set()
    for address in ("127.0.0.1", OWN, ELSEWHERE):
        try:
            assert httpx.get(f"http://{address}:{port}/metrics", timeout=20, verify=PLAIN).status_code == 200
            found.add(address)
        except httpx.ConnectError:
            pass
    return found


def check(process: ServerProcess) -> None:
    """The admin port is open where it is to be, and the log names its address in the network."""
    process.wait_ready()
    assert open_at(process.admin_port) == {"127.0.0.1", OWN}
    (ready,) = (line for line in process.log_lines() if line["message"] == "ready")
    assert ready["admin_url"] == f"http://{OWN}:{process.admin_port}"


def check_refused(process: ServerProcess, why: str) -> None:
    """It has not started, because of ``why``."""
    assert process.wait(120) == 1
    assert why in process.log.read_text().splitlines()[-1], process.log.read_text()


def main(folder: Path) -> None:
    """In the namespace."""
    make_networks()
    world = make_world(folder / "model")
    places = ("--backbone", f"tiny={world.folder}", "--data", str(folder / "data"))
    of_trainer = (*places, "--registry", str(folder / "registry"), "--admin-host", MONITORING)
    of_server = ("--backbone", str(world.folder), "--registry", str(folder / "registry"), "--kernels", "torch")
    with ServerProcess(folder, *of_server, "--admin-host", "10.1.1.0/24") as server:
        check_refused(server, "cannot listen in 10.1.1.0/24 (--admin-host): expected this machine to have an address")
        assert "backbone loaded" not in server.log.read_text()
    reached = f"no key was ever made, and {OWN} is reached from other machines"
    with ServerProcess(folder, *of_server, "--admin-host", MONITORING) as server:
        check_refused(server, reached)
    with TrainerProcess(folder, *of_trainer) as trainer:
        check_refused(trainer, reached)
    folder.joinpath("serve.log").unlink()
    folder.joinpath("trainer.log").unlink()
    with ServerProcess(folder, *of_server, "--admin-host", MONITORING, "--open-access") as server:
        check(server)
    with TrainerProcess(folder, *of_trainer, "--open-access") as trainer:
        check(trainer)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
