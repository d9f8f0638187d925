"""From replies to figures: strict and lenient readings side by side, and tables in which a failure is not a mistake.

Of every question one of three things is known: it was answered and scored, it was not answered (or a judge gave no
verdict), or nobody was asked to judge it. The first makes the accuracy over answered questions; the first and second
together, the second counted as wrong, the paper's accuracy over all; the third is in neither.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pomona.methods.nlpbench_eval import choices, mathematics
from pomona.methods.nlpbench_eval.conversation import SCORED, Response, final_part
from pomona.methods.nlpbench_eval.judging import Judgement
from pomona.methods.nlpbench_eval.overlap import bleu, rouge_l
from pomona.methods.nlpbench_eval.statistics import (
    Calibration,
    Cell,
    agreement,
    cluster_bootstrap,
    cohen_kappa,
    corrected_accuracy,
    detectable_difference,
    detectable_paired_difference,
    majority_at_k,
    pass_at_k,
)

PARSERS = ("strict", "lenient")
_WITHHELD = ("question", "options", "context", "gold", "answer", "thoughts")


def score(response: Response, judgement: Judgement | None) -> dict[str, Any]:
    """The line of answers.jsonl for one question.

    Args:
        judgement: of a short answer, or of a mathematical reply that could not be read; None where there is none.
    """
    question = response.question
    entry: dict[str, Any] = {
        "id": question.id,
        "group": question.group,
        "turn": question.turn,
        "type": question.type,
        "category": question.category,
        "context": question.context,
        "question": question.question,
        "options": list(question.options),
        "gold": list(question.answer),
        "unique": question.unique,
        "state": response.state,
        "answer": response.text,
    }
    if response.thoughts:
        entry["thoughts"] = response.thoughts
    entry |= dict(zip(PARSERS, readings(response, judgement), strict=True))
    if response.votes is not None:
        picks = [
            choices.parse_lenient(final_part(text or "", response.cued), question.options)
            for text in response.samples or ()
        ]
        read = [None if pick is None else sorted(pick) for pick in picks]
        entry["votes"] = {**response.votes, "samples": response.samples, "read": read}
    if response.tree is not None:
        entry["tree"] = response.tree
    if question.type == "sa" or judgement is not None:
        given = judgement or Judgement("nobody")
        entry["judgement"] = {
            "by": given.by,
            "status": given.status,
            "verdict": given.verdict,
            "reason": given.reason,
        }
    if question.type == "sa" and question.unique and response.text is not None and response.state in SCORED:
        golds = [str(form) for form in question.answer]
        entry["overlap"] = {
            "rouge_l": round(rouge_l(response.final, golds), 6),
            "bleu": round(bleu(response.final, golds), 6),
        }
    entry["finish_reason"] = response.finish_reason
    return {**entry, **response.usage}


def readings(response: Response, judgement: Judgement | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the strict and the lenient parser read in a reply, and whether it is right; None where nobody can say."""
    unread: dict[str, Any] = {"parsed": None, "correct": None}
    if response.state not in SCORED or response.text is None:
        return unread, dict(unread)
    question, text = response.question, response.text
    final = response.final
    if question.type == "mc":
        found = (
            choices.parse_strict(final) if response.in_form else None,
            choices.parse_lenient(final, question.options),
        )
        gold = frozenset(question.answer)
        first, second = ({"parsed": None if f is None else sorted(f), "correct": f == gold} for f in found)
        return first, second
    if question.type == "math":
        golds = [str(form) for form in question.answer]
        strictly, leniently = mathematics.grade(final, golds)
        if leniently is None and judgement is not None and judgement.status == "ok":
            leniently = judgement.verdict
        return (
            {
                "parsed": final.strip()[:200] if response.in_form and strictly is not None else None,
                "correct": response.in_form and bool(strictly),
            },
            {"parsed": (mathematics.extract(text) or "")[:200] or None, "correct": bool(leniently)},
        )
    verdict = judgement.verdict if judgement is not None else None
    return {"parsed": None, "correct": verdict}, {"parsed": None, "correct": verdict}


def undecided(response: Response) -> bool:
    """Whether a judge has something to say: a short answer, or a mathematical reply that cannot be read."""
    if response.state not in SCORED or response.text is None:
        return False
    question = response.question
    if question.type != "math":
        return question.type == "sa"
    golds = [str(form) for form in question.answer]
    return mathematics.grade(response.final, golds)[1] is None


def redacted(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`entry` with every text of the question and the reply replaced by its hash."""
    found = {key: _hashed(value) if key in _WITHHELD and value else value for key, value in entry.items()}
    for parser in PARSERS:
        if entry["type"] != "mc":
            found[parser] = {**entry[parser], "parsed": None}
    if "votes" in entry:
        found["votes"] = {k: v for k, v in entry["votes"].items() if k != "samples"}
    if "judgement" in entry:
        found["judgement"] = {k: v for k, v in entry["judgement"].items() if k != "reason"}
    return found


def _hashed(value: Any) -> dict[str, str]:
    return {"sha256": hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()}


def summarise(answers: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The figures of result.json that follow from the lines of answers.jsonl."""
    overlaps = [a["overlap"] for a in answers if "overlap" in a]
    scored = sum(a["lenient"]["correct"] is not None for a in answers)
    return {
        "questions": len(answers),
        "answered": sum(a["state"] in SCORED for a in answers),
        "states": _counts(a["state"] for a in answers),
        "unscored": _counts(
            a["judgement"]["status"] for a in answers if a["state"] in SCORED and a["lenient"]["correct"] is None
        ),
        **tables(answers, seed),
        "samples": by_samples(answers),
        "power": {
            "n": scored,
            "unpaired_points": round(100 * detectable_difference(scored), 1) if scored else None,
            "paired_points": round(100 * detectable_paired_difference(scored), 1) if scored else None,
        },
        "overlap": {
            "n": len(overlaps),
            **{
                name: round(sum(o[name] for o in overlaps) / len(overlaps), 6) if overlaps else None
                for name in ("rouge_l", "bleu")
            },
        },
        "finish_reasons": _counts(a["finish_reason"] for a in answers if a["finish_reason"]),
    }


def by_samples(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For k from 1 to the number of samples: how often the vote of k of them is right, and how often any of k is.

    Both are means over the questions whose every sample could be had, exact over all ways to pick k of the samples.
    """
    voted = [(a["votes"]["read"], a["gold"]) for a in answers if "votes" in a and None not in a["votes"]["samples"]]
    size = max((len(read) for read, _ in voted), default=0)
    ballots = [
        ([None if v is None else tuple(v) for v in read], tuple(gold)) for read, gold in voted if len(read) == size
    ]
    return [
        {
            "k": k,
            "n": len(ballots),
            "majority": round(sum(majority_at_k(votes, gold, k) for votes, gold in ballots) / len(ballots), 6),
            "any": round(sum(pass_at_k(size, votes.count(gold), k) for votes, gold in ballots) / len(ballots), 6),
        }
        for k in range(1, size + 1)
    ]


def tables(answers: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Accuracy cells overall, by type, by category, by context, and by type and context."""
    kinds: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "accuracy": lambda a: "",
        "by_type": lambda a: a["type"],
        "by_category": lambda a: a["category"],
        "by_context": lambda a: "with" if a["context"] else "without",
        "by_type_context": lambda a: f"{a['type']}/{'with' if a['context'] else 'without'}",
    }
    places: list[tuple[str, str, str, str]] = []
    columns: list[list[int | None]] = []  # 1 right, 0 wrong, None not counted
    for table, kind in kinds.items():
        labels = [kind(a) for a in answers]
        for label in sorted(set(labels)):
            for parser in PARSERS:
                for over in ("answered", "all"):
                    places.append((table, label, parser, over))
                    columns.append(
                        [
                            counted(a, parser, over) if at == label else None
                            for a, at in zip(answers, labels, strict=True)
                        ]
                    )
    clusters = [cluster(a) for a in answers]
    found: dict[str, Any] = {table: {} for table in kinds}
    for (table, label, parser, over), column in zip(places, columns, strict=True):
        counts = [(value, cluster) for value, cluster in zip(column, clusters, strict=True) if value is not None]
        row = found[table] if table == "accuracy" else found[table].setdefault(label, {})
        row.setdefault(parser, {})[over] = _cell(
            [value for value, _ in counts], [cluster for _, cluster in counts], seed
        )
    return found


def _cell(values: Sequence[int], clusters: Sequence[str], seed: int) -> dict[str, Any]:
    """An accuracy with its interval, and where questions share contexts the one that allows for it."""
    grouped: tuple[float, float] | tuple[None, None] = None, None
    if len(set(clusters)) < len(clusters) and len(set(values)) > 1:  # of values all alike every resample is alike too
        grouped = cluster_bootstrap(values, clusters, seed=seed)
    return {**Cell(sum(values), len(values)).as_dict(), "cluster_low": grouped[0], "cluster_high": grouped[1]}


def cluster(answer: Mapping[str, Any]) -> str:
    """What an answer stands or falls with: its group, or the question alone."""
    return f"g {answer['group']}" if answer["group"] is not None else f"q {answer['id']}"


def counted(answer: Mapping[str, Any], parser: str, over: str) -> int | None:
    """1, 0 or, where the question does not count, None: how one answer enters an accuracy over `over` questions."""
    correct = answer[parser]["correct"]
    if correct is not None:
        return int(correct)
    unjudged = answer["state"] in SCORED and answer.get("judgement", {}).get("status") == "unjudged"
    return None if over == "answered" or unjudged else 0


def calibration(
    judged: Mapping[str, Judgement], verdicts: Mapping[str, bool], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How far a judge model agrees with people's verdicts, and the accuracy corrected for where it does not.

    The correction is over the short answers that have the judge's verdict (Rogan and Gladen 1978).
    """
    known = {name: j.verdict for name, j in judged.items() if j.verdict is not None}
    both = sorted(known.keys() & verdicts.keys())
    said, true = [known[name] for name in both], [verdicts[name] for name in both]
    entry: dict[str, Any] = {"n": len(both)}
    if not both:
        return entry
    table = Calibration.of(said, true)
    entry |= {
        "agreement": agreement(said, true),
        "kappa": cohen_kappa(said, true),
        "sensitivity": table.sensitivity.value,
        "specificity": table.specificity.value,
        "corrected": None,
    }
    short = {a["id"] for a in answers if a["type"] == "sa"}
    votes = [verdict for name, verdict in known.items() if name in short]
    if corrected := corrected_accuracy(Cell(sum(votes), len(votes)), table):
        entry["corrected"] = dict(zip(("value", "low", "high"), corrected, strict=True))
    return entry


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))
