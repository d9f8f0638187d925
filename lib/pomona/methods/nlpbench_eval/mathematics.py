"""Whether a reply to a mathematics question is the gold answer: numbers, lists, sets, matrices; else the same text.

Two numbers are equal when they differ by at most a millionth of the gold, or by at most half a unit in a last place:

- the gold's, if it is a decimal of two digits or more: for 0.25 a reply of 0.2532 is right, of 0.2551 wrong. A single
  digit (0.5) is more often exact than rounded, and gives no room.
- the reply's, if it is a decimal rounded from an exact gold: three significant digits do, or two with two decimal
  places, as an exam marker has it. For 1/3 the replies 0.333 and 0.33 are right, 0.3 and 0.34 wrong. A gold that is
  itself a decimal shows what precision was asked for: there it takes three digits (for 0.1234, 0.123 but not 0.12).
  An integer has nothing to round.

Exact numbers (2/4 and 1/2, 1,000 and 10^3) are compared exactly. A percentage is its hundredth. Units after a number
are passed over when one side leaves them out; unlike units are undecided. `log` without a base may be of any usual one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from pomona.methods.nlpbench_eval.expressions import BASES, LONGEST, ROW, Unreadable, Value, evaluate, tidy

_CLOSE = Fraction(1, 1_000_000)
_TAIL = 4_000  # characters at the end of a reply in which its answer is looked for


@dataclass(frozen=True, slots=True)
class _Scalar:
    value: Value
    unit: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Several:
    items: tuple[_Answer, ...]
    ordered: bool = True


_Answer = _Scalar | _Several


def equal(reply: str, golds: Sequence[str]) -> bool | None:
    """Whether the whole of `reply` is one of `golds`, which are forms of the same answer.

    Returns:
        None where it is undecided: the reply, or every gold it might equal, is not an answer we can read.
    """
    verdicts = [_same(reply, gold) for gold in golds]
    return True if True in verdicts else None if None in verdicts or not verdicts else False


def extract(text: str) -> str | None:
    """The answer in a reply that says more: the last box, else after the last cue, else at the end of the last line."""
    text = text.rpartition("</think>")[2].partition("<think>")[0][-_TAIL:]
    if (box := _last_box(text)) is not None:
        return box
    for cue in reversed(list(_CUE.finditer(text))):
        after = text[cue.end() :].lstrip(" \t\r\n*:")
        if answer := _clause(after):
            return answer
    lines = [line.strip() for line in text.splitlines() if line.strip(" *`$.\t[]\\")]
    if not lines:
        return None
    last = lines[-1]
    if "=" in last and (answer := _clause(last.rpartition("=")[2])):
        return answer
    numbers = _NUMBER.findall(last)
    return numbers[-1].strip() if numbers else _clause(last) or None


def grade(reply: str, golds: Sequence[str]) -> tuple[bool | None, bool | None]:
    """Strict and lenient: the whole reply as the answer, and the answer found in it where the whole is none."""
    strict = equal(reply, golds)
    if strict is not None:
        return strict, strict
    answer = extract(reply)
    return None, None if answer is None else equal(answer, golds)


# --- Finding the answer ----------------------------------------------------------------------------------------------

_CUE = re.compile(
    r"\b(?:(?:final|correct|numeric(?:al)?|exact)[ \t]+)*(?:answer|result|solution)\b[*_]{0,2}"
    r"(?:[ \t]+(?:is|are|equals|would[ \t]+be|to[ \t]+[\w \t]{1,40}[ \t]is)\b|[ \t]*[:=])",
    re.IGNORECASE,
)
_CLAUSE_END = re.compile(r"\n|(?<=[^\s.])[.;!?](?=[\s*$]|$)|,? (?:because|since|which|where|so|as|when|if|using|by)\b")
_NUMBER = re.compile(
    r"[-−]?(?:\\[dt]?frac\{[^{}]{1,40}\}\{[^{}]{1,40}\}|\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?|\.\d+)"
    r"(?:[ ]?/[ ]?\d+(?:\.\d+)?)?(?:[ ]?(?:\\times|×|\*)[ ]?10\^(?:\{-?\d+\}|-?\d+))?[ ]?%?"
)


def _last_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start:end]
    return None


def _clause(text: str) -> str:
    end = _CLAUSE_END.search(text)
    return (text[: end.start()] if end else text).strip(" \t\r*`_")


# --- Reading it ------------------------------------------------------------------------------------------------------

_OPENING, _CLOSING = "([{", ")]}"
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_HEDGE = re.compile(r"^(?:about|approximately|approx\.?|roughly|around|exactly|≈|=|is)(?![a-z]) ?", re.IGNORECASE)
_NAME = re.compile(r"^ ?(\\?[A-Za-zα-ωΑ-Ω][A-Za-z0-9_'^\\{} ]{0,30}(?:[(\[][^()\[\]=]{0,60}[)\]])?) ?(?:=|:=|≈) ?(?!=)")
_MATRIX = re.compile(r"^\\begin ?\{([a-zA-Z]*matrix|array)\} ?(?:\{[lcr| ]*\})?(.*)\\end ?\{\1\}$", re.DOTALL)
_CURRENCY = re.compile(r"^([+-]?) ?(?:[$€£¥]|(?:USD|EUR) ) ?(?=[\d.])")
_UNIT = re.compile(
    r"^(.*?[\d)}]) ?((?: |(?<=\d)(?=(?:bits?|nats?|ms|kg|km|cm|mm|GB|MB|KB|Hz)\b))[A-Za-z°µ][\w°µ/ .-]*)$"
)
_NOT_UNITS = re.compile(
    r"\b(?:or|and|if|to|of|in|at|when|for|not|is|are|was|but|so|then|from|with|because|log|ln|exp|sqrt|e|pi|either|x|nor"
    r"|versus|vs|inf|nan|mod)\b"
)
_SPECIAL = re.compile(r"[+-]?(?:nan|inf)", re.IGNORECASE)


def _same(reply: str, gold: str) -> bool | None:
    if max(len(reply), len(gold)) > 2 * LONGEST:
        return None
    reply, gold = _without_full_stop(tidy(reply)), _without_full_stop(tidy(gold))
    open_base = re.compile(r"\blog(?!_)|\blg\b|(?<=\d)log(?!_)")
    bases = BASES if open_base.search(reply) or open_base.search(gold) else BASES[:1]
    verdicts: set[bool | None] = set()
    for base in bases:
        try:
            verdicts.add(_alike(_read(reply, base), _read(gold, base)))
        except Unreadable:
            verdicts = {None}
            break
    if len(verdicts) == 1 and None not in verdicts:
        return verdicts.pop()
    letters = _letters(reply)
    return True if letters and letters == _letters(gold) and not _SPECIAL.fullmatch(letters) else None


def _letters(text: str) -> str:
    """`text` for comparison as text: no spaces, no multiplication dots, no grouping braces, no case."""
    return re.sub(r"[\s*{}\\]", "", text).casefold()


def _without_full_stop(text: str) -> str:
    return text.rstrip(" .;,") if not text.endswith("\\,") else text


def _read(text: str, base: float, depth: int = 0) -> _Answer:
    """The structure and values of tidied `text`; raises Unreadable."""
    text = text.strip()
    if depth > 4 or not text or len(text) > LONGEST:
        raise Unreadable("nothing to read, or too much")
    if matrix := _MATRIX.match(text):
        rows = [row.split("&") for row in matrix[2].split(ROW) if row.strip()]
        return _Several(tuple(_Several(tuple(_read(cell, base, depth + 1) for cell in row)) for row in rows))
    inner, bracket = _within(text)
    parts = list(_parts(inner))
    if len(parts) > 1 and (bracket or not _thousands(text)):
        items = tuple(_read(part, base, depth + 1) for part in parts)
        return _Several(items, ordered=bracket != "{")
    if bracket in ("[", "{") and inner.strip():
        return _Several((_read(inner, base, depth + 1),), ordered=bracket == "[")
    return _scalar(text, base)


def _scalar(text: str, base: float) -> _Scalar:
    name = ""
    if named := _NAME.match(text):
        name, text = named[1].strip(), text[named.end() :]
    *chain, text = text.split("=")
    for link in filter(str.strip, chain):
        evaluate(link.strip(), base)  # prose before an equals sign is no answer
    exact, _, approximation = text.partition("≈")  # what is approximated says more
    text = exact if exact.strip() else approximation
    text = _CURRENCY.sub(r"\1", _HEDGE.sub("", text.strip()))
    try:
        return _Scalar(evaluate(text, base), "", name)
    except Unreadable:
        unit = _UNIT.match(text)
        if unit is None or _NOT_UNITS.search(unit[2]) or len(unit[2].split()) > 4:
            raise
        return _Scalar(evaluate(unit[1], base), unit[2].split()[0].lower().rstrip("s."), name)


def _thousands(text: str) -> bool:
    return re.fullmatch(r"\D{0,40}\d{1,3}(?:,\d{3})+(?![\d,]).{0,40}", text) is not None


def _within(text: str) -> tuple[str, str]:
    r"""The inside of the bracket that spans `text`, and the bracket; `text` and nothing where none does."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return text[2:-2], "{"
    if text[0] not in _OPENING or text[-1] != _PAIRS[text[0]]:
        return text, ""
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in _OPENING) - (sign in _CLOSING)
        if depth == 0 and place < len(text) - 1:
            return text, ""
    return text[1:-1], text[0]


def _parts(text: str) -> Iterator[str]:
    """`text` split at the commas, semicolons and `and`s outside brackets."""
    depth = start = 0
    for match in re.finditer(r"[(\[{]|[)\]}]|(,? and |[,;])", text):
        if match[1] is None:
            depth += 1 if match[0] in _OPENING else -1
        elif depth == 0:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


# --- Comparing -------------------------------------------------------------------------------------------------------


def _alike(reply: _Answer, gold: _Answer) -> bool | None:
    reply, gold = _flat(reply), _flat(gold)
    if isinstance(reply, _Scalar) and isinstance(gold, _Scalar):
        return _alike_scalars(reply, gold)
    if isinstance(reply, _Scalar) or isinstance(gold, _Scalar) or len(reply.items) != len(gold.items):
        return False
    theirs, ours = list(reply.items), list(gold.items)
    names = [[item.name for item in items if isinstance(item, _Scalar) and item.name] for items in (theirs, ours)]
    if names[0] and sorted(names[0]) == sorted(names[1]) and len(set(names[0])) == len(theirs):
        theirs.sort(key=lambda item: item.name if isinstance(item, _Scalar) else "")
        ours.sort(key=lambda item: item.name if isinstance(item, _Scalar) else "")
    elif not gold.ordered:
        return _alike_sets(theirs, ours)
    return _all(_alike(a, b) for a, b in zip(theirs, ours, strict=True))


def _alike_sets(theirs: list[_Answer], ours: list[_Answer]) -> bool | None:
    for item in theirs:
        match = next((other for other in ours if _alike(item, other)), None)
        if match is None:
            return False
        ours.remove(match)
    return True


def _flat(answer: _Answer) -> _Answer:
    """A list of one as its item, a matrix of one column as a list."""
    while isinstance(answer, _Several) and len(answer.items) == 1:
        answer = answer.items[0]
    if isinstance(answer, _Several):
        return _Several(tuple(map(_flat, answer.items)), answer.ordered)
    return answer


def _all(verdicts: Iterator[bool | None]) -> bool | None:
    seen = set(verdicts)
    return False if False in seen else None if None in seen else True


def _alike_scalars(reply: _Scalar, gold: _Scalar) -> bool | None:
    if not close(reply.value, gold.value):
        return False
    unlike_units = reply.unit and gold.unit and reply.unit != gold.unit
    unlike_names = len(reply.name) == len(gold.name) == 1 and reply.name != gold.name
    return None if unlike_units or unlike_names else True


def close(reply: Value, gold: Value) -> bool:
    """The tolerance rule at the top of this module."""
    theirs, ours = Fraction(reply.number), Fraction(gold.number)  # of a float too: nothing overflows
    if reply.exact and gold.exact:
        return theirs == ours
    rooms = [abs(ours) * _CLOSE]
    if gold.step is not None and gold.digits >= 2:
        rooms.append(gold.step / 2)
    if reply.step is not None and _is_rounding(reply, gold):
        rooms.append(reply.step / 2)
    return abs(theirs - ours) <= max(rooms)


def _is_rounding(reply: Value, gold: Value) -> bool:
    """Whether `reply`, a decimal, is precise enough to pass for `gold` rounded."""
    if gold.step is None and isinstance(gold.number, Fraction) and gold.number.denominator == 1:
        return False
    two_places = gold.step is None and reply.step is not None and reply.step <= Fraction(1, 100)
    return reply.digits >= (2 if two_places else 3)
