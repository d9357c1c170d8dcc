"""Flower's own runtimes: simulation, and ten clients' processes on loopback, of which some fail, beside one process.

Always one round of all clients and one with failures; three and one with ADADAGRAD_SLOW=1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adadagrad.federated import simulate
from adadagrad.federated.simulation import asked_clients
from benchmarks.neighbours.flower_deployment import Deployment, quiet_environment
from benchmarks.neighbours.flower_federation import Federation, loss

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'adadagrad[flower]'")
if not Path("/proc").is_dir():
    pytest.skip("the processes to end are found in /proc", allow_module_level=True)

WHOLE = os.environ.get("ADADAGRAD_SLOW") == "1"
ROUNDS = 3 if WHOLE else 1
FAILING = ROUNDS + 1
"""The round in which clients fail."""
FRACTION = 0.5
PATIENCE = 20.0
"""Seconds that the failing round lasts, as some replies never come; as long as the one before where that is more."""
FEDERATION = Federation(data="blobs", clients=10, concentration=0.5, seed=2, scale=0.05)
ASKED = asked_clients(FEDERATION.clients, FRACTION, 0, FAILING)
KILLED, NODE_KILLED, RAISING = ASKED[:3]
APP = """\
import os
import time
from pathlib import Path

from flwr.serverapp import ServerApp

from adadagrad.integrations.flower import OverTheAir, client_app
from benchmarks.neighbours.flower_federation import Federation, loss
from benchmarks.neighbours.flower_loopback import write

FOLDER = Path({folder!r})
FEDERATION = Federation(**{federation!r})
NUMBER = None

def dataset(number, count):
    global NUMBER
    NUMBER = number
    return FEDERATION.dataset(number, count)

def failing_loss(model, batch):
    if (FOLDER / "failing").exists():
        if NUMBER == {raising}:
            raise RuntimeError("this client has lost its disk")
        if NUMBER in {killed}:
            path = FOLDER / f"training-{{NUMBER}}"
            path.with_suffix(".partial").write_text(str(os.getpid()))
            path.with_suffix(".partial").rename(path)
            time.sleep(600)
    return loss(model, batch)

client = client_app(FEDERATION.model, dataset, failing_loss, FEDERATION.work, seed=FEDERATION.seed)
server = ServerApp()

@server.main()
def main(grid, context):
    waits = dict(connect_timeout=300, round_timeout=400)
    strategy = OverTheAir(FEDERATION.server(), num_clients=FEDERATION.clients, **waits)
    strategy.run(grid, {rounds} - 1)
    strategy.first_round = {rounds}
    start = time.monotonic()
    strategy.run(grid, 1)
    patience = max({patience}, time.monotonic() - start)
    write(str(FOLDER / "all.pt"), dict(strategy.server.model.state_dict()), strategy.records)
    (FOLDER / "failing").touch()
    strategy.first_round, strategy.fraction, strategy.round_timeout = {rounds} + 1, {fraction}, patience
    strategy.run(grid, 1)
    write(str(FOLDER / "end.pt"), dict(strategy.server.model.state_dict()), strategy.records)
"""


def in_process(records: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The weights after the same rounds with the same clients missing."""
    server = FEDERATION.server()
    clients = [FEDERATION.dataset(number, FEDERATION.clients) for number in range(FEDERATION.clients)]
    for record in records:
        number = record["round_number"]
        simulate(
            server,
            clients,
            loss,
            rounds=1,
            work=FEDERATION.work,
            seed=FEDERATION.seed,
            first_round=number,
            drops_out=lambda _, client, record=record: client not in record["answered"],
        )
    return dict(server.model.state_dict())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert bool(tensor.isfinite().all())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_client_processes_end_with_the_weights_of_one_process_also_where_some_are_killed(tmp_path: Path) -> None:
    app = APP.format(
        folder=str(tmp_path),
        federation=asdict(FEDERATION),
        raising=RAISING,
        killed=(KILLED, NODE_KILLED),
        rounds=ROUNDS,
        fraction=FRACTION,
        patience=PATIENCE,
    )
    waiting = {KILLED, NODE_KILLED}
    with Deployment(FEDERATION.clients, tmp_path) as deployment:

        def kill_those_who_train() -> None:
            for number in sorted(waiting):
                path = tmp_path / f"training-{number}"
                if path.exists():
                    waiting.discard(number)
                    pid = int(path.read_text())
                    assert pid in deployment.processes()
                    if number == KILLED:
                        os.kill(pid, signal.SIGKILL)
                    else:
                        deployment.kill_node(number)

        deployment.run(app, wait_for=tmp_path / "end.pt", timeout=800, meanwhile=kill_those_who_train)
    assert deployment.processes() == []
    assert not waiting
    whole, end = (torch.load(tmp_path / name) for name in ("all.pt", "end.pt"))
    assert [record["answered"] for record in whole["records"]] == [tuple(range(10))] * ROUNDS
    assert_same(whole["weights"], FEDERATION.in_process(ROUNDS)[0])

    record = end["records"][-1]
    assert (record["round_number"], record["asked"]) == (FAILING, ASKED)
    assert {KILLED, NODE_KILLED, RAISING} <= set(record["left_out"])
    # On a machine so slow that the round lasts a minute, Flower notices first, and says so.
    assert record["left_out"][KILLED].startswith(("no reply within ", "error: ClientApp stopped responding"))
    assert record["left_out"][NODE_KILLED].startswith(("no reply within ", "error: Error: Node Unavailable"))
    assert "this client has lost its disk" in record["left_out"][RAISING]
    assert record["answered"]
    assert set(record["answered"]) == set(ASKED) - set(record["left_out"])
    assert_same(end["weights"], in_process(end["records"]))
    assert any(not torch.equal(tensor, whole["weights"][name]) for name, tensor in end["weights"].items())
    log = (tmp_path / "server.log").read_text()
    for client, reason in record["left_out"].items():
        assert f"round {FAILING}: client {client} is left out: {reason}" in log


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("message", ["gradient", "drift"] if WHOLE else ["drift"])
def test_the_simulation_ends_with_the_weights_of_one_process(tmp_path: Path, message: str) -> None:
    arguments = ["--data", "blobs", "--clients", "4", "--rounds", "3", "--message", message, "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.neighbours.flower_loopback", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=quiet_environment(tmp_path / "home"),
        timeout=450,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "results" / "flower-simulation.json").read_text())
    assert written["equal"] is True, done.stdout
    assert [record["answered"] for record in written["records"]] == [[0, 1, 2, 3]] * 3
    assert written["accuracy"]["after"] != written["accuracy"]["before"]
    assert "bit for bit: True" in done.stdout


def test_a_deployment_that_cannot_start_ends_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SuperLink is replaced by a process that sleeps and never listens; it must not stay."""
    sleeper = tmp_path / "flower-superlink"
    sleeper.write_text(
        f"#!{sys.executable}\nimport subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c',"
        " 'import time; time.sleep(60)'], start_new_session=True)\ntime.sleep(60)\n"
    )
    sleeper.chmod(0o755)
    monkeypatch.setattr("benchmarks.neighbours.flower_deployment._command", lambda name: str(tmp_path / name))
    deployment = Deployment(2, tmp_path / "folder")
    seen: list[int] = []

    def give_up(port: int) -> None:
        end = time.monotonic() + 20
        while len(seen) < 2 and time.monotonic() < end:
            seen[:] = deployment.processes()
            time.sleep(0.05)
        raise RuntimeError("it does not listen")

    monkeypatch.setattr(deployment, "_wait_for_port", give_up)
    with pytest.raises(RuntimeError, match="it does not listen"):
        deployment.__enter__()
    assert len(seen) == 2  # the process and its own child, in a session of its own
    assert deployment.processes() == []
