"""Whatever passes the look at a backlog's statement touches nothing else by PostgreSQL's own plan."""

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

SEEDS = (
    "INSERT INTO documents ( file_path , title ) VALUES ( 'a' , 'b' ) ON CONFLICT ( file_path ) "
    "DO UPDATE SET title = EXCLUDED.title WHERE documents.title = 'c' RETURNING title",
    "INSERT INTO documents ( file_path ) SELECT id FROM messages WHERE id IN ( 'a' , 'b' )",
    "UPDATE documents SET title = 'a' , source = lower ( title ) FROM messages WHERE id = title",
    "DELETE FROM documents USING messages WHERE title = ANY ( ARRAY [ 'a' ] ) RETURNING title",
    "WITH x AS ( SELECT id FROM messages ) INSERT INTO documents ( file_path ) SELECT id FROM x",
)

#: Also without spaces: then words, strings and comments run into each other.
PIECES = (
    *(
        "secrets",
        "FROM secrets",
        ", secrets",
        "JOIN secrets ON true",
        "TABLE secrets",
        "( secrets )",
    ),
    *("( SELECT word FROM secrets )", "( TABLE secrets )", "USING secrets", "ONLY secrets"),
    *(
        "secrets AS ( SELECT 1 )",
        "WITH secrets AS ( SELECT 1 )",
        "NATURAL JOIN secrets",
        '"secrets"',
    ),
    *("public . secrets", "secrets . word", "UNION TABLE secrets", "INTO secrets", "secrets *"),
    *(
        "evil ( )",
        "public . evil ( )",
        '"evil" ( )',
        "evil",
        "evil / * * / ( )",
        "|| evil ( )",
        "( )",
    ),
    *("'", '"', "E'", "$$", "--", "/*", "*/", "\n", "\\", ";", "(", ")", ",", ".", "AS", "LATERAL"),
    *("::", "text", "date", "1", "a", "AND", "IN", "EXISTS", "ARRAY", "[", "]", "->", "-", "NOT"),
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


@st.composite
def scripts(draw: st.DrawFn) -> str:
    """One of the usual statements, with some words exchanged and some put in."""
    words = draw(st.sampled_from(SEEDS)).split(" ")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(1, len(words)))
        gone = draw(st.integers(0, 2))
        words[at : at + gone] = [draw(st.sampled_from(PIECES))]
    glue = draw(st.sampled_from((" ", " ", " ", "", "\n")))
    return " ".join(words) if glue == " " else glue.join(f"{word} " for word in words)


def touched(plan: Any) -> Iterator[str]:
    """Tables and expressions of a plan."""
    if isinstance(plan, dict):
        if "Relation Name" in plan:
            yield f"table {plan['Relation Name']}"
        for key, value in plan.items():
            if key not in ("Alias", "CTE Name", "Subplan Name"):
                yield from touched(value)
    elif isinstance(plan, list):
        for value in plan:
            yield from touched(value)
    elif isinstance(plan, str):
        yield plan


@settings(max_examples=15000, deadline=None, suppress_health_check=list(HealthCheck))
@given(scripts())
def test_what_is_allowed_reads_and_calls_nothing_else(database: psycopg.Connection, script: str):
    try:
        found = statements(script)
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
