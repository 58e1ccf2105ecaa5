"""The `salsa` command: every subcommand reaches its own parser."""

from __future__ import annotations

import pytest

from salsa_peft.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([command, "--help"])
    except SystemExit as end:  # argparse's own
        code = end.code or 0
    assert code == 0 and f"salsa {command}" in capsys.readouterr().out.splitlines()[0]
