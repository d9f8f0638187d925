"""Rows of JSON as Arrow tables of one schema, however their fields differ from row to row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pomona.errors import OutputError

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Sequence[Mapping[str, Any]]


def common_schema(pieces: Iterable[Rows]) -> pa.Schema:
    """The fields of all rows, in the order in which they are met, each with a type that holds all its values.

    Raises:
        OutputError: there is no such type, as of text and numbers.
    """
    import pyarrow as pa

    schema = pa.schema([])
    with fitting():
        for rows in pieces:
            found = _table(rows, list(dict.fromkeys(name for row in rows for name in row))).schema
            schema = pa.unify_schemas([schema, found], promote_options="permissive")
    return schema


def as_table(rows: Rows, schema: pa.Schema) -> pa.Table:
    """`rows` under `schema`; a field that a row lacks is null in it.

    Raises:
        OutputError: a value does not fit.
    """
    import pyarrow as pa

    with fitting():
        return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)


def _table(rows: Rows, names: Sequence[str]) -> pa.Table:
    import pyarrow as pa

    columns = {}
    for name in names:
        with fitting(name):
            columns[name] = pa.array([row.get(name) for row in rows])
    return pa.table(columns)


@contextmanager
def fitting(field: str | None = None) -> Iterator[None]:
    """Turn what Arrow or Parquet cannot hold, in `field` where that is known, into `OutputError`."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OverflowError) as error:
        named = "" if field is None else f'field "{field:.80}": '
        raise OutputError(
            f"Parquet has one type per column: {named}{str(error).splitlines()[0]}", hint="write .jsonl instead"
        ) from error
