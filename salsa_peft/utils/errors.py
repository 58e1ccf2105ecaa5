"""The error class for mistakes that a user can correct."""


class SalsaError(ValueError):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise SalsaError with this message if the condition is false."""
    if not condition:
        raise SalsaError(message)
