"""The SQL of a flush: one statement for all rows of a group, read from one JSON parameter.

`json_to_recordset` with the catalog's types: one parameter and one round trip for any number of
rows, no temporary table, no prepared statement, nothing that a pooler refuses. Columns that are not
given are not named, so they keep their values or get their defaults.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from psycopg import sql
from psycopg.types.json import Json

from helena_cli.batch.plan import Mode
from helena_cli.batch.table import Column, Table

# Not ON CONFLICT alone: it checks NOT NULL and CHECK on the whole new row before it looks for the
# old one, and takes a value from the sequence of every default. It is left with the case that
# somebody else inserts the key at the same moment. Both halves see the table as it was before, so
# that no row is written twice; where all rows were new the second half does not even start.
_UPSERT = """\
WITH r AS (SELECT * FROM json_to_recordset($1) AS r({types})),
     i AS (INSERT INTO {table} ({columns}) {overriding} SELECT {r_columns} FROM r
            WHERE NOT EXISTS (SELECT FROM {table} AS t WHERE {match})
            ON CONFLICT ({key}) DO UPDATE SET {assign_excluded} RETURNING 1)
UPDATE {table} AS t SET {assign} FROM r
 WHERE {match} AND (SELECT count(*) FROM i) < (SELECT count(*) FROM r)"""

_UNLESS_EXISTS = """\
INSERT INTO {table} ({columns}) {overriding}
SELECT {r_columns} FROM json_to_recordset($1) AS r({types})
 WHERE NOT EXISTS (SELECT FROM {table} AS t WHERE {match})
 ON CONFLICT ({key}) DO NOTHING"""

_INSERT = """\
INSERT INTO {table} ({columns}) {overriding}
SELECT {r_columns} FROM json_to_recordset($1) AS r({types})"""

# One array to look up takes the server a third of what joining its elements does.
_ANY_EXISTS = """\
SELECT EXISTS (SELECT FROM {table} AS t WHERE t.{name} = ANY (ARRAY(
                 SELECT r.value::{type} FROM json_array_elements_text($3) AS r(value)))), """

_ANY_PAIR_EXISTS = """\
SELECT EXISTS (SELECT FROM json_array_elements($3) AS r(key) JOIN {table} AS t ON {match}), """

# COPY holds a lock on the table, and so does the question above: it stays as it is found here.
_DIFFERS = """\
EXISTS (SELECT FROM pg_catalog.pg_class c
         WHERE c.oid = {name}::regclass AND (c.relhasrules OR c.relrowsecurity))
OR EXISTS (SELECT FROM unnest($1::text[], $2::text[]) AS n(name, type)
            WHERE NOT EXISTS (
              SELECT FROM pg_catalog.pg_attribute a
               WHERE a.attrelid = {name}::regclass AND a.attname = n.name AND NOT a.attisdropped
                 AND format_type(a.atttypid, a.atttypmod) = n.type
                 AND (NOT {updates} OR n.name = ANY({key}::text[])
                      OR has_column_privilege(a.attrelid, a.attnum, 'UPDATE'))))"""

_RANK = """\
SELECT dense_rank() OVER (ORDER BY {names})
  FROM ROWS FROM (json_to_recordset($1) AS ({types})) WITH ORDINALITY AS r({names}, n) ORDER BY n"""


def write(
    table: Table, mode: Mode, names: Sequence[str], key: Sequence[str] | None
) -> sql.Composed:
    """The statement that writes rows with these columns, going by `key` unless `mode` is INSERT."""
    columns = [column for column in table.columns if column.name in set(names)]
    others = [column.name for column in columns if column.name not in (key or ())]
    template = _INSERT
    if mode is Mode.MESSAGE or (mode is Mode.UPSERT and not others):
        template = _UNLESS_EXISTS
    elif mode is Mode.UPSERT:
        template = _UPSERT
    overriding = any(column.always_identity for column in columns)
    return sql.SQL(template).format(
        table=sql.Identifier(table.schema, table.name),
        types=_types(columns),
        columns=_list("{}", [column.name for column in columns]),
        r_columns=_list("r.{}", [column.name for column in columns]),
        key=_list("{}", key or ()),
        match=_list("t.{0} = r.{0}", key or (), " AND "),
        assign=_list("{0} = r.{0}", others),
        assign_excluded=_list("{0} = excluded.{0}", others),
        overriding=sql.SQL("OVERRIDING SYSTEM VALUE" if overriding else ""),
    )


def copy(table: Table, names: Sequence[str]) -> sql.Composed:
    """The statement that loads lines of these columns, which are in the table's order."""
    return sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table.schema, table.name), _list("{}", names)
    )


def any_exists(table: Table, key: Sequence[str], *, updates: bool) -> sql.Composed:
    """Whether the table has one of the keys in $3 already; and whether it `differs`.

    $3 is an array in JSON; a key of several columns is an array of its values.
    """
    types = {column.name: sql.SQL(column.type) for column in table.columns}
    names = [sql.Identifier(name) for name in key]
    place = sql.Identifier(table.schema, table.name)
    if len(key) == 1:
        question = sql.SQL(_ANY_EXISTS).format(table=place, name=names[0], type=types[key[0]])
    else:
        match = sql.SQL(" AND ").join(
            sql.SQL("t.{} = (r.key ->> {})::{}").format(name, sql.Literal(n), types[key[n]])
            for n, name in enumerate(names)
        )
        question = sql.SQL(_ANY_PAIR_EXISTS).format(table=place, match=match)
    return question + _differs(table, key, updates=updates)


def differs(table: Table) -> sql.Composed:
    """Whether COPY into these columns ($1) of these types ($2) would not mean what INSERT means."""
    return sql.SQL("SELECT ") + _differs(table, (), updates=False)


def _differs(table: Table, key: Sequence[str], *, updates: bool) -> sql.Composed:
    return sql.SQL(_DIFFERS).format(
        name=sql.Literal(sql.Identifier(table.schema, table.name).as_string()),
        key=sql.Literal(list(key)),
        updates=sql.Literal(updates),
    )


def rank(columns: Sequence[Column]) -> sql.Composed:
    """The question which keys are equal: equal ones get equal numbers, in the order of the rows."""
    return sql.SQL(_RANK).format(
        types=_types(columns, collate=True),
        names=_list("{}", [f"k{n}" for n in range(len(columns))]),
    )


def rows(encoded: Iterable[bytes]) -> Json:
    """JSON objects as one parameter, as they are."""
    return Json(b"[" + b",".join(encoded) + b"]", dumps=_as_it_is)


def _as_it_is(encoded: Any) -> Any:
    return encoded


def _types(columns: Iterable[Column], *, collate: bool = False) -> sql.Composed:
    """A column definition list. The types are the catalog's own spelling, quoted where need be."""
    return sql.SQL(", ").join(
        sql.SQL("{} {}{}").format(
            sql.Identifier(column.name),
            sql.SQL(column.type),
            sql.SQL(f" COLLATE {column.collation}" if collate and column.collation else ""),
        )
        for column in columns
    )


def _list(form: str, names: Iterable[str], separator: str = ", ") -> sql.Composed:
    template = sql.SQL(form)
    return sql.SQL(separator).join(template.format(sql.Identifier(name)) for name in names)
