"""The `salsa` command: every subcommand reaches its own parser."""

from __future__ import annotations

import pytest

from salsa_peft.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code in (0, None)
    assert capsys.readouterr().out.startswith(f"usage: salsa {command}")
