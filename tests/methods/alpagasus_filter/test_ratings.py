"""Which rating belongs to which record."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pomona.errors import DataError, MissingError, PomonaError
from pomona.io.conversation import Fields, turns
from pomona.methods.alpagasus_filter.parsing import Reader
from pomona.methods.alpagasus_filter.ratings import Join, Ratings
from pomona.methods.alpagasus_filter.selection import passes

FIELDS = Fields()


def _record(number: int, **more: Any) -> dict[str, Any]:
    return {"instruction": f"Question {number}", "input": "", "output": f"Answer {number}", **more}


def _triplet(record: dict[str, Any]) -> str:
    """The released script's string, from its description."""
    parts = (("###Instruction:", "instruction"), ("### Input:", "input"), ("### Response:", "output"))
    return "".join(f"{header}\n{record[name]}\n\n" for header, name in parts)


def _file(path: Path, entries: Sequence[Any], *, lines: bool = False) -> Path:
    path.write_text("\n".join(json.dumps(e) for e in entries) + "\n" if lines else json.dumps(entries))
    return path


def _open(path: Path, join: Join = "content", **reader: Any) -> Ratings:
    return Ratings(path, join=join, id_field="id", reader=Reader(**reader), fields=FIELDS)


def _scores(ratings: Ratings, records: Sequence[dict[str, Any]]) -> list[float | str | None]:
    found = [ratings.find(record, turns(record, FIELDS), place) for place, record in enumerate(records)]
    return [rating.score if rating.status == "ok" else rating.status for rating in found]


RECORDS = [_record(0), _record(1), _record(2)]


@pytest.mark.parametrize(
    "shape",
    [
        lambda record, score: {**record, "score": score},
        lambda record, score: {**record, "rating": {"score": score}},
        lambda record, score: {**record, "rating": f"{score}/5"},
        lambda record, score: {**record, "accuracy": score},
        lambda record, score: {**record, "alpagasus": {"score": score, "status": "ok"}},
        lambda record, score: {"triplet": _triplet(record), "review": f"{score}\n\nThe answer is right."},
        lambda record, score: {"triplet": _triplet(record).replace("###I", "### I"), "score": score},
        lambda record, score: {
            "score": score,
            "messages": [
                {"role": "user", "content": record["instruction"]},
                {"role": "assistant", "content": record["output"]},
            ],
        },
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_every_known_shape_of_a_rating_joins_by_content_in_any_order(
    tmp_path: Path, shape: Callable[[dict[str, Any], float], dict[str, Any]], lines: bool
) -> None:
    entries = [shape(record, score) for record, score in zip(RECORDS, (4.5, 2, 5), strict=True)]
    ratings = _open(_file(tmp_path / "r", entries[::-1], lines=lines))
    assert _scores(ratings, RECORDS) == [4.5, 2, 5]
    assert (ratings.count, ratings.used) == (3, 3)


@pytest.mark.parametrize("text", ["[4.5, 2, 5]", "4.5\n2\n5\n", '["4.5", "Score: 2", "5/5"]', "4.5\n2\n5"])
def test_bare_numbers_join_by_position(tmp_path: Path, text: str) -> None:
    (tmp_path / "r").write_text(text)
    ratings = _open(tmp_path / "r", "index")
    assert _scores(ratings, RECORDS) == [4.5, 2, 5]
    ratings.check_length(3)


def test_what_is_no_rating_is_unparsed_and_not_worst(tmp_path: Path) -> None:
    path = _file(tmp_path / "r", [-1, None, 7])
    assert _scores(_open(path, "index"), RECORDS) == ["unparsed", "unparsed", "unparsed"]
    assert _scores(_open(path, "index", parser="reference"), RECORDS) == ["unparsed", "unparsed", 7]


def test_compressed_ratings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({**r, "score": 4}) + "\n" for r in RECORDS).encode()))
    assert _scores(_open(path), RECORDS) == [4, 4, 4]


def test_a_journal_whose_values_name_their_content_is_a_ratings_file(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = [{"fingerprint": {"judge": "local"}}]
    entries += [{"key": f"k{i}", "value": {"triplet": _triplet(r), "text": "4\nok"}} for i, r in enumerate(RECORDS)]
    assert _scores(_open(_file(tmp_path / "r", entries, lines=True)), RECORDS) == [4, 4, 4]


def test_shuffled_ratings_joined_by_content_give_what_ordered_ones_give(tmp_path: Path) -> None:
    """D7, second half."""
    generator = random.Random(7)
    records = [_record(i) for i in range(500)]
    entries = [{"triplet": _triplet(r), "score": generator.randrange(11) / 2} for r in records]
    ordered = _scores(_open(_file(tmp_path / "a", entries)), records)
    generator.shuffle(entries)
    assert _scores(_open(_file(tmp_path / "b", entries)), records) == ordered
    assert sum(passes(float(score or 0), 4.5) for score in ordered if not isinstance(score, str)) > 0


def test_a_list_of_another_length_names_both_counts(tmp_path: Path) -> None:
    """D7, first half: what a user of the reference met."""
    ratings = _open(_file(tmp_path / "r", [4.0] * 26_002), "index")
    with pytest.raises(DataError, match=r"26,002 ratings for 52,002 records") as error:
        ratings.check_length(52_002)
    assert error.value.exit_code == 4
    assert ratings.find(RECORDS[0], turns(RECORDS[0], FIELDS), 40_000).status == "no rating"


def test_positions_are_verified_by_what_the_ratings_carry(tmp_path: Path) -> None:
    entries = [{"triplet": _triplet(r), "score": 4} for r in RECORDS]
    assert _scores(_open(_file(tmp_path / "a", entries), "index"), RECORDS) == [4, 4, 4]
    with pytest.raises(DataError, match=r"entry 1 was joined to record 1 by index, but its text"):
        _scores(_open(_file(tmp_path / "b", entries[::-1]), "index"), RECORDS)
    named = [_record(i, id=f"n{i}") for i in range(3)]
    numbers = [{"id": f"n{i}", "score": 4} for i in (0, 2, 1)]
    with pytest.raises(DataError, match=r'record 2 by index, but its "id"'):
        _scores(_open(_file(tmp_path / "c", numbers), "index"), named)


def test_ids_join_numbers_and_text_alike_and_are_verified(tmp_path: Path) -> None:
    named = [_record(i, id=i) for i in range(3)]
    entries: list[dict[str, Any]] = [{"id": str(i), "score": i} for i in (2, 0, 1)]
    assert _scores(_open(_file(tmp_path / "a", entries), "id"), named) == [0, 1, 2]
    entries[0]["triplet"] = _triplet(named[1])
    with pytest.raises(DataError, match=r"entry 1 was joined to record 3 by id, but its text"):
        _scores(_open(_file(tmp_path / "b", entries), "id"), named)


def test_a_record_or_a_rating_without_an_id_is_an_error_under_join_id(tmp_path: Path) -> None:
    path = _file(tmp_path / "r", [{"id": 1, "score": 4}])
    with pytest.raises(DataError, match=r'record 1 has no "id"'):
        _scores(_open(path, "id"), RECORDS)
    with pytest.raises(DataError, match=r'r:2: the rating has no "id"'):
        _scores(_open(_file(tmp_path / "r", [{"id": 1, "score": 4}, {"score": 4}]), "id"), [_record(0, id=1)])


def test_identical_records_share_a_rating(tmp_path: Path) -> None:
    entries = [{**RECORDS[0], "score": 4}, {**RECORDS[0], "score": 4}, {**RECORDS[0], "score": None}]
    assert _scores(_open(_file(tmp_path / "r", entries)), [RECORDS[0]] * 3) == [4, 4, 4]


def test_two_ratings_of_one_content_that_disagree_are_both_named(tmp_path: Path) -> None:
    entries = [{**r, "score": 4} for r in RECORDS] + [{**RECORDS[1], "score": None}, {**RECORDS[1], "score": 2}]
    with pytest.raises(DataError, match=r"entries 2 and 5 rate the same content 4 and 2"):
        _open(_file(tmp_path / "r", entries))


def test_records_differing_in_any_field_do_not_share_a_rating(tmp_path: Path) -> None:
    path = _file(tmp_path / "r", [{**_record(1), "score": 4}])
    others = [_record(1, input="x"), _record(1, output="Answer 1 "), _record(1, instruction="Question 1\n")]
    assert _scores(_open(path), others) == ["no rating"] * 3


def test_ratings_without_text_say_which_join_would_work(tmp_path: Path) -> None:
    path = _file(tmp_path / "r", [{"id": i, "score": 4} for i in range(3)])
    with pytest.raises(DataError, match="carries no text") as error:
        _scores(_open(path), [_record(0, id=0)])
    assert "--join id" in (error.value.hint or "")
    with pytest.raises(DataError, match="carries no text") as error:
        _scores(_open(path), RECORDS)
    assert "--join index" in (error.value.hint or "")


@pytest.mark.parametrize(
    ("text", "kind", "match"),
    [
        ('[{"instruction": "a"}]', DataError, r":1: no rating in it"),
        ('{"score": 4}\n{"score": ', DataError, r":2: not JSON"),
        ("[4, 5", DataError, "not JSON"),
        ('[{"score": 4}, 5]', DataError, r":2: a JSON int"),
    ],
)
def test_a_damaged_ratings_file_is_named_with_its_entry(
    tmp_path: Path, text: str, kind: type[PomonaError], match: str
) -> None:
    (tmp_path / "r").write_text(text)
    with pytest.raises(kind, match=match):
        _open(tmp_path / "r")


def test_a_missing_ratings_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        _open(tmp_path / "nowhere")


def test_an_empty_file_holds_no_ratings(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("")
    assert _scores(_open(tmp_path / "r"), RECORDS) == ["no rating"] * 3


def test_hostile_text_is_hashed_as_it_is(tmp_path: Path) -> None:
    hostile = [_record(0, output=text) for text in ("\x00", "\ud800", "### Input:\n\n", "x" * 10**6, "é", "e\u0301")]
    entries = [{**record, "score": i / 2} for i, record in enumerate(hostile) if i != 1]
    assert _scores(_open(_file(tmp_path / "r", entries)), hostile) == [0.0, "no rating", 1.0, 1.5, 2.0, 2.5]
