"""What a judge is shown, what counts as a verdict, and how people's verdicts are read."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pomona.errors import DataError
from pomona.methods.nlpbench_eval.conversation import Response, drive
from pomona.methods.nlpbench_eval.judging import (
    Judgement,
    judge,
    matches,
    read_verdict,
    read_verdicts,
    verdict_sheet,
)
from pomona.methods.nlpbench_eval.questions import Question
from pomona.models.endpoint import Answer, Failure, Outcome, Request

SA = Question("s", "sa", "What grows here?", ("An oak tree", "oak"), "ot", context="A park in Kent.")


def response(text: str, question: Question = SA, state: str = "ok") -> Response:
    return Response(question, state=state, text=text)


def judged(say: Callable[[int], str | Outcome], **options: bool) -> tuple[Judgement, list[Request]]:
    asked: list[Request] = []

    def answer(requests: Sequence[Request]) -> list[Outcome]:
        said = say(len(asked))
        asked.extend(requests)
        return [Answer(said, 1, 1, "stop", "j", cached=False) if isinstance(said, str) else said]

    return drive(judge(response("An elm."), "j", **options), answer), asked


def test_the_judge_sees_question_context_every_accepted_form_and_the_reply() -> None:
    (text,) = [text for role, text in judged(lambda n: "1")[1][0].messages if role == "user"]
    for part in ("What grows here?", "A park in Kent.", "An oak tree", "Also accepted: oak", "An elm."):
        assert part in text


def test_the_released_judge_sees_no_context_and_whatever_is_not_a_one_is_wrong() -> None:
    for said, verdict in (("1", True), (" 1\n", True), ("11", False), ("Verdict: 1", False), ("0", False)):
        found, asked = judged(lambda n, said=said: said, released=True)  # type: ignore[misc]
        assert (found.status, found.verdict, len(asked)) == ("ok", verdict, 1)
        assert "A park in Kent." not in asked[0].messages[0][1] and asked[0].max_tokens == 20


def test_a_judge_is_asked_three_times_each_a_sample_of_its_own() -> None:
    found, asked = judged(lambda n: "Perhaps.")
    assert (found.status, found.verdict, len(found.steps)) == ("judge_error", None, 3)
    assert [r.sample for r in asked] == [0, 1, 2] and [r.schema is None for r in asked] == [True, False, False]
    assert [len(r.messages) for r in asked] == [2, 4, 4]


def test_a_judge_that_fails_gives_no_verdict() -> None:
    found, asked = judged(lambda n: Failure("timeout", 3))
    assert (found.status, found.verdict, found.reason, len(asked)) == ("judge_error", None, "timeout", 1)


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"verdict": "correct"}', True),
        ('At first {"verdict": "correct"}, but no: {"verdict": "incorrect"}', False),
        ('{"verdict": "incorrect"} {not json}', False),
        ('{"verdict": "perhaps"}', None),
        ("**Correct.**", True),
        ("It is correct.", None),
        ("{" * 100_000, None),
        ("", None),
    ],
)
def test_a_verdict_is_the_last_that_is_beyond_doubt(text: str, verdict: bool | None) -> None:
    assert read_verdict(text)[0] is verdict


@pytest.mark.parametrize(
    ("text", "right"), [("an OAK tree!", True), ("Oak tree", True), ("the oak", True), ("oaks", False), ("", False)]
)
def test_equality_leaves_case_punctuation_and_articles_aside(text: str, right: bool) -> None:
    assert matches(response(text)).verdict is right


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"\xef\xbb\xbfid,verdict\r\na,1\r\nb,no\r\nc,\r\n", {"a": True, "b": False}),
        (b"id;verdict;note\na;1;x,y\n", {"a": True}),
        (b'verdict,id,answer\ncorrect,a,"two\nlines"\n', {"a": True}),
        (b"id,verdict\na,1\na,yes\n", {"a": True}),
    ],
)
def test_verdicts_are_read_as_spreadsheets_write_them(content: bytes, found: dict[str, bool], tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_bytes(content)
    assert read_verdicts(tmp_path / "v.csv") == found


def test_a_long_answer_in_the_sheet_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_bytes(b"id,verdict,answer\na,1," + b"x" * 500_000 + b"\n")
    assert read_verdicts(tmp_path / "v.csv") == {"a": True}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "needs the columns"),
        (b"name,grade\na,1\n", "needs the columns"),
        (b"id,verdict\na,maybe\n", ":2: verdict 'maybe'"),
        (b"id,verdict\na,1\na,0\n", ":3: 'a' has two verdicts"),
        (b'id,verdict\na,1\n"b,0\nc,0\n', "unexpected end of data"),
        (b'"id"x,verdict\na,1\n', "expected after"),
    ],
)
def test_verdicts_that_cannot_be_read_are_refused_not_passed_over(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_verdicts(tmp_path / "v.csv")
    assert told in caught.value.message


def test_the_sheet_has_a_row_for_each_answer_to_judge_in_cells_that_a_spreadsheet_can_hold(tmp_path: Path) -> None:
    other = Question("m", "mc", "Which?", (0,), "ot", ("a", "b"))
    empty, long = Question("e", "sa", "?", ("x",), "ot"), Question("l", "sa", "?", ("x",), "ot")
    sheet = verdict_sheet(
        [response("-1"), response("0", other), response("", empty, "filtered"), response("x" * 50_000, long)],
        {"s": False},
    )
    (tmp_path / "v.csv").write_bytes(sheet)
    assert read_verdicts(tmp_path / "v.csv") == {"s": False}
    rows = list(csv.DictReader(io.StringIO(sheet.decode())))
    assert [(row["id"], row["verdict"]) for row in rows] == [("s", "0"), ("l", "")]
    assert rows[0]["answer"] == "'-1" and len(rows[1]["answer"]) < 32_767
