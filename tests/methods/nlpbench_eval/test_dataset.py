"""Questions are read from our own schema and the official files, and everything wrong with them is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods.nlpbench_eval.synthetic import official, synthetic, write
from pomona.errors import DataError, MissingError
from pomona.methods.nlpbench_eval.dataset import OFFICIAL_MARGINS, load, official_problems, select
from pomona.methods.nlpbench_eval.questions import Question

GOOD: dict[str, Any] = {
    "id": "a",
    "type": "mc",
    "question": "Which?",
    "options": ["x", "y", "z"],
    "answer": [2, 0],
    "category": "ai",
}


def problems(tmp_path: Path, *records: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        load([str(write(tmp_path / "d.jsonl", list(records)))])
    return caught.value.message


def test_a_question_is_read_whole(tmp_path: Path) -> None:
    record = {**GOOD, "solution": "s", "unique": True, "origin": {"exam": 3}}
    (question,) = load([str(write(tmp_path / "d.jsonl", [record]))]).questions
    assert question == Question(
        "a", "mc", "Which?", (0, 2), "ai", ("x", "y", "z"), unique=True, solution="s", extra={"origin": {"exam": 3}}
    )
    assert question.gold_text == "0, 2"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"id": ""}, "id: must be a text"),
        ({"id": None}, "id: must be a text"),
        ({"question": " "}, "question: must be a text"),
        ({"type": "essay"}, "type: is 'essay'"),
        ({"category": "NLP"}, "category: is 'NLP'"),
        ({"options": ["x"]}, "options: multiple choice needs at least two"),
        ({"options": ["x", ""]}, "options: must be a list of texts"),
        ({"answer": []}, "answer: must be a list of option indices"),
        ({"answer": [3]}, "points beyond the 3 options"),
        ({"answer": [-1]}, "points beyond the 3 options"),
        ({"answer": [1, 1]}, "repeats an index"),
        ({"answer": [True]}, "answer: must be a list of option indices"),
        ({"answer": "0"}, "answer: must be a list of option indices"),
        ({"type": "sa"}, "options: a question of type sa has none"),
        ({"type": "sa", "options": [], "answer": ""}, "answer: must be a text"),
        ({"type": "math", "options": [], "answer": [1]}, "answer: must be a text"),
        ({"group": ""}, "group: must be a text or null"),
        ({"group": "g", "turn": None}, "turn: must be a whole number"),
        ({"group": "g", "turn": 1}, "turn: group 'g' has the turns 1, not 0 to 0"),
        ({"context": 3}, "context: must be a text or null"),
        ({"solution": ["1"]}, "solution: must be a text or null"),
        ({"unique": "no"}, "unique: must be true, false or null"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    message = problems(tmp_path, {**GOOD, **change})
    assert message.startswith(f"{tmp_path}/d.jsonl:1: ") and told in message


def test_all_problems_are_told_not_only_the_first(tmp_path: Path) -> None:
    told = problems(tmp_path, {**GOOD, "answer": [9]}, GOOD, {**GOOD, "id": "b", "category": "x", "type": "y"})
    assert told.count("d.jsonl:") == 3 and ":1: answer" in told and ":3: type" in told and ":3: category" in told


def test_groups_are_put_together_in_the_order_of_their_turns_and_checked(tmp_path: Path) -> None:
    def member(turn: int, **more: Any) -> dict[str, Any]:
        return {**GOOD, "id": f"t{turn}", "group": "g", "turn": turn, "context": "about", **more}

    alone = {**GOOD, "id": "z"}
    data = load([str(write(tmp_path / "d.jsonl", [member(1), alone, member(0)]))])
    assert [q.id for q in data.questions] == ["t0", "t1", "z"]
    assert [[q.id for q in turns] for turns in data.groups()] == [["t0", "t1"], ["z"]]
    assert "group 'g' has the turns 0, 2" in problems(tmp_path, member(0), member(2))
    assert "group 'g' has more than one" in problems(tmp_path, member(0), member(1, context="other"))
    assert "id: 't0' is taken by" in problems(tmp_path, member(0), member(1, id="t0"))


@pytest.mark.parametrize("context", ["-1", "", "  "])
def test_a_context_that_is_none_is_none(tmp_path: Path, context: str) -> None:
    data = load([str(write(tmp_path / "d.jsonl", [{**GOOD, "group": "g", "turn": 0, "context": context}]))])
    assert data.questions[0].context is None


def test_what_is_odd_is_a_warning(tmp_path: Path) -> None:
    odd = [
        {**GOOD, "question": "Café?"},
        {**GOOD, "id": "b", "options": ["x", "x", "y"]},
        {**GOOD, "id": "c", "question": r"\frac{1}{2 ?"},
        {**GOOD, "id": "d"},
        {**GOOD, "id": "e"},
    ]
    warnings = load([str(write(tmp_path / "d.jsonl", odd))]).warnings
    for part in ("a: characters beyond ASCII", "b: two options", "c: braces", "e: the same question as d"):
        assert any(part in warning for warning in warnings), part
    assert len(warnings) == 4


def test_the_synthetic_set_has_the_official_counts_and_one_line_less_has_not(tmp_path: Path) -> None:
    records = synthetic()
    data = load([str(write(tmp_path / "d.jsonl", records))])
    assert data.margins() == OFFICIAL_MARGINS and official_problems(data) == []
    for gone in (0, 200, 377):
        rest = [dict(r) for r in records[:gone] + records[gone + 1 :]]
        for turn, r in enumerate(r for r in rest if r["group"] == records[gone]["group"] is not None):
            r["turn"] = turn
        kind, context = records[gone]["type"], "with" if records[gone]["context"] else "without"
        told = official_problems(load([str(write(tmp_path / "d.jsonl", rest))]))
        assert "questions all: 377, expected 378" in told
        assert any(p.startswith(f"type/context {kind}/{context}: ") for p in told) and len(told) == 5


def test_the_official_files_give_the_same_questions_as_our_own_schema(tmp_path: Path) -> None:
    own = load([str(write(tmp_path / "d.jsonl"))])
    theirs = load([str(path) for path in official(tmp_path)])
    assert theirs.margins() == OFFICIAL_MARGINS
    for ours, read in zip(own.questions, theirs.questions, strict=True):
        assert (ours.question, ours.options, ours.answer, ours.category, ours.type, ours.context) == (
            read.question,
            read.options,
            read.answer,
            read.category,
            read.type,
            read.context,
        )
        assert ours.unique == read.unique and ours.turn == read.turn
    assert theirs.questions[0].id == "w-000-00" and theirs.questions[-1].id == "wo-0208"


def test_the_official_layout_is_read_with_its_gaps_and_what_it_adds_is_kept(tmp_path: Path) -> None:
    group = {
        "context": "-1",
        "questions": ["First?", "Second?", "Third?"],
        "type": [0, 1, 2],
        "options": [["a", "b"], None, None],
        "answers": [[1], "text", "1/2"],
        "category": [
            "Language Modelling, Syntax, and Parsing",
            "pragmatics and discourse and dialogue and applications",
            "Information Retrieval, Topic Modeling",
        ],
        "source": "exam 7",
    }
    single = {"question": "Alone?", "type": 1, "answer": "yes", "category": "Semantics and Logic", "year": 2019}
    for name, entry in (("w.json", group), ("wo.json", single)):
        (tmp_path / name).write_text(json.dumps([entry]))
    data = load([str(tmp_path / "w.json"), str(tmp_path / "wo.json")])
    assert [q.category for q in data.questions] == ["lmsp", "pdda", "irtm", "sl"]
    assert [q.context for q in data.questions] == [None] * 4
    assert [q.unique for q in data.questions] == [False] * 4
    assert data.questions[0].extra == {"source": "exam 7"} and data.questions[3].extra == {"year": 2019}
    assert [q.group for q in data.questions] == ["w-000"] * 3 + [None]


def test_an_official_group_whose_lists_differ_in_length_is_refused_with_its_number(tmp_path: Path) -> None:
    entries = json.loads(official(tmp_path)[0].read_text())
    entries[4]["answers"].pop()
    (tmp_path / "w.json").write_text(json.dumps(entries))
    with pytest.raises(DataError, match="group 4 has 5 questions, but 4 here"):
        load([str(tmp_path / "w.json")])


def test_no_question_and_no_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no question"):
        load([str(tmp_path / "empty.jsonl")])
    with pytest.raises(MissingError):
        load([str(tmp_path / "absent.jsonl")])


def test_filters_and_limits_keep_groups_whole(tmp_path: Path) -> None:
    data = load([str(write(tmp_path / "d.jsonl"))])
    assert len(select(data, limit=6).questions) == 10
    assert len(select(data, limit=5).questions) == 5
    assert len(select(data, limit=1).questions) == 5
    assert len(select(data, context="without").questions) == 209
    assert {q.type for q in select(data, types=["math"]).questions} == {"math"}
    assert len(select(data, categories=["pdda"]).questions) == 13
    assert [q.id for q in select(data, ids=["q003", "g00-1"]).questions] == ["g00-1", "q003"]
    with pytest.raises(DataError, match="no question has the id 'nobody'"):
        select(data, ids=["nobody"])
    with pytest.raises(DataError, match="no question is left"):
        select(data, types=["math"], categories=["pdda"], context="without")


def test_the_digest_follows_what_is_asked_and_nothing_else(tmp_path: Path) -> None:
    def digest(**change: Any) -> str:
        return load([str(write(tmp_path / "d.jsonl", [{**GOOD, **change}]))]).sha256()

    assert digest() == digest(origin="elsewhere") == digest(turn=4)
    changes = ({"question": "What?"}, {"answer": [1]}, {"options": ["x", "y", "w"]}, {"category": "sl"}, {"id": "b"})
    more: tuple[dict[str, Any], ...] = (
        {"context": "c"},
        {"unique": True},
        {"solution": "s"},
        {"group": "g", "turn": 0},
    )
    assert len({digest(), *(digest(**change) for change in more)}) == len(more) + 1
    assert len({digest(), *(digest(**change) for change in changes)}) == len(changes) + 1


def test_a_group_and_a_question_of_the_same_name_are_not_one_conversation(tmp_path: Path) -> None:
    records = [{**GOOD, "id": "x", "group": "a", "turn": 0}, GOOD]
    groups = load([str(write(tmp_path / "d.jsonl", records))]).groups()
    assert [[q.id for q in turns] for turns in groups] == [["x"], ["a"]]


def test_other_categories_are_read_and_asked_for_by_name_when_allowed(tmp_path: Path) -> None:
    path = str(write(tmp_path / "d.jsonl", [{**GOOD, "category": "NLP"}, {**GOOD, "id": "b"}]))
    data = load([path], other_categories=True)
    assert [q.id for q in select(data, categories=["NLP"]).questions] == ["a"]
    with pytest.raises(DataError, match="no question has the category 'ia'"):
        select(data, categories=["ai", "ia"])


def test_the_same_words_about_another_text_are_another_question(tmp_path: Path) -> None:
    records = [{**GOOD, "id": i, "group": i, "turn": 0, "context": i} for i in ("one", "two")]
    assert load([str(write(tmp_path / "d.jsonl", records))]).warnings == ()


def test_a_message_holds_twenty_problems_and_the_number_of_the_rest(tmp_path: Path) -> None:
    told = problems(tmp_path, *({**GOOD, "id": f"q{n}", "answer": [9]} for n in range(23)))
    assert told.count("d.jsonl:") == 20 and told.endswith("; and 3 more")


def test_only_a_one_marks_an_official_answer_as_definite(tmp_path: Path) -> None:
    single = {"question": "?", "type": 1, "answer": "yes", "category": "sl"}
    (tmp_path / "wo.json").write_text(json.dumps([{**single, "unique_ans": mark} for mark in (1, 0, -1, 2, None)]))
    assert [q.unique for q in load([str(tmp_path / "wo.json")]).questions] == [True, False, False, False, False]
