"""The `salsa` command: every subcommand reaches its own parser."""

from __future__ import annotations

import subprocess
import sys

import pytest
from paths import ROOT

from salsa_peft.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: object = main([command, "--help"])
    except SystemExit as end:
        code = end.code
    assert code == 0
    assert capsys.readouterr().out.startswith(f"usage: salsa {command}")


def test_a_closed_pipe_is_no_traceback() -> None:
    """`salsa docs ppo | head -1`."""
    line = f"{sys.executable} -m salsa_peft.cli.main docs ppo | head -1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("ppo: ") and done.stderr == ""
