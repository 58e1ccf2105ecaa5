"""The mistakes of a recipe, collected from all of its layers and reported together, each with its place."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from salsa_peft.config.yaml import line_of, node_tree
from salsa_peft.utils.errors import SalsaError, SalsaErrors

MOST = 50
"""Maximum number of mistakes that are shown."""
MOST_KEPT = 200
"""Maximum number of mistakes whose lines are looked up."""


@dataclass(frozen=True)
class Layer:
    """Settings from one source, without the defaults."""

    label: str
    """Start of error messages about the layer, such as the file's name or --set."""
    data: dict[str, Any]
    file: Path | None = None
    """File of the settings. None: the command line."""
    section: str = ""
    """Key in the file whose value is the layer: lora, or empty for the whole file."""

    def line(self, key: str) -> int | None:
        """Line of a key in the file, from 1; None without a file, and for a key that the file does not have."""
        inside = f"{self.section}.{key}" if self.section else key
        return None if self.file is None else line_of(self._nodes, inside)

    @functools.cached_property
    def _nodes(self) -> Any:
        assert self.file is not None
        return node_tree(self.file)

    def place(self, line: int | None) -> str:
        """Start of a message about a key in a line: `my.yaml: line 3`, `my.yaml: line 9: lora` or `--set`."""
        where = self.label if line is None else f"{self.label}: line {line}"
        return f"{where}: {self.section}" if self.section else where

    def depth(self, key: str) -> int:
        """Number of leading parts of `key` that the layer sets."""
        inner: Any = self.data
        parts = 0
        for part in key.replace("sft.from", "sft.from_").split("[")[0].split("."):
            if not isinstance(inner, dict) or part not in inner:
                break
            inner, parts = inner[part], parts + 1
        return parts


class _Problem(NamedTuple):
    layer: int
    line: int
    text: str


class Problems:
    """Collects mistakes. The layers are those that were read so far; the first one is the recipe file."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.misspelt: set[str] = set()
        """Sections with an unknown key, in which a missing key is no second mistake."""
        self._found: list[_Problem] = []
        self._more = 0
        self._cause: SalsaError | None = None

    def __len__(self) -> int:
        return len(self._found) + self._more

    def add(self, key: str, message: str, layer: Layer | None = None) -> None:
        """Add a mistake of `key`. layer: that of the key, by default the last one that sets the key."""
        if len(self._found) >= MOST_KEPT:
            self._more += 1
            return
        layer = layer or self._origin(key)
        if layer is None:
            self._add(0, 0, f"{key}: {message}")
            return
        number = self.layers.index(layer) if layer in self.layers else len(self.layers)
        line = layer.line(key)
        self._add(number, line or 0, f"{layer.place(line)}: {key}: {message}")

    def _add(self, layer: int, line: int, text: str) -> None:
        if text not in [problem.text for problem in self._found]:
            self._found.append(_Problem(layer, line, text))

    @contextlib.contextmanager
    def collecting(self, placed: bool = False) -> Iterator[None]:
        """Context that collects a SalsaError. placed: its messages start with their place, not with a key."""
        try:
            yield
        except SalsaError as error:
            self._cause = self._cause or error
            for problem in error.problems:
                key, colon, message = problem.partition(": ")
                if placed or not colon:
                    self._add(len(self.layers), 0, problem)
                else:
                    self.add(key, message)

    def _origin(self, key: str) -> Layer | None:
        """The layer that sets the longest prefix of `key` (the last such layer); the first one if none does."""
        found, depth = (self.layers[0] if self.layers else None), 0
        for layer in self.layers:
            parts = layer.depth(key)
            if parts and parts >= depth:
                found, depth = layer, parts
        return found

    def report(self) -> None:
        """Raise a SalsaError of all mistakes, in the order of layers and lines, if there are any."""
        texts = [problem.text for problem in sorted(self._found, key=lambda problem: problem[:2])]
        if len(texts) > MOST:
            texts = [*texts[:MOST], f"{len(self) - MOST} more mistakes are not shown"]
        if texts:
            raise (SalsaError(texts[0]) if len(texts) == 1 else SalsaErrors(texts)) from self._cause
