"""``adadagrad watch``: a page on this machine that shows a run, or several, while they train."""

from __future__ import annotations

import argparse
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from adadagrad.cli.interrupt import Interrupt
from adadagrad.core.errors import InvalidArgument
from adadagrad.report.live.server import LiveServer
from adadagrad.report.reader import LOG_NAME

PORT = 8127


def main(arguments: Sequence[str]) -> int:
    """Run the command until Ctrl-C or SIGTERM.

    Args:
        arguments: What follows ``watch``.

    Returns:
        The exit status: 0.

    Raises:
        InvalidArgument: RUN_DIR is a file, or host and port cannot be listened at.
    """
    parser = argparse.ArgumentParser(
        prog="adadagrad watch", description="Show a run while it trains, on a page for the browser of this machine."
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN_DIR", help="run directory, or a folder of run directories; it may come later"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 shows the run to the whole network"
    )
    parser.add_argument("--port", type=int, default=PORT, help=f"port (default {PORT}); 0 takes any free one")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    options = parser.parse_args(arguments)
    directory = options.run.parent if options.run.name == LOG_NAME else options.run
    if directory.exists() and not directory.is_dir():
        raise InvalidArgument(f"RUN_DIR must be a folder, got the file {directory}: give the folder it lies in")
    if not 0 <= options.port <= 65535:
        raise InvalidArgument(f"--port must be between 0 and 65535, got {options.port}")
    with Interrupt() as interrupt:
        try:
            server = LiveServer(directory, options.host, options.port)
        except OSError as error:
            raise InvalidArgument(
                f"--host {options.host} --port {options.port} cannot be listened at ({error.strerror or error}): "
                "choose another one, or --port 0 for any that is free"
            ) from error
        with server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
            thread.start()
            print(f"watching {directory}: {server.url} (Ctrl-C ends it)", flush=True)
            if options.open:
                webbrowser.open(server.url)
            while not interrupt.requested:
                time.sleep(0.1)
            server.shutdown()
            thread.join()
    print("stopped watching", file=sys.stderr)
    return 0
