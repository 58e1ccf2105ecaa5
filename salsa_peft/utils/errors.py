"""The error class for mistakes that a user can correct."""

from collections.abc import Callable, Iterable, Sequence


class SalsaError(ValueError):
    """A mistake that the user can correct. The message is one line: what is wrong, where, and what to do."""

    @property
    def problems(self) -> Sequence[str]:
        """The messages of all mistakes, one line each."""
        return [str(self)]


class SalsaErrors(SalsaError):
    """Several mistakes that the user can correct. The message has a line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self._problems = problems

    @property
    def problems(self) -> Sequence[str]:
        """The messages of all mistakes, one line each."""
        return self._problems


def require(condition: bool, message: str) -> None:
    """Raise SalsaError with this message if the condition is false."""
    if not condition:
        raise SalsaError(message)


def run_checks(checks: Iterable[Callable[[], object]]) -> None:
    """Run all checks, then raise one SalsaError with the mistakes that they found, each of them once."""
    found: list[SalsaError] = []
    for check in checks:
        try:
            check()
        except SalsaError as error:
            found.append(error)
    problems = list(dict.fromkeys(problem for error in found for problem in error.problems))
    if problems:
        raise (SalsaError(problems[0]) if len(problems) == 1 else SalsaErrors(problems)) from found[0]
