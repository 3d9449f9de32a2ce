"""``python -m normkit``: what normkit does on this machine, and what is in a file."""

from __future__ import annotations

import argparse
import sys
from types import ModuleType

from normkit._commands import RefusedError, bench, check, diff, info, inspect

COMMANDS: dict[str, tuple[ModuleType, str]] = {
    "info": (info, "versions, frameworks, and the faster paths that are there"),
    "check": (check, "whether every framework here computes the same, beside the native layers"),
    "bench": (bench, "how long normkit takes here, beside the native layers"),
    "inspect": (inspect, "the normalization layers in a file, and what will bite on a port"),
    "diff": (diff, "in what the normalization layers of two files differ"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m normkit", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (command, says) in COMMANDS.items():
        command.arguments(commands.add_parser(name, help=says, description=says))
    options = parser.parse_args(argv)
    try:
        return int(COMMANDS[options.command][0].main(options))
    except RefusedError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
