"""Read the verdict [[A]], [[B]] or [[C]] from a judge's reply.

FastChat searches for [[A]], then [[B]], then [[C]] anywhere in the reply, and so reads A if the judge repeats its
instruction or quotes an answer that contains [[A]]. The result can differ from FastChat's if a reply has several
brackets, or one that is not a verdict. Each bracket is classified by its use:

- ignored: in the judge's thinking, in a repeated answer or instruction, attributed to an assistant, negated,
  hypothetical, in a question, or as code (`x[[A]]`);
- a verdict: anywhere else; a declared verdict if the text calls it one ("final verdict: …"), or if it is a line or
  sentence of its own.

If there are declared verdicts, the others are dropped. If the remaining verdicts differ, the last one counts if the
text calls it final or a revision, or if it ends the reply; otherwise there is no verdict, and the judge is asked again.
Imports no torch.
"""

import re

BRACKET = re.compile(r"(?<!\w)\[\[\s*([ABC])\s*\]\](?!\w)", re.IGNORECASE)
VERDICTS = {"A": "A", "B": "B", "C": "tie"}
QUOTES = "\"'`*_“”‘’«»"
CONTEXT = 400
"""Number of characters that are inspected before and after a bracket."""
THOUGHT = re.compile(r"</think(?:ing)?>|<\|channel\|>final<\|message\|>")
"""End of the judge's thinking, as a tag or as a channel of gpt-oss."""
THINKS = re.compile(r"<think(?:ing)?>|<\|channel\|>analysis<\|message\|>")
FORCED = r"(?!\s+(i|we|forced|pressed|asked|made)\b(\s+(had|have|has|must|were|was|am))?)"
"""Lookahead after "if" that excludes phrases such as "if I had to choose", which precede a verdict."""
CONDITION = re.compile(rf"[{QUOTES}]*[ \t,:–—-]*\(?(if{FORCED}|when|whenever|in case)\b", re.IGNORECASE)
"""A condition right after a bracket, as in an instruction: "[[A]] if assistant A is better"."""
FOR_A_TIE = re.compile(rf"[{QUOTES}]*[\s,:–—-]*\(?(for|in case of|means) (a )?(tie|draw)\b", re.IGNORECASE)
LISTED = re.compile(rf"\b(and|or)\s*[{QUOTES}]*$", re.IGNORECASE)
""""and" or "or" right before a bracket, which makes the bracket an item of a list."""
SENTENCE_END = re.compile(rf"[.!?][{QUOTES})\]]*\s|\n\s*\n")
LINE_START = re.compile(rf"[\s\d.){QUOTES}•+#>-]*")
LONGEST_GAP = 120
"""Maximum number of characters between two brackets of one sentence."""
REPEATED = re.compile(
    r"^=+\s*Begin[^\n]*=+\s*$.*?(^=+\s*End[^\n]*=+\s*$|\Z)|\[The Start of [^\]]*\].*?(\[The End of [^\]]*\]|\Z)"
    r"|<\|The Start of [^|]*\|>.*?(<\|The End of [^|]*\|>|\Z)",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
"""An answer or prompt that the judge repeats, between delimiters of figure7, FastChat or Arena-Hard."""
FENCE = re.compile(r"^[ \t]*(```|~~~).*?(^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
NEGATED = re.compile(
    r"(\b(not|never|nor|neither|cannot|rather than|instead of|as opposed to)\b|n[’']t\b)[^:;.!?\n]{0,30}$",
    re.IGNORECASE,
)
CONCEDED = re.compile(
    r"\b(although|though|even if|whereas|despite|(may|might|could|can) (also )?(be|have|say|argue|prefer|choose|pick|go|give)"
    r"|case (can|could|may|might)|at first|first (thought|leaned|wanted|felt|considered|impression|glance|reading)|initial(ly)?|originally"
    r"|(was|were|felt) (almost |nearly )?(tempted|inclined|leaning|going)|almost|nearly)\b[^,;:.!?\n]*$",
    re.IGNORECASE,
)
"""Words in the clause before a bracket that mark a concession, another view or a first impression."""
HYPOTHETICAL = re.compile(
    rf"(\b(if|unless){FORCED}\b[^.!?\n]*\b(would|could|might)\b|\b(had|were) (it|this|that|the|they|assistant|answer)\b[^.!?\n]*\bwould\b|\bwould have\b)[^.!?\n]*$",
    re.IGNORECASE,
)
ASKED = re.compile(
    rf"[\s{QUOTES}(>#-]*((so|then|but|and|or|now|well|hmm),?\s+)?(is|are|was|were|do|does|did|should|shall|would|will|could|can|may|might|must|has|have|had"
    r"|which|what|who|whose|why|how|when|where)\b",
    re.IGNORECASE,
)
"""The beginning of a question."""
QUESTION_MARK = re.compile(rf"[{QUOTES})\]]*\s?\?")
"""A question mark right after a bracket, which makes the bracket part of a question."""
SPEAKER = r"\b(assistants?|answers?|responses?|models?|candidates?|repl(y|ies)|texts?|outputs?|prompts?|users?|instructions?|it|which|that)\b"
SAYS = (
    r"(says?|said|saying|writes?|wrote|writing|written|claims?|claimed|claiming|contains?|contained|containing|includes?|included|including"
    r"|ends?|ended|ending|concludes?|concluded|inserts?|inserted|inserting|prints?|printed|states?|stated|stating|adds?|added|appends?|appended"
    r"|outputs?|outputted|quotes?|quoted|quoting|repeats?|repeated|puts?|embeds?|embedded|injects?|injected|tells?|told|asks?|asked|begins?|reads?)"
)
ATTRIBUTED = re.compile(
    rf"{SPEAKER}[^.!?\n]*\b{SAYS}( (with|that|by|in|as|me|us|the|a|an|its?|own|judge|string|text|words?|line|phrase|token|tag|marker|sentence"
    r"|fake|false|to|output|write|say|for|itself))*[\s:,]*((my|the|its|a)?\s*(final )?(verdict|answer|choice|decision)?( is)?[\s:]*)?"
    rf"[{QUOTES}>\s]*$",
    re.IGNORECASE,
)
"""Words that attribute the next bracket to somebody other than the judge: "Assistant A ends with"."""
ATTRIBUTED_QUOTATION = re.compile(
    rf"({SPEAKER}[^.!?\n]*\b{SAYS}|\b(string|phrase|token|tag|marker|words|text|line|sequence|quotation|instruction))\b[^.!?\n]*$",
    re.IGNORECASE,
)
"""Words before a quotation that attribute the quotation to somebody other than the judge."""
AFTER_QUOTATION = re.compile(
    r"[.!]?[\"'”’»`]+[\s,(–—-]*(says?|said|wrote|writes?|claims?|claimed|is what|as (assistant|answer|it)|appears?|appeared|occurs?|stands?|in (its|the|their|assistant|answer)"
    r"|inside|at the end of|by assistant|from (assistant|answer))\b",
    re.IGNORECASE,
)
LED_IN = re.compile(r"\b(assistant|answer|response|model|candidate) [AB12]\b([’']s)?[\w ]*$", re.IGNORECASE)
"""A line that announces a quotation, such as "Assistant A's answer"."""
NOTHING_ELSE = re.compile(r"\W*(\w+\n)?\W*((my|the|final|verdict|answer|is|winner|[ABC])\b\W*)*", re.IGNORECASE)
"""A code block that contains only a verdict, with or without the name of a language."""
CUE = re.compile(
    r"\b(verdict|final(ly)?|choose|chose|choice|decision|decide|judg(e)?ment|conclusion|conclude|winner|therefore|pick|my answer|i answer)\b",
    re.IGNORECASE,
)
FINAL = re.compile(r"\bfinal(ly)?\b", re.IGNORECASE)
REVISES = re.compile(
    r"\b(on reflection|on second thoughts?|actually|wait|correction|correcting|revis\w+|reconsider\w*|chang\w+ my|however|but|sorry|scratch|overall)\b",
    re.IGNORECASE,
)
SAID, DECLARED = 1, 2


def read_verdict(text: str) -> str | None:
    """The verdict of a reply, A, B or tie; None if the reply has no verdict or an ambiguous one."""
    text = THOUGHT.split(text)[-1]
    text = THINKS.split(text)[0]  # thinking that does not end: the reply was cut off
    repeated, fences = ([match.span() for match in pattern.finditer(text)] for pattern in (REPEATED, FENCE))
    brackets = [bracket for bracket in BRACKET.finditer(text) if _around(bracket, repeated) is None]
    uses = {bracket: use for bracket in brackets if (use := _use(text, bracket, fences))}
    groups = _groups(text, list(uses))
    said = [bracket for group in groups if len({_letter(one) for one in group}) == 1 for bracket in group]
    strongest = max((uses[bracket] for bracket in said), default=0)
    return _settled(text, [bracket for bracket in said if uses[bracket] == strongest])


def _settled(text: str, said: list[re.Match[str]]) -> str | None:
    """The verdict of brackets with the same use; None if they are ambiguous or there are none."""
    if not said:
        return None
    last = said[-1]
    others = [bracket for bracket in said if _letter(bracket) != _letter(last)]
    if others:
        ends = LINE_START.fullmatch(text[last.end() :].rstrip("]})$.! \n")) is not None
        revised = REVISES.search(text[others[-1].end() : last.start()][-4 * CONTEXT :]) is not None
        final = FINAL.search(_sentence(text, last)) is not None and not FINAL.search(_sentence(text, others[-1]))
        if not (revised or final or (ends and not _declared(text, others[-1]))):
            return None
    return VERDICTS[_letter(last)]


def _letter(bracket: re.Match[str]) -> str:
    return bracket[1].upper()


def _around(bracket: re.Match[str], spans: list[tuple[int, int]]) -> tuple[int, int] | None:
    return next((span for span in spans if span[0] <= bracket.start() < span[1]), None)


def _use(text: str, bracket: re.Match[str], fences: list[tuple[int, int]]) -> int:
    """Use of a bracket: 0 if the bracket is not a verdict, else SAID or DECLARED."""
    before, after = _sentence(text, bracket), text[bracket.end() : bracket.end() + CONTEXT]
    listed = LISTED.search(before[-20:]) or "]]" in before[-LONGEST_GAP:]
    if CONDITION.match(after) or (FOR_A_TIE.match(after) and listed) or _asked(before, after):
        return 0
    part = re.split(r"\]\]|\bbut\b|\bhowever\b", before)[-1]
    clause = re.split(r"[,;:—–(]", part)[-1]
    if NEGATED.search(clause) or CONCEDED.search(clause) or HYPOTHETICAL.search(part):
        return 0
    fence = _around(bracket, fences)
    if fence is not None and (_led_in(text[: fence[0]]) or not NOTHING_ELSE.fullmatch(text[slice(*fence)])):
        return 0
    line = text.rfind("\n", 0, bracket.start()) + 1
    if _led_in(text[max(0, line - CONTEXT) : line]) or ATTRIBUTED.search(before):
        return 0
    opened = _quotation(text[max(line, bracket.start() - CONTEXT) : bracket.start()])
    if opened is not None:
        quotation = before[: len(before) - opened]
        if ATTRIBUTED_QUOTATION.search(quotation) or AFTER_QUOTATION.search(after.partition("\n")[0]):
            return 0
    return DECLARED if _declared(text, bracket) else SAID


def _sentence(text: str, bracket: re.Match[str]) -> str:
    """The part of a bracket's sentence that precedes the bracket."""
    before = text[max(0, bracket.start() - CONTEXT) : bracket.start()]
    ends = [match.end() for match in SENTENCE_END.finditer(before)]
    return before[ends[-1] if ends else 0 :].rpartition("\n")[2]


def _asked(before: str, after: str) -> bool:
    """Whether a bracket is part of a question; a tag question after it ("[[A]], right?") does not count."""
    ends = re.search(r"[.!?\n]", after)
    return QUESTION_MARK.match(after) is not None or (
        ASKED.match(before) is not None and ends is not None and ends[0] == "?"
    )


def _led_in(before: str) -> bool:
    """Whether the text before a line or code block announces a quotation, as "Answer A ends with:" does."""
    line = before[-CONTEXT:].rstrip("\n >").rpartition("\n")[2].rstrip()
    line, colon, rest = line.rpartition(":")
    return bool(colon and not rest.strip("*_")) and bool(ATTRIBUTED_QUOTATION.search(line) or LED_IN.search(line))


def _quotation(before: str) -> int | None:
    """Number of characters from the start of the quotation that is open at the end of `before`, or None."""
    places = [before.rfind(mark) for mark in '"`' if before.count(mark) % 2]
    places += [before.rfind(pair[0]) for pair in ("“”", "«»", "‘’") if before.rfind(pair[0]) > before.rfind(pair[1])]
    places += [single.start() for single in re.finditer(r"(?<!\w)'[^']*$", before)]
    return len(before) - min(places) if places else None


def _declared(text: str, bracket: re.Match[str]) -> bool:
    """Whether a bracket is a sentence or a line of its own, or the text calls it the verdict."""
    before, after = _sentence(text, bracket), text[bracket.end() : bracket.end() + 40]
    alone = LINE_START.fullmatch(before) and re.match(rf"[{QUOTES}\]}})$.!\s]*(\n|\Z)", after)
    return bool(alone) or CUE.search(before) is not None


def _groups(text: str, brackets: list[re.Match[str]]) -> list[list[re.Match[str]]]:
    """Group the brackets that are in one sentence or one list."""
    groups: list[list[re.Match[str]]] = []
    for bracket in brackets:
        if groups and _together(text, groups[-1][-1], bracket):
            groups[-1].append(bracket)
        else:
            groups.append([bracket])
    return groups


def _together(text: str, first: re.Match[str], second: re.Match[str]) -> bool:
    """Whether two brackets are in one sentence, or begin two lines of a list."""
    gap = text[first.end() : second.start()]
    before, newline, after = gap.rpartition("\n")
    if len(gap) > LONGEST_GAP or (newline and not LINE_START.fullmatch(after)):
        return False
    start = text[max(0, first.start() - 8) : first.start()].rpartition("\n")[2]
    lines = newline and "\n" not in before and LINE_START.fullmatch(start)
    return bool(lines) or SENTENCE_END.search(before + newline if newline else gap) is None
