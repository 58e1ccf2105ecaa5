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
    found = list(BRACKET.finditer(text))
    verdict = None
    while found:
        count = 1
        while count < len(found) and _together(text[found[count - 1].end() : found[count].start()]):
            count += 1
        sentence, found = found[:count], found[count:]
        if len({one[1].upper() for one in sentence}) == 1:
            said = [one for one in sentence if not _quoted(text, one)]
            verdict = VERDICTS[said[-1][1].upper()] if said else verdict
    return verdict


def _together(gap: str) -> bool:
    """Whether what stands between two brackets leaves them in one sentence, or in one list of a line each."""
    after = gap.rpartition("\n")[2]
    within = len(gap) <= LONGEST_GAP and SENTENCE_END.search(gap) is None
    return within and ("\n" not in gap or LINE_START.fullmatch(after) is not None)


def _quoted(text: str, bracket: re.Match[str]) -> bool:
    after = text[bracket.end() : bracket.end() + 40]
    listed = LISTED.search(text[max(0, bracket.start() - 20) : bracket.start()])
    return CONDITION.match(after) is not None or (FOR_A_TIE.match(after) is not None and listed is not None)
