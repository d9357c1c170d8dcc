"""The command line: ``adadagrad train``, ``compare``, ``measure``, ``report``, ``watch``, and the neighbours."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from adadagrad.core.errors import AdadagradError, UnknownName

COMMANDS = {
    "train": "train one model with an adaptive batch size",
    "compare": "train it with a small, a large and an adaptive batch size, and compare",
    "measure": "say which batch size to use, from the noise of the gradient",
    "report": "print the table and write the page of runs that are there",
    "watch": "show a run in the browser while it trains",
    "federated": "train by rounds of many clients through a noisy radio channel",
    "perturb": "say how one small perturbation of all inputs changes a model's predictions",
    "detect": "train a detector whose loss chooses how the next batch is composed",
    "completion": "print what makes bash or zsh finish commands, flags and names",
}

USAGE = "\n".join([
    "usage: adadagrad COMMAND ...",
    "",
    "Train with batch sizes that the gradient itself chooses.",
    "",
    "commands:",
    *(f"  {name:<10} {text}" for name, text in COMMANDS.items()),
    "",
    "examples:",
    "  adadagrad compare --data digits",
    "  adadagrad train --data mnist:path/to/mnist --model cnn --policy norm --eta 0.25 --epochs 5",
    "  torchrun --nproc-per-node 4 -m adadagrad train --data mnist:path/to/mnist --model cnn --device cuda",
    "  adadagrad measure --data my_package.my_module:make_data --model my_package.my_module:make_model",
    "  adadagrad report runs/train-001 runs/train-002 -o report.html",
    "  adadagrad watch runs/train-001",
    "  adadagrad federated --data digits --clients 50 --server adam-ota --tail-index 1.5",
    "  adadagrad perturb --data digits --model cnn --checkpoint runs/train-001/checkpoint.pt --eps 0.15",
    "  adadagrad detect --policies never threshold random always",
    "",
    "adadagrad COMMAND --help lists a command's options; adadagrad --version prints the version.",
])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; an error that the library raises on purpose becomes one line on standard error.

    Args:
        arguments: The command and its arguments; None takes those of the process.

    Returns:
        The exit status: 0, 2 after a mistake in the arguments or the data, 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except AdadagradError as error:
        if os.environ.get("ADADAGRAD_TRACEBACK"):
            traceback.print_exception(error)
        rank = int(os.environ.get("RANK") or 0)  # what torchrun has numbered this process
        whose = f"rank {rank}: " if rank else ""
        print(f"adadagrad: {whose}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written to
        place = f"{error.filename}: " if error.filename else ""
        print(f"adadagrad: {place}{error.strerror or error}: make room, or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("adadagrad: interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from adadagrad.version import __version__

        print(f"adadagrad {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise UnknownName("command", name, COMMANDS)
    if name != "train" and "LOCAL_RANK" in os.environ:
        from adadagrad.cli.processes import refuse_processes

        refuse_processes(name)
    command: Callable[[Sequence[str]], int] = importlib.import_module(f"adadagrad.cli.{name}").main
    return command(rest)
