"""The scanner of SQL files sees what PostgreSQL's own scanner sees."""

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helena_cli.database.script import Kind, Token, Unfinished, statements

pytestmark = pytest.mark.postgres

PIECES = (
    *("'", "''", "E'", "e'", "U&'", "B'", "N'", '"', 'U&"', "\\", "\\'", "$$", "$a$", "$1", "$"),
    *("--", "/*", "*/", "\n", "\r", " ", "\t", "\f", "+", "-", "*", "/", "@", "=", "<", ">", "%"),
    *("1", "1.5", ".", "e", "x", "é", "marker()", ",", "(", ")", "::", ":", "[", "]", "|", "#"),
)

TEXTS = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.fixture(scope="module")
def database(postgres: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("SET standard_conforming_strings = on")
        yield connection


def complaint(database: psycopg.Connection, text: str) -> psycopg.errors.Diagnostic | None:
    try:
        # In binary the extended protocol is used, which takes one statement only.
        psycopg.RawCursor(database).execute(text.encode(), binary=True)
    except psycopg.Error as error:
        return error.diag
    return None


def scanned(text: str) -> list[Token] | None:
    """All tokens; None when something does not end."""
    try:
        return [token for statement in statements(text) for token in statement.tokens]
    except Unfinished:
        return None


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEXTS)
def test_postgresql_complains_where_the_scanner_sees_a_token(
    database: psycopg.Connection, text: str
):
    text = f"SELECT {text} marker(1) AS x, 'end'"
    tokens, said = scanned(text), complaint(database, text)
    if said is None:
        assert tokens is not None
        return
    message = said.message_primary or ""
    if message.startswith("unterminated"):
        assert tokens is None
    elif message.startswith("syntax error") and said.statement_position:
        # PostgreSQL has read no further, so that something may be unfinished behind it.
        position = int(said.statement_position) - 1
        assert scanned(text[:position]) is not None
        starts = {token.start for token in tokens or ()} | {len(text)}
        assert tokens is None or position in starts, message
    elif message.startswith("function marker"):
        # It was read to the end. What PostgreSQL calls is no part of a string for the scanner.
        assert tokens is not None
        assert "marker" in {token.text for token in tokens if token.kind is Kind.WORD}
