"""Flower's deployment runtime on loopback: a SuperLink and a SuperNode for each client, all ended when the block ends.

    with Deployment(clients=10, folder=Path(...)) as deployment:
        deployment.run(APP, wait_for=Path(...))

Every client is a SuperNode process that starts its ClientApp in a further process; nothing listens elsewhere than on
127.0.0.1, Flower's telemetry and its check for updates are off, and its files lie in the given folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
MARK = "ADADAGRAD_FLOWER_RUN"
"""Environment variable by which the processes of one deployment are known, grandchildren included."""
APP = """\
[project]
name = "loopback"
version = "1.0.0"
description = "Federated rounds on loopback"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "adadagrad"

[tool.flwr.app.components]
serverapp = "loopback_app:server"
clientapp = "loopback_app:client"
"""
CONNECTION = """\
[superlink]
default = "loopback"

[superlink.loopback]
address = "127.0.0.1:{port}"
insecure = true
"""


class Deployment:
    """A SuperLink with its SuperNodes, as a context.

    Args:
        clients: How many SuperNodes; the n-th, from 0, has the partition-id n.
        folder: For logs and Flower's own files; made if it is missing.
    """

    def __init__(self, clients: int, folder: Path) -> None:
        self.clients = clients
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Deployment:
        """Start the processes, and end them again if one cannot be started."""
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        try:
            port, *ports = free_ports(1 + self.clients)
            (home / "config.toml").write_text(CONNECTION.format(port=port))
            local = ["--insecure", "--host", "127.0.0.1", "--port"]
            self._start("superlink", "flower-superlink", *local, str(port), "--disable-runtime-dependency-installation")
            self._wait_for_port(port)
            for number, own in enumerate(ports):
                place = f"partition-id={number} num-partitions={self.clients}"
                link = ["--superlink", f"127.0.0.1:{port}", "--node-config", place]
                self._start(f"supernode-{number}", "flower-supernode", *local, str(own), *link)
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes, also after an error."""
        self.end()

    def run(
        self, source: str, *, wait_for: Path, timeout: float = 300.0, meanwhile: Callable[[], None] | None = None
    ) -> None:
        """Run an app until it has written a file and its log is whole.

        Args:
            source: Of a module with a ServerApp `server` and a ClientApp `client`.
            wait_for: The file that the server writes as its last act.
            timeout: Seconds.
            meanwhile: Called again and again until the file is there.

        Raises:
            RuntimeError: The app could not be started, a process has ended, or the file does not come in time; with the
                ends of the logs.
        """
        app = self.folder / "loopback"
        app.mkdir(exist_ok=True)
        (app / "pyproject.toml").write_text(APP)
        (app / "loopback_app.py").write_text(source)
        self._start("server", "flwr", "run", str(app), "loopback", "--stream")
        end = time.monotonic() + timeout
        while not wait_for.exists():
            ended = [name for name in ("superlink", "server") if self._processes[name].poll() is not None]
            if (ended and not wait_for.exists()) or time.monotonic() > end:
                raise RuntimeError(f"{wait_for.name} is not there, ended: {ended}\n{self.logs()}")
            if meanwhile is not None:
                meanwhile()
            time.sleep(0.2)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes["server"].wait(timeout=30.0)  # the rest of the run's log comes, in server.log

    def kill_node(self, number: int) -> None:
        """Kill a SuperNode, as a crash would; its ClientApp ends by itself.

        Args:
            number: Of the client.
        """
        self._processes[f"supernode-{number}"].kill()

    def logs(self, characters: int = 3000) -> str:
        """Return the ends of all logs.

        Args:
            characters: Of each.
        """
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-characters:]}" for path in paths)

    def processes(self) -> list[int]:
        """Return the ids of all processes of this deployment that live, however far down they were started."""
        found = {process.pid for process in self._processes.values() if process.poll() is None}
        wanted = f"{MARK}={self.mark}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
            except OSError:  # it has ended meanwhile, or is somebody else's
                continue
        return sorted(found)

    def end(self, patience: float = 5.0) -> None:
        """End every process of this deployment and no other: first asked, then killed.

        Args:
            patience: Seconds between the two.
        """
        for sign, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, patience)):
            for pid in self.processes():
                try:
                    os.kill(pid, sign)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + seconds
            while self.processes() and time.monotonic() < end:
                time.sleep(0.1)
        for process in self._processes.values():
            process.wait(timeout=patience)

    def _start(self, name: str, command: str, *arguments: str) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [_command(command), *arguments],
                env=self._environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _wait_for_port(self, port: int, timeout: float = 60.0) -> None:
        end = time.monotonic() + timeout
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            if self._processes["superlink"].poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the SuperLink does not listen\n{self.logs()}")
            time.sleep(0.1)

    def _environment(self) -> dict[str, str]:
        return {**quiet_environment(self.folder / "home"), MARK: self.mark}


def quiet_environment(home: Path) -> dict[str, str]:
    """Return this process's environment, such that Flower and Ray talk to loopback only and each process uses a core.

    Args:
        home: For Flower's own files.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux too, this is what makes Ray listen on loopback alone
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on.

    Args:
        count: How many.
    """
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def _command(name: str) -> str:
    """Return a command of the environment that this Python belongs to."""
    return str(Path(sys.executable).parent / name)
