"""What passes the look at a backlog's statement touches nothing else, by the server's own plan."""

import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli.database.allowlist import NotAllowed, check
from helena_cli.database.script import Unfinished, statements

pytestmark = pytest.mark.postgres

KNOWN = {(None, "documents"), (None, "messages")}

#: The column to write, of each table.
COLUMNS = {"documents": "file_path", "messages": "id", "secrets": "word"}

EXPRESSIONS = (
    *("lower({0})", "coalesce({0}, {1})", "{0} || {1}", "CAST({0} AS text)", "({0})::text"),
    *("CASE WHEN {0} = {1} THEN {0} ELSE {1} END", "({q})", "(ARRAY({q}))[1]", "concat({0}, {1})"),
    *("EXISTS ({q})::text", "({0} = ANY ({q}))::text", "({0} IN ({q}))::text", "{call}", "({0})"),
    *("(ARRAY[{0}, ({q})])[1]", "(({0}) IS NOT NULL)::text", "nullif({0}, {1})", "trim({0})"),
)
CALLS = (
    "evil()",
    "EVIL ()",
    "public.evil()",
    '"evil"()',
    "evil/* */()",
    "evil -- (\n()",
    "now()::text",
)
SOURCES = (
    *("{t}", "{t} AS a", "ONLY {t}", "({q}) AS b", "{t} CROSS JOIN {u}", "{t} JOIN {u} ON true"),
    *("{t}, {u}", "{t} LEFT JOIN ({q}) AS c ON true", "({t} CROSS JOIN {u})", "{t} AS d, {u} AS e"),
)
QUERIES = (
    *("SELECT {0} FROM {f} LIMIT 1", "SELECT {0}", "SELECT {0} UNION SELECT {1} FROM {f}"),
    *("SELECT {0} FROM {f} WHERE {0} = {1} ORDER BY {1} LIMIT 1", "VALUES ({0})"),
    "SELECT max({0}) FROM {f} GROUP BY {1} HAVING {0} = {1} LIMIT 1",
)
STATEMENTS = (
    "INSERT INTO {w} ({c}) VALUES ({0}), ({1})",
    "INSERT INTO {w} ({c}) {q}",
    "INSERT INTO {w} ({c}) VALUES ({0}) ON CONFLICT ({c}) DO UPDATE SET {c} = {1} RETURNING {0}",
    "INSERT INTO {w} ({c}) VALUES ({0}) ON CONFLICT ({c}) DO UPDATE SET {c} = 'a' WHERE {0} = {1}",
    "UPDATE {w} SET {c} = {0} FROM {f} WHERE {0} = {1} RETURNING {1}",
    "UPDATE {w} SET {c} = {0}",
    "DELETE FROM {w} USING {f} WHERE {0} = {1}",
    "DELETE FROM {w} WHERE {c} = {0} RETURNING {1}",
)


@pytest.fixture(scope="module")
def database(postgres: str, _template: str) -> Iterator[psycopg.Connection]:
    name = sql.Identifier(f"helena_allowlist_{os.getpid()}")
    with psycopg.connect(postgres, autocommit=True) as server:
        make = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        server.execute(make.format(name, sql.Identifier(_template)))
        dsn = make_conninfo(postgres, dbname=name.as_string().strip('"'))
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute(
                "CREATE TABLE secrets (word text);"
                "CREATE FUNCTION evil() RETURNS text LANGUAGE plpgsql AS 'BEGIN RETURN 1; END'"
            )
            yield connection
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def spelled(draw: st.DrawFn, table: str) -> str:
    return draw(st.sampled_from((table, table, table.upper(), f'"{table}"', f"public.{table}")))


def table(draw: st.DrawFn) -> str:
    return draw(st.sampled_from(("documents", "messages", "x", "secrets")))


def fill(draw: st.DrawFn, forms: tuple[str, ...], depth: int) -> str:
    """One of the forms, with everything in it filled in, ever simpler."""
    form = draw(st.sampled_from(forms if depth else forms[:1]))
    values: dict[str, str] = {}
    if "{q}" in form:
        values["q"] = fill(draw, QUERIES, depth - 1) if depth else "SELECT 'q'"
    if "{f}" in form:
        values["f"] = fill(draw, SOURCES, depth - 1) if depth else "documents"
    values |= {name: spelled(draw, table(draw)) for name in "tu" if f"{{{name}}}" in form}
    if "{call}" in form:
        values["call"] = draw(st.sampled_from(CALLS))
    written = draw(st.sampled_from(("documents", "documents", "messages", "secrets")))
    if "{w}" in form:
        values |= {"w": spelled(draw, written), "c": COLUMNS[written]}
    leaf = st.sampled_from(("'a'", "evil()", "E'b\\''", "$$c$$", "NULL", "'d;--'"))
    chosen = [
        draw(leaf) if depth < 1 or draw(st.booleans()) else fill(draw, EXPRESSIONS, depth - 1)
        for _ in range(2)
    ]
    return form.format(*chosen, **values)


@st.composite
def scripts(draw: st.DrawFn) -> str:
    """A statement that PostgreSQL would take, and that may or may not stay with what is known."""
    statement = fill(draw, STATEMENTS, 3)
    named = draw(st.lists(st.sampled_from(("x", "secrets", "y")), max_size=2, unique=True))
    bodies = [
        fill(draw, (*QUERIES, "DELETE FROM {w} RETURNING 'a'::text"), 2).join(("(", ")"))
        for _ in named
    ]
    heads = ", ".join(f"{name} AS {body}" for name, body in zip(named, bodies, strict=True))
    return f"WITH {heads} {statement}" if heads else statement


def touched(plan: Any) -> Iterator[str]:
    """Tables and expressions of a plan."""
    if isinstance(plan, dict):
        if "Relation Name" in plan:
            yield f"table {plan['Relation Name']}"
        for key, value in plan.items():
            if key not in ("Alias", "CTE Name", "Subplan Name"):
                yield from touched(value)
    elif isinstance(plan, list | tuple):
        for value in plan:
            yield from touched(value)
    elif isinstance(plan, str):
        yield plan


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(scripts())
def test_what_is_allowed_reads_and_calls_nothing_else(database: psycopg.Connection, script: str):
    try:
        found = list(statements(script))
        for statement in found:
            check(statement, KNOWN)
    except (NotAllowed, Unfinished):
        event("refused")
        return
    for statement in found:
        query = f"EXPLAIN (VERBOSE, FORMAT JSON) {statement.text}".encode()
        try:
            row = psycopg.RawCursor(database).execute(query, binary=True).fetchone()
        except psycopg.Error:
            event("allowed, but no SQL")
            continue
        event("allowed, and it has a plan")
        seen = list(touched(row))
        assert "table secrets" not in seen
        assert not [text for text in seen if "evil(" in text]
