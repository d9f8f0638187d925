"""What of a reply is counted, over which questions, and what of it may leave the house."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pomona.methods.nlpbench_eval.arms import Arm
from pomona.methods.nlpbench_eval.compare import compare
from pomona.methods.nlpbench_eval.conversation import Response
from pomona.methods.nlpbench_eval.judging import Judgement
from pomona.methods.nlpbench_eval.questions import Question
from pomona.methods.nlpbench_eval.scoring import (
    by_samples,
    calibration,
    counted,
    readings,
    redacted,
    score,
    summarise,
    undecided,
)
from pomona.methods.nlpbench_eval.statistics import cluster_bootstrap, mcnemar

MC = Question("m", "mc", "Which of these trees?", (0, 2), "ot", ("an oak tree", "a rose", "an elm tree"))
SA = Question("s", "sa", "What is a token, then?", ("An occurrence.",), "lmsp", unique=True)
MATH = Question("x", "math", "Half and a quarter?", (r"\frac{3}{4}",), "lmsp")


def response(question: Question, text: str | None = "0,2", **more: Any) -> Response:
    return Response(question, state=more.pop("state", "ok"), text=text, **more)


def scored(question: Question, text: str | None = "0,2", by: Judgement | None = None, **more: Any) -> dict[str, Any]:
    usage = {"calls": 1, "prompt_tokens": 1, "completion_tokens": 1}
    return score(response(question, text, usage=usage, **more), by)


def right(question: Question, text: str, by: Judgement | None = None, **more: Any) -> tuple[Any, Any]:
    strict, lenient = readings(response(question, text, **more), by)
    return strict["correct"], lenient["correct"]


def test_strict_holds_a_reasoned_reply_to_its_cue_and_lenient_does_not() -> None:
    for question, answer in ((MC, "0,2"), (MATH, r"\frac{3}{4}")):
        assert right(question, f"Let me see.\nAnswer: {answer}", cued=True) == (True, True)
        assert right(question, answer, cued=True) == (False, True)
        assert right(question, answer) == (True, True)


def test_only_the_last_cue_counts_whatever_its_case() -> None:
    assert right(MC, "Answer: 1\nNo.\nANSWER: 0,2", cued=True) == (True, True)


def test_mathematics_that_cannot_be_read_goes_to_a_judge_whose_verdict_is_lenient_only() -> None:
    said = "three of four parts"
    assert undecided(response(MATH, said)) and not undecided(response(MATH, "0.75"))
    assert right(MATH, said) == (False, False)
    assert right(MATH, said, Judgement("j", "ok", True)) == (False, True)
    assert right(MATH, said, Judgement("j", "judge_error", None)) == (False, False)


@pytest.mark.parametrize(
    ("entry", "answered", "everything"),
    [
        (scored(MC), 1, 1),
        (scored(MC, "1"), 0, 0),
        (scored(MC, None, state="timeout"), None, 0),
        (scored(SA, "x"), None, None),  # nobody was asked to judge
        (scored(SA, "x", Judgement("j", "judge_error")), None, 0),
        (scored(SA, None, state="empty"), None, 0),
        (scored(SA, "x", Judgement("j", "ok", False)), 0, 0),
    ],
)
def test_a_failure_is_wrong_over_all_and_absent_over_the_answered(entry: Any, answered: Any, everything: Any) -> None:
    assert (counted(entry, "lenient", "answered"), counted(entry, "lenient", "all")) == (answered, everything)


def test_cut_and_refused_replies_are_answers() -> None:
    entries = [scored(MC, state=state) for state in ("ok", "truncated", "refused", "filtered", "empty")]
    assert summarise(entries, 0)["answered"] == 3


def test_overlap_is_measured_only_where_the_answer_is_one_definite_thing() -> None:
    assert scored(SA, "An occurrence.")["overlap"]["rouge_l"] == 1.0
    assert "overlap" not in scored(Question("t", "sa", "?", ("x",), "ot"), "x")
    assert "overlap" not in scored(SA, "", state="filtered")


def test_questions_with_a_failed_sample_are_not_in_the_figures_by_sample() -> None:
    votes = {"share": 1.0, "tied": False}
    whole = scored(MC, samples=["0,2", "1", "0,2"], votes=votes)
    broken = scored(MC, samples=["1", None, "1"], votes=votes)
    assert whole["votes"]["read"] == [[0, 2], [1], [0, 2]]
    found = by_samples([whole, broken])
    assert [(row["k"], row["n"]) for row in found] == [(1, 1), (2, 1), (3, 1)]
    assert [row["any"] for row in found] == [pytest.approx(2 / 3, abs=1e-6), 1.0, 1.0] and found[2]["majority"] == 1.0


def test_intervals_allow_for_questions_that_share_a_context() -> None:
    members = [Question(f"g{i}", "mc", "?", (i % 2,), "ot", ("a", "b"), "c", f"g{i // 4}", i % 4) for i in range(24)]
    entries = [scored(q, str(i // 4 % 2)) for i, q in enumerate(members)]
    cell = summarise(entries, 5)["accuracy"]["strict"]["answered"]
    expected = cluster_bootstrap(
        [counted(e, "strict", "answered") or 0 for e in entries], [f"g g{i // 4}" for i in range(24)], seed=5
    )
    assert (cell["cluster_low"], cell["cluster_high"]) == expected


def test_redaction_leaves_no_text_of_question_or_reply() -> None:
    for question in (MC, SA, MATH):
        text = "SECRET reply of many words, Answer: SECRET"
        entry = scored(
            Question(**{**{f: getattr(question, f) for f in question.__slots__}, "context": "SECRET context"}),
            text,
            Judgement("j", "ok", True, "SECRET reason"),
            thoughts=["SECRET thought"],
            samples=["SECRET sample"] if question.type == "mc" else None,
            votes={"share": 1.0, "tied": False} if question.type == "mc" else None,
        )
        told = json.dumps(redacted(entry))
        assert "SECRET" not in told and str(question.question) not in told
        for piece in (*question.options, *(map(str, question.answer) if question.type != "mc" else ())):
            assert json.dumps(piece)[1:-1] not in told
        assert redacted(entry)["gold"] == {"sha256": redacted(entry)["gold"]["sha256"]}


def test_calibration_corrects_the_accuracy_of_short_answers_alone() -> None:
    judged = {f"s{i}": Judgement("j", "ok", i % 2 == 0) for i in range(40)} | {"x": Judgement("j", "ok", True)}
    people = {f"s{i}": (i % 2 == 0) != (i == 0) for i in range(40)} | {"x": True}
    answers = [{"id": f"s{i}", "type": "sa"} for i in range(40)] + [{"id": "x", "type": "math"}]
    found = calibration(judged, people, answers)
    without = calibration(judged, people, answers[:40])
    assert found["n"] == 41 and found["corrected"] == without["corrected"]
    assert calibration(judged, people, [])["corrected"] is None


# --- side by side ----------------------------------------------------------------------------------------------------


def arm(name: str, correct: dict[str, bool | None], group: str | None = None) -> Arm:
    def entry(question: str, value: bool | None) -> dict[str, Any]:
        state, reading = "ok" if value is not None else "timeout", {"correct": value}
        return {"id": question, "group": group, "state": state, "strict": reading, "lenient": reading}

    return Arm(name, {}, [entry(question, value) for question, value in correct.items()])


def test_runs_are_paired_by_question_not_by_place_and_only_where_both_answered() -> None:
    first = {f"q{i}": i % 2 == 0 for i in range(20)}
    second = dict(reversed(first.items())) | {"q0": None, "q1": True}
    (pair,) = compare([arm("a", first), arm("b", second)], "strict", seed=0)
    assert (pair.n, pair.both, pair.only_first, pair.only_second, pair.neither) == (19, 9, 0, 1, 9)
    assert pair.difference == pytest.approx(1 / 19)


def test_three_runs_are_three_tests_held_to_a_corrected_level() -> None:
    ids = [f"q{i}" for i in range(40)]
    found = compare(
        [arm(n, {q: i < k for i, q in enumerate(ids)}) for n, k in (("a", 10), ("b", 16), ("c", 17))], "strict", seed=0
    )
    raw = {(p.first, p.second): p.p_exact for p in found}
    assert raw == {("a", "b"): mcnemar(0, 6)[0], ("a", "c"): mcnemar(0, 7)[0], ("b", "c"): mcnemar(0, 1)[0]}
    holm = {(p.first, p.second): p.p_holm for p in found}
    assert holm["a", "c"] == pytest.approx(3 * 2 / 2**7) and holm["a", "b"] == pytest.approx(2 * 2 / 2**6)
    assert [p.verdict for p in found] == ["not distinguishable", "c better than a", "not distinguishable"]


def test_a_group_is_one_draw_of_the_paired_bootstrap() -> None:
    ids = {f"q{i}": i % 3 == 0 for i in range(30)}
    better = {q: i % 2 == 0 for i, q in enumerate(ids)}
    (alone,) = compare([arm("a", ids), arm("b", better)], "strict", seed=0)
    (grouped,) = compare([arm("a", ids, "g"), arm("b", better, "g")], "strict", seed=0)
    assert alone.low < alone.difference < alone.high and grouped.low == grouped.difference == grouped.high
