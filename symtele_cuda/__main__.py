"""The command line: `symtele info` and `symtele demo`, or `python -m symtele_cuda` in the place of `symtele`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from symtele_cuda import demo
from symtele_cuda.info import describe

PROGRAM = "symtele"
USAGE_ERROR, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 after an error (one line on stderr) or 130 after an interrupt."""
    options = make_parser().parse_args(arguments)
    try:
        print(describe() if options.command == "info" else demo.run(options.epochs, range(options.seeds)))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ImportError as error:
        print(f"{PROGRAM} {options.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    return 0


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Symmetry teleportation: what is installed, and a demo.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, what was built and for what, and what is visible")
    text = "train on scikit-learn's handwritten digits, without and with teleports"
    command = commands.add_parser("demo", help=text, description=text)
    command.add_argument("--epochs", type=positive_int, default=20, help="epochs of a run (default: %(default)s)")
    command.add_argument("--seeds", type=positive_int, default=3, help="how many seeds (default: %(default)s)")
    return parser


def positive_int(text: str) -> int:
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")


if __name__ == "__main__":
    sys.exit(main())
