"""A judge's text → its verdict: the last [[A]], [[B]] or [[C]] that is one, not a quotation of what it was told.

FastChat takes the first letter of A, B, C that stands anywhere in brackets, so that a judge that repeats its instruction says A.
"""

from __future__ import annotations

import re

BRACKET = re.compile(r"\[\[\s*([ABC])\s*\]\]", re.IGNORECASE)
VERDICTS = {"A": "A", "B": "B", "C": "tie"}
QUOTES = "\"'`*_“”‘’«»"
CONDITION = re.compile(rf"[{QUOTES}]*[\s,:–—-]*\(?(if|when|whenever|in case)\b", re.IGNORECASE)
"""After a bracket: it says when to write it."""
FOR_A_TIE = re.compile(rf"[{QUOTES}]*[\s,:–—-]*\(?(for|in case of|means) (a )?(tie|draw)\b", re.IGNORECASE)
LISTED = re.compile(rf"\b(and|or)\s*[{QUOTES}]*$", re.IGNORECASE)
"""Before a bracket: it is one of several."""
SENTENCE_END = re.compile(rf"[.!?][{QUOTES})\]]*\s|\n\s*\n")
LINE_START = re.compile(rf"[\s\d.){QUOTES}•+#>-]*")
LONGEST_GAP = 120
"""Characters between two brackets of one sentence."""


def read_verdict(text: str) -> str | None:
    """A | B | tie, or None where there is none that can be read.

    Not counted: brackets that a condition follows ("[[A]]" if assistant A is better), several different ones in one sentence or list
    ([[A]], [[B]] or [[C]]), whatever stands in quotation marks or not, and those of thinking aloud (<think>). Quotation marks alone
    are none: My verdict is "[[A]]".
    """
    text = text.rpartition("</think>")[2]
    if "<think>" in text:  # cut before it came to an answer
        text = text.partition("<think>")[0]
    sentences: list[list[re.Match[str]]] = []
    for bracket in BRACKET.finditer(text):
        if sentences and _together(text, sentences[-1][-1], bracket):
            sentences[-1].append(bracket)
        else:
            sentences.append([bracket])
    of_one = [sentence for sentence in sentences if len({bracket[1].upper() for bracket in sentence}) == 1]
    said = [bracket for sentence in of_one for bracket in sentence if not _quoted(text, bracket)]
    return VERDICTS[said[-1][1].upper()] if said else None


def _together(text: str, first: re.Match[str], second: re.Match[str]) -> bool:
    """Whether two brackets stand in one sentence, or begin two lines of a list."""
    gap = text[first.end() : second.start()]
    before, newline, after = gap.rpartition("\n")
    if len(gap) > LONGEST_GAP or (newline and not LINE_START.fullmatch(after)):
        return False
    lines = (
        bool(newline)
        and "\n" not in before
        and LINE_START.fullmatch(text[max(0, first.start() - 8) : first.start()].rpartition("\n")[2])
    )
    return bool(lines) or SENTENCE_END.search(before + newline if newline else gap) is None


def _quoted(text: str, bracket: re.Match[str]) -> bool:
    after = text[bracket.end() : bracket.end() + 40]
    listed = LISTED.search(text[max(0, bracket.start() - 20) : bracket.start()])
    return CONDITION.match(after) is not None or (FOR_A_TIE.match(after) is not None and listed is not None)
