"""Ratings made earlier, and which record each belongs to.

A rating is joined to a record by what both say (`content`), by a shared name (`id`), or by position (`index`), and
whatever else it carries is verified. Only hashes and numbers are held in memory: at most 48 bytes per rating.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pomona.errors import DataError, MissingError
from pomona.io.conversation import BadRecord, Fields, Turn, turns
from pomona.io.records import Record, Reject, read
from pomona.methods.alpagasus_filter.parsing import Reader
from pomona.methods.alpagasus_filter.prompts import triplet

if TYPE_CHECKING:
    from numpy.typing import NDArray

Join = Literal["content", "id", "index"]
Key = tuple[int, int]
"""A 128-bit hash in two halves; `ABSENT` where there is nothing to hash."""

ABSENT: Key = (0, 0)
_SCORE_KEYS = ("score", "rating")


@dataclass(frozen=True, slots=True)
class Rating:
    """What is known of one record's rating.

    Attributes:
        score: on the scale, or None.
        status: "ok"; "unparsed", there is a reply but no rating in it; "unanswered", the judge gave no reply;
            "unasked", the budget was used up before; "too long", the record does not fit the local judge's context;
            "no rating", the ratings do not hold this record.
        first_line: of the reply.
        prompt_tokens, completion_tokens: as the judge counted them.
        detail: why there is no score.
    """

    score: float | None
    status: Literal["ok", "unparsed", "unanswered", "unasked", "too long", "no rating"]
    model: str | None = None
    first_line: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    detail: str | None = None

    def as_object(self, dimension: str) -> dict[str, Any]:
        """The `alpagasus` object of a record."""
        asked = self.prompt_tokens is not None
        return {
            "score": self.score,
            "dimension": dimension,
            "model": self.model,
            "first_line": self.first_line,
            "status": self.status,
            "tokens": {"prompt": self.prompt_tokens, "completion": self.completion_tokens} if asked else None,
        }


def content_key(turns: Sequence[Turn]) -> Key:
    """A record by what the judge is shown of it: two records shown alike share their ratings."""
    return _key(triplet(turns).removesuffix("\n\n"))


def _triplet_key(stored: str) -> Key:
    """The same, of a stored `triplet`; some scripts put a space into its first header."""
    if stored.startswith("### Instruction:"):
        stored = "###" + stored[4:]
    return _key(stored.removesuffix("\n\n"))


def _id_key(identifier: Any) -> Key:
    """A record's name; 7 and "7" are one name."""
    return _key(identifier if isinstance(identifier, str) else json.dumps(identifier, sort_keys=True))


def _key(text: str) -> Key:
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


@dataclass(frozen=True, slots=True)
class _Entry:
    score: float  # NaN: no rating could be read
    line: int
    content: Key = ABSENT
    id: Key = ABSENT


class Ratings:
    """A file of ratings, ready to be joined."""

    def __init__(self, path: Path, *, join: Join, id_field: str, reader: Reader, fields: Fields) -> None:
        """Read `path`: a JSON array, JSONL, CSV or Parquet of objects, or bare numbers.

        An object's rating is its `alpagasus` object, `score`, `rating`, or a field named like the dimension; or it is
        read from its `review`. What it belongs to is its `triplet` or its instruction, input and output; or its id.

        Raises:
            MissingError: the file cannot be read.
            DataError: an entry holds no rating, or two entries for one record disagree.
        """
        self.path = path
        self.join = join
        self._id_field = id_field
        self._lacking: int | None = None  # the first entry without what the join needs
        self._with_id = False
        scores, lines = array("d"), array("Q")
        contents, ids = (array("Q"), array("Q")), (array("Q"), array("Q"))
        for entry in _entries(path, reader, fields, id_field):
            scores.append(entry.score)
            lines.append(entry.line)
            needed = {"content": entry.content, "id": entry.id, "index": None}[join]
            if needed == ABSENT and self._lacking is None:
                self._lacking = entry.line
                self._with_id = entry.id != ABSENT
            for key, halves in ((entry.content, contents), (entry.id, ids)):
                if halves is contents or join != "content":
                    halves[0].append(key[0])
                    halves[1].append(key[1])
        self.count = len(scores)
        self._used = bytearray(self.count)
        if self._lacking is not None:
            return
        self._scores, self._lines = _view(scores, "f8"), _view(lines, "u8")
        self._contents = _view(contents[0], "u8"), _view(contents[1], "u8")
        self._ids = _view(ids[0], "u8"), _view(ids[1], "u8")
        if join != "index":
            self._sort()

    def _sort(self) -> None:
        """Order the entries by their key, one per key; equal keys must agree on the rating."""
        import numpy as np

        first, second = self._contents if self.join == "content" else self._ids
        order = np.lexsort((second, first))
        first, second, scores = first[order], second[order], self._scores[order]
        new = np.ones(self.count, dtype=bool)
        new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        starts = np.flatnonzero(new)
        if self.count:
            least, most = np.fmin.reduceat(scores, starts), np.fmax.reduceat(scores, starts)
            for group in np.flatnonzero(least < most)[:1]:
                end = starts[group + 1] if group + 1 < len(starts) else self.count
                among = range(starts[group], end)
                low, high = (next(i for i in among if scores[i] == value) for value in (least[group], most[group]))
                one, other = sorted((low, high), key=lambda i: int(self._lines[order[i]]))
                what = "the same content" if self.join == "content" else "the same id"
                raise DataError(
                    f"{self.path}: entries {self._lines[order[one]]} and {self._lines[order[other]]} rate {what} "
                    f"{scores[one]:g} and {scores[other]:g}",
                    hint="remove one of them",
                )
            self._scores = least
        representative = order[starts]
        self._keys = first[starts], second[starts]
        self._lines = self._lines[representative]
        self._contents = self._contents[0][representative], self._contents[1][representative]
        if self.join != "content":
            self._ids = self._ids[0][representative], self._ids[1][representative]

    @property
    def used(self) -> int:
        """How many different ratings found a record."""
        return sum(self._used)

    def find(self, record: Record, said: Sequence[Turn], position: int) -> Rating:
        """The rating of a record: `said` are its turns, `position` its place in the input, from 0.

        Raises:
            DataError: the ratings lack what the join needs, the record has no id, or what the rating carries besides
                belongs to another record.
        """
        if self._lacking is not None:
            raise self._cannot_join(record)
        content = content_key(said)
        if self.join == "index":
            if position >= self.count:
                return Rating(None, "no rating")
            place: int | None = position
        elif self.join == "content":
            place = self._place(content)
        else:
            if record.get(self._id_field) is None:
                raise DataError(
                    f'record {position + 1} has no "{self._id_field}" to join by', hint="--id-field names another field"
                )
            place = self._place(_id_key(record[self._id_field]))
        if place is None:
            return Rating(None, "no rating")
        self._verify(place, record, content, position)
        self._used[place] = 1
        score = float(self._scores[place])
        return Rating(None, "unparsed") if math.isnan(score) else Rating(score, "ok")

    def _place(self, key: Key) -> int | None:
        import numpy as np

        first, second = self._keys
        place = int(np.searchsorted(first, np.uint64(key[0])))
        while place < len(first) and int(first[place]) == key[0]:
            if int(second[place]) == key[1]:
                return place
            place += 1
        return None

    def _verify(self, place: int, record: Record, content: Key, position: int) -> None:
        checks: list[tuple[str, Key, Key]] = []
        if self.join != "content":
            checks.append(("text", _at(self._contents, place), content))
        if self.join == "index" and record.get(self._id_field) is not None:
            checks.append((f'"{self._id_field}"', _at(self._ids, place), _id_key(record[self._id_field])))
        for what, carried, own in checks:
            if carried not in (ABSENT, own):
                raise DataError(
                    f"{self.path}: entry {self._lines[place]} was joined to record {position + 1} by {self.join}, "
                    f"but its {what} belongs to another record",
                    hint="--join content finds the record a rating belongs to" if what == "text" else "--join id",
                )

    def check_length(self, records: int) -> None:
        """For `--join index`: there must be one rating per record (DataError naming both counts)."""
        if self.join == "index" and records != self.count:
            raise DataError(
                f"{self.path} holds {self.count:,} ratings for {records:,} records: position says nothing then",
                hint="--join content or --join id, if the ratings carry the texts or ids",
            )

    def _cannot_join(self, record: Record) -> DataError:
        where = f"{self.path}:{self._lacking}"
        if self.join == "id":
            what = f'the rating has no "{self._id_field}" to join by'
            return DataError(f"{where}: {what}", hint="--id-field names another field")
        if self._with_id and record.get(self._id_field) is not None:
            hint = f'both sides have "{self._id_field}": use --join id'
        else:
            hint = "if there is exactly one rating per record in the same order, use --join index"
        return DataError(f"{where}: the rating carries no text to join by content", hint=hint)


def _at(halves: tuple[NDArray[Any], NDArray[Any]], place: int) -> Key:
    return int(halves[0][place]), int(halves[1][place])


def _view(values: array[Any], dtype: str) -> NDArray[Any]:
    import numpy as np

    return np.frombuffer(values, dtype=dtype) if len(values) else np.empty(0, dtype=dtype)


def _entries(path: Path, reader: Reader, fields: Fields, id_field: str) -> Iterator[_Entry]:
    bare = _bare_numbers(path, reader)
    if bare is not None:
        yield from (_Entry(math.nan if score is None else score, line) for line, score in enumerate(bare, 1))
        return
    for item in read([str(path)]):
        if isinstance(item, Reject):
            raise DataError(f"{path}:{item.line}: {item.reason}")
        record = item.record
        if item.line == 1 and "fingerprint" in record:
            continue
        if set(record) == {"key", "value"} and isinstance(record["value"], dict):
            record = record["value"]
        score = _score(record, reader)
        if score is _NOTHING:
            names = ", ".join([*_SCORE_KEYS, "alpagasus", "review"])
            raise DataError(f"{path}:{item.line}: no rating in it", hint=f"looked for {names}, {reader.dimension}")
        yield _Entry(
            math.nan if score is None else score,
            item.line,
            _content(record, fields),
            _id_key(record[id_field]) if record.get(id_field) is not None else ABSENT,
        )


_NOTHING = object()


def _score(record: Mapping[str, Any], reader: Reader) -> Any:
    """The rating in an object, None where it says that there is none, `_NOTHING` where it does not say."""
    for name in ("alpagasus", *_SCORE_KEYS, reader.dimension):
        if name in record:
            value = record[name]
            return _score(value, reader) if isinstance(value, Mapping) else _value(value, reader)
    for name in ("review", "text"):
        if isinstance(record.get(name), str):
            return reader.reply(record[name])
    return _NOTHING


def _value(value: Any, reader: Reader) -> float | None:
    if isinstance(value, str):
        return reader.reply(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return reader.number(float(value))


def _content(record: Mapping[str, Any], fields: Fields) -> Key:
    if isinstance(record.get("triplet"), str):
        return _triplet_key(record["triplet"])
    try:
        return content_key(turns(record, fields))
    except BadRecord:
        return ABSENT


def _bare_numbers(path: Path, reader: Reader) -> list[float | None] | None:
    """The ratings of a file that holds nothing else: a JSON list, or one per line. None for a file of objects."""
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            inner = start[1:].lstrip() if start.startswith(b"[") else start
            if not inner or inner[:1] not in b'-+.0123456789n"':
                return None
            text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MissingError(f"{path}: no such file") from error
    except OSError as error:
        raise MissingError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError:
        return None
    if not start.startswith(b"["):
        return [None if line.strip() == "null" else reader.reply(line) for line in text.rstrip().split("\n")]
    try:
        values = json.loads(text)
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if any(isinstance(value, dict | list) for value in values):
        return None
    return [_value(value, reader) for value in values]
