"""What runs show, in the words and numbers that every form of the report shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pomona.methods.nlpbench_eval.arms import Arm, Comparison
from pomona.methods.nlpbench_eval.replies import read, scored
from pomona.methods.nlpbench_eval.statistics import Cell as Count
from pomona.report.text import one_line

Reading = Literal["lenient", "strict"]
Cell = Mapping[str, Any]

NAMES = {
    "mc": "Multiple choice",
    "sa": "Short answer",
    "math": "Mathematics",
    "with": "With context",
    "without": "Without context",
    "lmsp": "Language models, syntax",
    "ai": "Artificial intelligence",
    "sl": "Semantics, logic",
    "irtm": "Retrieval, topic models",
    "pdda": "Pragmatics, dialogue",
    "ot": "Other",
}
PAIR_COLUMNS = "first|second|n|only first|only second|difference|95 %|exact p|mid-p|Holm|verdict".split("|")
PAIR_SIDES = "llrrrrlrrrl"  # words to the left, figures to the right

_PARTS = (
    ("by_type", "Type", ("mc", "sa", "math")),
    ("by_category", "Category", ("lmsp", "ai", "sl", "irtm", "pdda", "ot")),
    ("by_context", "Context", ("with", "without")),
    (
        "by_type_context",
        "Type and context",
        tuple(f"{t}/{c}" for t in ("mc", "sa", "math") for c in ("with", "without")),
    ),
)
_REMEDIES = {
    "filtered": "A content filter held them back; see the questions below.",
    "bad_response": "No attempt was readable; --resume asks them again.",
    "http_4xx": "The server refused the request; transcripts.jsonl has its words.",
    "exhausted": "Every attempt failed; --resume asks them again.",
    "timeout": "Raise --timeout, then --resume.",
    "context_overflow": "The prompt exceeds the model's window: fewer --shots, or a model with a longer one.",
}
_NOISY = 1.0  # points between the readings that are worth a word
_KAPPA = 0.6  # below it a judge's agreement with people is commonly called no more than moderate


class Row(NamedTuple):
    """A row of the accuracy table; `cells` is reading -> denominator -> cell."""

    part: str
    name: str
    cells: Mapping[str, Mapping[str, Cell]]

    @property
    def small(self) -> bool:
        return any(cell["small"] and cell["n"] for cell in (self.cells[r]["answered"] for r in ("lenient", "strict")))


# --- numbers ---------------------------------------------------------------------------------------------------------


def share(cell: Cell) -> str:
    """The accuracy, "61.3%"; a dash where there is none to speak of, never a perfect score for no questions."""
    return "–" if cell["value"] is None else f"{cell['value']:.1%}"


def interval(cell: Cell, kind: str = "") -> str:
    """Its 95 % interval in per cent, "56.2–66.1"; `kind` "cluster_" for the one clustered by group."""
    low, high = cell.get(f"{kind}low"), cell.get(f"{kind}high")
    return "" if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}"


def both(cell: Cell) -> str:
    """Accuracy, interval and n in one breath."""
    if not cell["n"]:
        return "–"
    return f"{share(cell)}{'†' if cell['small'] else ''}, {interval(cell)}, n {cell['n']:,}"


def points(difference: float) -> str:
    return f"{100 * difference:+.1f}".replace("-", "−")


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def number(value: Any) -> str:
    """A count or an amount; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return one_line(str(value), 60)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


# --- tables ----------------------------------------------------------------------------------------------------------


def rows(result: Mapping[str, Any]) -> list[Row]:
    """Overall, then by type, category, context, and type with context, in the paper's order."""
    found = [Row("", "All questions", result["accuracy"])]
    for key, part, order in _PARTS:
        table: Mapping[str, Any] = result.get(key) or {}
        for name in sorted(table, key=lambda n: (order.index(n) if n in order else len(order), n)):
            found.append(Row(part, named(name), table[name]))
    return found


def named(key: str) -> str:
    first, slash, second = key.partition("/")
    return f"{named(first)}, {one_line(second, 60)}" if slash else NAMES.get(key) or one_line(key, 60)


def clustered(result: Mapping[str, Any]) -> bool:
    """Whether questions come in groups, so that intervals by group say something of their own."""
    return any(interval(row.cells["lenient"]["answered"], "cluster_") for row in rows(result))


def denominators(arms: Sequence[Arm]) -> Iterator[tuple[str, str, Cell, Cell]]:
    """(arm, denominator, lenient, strict): of the answered, of all questions, of those every arm answered.

    The second and third are left out where they are the first for every arm.
    """
    common = shared_questions(arms) if len(arms) > 1 else {}
    accuracies = [arm.result["accuracy"] for arm in arms]
    all_differ = any(a[r]["all"]["n"] != a[r]["answered"]["n"] for a in accuracies for r in ("lenient", "strict"))
    common_differ = any(
        common[arm.name][0]["n"] != arm.result["accuracy"]["lenient"]["answered"]["n"] for arm in arms if common
    )
    for arm, accuracy in zip(arms, accuracies, strict=True):
        yield arm.name, "answered", accuracy["lenient"]["answered"], accuracy["strict"]["answered"]
        if all_differ:
            yield arm.name, "all, unanswered wrong", accuracy["lenient"]["all"], accuracy["strict"]["all"]
        if common_differ:
            lenient, strict = common[arm.name]
            yield arm.name, "answered by every run", lenient, strict


def shared_questions(arms: Sequence[Arm]) -> dict[str, tuple[Cell, Cell]]:
    """Each arm's lenient and strict cell over the questions that every arm answered and had scored."""
    answered = [{str(a["id"]): a for a in arm.answers if scored(a)} for arm in arms]
    ids = [i for i in answered[0] if all(i in other for other in answered[1:])]
    cells: dict[str, tuple[Cell, Cell]] = {}
    for arm, lines in zip(arms, answered, strict=True):
        right = {r: sum(read(lines[i], r).get("correct") is True for i in ids) for r in ("lenient", "strict")}
        cells[arm.name] = Count(right["lenient"], len(ids)).as_dict(), Count(right["strict"], len(ids)).as_dict()
    return cells


def settings(arms: Sequence[Arm]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Settings all arms share, and those in which they differ, with one value for each arm."""
    keys = list(dict.fromkeys(key for arm in arms for key in arm.result["settings"]))
    told = {key: [_said(arm.result["settings"].get(key)) for arm in arms] for key in keys}
    shared = [(_spoken(key), values[0]) for key, values in told.items() if len(set(values)) == 1]
    return shared, [(_spoken(key), values) for key, values in told.items() if len(set(values)) > 1]


def _spoken(key: str) -> str:
    return one_line(key, 40).replace("_", " ")


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return one_line(f"{value:g}" if isinstance(value, float) else str(value), 120)


def data(arm: Arm) -> str:
    """The questions, in a phrase."""
    told = arm.result["data"]
    sources = ", ".join(one_line(str(source), 80) for source in told.get("sources") or [])
    groups = f" in {told['groups']:,} groups" if told.get("groups") else ""
    digest = f", sha256 {one_line(str(told['sha256']), 12)}" if told.get("sha256") else ""
    return f"{sources or 'questions'}: {told['questions']:,} questions{groups}{digest}"


def conduct(arms: Sequence[Arm]) -> list[tuple[str, str, list[str]]]:
    """(part, name, one value for each arm): how replies ended, what was used, how votes fell."""
    table: list[tuple[str, str, list[str]]] = []

    def counts(part: str, key: str) -> None:
        for name in sorted({n for arm in arms for n in arm.result.get(key) or {}}):
            values = [(arm.result.get(key) or {}).get(name, 0) for arm in arms]
            if any(values):
                table.append((part, _spoken(str(name)), [number(v) for v in values]))

    counts("Replies by state", "states")
    counts("Not scored", "unscored")
    counts("Finish reasons", "finish_reasons")
    tokens = [arm.result.get("tokens") or {} for arm in arms]
    use = [
        ("calls", [arm.result.get("calls") for arm in arms]),
        ("prompt tokens", [t.get("prompt") for t in tokens]),
        ("reply tokens", [t.get("completion") for t in tokens]),
        ("cost", [arm.result.get("cost") for arm in arms]),
        ("cost per right answer", [arm.result.get("cost_per_correct") for arm in arms]),
    ]
    table += [("Use", name, [number(v) for v in values]) for name, values in use if any(v is not None for v in values)]
    ballots = [[a["votes"] for a in arm.answers if a.get("votes")] for arm in arms]
    if any(ballots):
        means = [math.fsum(v["share"] for v in b) / len(b) if b else None for b in ballots]
        table.append(("Votes", "mean share of the winner", ["–" if m is None else f"{m:.2f}" for m in means]))
        table.append(("Votes", "questions put to the vote", [number(len(b)) for b in ballots]))
        table.append(("Votes", "ties", [number(sum(bool(v.get("tied")) for v in b)) for b in ballots]))
    for key, name in (("rouge_l", "ROUGE-L"), ("bleu", "BLEU")):
        scores = [(arm.result.get("overlap") or {}) for arm in arms]
        if any(s.get(key) is not None for s in scores):
            said = [f"{s[key]:.3f} (n {number(s.get('n'))})" if s.get(key) is not None else "–" for s in scores]
            table.append(("Overlap with the reference", name, said))
    judges = [arm.result.get("judge") or {} for arm in arms]
    for key in dict.fromkeys(k for judge in judges for k, v in judge.items() if isinstance(v, int | float)):
        values = [judge.get(key) for judge in judges]
        said = [f"{v:.2f}" if isinstance(v, float) else number(v) for v in values]
        table.append(("Judge", _spoken(key), said))
    return table


# --- words -----------------------------------------------------------------------------------------------------------


def heading(arms: Sequence[Arm]) -> str:
    if len(arms) > 1:
        return f"{len(arms)} runs compared"
    told = arms[0].result["settings"]
    return f"{_said(told.get('model'))}, {_said(told.get('strategy'))}"


def verdict(arms: Sequence[Arm], reading: Reading) -> str:
    """The result in a sentence, with n and interval; of several arms the highest."""
    best = _highest(arms, reading)
    if best is None:
        return "No question was answered and scored."
    cell, before = best.result["accuracy"][reading]["answered"], ""
    if len(arms) > 1:
        before = f"Highest: {one_line(best.name, 40)}, "
    by_group = interval(cell, "cluster_")
    return (
        f"{before}{share(cell)} of {cell['n']:,} answered questions right by the {reading} reading, 95 % interval "
        f"{interval(cell)}{f' ({by_group} by group)' if by_group else ''}."
    )


def standing(arms: Sequence[Arm], comparisons: Sequence[Comparison], reading: Reading) -> list[str]:
    """The verdicts on the highest arm and each other one."""
    best = _highest(arms, reading)
    return [pair(c) for c in comparisons if best is not None and best.name in (c.first, c.second)]


def _highest(arms: Sequence[Arm], reading: Reading) -> Arm | None:
    value = {arm.name: arm.result["accuracy"][reading]["answered"]["value"] for arm in arms}
    known = [arm for arm in arms if value[arm.name] is not None]
    return max(known, key=lambda arm: float(value[arm.name])) if known else None


def pair(comparison: Comparison) -> str:
    """The verdict on two arms, with their names where it has none."""
    said, names = one_line(comparison.verdict, 120), [one_line(n, 40) for n in (comparison.first, comparison.second)]
    return said if all(n in said for n in names) else f"{names[0]} and {names[1]}: {said}"


def warnings(arms: Sequence[Arm]) -> list[str]:
    """What a careful reader should know before the numbers, with what to do about it."""
    told: list[str] = []
    if len({str(arm.result["data"].get("sha256")) for arm in arms}) > 1:
        told.append("The runs were not made on the same data: compare only what every run answered.")
    concerns: dict[tuple[str, str], list[str]] = {}
    for arm in arms:
        for what, amount, remedy in _concerns(arm):
            name = f"{one_line(arm.name, 40)} " if len(arms) > 1 else ""
            concerns.setdefault((what, remedy), []).append(f"{name}{amount}".strip())
    told += [f"{what}: {', '.join(amounts)}. {remedy}" for (what, remedy), amounts in concerns.items()]
    if any(row.small for arm in arms for row in rows(arm.result)):
        told.append("Rows marked † have fewer than 20 questions: too few to conclude from.")
    return told


def _concerns(arm: Arm) -> Iterator[tuple[str, str, str]]:
    """(what, how much of it, what to do about it)."""
    states: Mapping[str, int] = arm.result.get("states") or {}
    for state in sorted(states, key=lambda s: (-states[s], s)):
        if state == "ok" or not states[state]:
            continue
        what, remedy = _state(arm, state)
        reasons = {str(a["finish_reason"]) for a in arm.answers if a.get("state") == state and a.get("finish_reason")}
        shown = f" (finish reason {one_line(', '.join(sorted(reasons)), 60)})" if reasons else ""
        yield f"{what}{shown}", f"{states[state]:,}", remedy
    unscored: Mapping[str, int] = arm.result.get("unscored") or {}
    if count := unscored.get("judge_error"):
        yield (
            "Short answers not scored, the judge gave no verdict",
            f"{count:,}",
            "Name another with --judge, and --resume.",
        )
    if count := unscored.get("unjudged"):
        yield "Short answers not scored for want of a judge", f"{count:,}", "Name one with --judge."
    lenient, strict = (arm.result["accuracy"][r]["answered"]["value"] for r in ("lenient", "strict"))
    if lenient is not None and strict is not None and abs(lenient - strict) * 100 >= _NOISY:
        remedy = "That is the format of the replies, not knowledge."
        yield "Strict against lenient reading, in points", points(strict - lenient), remedy
    kappa = (arm.result.get("judge") or {}).get("kappa")
    if isinstance(kappa, int | float) and kappa < _KAPPA:
        yield "The judge agrees poorly with the labels (κ)", f"{kappa:.2f}", "Read the short answers with care."
    for name, value in (arm.result.get("downgrades") or {}).items():
        yield f"The server did not take {one_line(str(name), 40)}", _said(value), "The run went on without it."


def _state(arm: Arm, state: str) -> tuple[str, str]:
    """What to call replies that ended in `state`, and what to do about them."""
    if state == "empty":
        long = any(a.get("finish_reason") == "length" for a in arm.answers if a.get("state") == state)
        return "Empty replies", "Raise --max-tokens." if long else "transcripts.jsonl shows what the server sent."
    if state == "truncated":
        return "Replies cut off, scored as they stand", "Raise --max-tokens."
    if state == "refused":
        return "Refusals, scored as they stand", "Read them below."
    name = _spoken(state)
    return f"Questions without an answer, {name}", _REMEDIES.get(state, "See the questions below.")


def power(arms: Sequence[Arm]) -> list[str]:
    """The smallest differences that so many questions can show, once for each number of questions."""
    told: dict[str, None] = {}
    for arm in arms:
        can = arm.result.get("power") or {}
        if can.get("unpaired_points") is not None and can.get("paired_points") is not None:
            told[
                f"With {arm.result['questions']:,} questions, two runs can be told apart (80 % power) when they differ "
                f"by about {can['paired_points']:.1f} points on the same questions, {can['unpaired_points']:.1f} on "
                "different ones."
            ] = None
    return list(told)
