"""Runs made up for the report's tests: three arms on the same sixty questions, with replies that mean harm."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pomona.methods.nlpbench_eval.arms import Arm, Comparison

HOSTILE = (
    "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)>",
    "</details></table><a href='javascript:alert(1)'>2</a>",
    "| a | b |\n|---|---|\n`code` **bold** [link](http://evil.example) www.evil.example",
    "\x1b[31mred\x07\x1b]0;title\x07 \x9b2J",
    "\u202eesrever\u2066 \u200bzero\ufeff width",
    "lone \ud800 surrogate \udfff",
    "x" * 1_000_000,
    "\n" * 5_000 + "2",
    "漢字" * 200,
    "e\u0301" + "\u0336" * 300,
)
STEPS = "The sum runs over all n-grams of the reference, and the brevity penalty multiplies the geometric mean. "
TOPICS = (
    "Which smoothing method reserves probability mass for unseen bigrams",
    "What does a CKY parser store in each cell of its chart",
    "Name the loss that skip-gram with negative sampling minimises",
    "How many parameters has a bigram model over a vocabulary of 50 words",
    "Which of these sentences is true in every model of the formula",
    "Explain why BLEU needs a brevity penalty",
    "Compute the F1 of precision 0.6 and recall 0.75",
)
OPTIONS = ("Add-one smoothing", "Good-Turing discounting", "The Viterbi algorithm", "Beam search of width k")


def cell(pairs: Sequence[tuple[bool, str]], grouped: bool) -> dict[str, Any]:
    """The cell of (right, group) pairs; the clustered interval is only a wider one."""
    k, n = sum(right for right, _ in pairs), len(pairs)
    if not n:
        return dict.fromkeys(("value", "low", "high", "cluster_low", "cluster_high")) | {"k": 0, "n": 0, "small": True}
    p, z = k / n, 1.959963984540054
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n)
    wider = (max(0.0, low - 0.03), min(1.0, high + 0.03)) if grouped else (None, None)
    return {"k": k, "n": n, "value": p, "low": low, "high": high, "cluster_low": wider[0], "cluster_high": wider[1],
            "small": n < 20}  # fmt: skip


def result(answers: Sequence[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    def table(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
        chosen = list(lines)
        grouped = any(a["group"] for a in chosen)
        known = [
            a for a in chosen if a["state"] in ("ok", "truncated", "refused") and a["lenient"]["correct"] is not None
        ]
        return {
            reading: {
                "answered": cell([(a[reading]["correct"], a["group"]) for a in known], grouped),
                "all": cell([(a[reading].get("correct") is True, a["group"]) for a in chosen], grouped),
            }
            for reading in ("strict", "lenient")
        }

    def split(key: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
        return {name: table(a for a in answers if key(a) == name) for name in sorted({key(a) for a in answers})}

    def place(answer: dict[str, Any]) -> str:
        return "with" if answer["group"] else "without"

    states = Counter(a["state"] for a in answers)
    n = len(answers)
    errors = sum((a.get("judgement") or {}).get("status") == "judge_error" for a in answers)
    right = sum(a["lenient"].get("correct") is True for a in answers)
    return {
        "settings": settings,
        "data": {"sources": ["exam.jsonl"], "questions": n, "groups": len({a["group"] for a in answers} - {None}),
                 "sha256": "9f2c41d07be85a63" * 4},
        "questions": n,
        "answered": sum(states[s] for s in ("ok", "truncated", "refused")),
        "states": dict(states),
        "unscored": {"unjudged": 0, "judge_error": errors},
        "accuracy": table(answers),
        "by_type": split(lambda a: a["type"]),
        "by_category": split(lambda a: a["category"]),
        "by_context": split(place),
        "by_type_context": split(lambda a: f"{a['type']}/{place(a)}"),
        "power": {"unpaired_points": 280.2 * math.sqrt(0.5 / n), "paired_points": 280.2 * math.sqrt(0.2 / n)},
        "overlap": {"rouge_l": 0.4127, "bleu": 0.1834, "n": sum(1 for a in answers if a.get("overlap"))},
        "calls": n * (3 if settings["strategy"] == "sc" else 1),
        "tokens": {"prompt": 412 * n, "completion": 58 * n},
        "cost": 0.0131 * n,
        "cost_per_correct": 0.0131 * n / max(1, right),
        "finish_reasons": dict(Counter(a["finish_reason"] for a in answers if a["finish_reason"])),
        "judge": {"kappa": 0.71, "agreement": 0.86, "n": 120},
        "downgrades": {},
    }  # fmt: skip


def arm(name: str, skill: float, *, questions: int = 60, hostile: bool = True, seed: int = 1, **more: Any) -> Arm:
    """An arm that answers a share `skill` of the questions right; the questions depend on `seed` only."""
    asked, luck = random.Random(seed), random.Random(f"{seed} {name}")
    answers: list[dict[str, Any]] = []
    group = turn = left = 0
    for number in range(questions):
        if not left and asked.random() < 0.25:
            group, turn, left = group + 1, 0, asked.choice((2, 3, 4))
        inside = left > 0
        kind = asked.choices(("mc", "sa", "math"), (5, 5, 1))[0]
        category = asked.choices(("lmsp", "ai", "sl", "ot", "irtm", "pdda"), (43, 20, 18, 9, 7, 3))[0]
        topic = asked.choice(TOPICS)
        gold = [asked.randrange(4)] if kind == "mc" else [f"{asked.randrange(1, 90) / 8:g}"]
        state = luck.choices(("ok", "empty", "truncated", "timeout"), (90, 4, 3, 2))[0]
        right = luck.random() < skill
        told = kind == "mc" and luck.random() < 0.15  # right, but not in the form that was asked for
        read = list(gold) if right else [3 - gold[0]] if kind == "mc" and gold[0] != 3 - gold[0] else None
        reply = "The answer is " + ", ".join(map(str, read or ["unclear"]))
        if kind == "sa":
            gold = [f"{topic.split()[1].capitalize()} does, because the counts of seen events are discounted."]
            reply = STEPS * luck.choice((1, 2, 5))
        if hostile and number % 6 == 5:
            reply = HOSTILE[(number // 6) % len(HOSTILE)]
        usable = state in ("ok", "truncated")
        failed = kind == "sa" and luck.random() < 0.05
        correct = right if usable and not failed else None
        line: dict[str, Any] = {
            "id": f"w-{group:03}-{turn:02}" if inside else f"wo-{number:04}",
            "group": f"w-{group:03}" if inside else None,
            "turn": turn if inside else None,
            "type": kind,
            "category": category,
            "context": f"Consider grammar {group}:\nS -> NP VP\nNP -> Det N | N\nVP -> V NP\n" if inside else None,
            "question": f"{topic} ({number})?",
            "options": list(OPTIONS) if kind == "mc" else [],
            "gold": gold,
            "unique": kind != "sa" or number % 2 == 0,
            "state": state,
            "answer": None if state in ("empty", "timeout") else reply,
            "strict": {"parsed": None if told else read, "correct": correct and not told} if usable else {},
            "lenient": {"parsed": read, "correct": correct} if usable else {},
            "finish_reason": {
                "ok": "stop",
                "empty": ("length", "content_filter", "stop")[number % 3],
                "truncated": "length",
            }.get(state),
            "calls": 1,
            "prompt_tokens": 412,
            "completion_tokens": 58,
        }
        if kind == "sa" and usable:
            reason = "No verdict in the judge's reply." if failed else "Names the method but not why it is needed."
            verdict = {"by": "judge-large", "verdict": correct, "status": "judge_error" if failed else "ok"}
            line["judgement"] = verdict | {"reason": reason}
            line["overlap"] = {"rouge_l": luck.random(), "bleu": luck.random() / 2}
        if name == "sc" and kind == "mc" and usable:
            line["votes"] = {
                "share": luck.choice((1 / 3, 2 / 3, 1.0)),
                "samples": [reply[:200], "2", "0"],
                "tied": right,
            }
        if name == "cot":
            line["thoughts"] = [STEPS, HOSTILE[0]] if hostile else [STEPS]
        answers.append(line)
        turn, left = turn + 1, max(0, left - 1)
    settings = {"model": "gpt-sample-4", "strategy": name, "profile": "fixed", "history": "own", "temperature": 0.0,
                "max_tokens": 945, "shots": 0, "judge": "judge-large"} | more  # fmt: skip
    return Arm(name, result(answers, settings), answers)


def arms(**more: Any) -> list[Arm]:
    return [arm("zs", 0.42, **more), arm("cot", 0.66, **more), arm("sc", 0.6, **more)]


def comparisons(several: Sequence[Arm]) -> list[Comparison]:
    """Every pair, with plausible figures: what they are is not the report's concern."""
    pairs = [(a, b) for i, a in enumerate(several) for b in several[i + 1 :]]
    told = []
    for number, (a, b) in enumerate(pairs):
        better = number == 0
        verdict = f"{b.name} better than {a.name}" if better else "not distinguishable"
        difference, p = (0.19, 0.0013) if better else (0.05, 0.11 * number)
        told.append(
            Comparison(
                first=a.name, second=b.name, n=len(a.answers), both=20, only_first=6, only_second=17,
                neither=len(a.answers) - 43, difference=difference, low=difference - 0.14, high=difference + 0.13,
                p_exact=p, p_mid=0.6 * p, p_holm=min(1.0, 3 * p), verdict=verdict,
            )
        )  # fmt: skip
    return told
