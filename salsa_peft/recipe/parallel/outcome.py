"""The exit code of a command, and the lines that it prints, for an error."""

from pathlib import Path
from typing import NamedTuple

from salsa_peft.recipe.processes import StageError, Terminated
from salsa_peft.utils.errors import SalsaError
from salsa_peft.utils.files import disk_full_message

EXPECTED = (SalsaError, StageError, OSError, KeyboardInterrupt, Terminated)
"""Errors that are shown without a traceback."""


class Outcome(NamedTuple):
    """How a run ended."""

    code: int
    """Exit code: 1 for a failed stage or file, 2 for a mistake of the user, 130 after SIGINT, 143 after SIGTERM."""
    lines: list[str]
    """What to print."""


def outcome(error: BaseException, folder: Path) -> Outcome:
    """The outcome of a run that ended with one of the EXPECTED errors. folder: the run's, for errors of the disk."""
    if isinstance(error, SalsaError):
        return Outcome(2, list(error.problems))
    if isinstance(error, StageError):
        return Outcome(1, [str(error)])
    if isinstance(error, OSError):
        line = (
            f"cannot read or write {error.filename or folder} ({error.strerror or error}). Finished stages are kept;"
            " correct this, and run the same command again"
        )
        return Outcome(1, [disk_full_message(error, folder) or line])
    stopped, code = ("stopped", 130) if isinstance(error, KeyboardInterrupt) else ("terminated", 143)
    return Outcome(code, [f"{stopped}; run the same command again to continue"])
