"""README and the pages of docs/: their code blocks, commands, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A code block of a page."""

    page: str
    line: int
    text: str

    @property
    def place(self) -> str:
        """Page and line, as the id of a test."""
        return f"{self.page}:{self.line}"


class Command(NamedTuple):
    """A shell command of a page."""

    page: str
    line: int
    words: list[str]

    @property
    def place(self) -> str:
        """Page and command, as the id of a test."""
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(language: str) -> list[Block]:
    """All code blocks of a language."""
    return [block for page in PAGES for block in _blocks(page, language)]


def _blocks(page: Path, language: str) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[2] == language:
            yield Block(page.name, text[: match.start()].count("\n") + 1, match[3])


def commands() -> list[Command]:
    """The commands of all bash blocks, without comments, variables before them, and the path of an environment."""
    return [Command(block.page, block.line, words) for block in blocks("bash") for words in _split(block.text) if words]


def _split(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word.removeprefix(".venv/bin/"))
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            yield words
            words = []


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_commands(page: Path) -> list[list[str]]:
    """Commands `salsa …` in the running text."""
    spans = re.findall(r"`(salsa [^`]+)`", prose(page).replace("\n", " "))
    return [shlex.split(span.replace("…", "")) for span in spans]


def links(page: Path) -> list[str]:
    """Targets of the page's links and images that are inside the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", prose(page)))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
