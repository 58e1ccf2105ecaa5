"""The error that a user can mend. Imports nothing, so that a command that needs no recipe does not wait for its schema."""

from __future__ import annotations


class SalsaError(ValueError):
    """Something the user can mend: one line that says what was found, what was expected and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise SalsaError(message) unless condition."""
    if not condition:
        raise SalsaError(message)
