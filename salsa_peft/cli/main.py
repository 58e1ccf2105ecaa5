"""The `salsa` command, which calls one of COMMANDS."""

import importlib
import os
import sys
from collections.abc import Sequence

import salsa_peft
from salsa_peft.utils.console import complain
from salsa_peft.utils.messages import did_you_mean, one_line

HELP = """usage: salsa COMMAND …

  salsa run RECIPE --lora [--set KEY=VALUE] [--dry-run] …   run a recipe, from the SFT seeds to the report
  salsa soup OUT MEMBER MEMBER …                            average adapters or checkpoints into one
  salsa landscape OUT MEMBER MEMBER [MEMBER] …              measure models on the line or plane through members
  salsa judge A B … --questions FILE --judge KIND …         compare the answers of models, adapters or answer files
  salsa hub push RUN ITEM … --to NAMESPACE/NAME             push results to the Hub; salsa hub pull ID
  salsa report RUN [RUN …] | --paper                        write the report of runs, or show the paper's tables
  salsa doctor [RUN]                                        check this machine, and the results of a run if given
  salsa init [RECIPE] --model M --demonstrations F …        write a commented recipe for your model and data
  salsa docs [KEY]                                          explain a recipe's keys: type, unit, default, source, example

`salsa COMMAND --help` shows the options; `salsa --version` the version. Tab completion: pip install
'salsa-peft[completion]', then eval "$(register-python-argcomplete salsa)" in your shell."""


COMMANDS = {
    "run": "salsa_peft.recipe.__main__",
    "soup": "salsa_peft.soup.__main__",
    "landscape": "salsa_peft.cli.landscape",
    "judge": "salsa_peft.cli.judge",
    "report": "salsa_peft.cli.report",
    "hub": "salsa_peft.cli.hub",
    "doctor": "salsa_peft.cli.doctor",
    "docs": "salsa_peft.cli.docs",
    "init": "salsa_peft.cli.init.command",
}
"""Command → the module whose `main` runs it. The module is imported only for this command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console script `salsa`. Returns the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        importlib.import_module("salsa_peft.cli.completion").complete(COMMANDS)
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if words else 2
    if words[0] == "--version":
        print(salsa_peft.__version__)
        return 0
    if words[0] not in COMMANDS:
        complain(f"salsa {one_line(words[0])}: no such command; {did_you_mean(words[0], list(COMMANDS), 'commands')}")
        return 2
    if words[0] == "run" and words[1:2] in (["-h"], ["--help"]) and len(words) > 2:  # salsa run --help KEY
        words = ["docs", *words[2:]]
    try:
        code: int = importlib.import_module(COMMANDS[words[0]]).main(words[1:])
    except KeyboardInterrupt:
        complain(f"salsa {words[0]}: interrupted")
        return 130
    except BrokenPipeError:  # `salsa docs ppo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
