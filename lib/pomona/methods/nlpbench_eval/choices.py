"""The options a multiple-choice reply picks, and the vote over several replies.

Two readings are reported side by side. The strict one is the released rule: the whole reply is indices. The lenient one
reads what a careful person would, and nothing where a person would hesitate.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_QUOTED_INDEX = r"\s*+['\"]?\s*+[0-9]{1,9}\s*+['\"]?\s*+"
_INDICES = re.compile(rf"{_QUOTED_INDEX}(?:,{_QUOTED_INDEX})*")


def parse_strict(text: str | None) -> frozenset[int] | None:
    """The indices, if the whole reply is indices between commas, quoted or not; else None."""
    if text is None or _INDICES.fullmatch(text) is None:
        return None
    return frozenset(int(number) for number in re.findall("[0-9]+", text))


def parse_lenient(text: str | None, options: Sequence[str]) -> frozenset[int] | None:
    """The options that a reply picks in whatever words, or None where they are in doubt.

    In order of precedence: the strict reading; the last box; the last answer cue (`Answer: 3`, `so 2`); options called
    right (`B is correct`); a lone pick in bold, on the first line or at the end; an option's text in the last sentence.
    A pick is an index, an option's text, or a letter from `a`. Reasoning in <think> is passed over. An index out of
    range, alternatives (`1 or 2`), a bare denial and picks that contradict each other are read as nothing.
    """
    strict = parse_strict(text)
    if strict is not None and max(strict) < len(options):
        return strict
    reply = (text or "").rpartition("</think>")[2].partition("<think>")[0]  # cut inside its reasoning: states nothing
    if len(reply) > _LONGEST:
        reply = reply[-_LONGEST:].partition("\n")[2]
    return _Reader(options).read(unicodedata.normalize("NFKC", reply)) or None


@dataclass(frozen=True, slots=True)
class Vote(Generic[T]):
    """What several samples agree on.

    Attributes:
        choice: the winner; None where no sample could be read.
        share: its votes among all samples, the unreadable included: two of three unread is no unanimous vote.
        tied: others had as many votes; the first voted for won.
    """

    choice: T | None
    share: float
    tied: bool


def vote_sets(samples: Sequence[frozenset[int] | None]) -> Vote[frozenset[int]]:
    """The vote on what the samples pick; None abstains."""
    return _vote([sample for sample in samples if sample is not None], len(samples))


def vote_texts(samples: Sequence[str]) -> Vote[str]:
    """The released vote, on the texts themselves without spaces and quotes: `2,0` and `0,2` are different votes."""
    return _vote([re.sub("[ '\"]", "", sample) for sample in samples], len(samples))


def _vote(ballots: Sequence[T], samples: int) -> Vote[T]:
    if not ballots:
        return Vote(None, 0.0, False)
    ranked = Counter(ballots).most_common()  # equals keep the order in which they were first seen
    choice, votes = ranked[0]
    return Vote(choice, votes / samples, len(ranked) > 1 and ranked[1][1] == votes)


# --- The lenient reading ---------------------------------------------------------------------------------------------
# Everything below works on lower-case text without Markdown, quotes and LaTeX wrappers (`_plain`).

_LONGEST = 6_000  # characters; of a longer reply only the last whole lines, where the answer is, are read
_STATEMENT = 1_000  # characters of it that may be an answer
_CUES = 50
_DOUBT: frozenset[int] = frozenset()  # an answer is stated, but it picks no option: to read on would be a guess

_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*(?!\s*(?:is|are)\s+(?:not|in|wrong|false))")
_WRAPPER = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|boxed)\s*\{([^{}]*)\}")
_DRESS = re.compile(r"[*_`$\"“”‘\u200b\ufeff]|\\[()\[\],;!]|(?<!\w)['’]|['’](?!\w)")
_BULLET = re.compile(r"^[ \t]*(?:[>#]+|[-•–][ \t])[ \t]*", re.MULTILINE)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")

_NOUN = r"(?:options?|choices?|answers?|alternatives?|statements?|index|indices|indexes|numbers?|items?|letters?)"
_GOOD = r"(?:correct|right|true|accurate|valid|best|answers?|appropriate|most \w+)"
_ADVERB = r"(?:(?:both|all|the|only|therefore|clearly|also|definitely|thus|ones?|two|that|is|are) ){0,6}"
_INDEX = r"(?<![\w.-])[0-9]{1,9}(?!\w)"
_LETTER = r"(?<![\w.-])[a-j](?![\w+#'’])"
_AND = r" ?+(?:,? ?+\b(?:and|as well as|plus)\b|[,;&]) ?+(?:also )?"
_LEAD = r"(?:(?:simply|only|just|both|all|likely|probably|definitely|clearly|of|the|be|as|follows?)\b:? |: ){0,8}"


def _list(pick: str) -> str:
    one = rf"(?:(?:the )?{_NOUN} )?[#(\[{{]{{0,4}}+ ?+(?:{pick}) ?[)\]}}]{{0,4}}+"
    return rf"{one}(?:{_AND}{one}){{0,15}}"


# What may follow a pick and leave it what it is: an end, a remark, a reason. Not `2 layers`, `2.5`, `2:1` or `2-gram`.
_AFTER = (
    r"(?:(?<=[)\]}])| ?\Z| ?\n| ?[.:](?!\d)| ?[;)\]}!(=]| ?,(?! ?\d)|[-–—] | [-–—]"
    r"| (?:because|since|as|for|which|where|based|given|from|rather|instead|while|whereas|but|not|due|when|in this)\b"
    rf"| {_ADVERB}{_GOOD}\b)"
)
_STATED = [
    re.compile(rf"{_LEAD}(?P<list>{_list(pick)})(?:(?P<or> or\b| ?/)|(?={_AFTER}))") for pick in (_INDEX, _LETTER)
]
_STRONG = (
    rf"\b{_NOUN}(?: ?\(s\))?(?: (?:to|for|of|in|from|among|here|that|which|i)(?: [\w'’-]+){{0,8}}?)?"
    r"(?: ?(?::|=|→|⇒|[-=]+>)| [-–—] | (?:is|are|would be|should be|must be|will be)\b) ?:?"
    r"|\b(?:i|we)(?: ?['’]d| would| will| ?['’]ll)?(?: therefore| thus| then| finally| also)?"
    r" (?:choose|pick|select|answer|(?:go|going|went) with|say|think|believe)\b(?: that)? ?:?"
)
_WEAK = (
    r"\b(?:so|therefore|thus|hence|consequently|finally|conclusion|result|solution|leaves|leaving)\b ?[,:]?"
    r"|\b(?:it|that)(?:['’]s| is| must be)\b|(?:^|\n)a: (?=\d)|[=-]>|→|⇒|∴"
)
_CUE = re.compile(
    rf"(?:(?P<strong>{_STRONG})|{_WEAK})[ \n]{{0,2}}(?:(?:it|this|that|they)(?:['’]s| is| are| must be) )?"
)
_ANY = _list(rf"{_INDEX}|{_LETTER}")
_PICK = re.compile(rf"{_ANY} ?[.,;]?")
_VERDICT = re.compile(
    rf"(?:\A|[\n.,;:!?(]|\b(?:only|so|that|but|therefore|thus|hence|while|and|both)\b) ?"
    rf"(?:only |both )?(?P<list>{_ANY})"
    rf"(?: ?: ?| (?:is|are|seems?|looks?|appears?|must be|would be) )(?:to be )?{_ADVERB}"
    rf"(?:(?P<good>{_GOOD})|not\b|incorrect|wrong|false|invalid|inaccurate)\b"
)
_NEGATED = re.compile(r"(?:definitely |clearly |certainly )?(?:not|neither|none of|never|either|between)\b")
_NOT_BUT = re.compile(r"not\b[^.;\n]{0,80}?,? ?\b(?:but rather|but|rather)\b ?")
_DENIAL = re.compile(r"\b(?:not|neither|nor|incorrect|wrong|false|never|except|cannot|unlike)\b|n['’]t\b")
_REMARK = re.compile(rf"[,.:;(] ?| [-–—] | (?:because|since|as)\b| {_ADVERB}{_GOOD}\b")
_LABEL = re.compile(r"\(?\b[a-j0-9] ?[.):] ?")


class _Reader:
    """Reads replies to one question."""

    def __init__(self, options: Sequence[str]) -> None:
        self.texts = [_bare(_plain(unicodedata.normalize("NFKC", option))) for option in options]
        times = Counter(self.texts)
        self.places = {text: place for place, text in enumerate(self.texts) if text and times[text] == 1}
        for text, place in list(self.places.items()):
            self.places.setdefault(_LABEL.sub("", text, count=1) if _LABEL.match(text) else text, place)

    def read(self, reply: str) -> frozenset[int] | None:
        text = self._without_own_text(_plain(reply))
        if (place := self.places.get(_bare(text))) is not None:
            return frozenset([place])
        for box in reversed(_BOXED.findall(reply)):
            if (picks := self.stated(self._without_own_text(_plain(box)))) is not None:
                return picks
        for cue in reversed(list(_CUE.finditer(text))[-_CUES:]):
            if (picks := self._after_cue(text[cue.end() :].lstrip(), strong=bool(cue["strong"]))) is not None:
                return picks
        if (picks := self._called_right(text)) is not None:
            return picks
        return self._alone(reply, text)

    def stated(self, statement: str) -> frozenset[int] | None:
        """What a statement picks at its beginning: `2, because ...`; None where it is about something else."""
        statement = statement[:_STATEMENT]
        if negated := _NOT_BUT.match(statement):
            statement = statement[negated.end() :]
        numbers, letters = (pattern.match(statement) for pattern in _STATED)
        text = self._text(statement)
        if numbers and not numbers["or"]:
            picks = self._in_range(int(number) for number in re.findall("[0-9]+", numbers["list"]))
            if picks is not _DOUBT or text is None:
                return self._unless_contradicted(picks, statement[numbers.end() :])
        if text is not None:
            return text
        if _NEGATED.match(statement) or (numbers or letters or {"or": None})["or"]:
            return _DOUBT
        if letters:
            picks = self._in_range(ord(letter) - ord("a") for letter in re.findall(r"\b[a-j]\b", letters["list"]))
            return self._unless_contradicted(picks, statement[letters.end() :])
        return None

    def mentioned(self, sentence: str) -> frozenset[int] | None:
        """The one option whose text occurs in a sentence that denies nothing."""
        found = [text for text in self.places if len(text) > 2 and _occurs(text, sentence)]
        longest = [text for text in found if not any(text != other and text in other for other in found)]
        for text in longest:
            sentence = sentence.replace(text, " ")
        picks = {self.places[text] for text in longest}
        return frozenset(picks) if len(picks) == 1 and not _DENIAL.search(sentence) else None

    def _after_cue(self, rest: str, *, strong: bool) -> frozenset[int] | None:
        line = rest.partition("\n")[0]
        picks = self.stated(line)
        return self.mentioned(_SENTENCE.split(line)[0]) if picks is None and strong else picks

    def _called_right(self, text: str) -> frozenset[int] | None:
        """Options called correct, if in one breath or with a verdict on every option."""
        right: list[frozenset[int]] = []
        judged: set[int] = set()
        for verdict in _VERDICT.finditer(text):
            picks = self._in_range(
                int(pick) if pick.isdigit() else ord(pick) - ord("a")
                for pick in re.findall(r"\b(?:[0-9]+|[a-j])\b", verdict["list"])
            )
            judged |= picks
            if verdict["good"]:
                right.append(picks)
        if not right:
            return None
        if len(set(right)) == 1 or len(judged) == len(self.texts):
            return frozenset().union(*right)
        return _DOUBT

    def _alone(self, reply: str, text: str) -> frozenset[int] | None:
        lines = [line for line in text.split("\n") if line]
        if not lines:
            return None
        sentences = [sentence for sentence in _SENTENCE.split(text) if sentence]
        bold = [self._without_own_text(_plain(span)) for span in _BOLD.findall(reply)]
        candidates = {self.stated(part) for part in (lines[0], lines[-1], sentences[-1], *bold)} - {None}
        if len(lines) > 1 and all(_PICK.fullmatch(line) for line in lines):
            # A pick a line; every option in turn is the question said again.
            together = frozenset().union(*(self.stated(line) or _DOUBT for line in lines))
            return together if len(together) < len(self.texts) else _DOUBT
        if candidates:
            return candidates.pop() if len(candidates) == 1 else _DOUBT
        return self.mentioned(sentences[-1])

    def _text(self, statement: str) -> frozenset[int] | None:
        """Options whose texts are the statement, its beginning before a remark, or its parts."""
        ends = [len(statement), *(remark.start() for remark in list(_REMARK.finditer(statement))[:20])]
        for end in ends:
            if (place := self.places.get(_bare(statement[:end]))) is not None:
                return frozenset([place])
        parts = [self.places.get(_bare(part)) for part in re.split(_AND, _bare(statement))]
        return frozenset(part for part in parts if part is not None) if None not in parts else None

    def _without_own_text(self, text: str) -> str:
        """`text` with `2: OpenAI` shortened to `2` where that is option 2, so that lists of such are lists."""
        for place, option in enumerate(self.texts):
            if option and option in text:
                name = rf"{place}|{chr(ord('a') + place)}" if place < 10 else str(place)
                pattern = rf"(?<![\w.-])({name})[ ):.(\[=–—-]+{re.escape(option)}(?!\w) ?[)\]]?"
                text = re.sub(pattern, r"\1", text)
        return text

    def _unless_contradicted(self, picks: frozenset[int], rest: str) -> frozenset[int]:
        """`picks`, unless another option's text follows as if it were theirs (`2: OpenAI` where that is option 1)."""
        place = self.places.get(_bare(rest.partition("\n")[0]))
        return picks if place is None or place in picks else _DOUBT

    def _in_range(self, places: Iterable[int]) -> frozenset[int]:
        picks = frozenset(places)
        return picks if all(place < len(self.texts) for place in picks) else _DOUBT


def _plain(text: str) -> str:
    """`text` in lower case without dress, its white space single blanks or single line ends."""
    text = _DRESS.sub("", _WRAPPER.sub(r"\1", text.lower()))
    text = _BULLET.sub("", text)
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


def _bare(text: str) -> str:
    return text.strip(" \n.,:;!?()[]{}-–—")


def _occurs(text: str, sentence: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", sentence) is not None
