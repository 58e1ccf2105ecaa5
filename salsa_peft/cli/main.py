"""The `salsa` command: `salsa run`, `soup`, `landscape`, `report`, `hub`, `doctor`. Each is also `python -m salsa_peft.<module>`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import salsa_peft
from salsa_peft.utils.console import say
from salsa_peft.utils.messages import did_you_mean, one_line

HELP = """usage: salsa COMMAND …

  salsa run RECIPE --lora [--set KEY=VALUE] [--dry-run] …   the whole of SALSA from one recipe
  salsa soup OUT MEMBER MEMBER …                            average adapters, or checkpoints
  salsa landscape OUT MEMBER MEMBER [MEMBER] …              a measure along the line or on the plane between them
  salsa hub push RUN ITEM … --to NAMESPACE/NAME             soup, policies, seeds, reward to the Hub; salsa hub pull ID
  salsa report RUN [RUN …] | --paper                        the report of a finished run again, several in one; the paper's tables
  salsa doctor [RUN]                                        what this machine has for a run, and what is wrong with it

`salsa COMMAND --help` says more; `salsa --version`."""


COMMANDS = {
    "run": "salsa_peft.recipe.__main__",
    "soup": "salsa_peft.soup.__main__",
    "landscape": "salsa_peft.cli.landscape",
    "report": "salsa_peft.cli.report",
    "hub": "salsa_peft.cli.hub",
    "doctor": "salsa_peft.cli.doctor",
}
"""Command → the module whose `main` runs it; imported only when it is called."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if words else 2
    if words[0] == "--version":
        print(salsa_peft.__version__)
        return 0
    if words[0] not in COMMANDS:
        say(f"salsa {one_line(words[0])}: no such command; {did_you_mean(words[0], list(COMMANDS), 'commands')}")
        return 2
    code: int = importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
