"""Statements of other sessions are shown without the passwords in them."""

import pytest

from helena_cli.database.statement_text import readable, without_secrets


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER ROLE r PASSWORD 'sesame'",
        "alter user r with encrypted password E'it''s sesame' valid until 'x'",
        "CREATE ROLE r PASSWORD 'sesame and then it was cut",
        "SELECT * FROM users WHERE password = 'sesame'",
        "CREATE SUBSCRIPTION s CONNECTION 'host=h password=sesame dbname=d' PUBLICATION p",
        "SELECT dblink('password=''sesame x'' host=h', 'SELECT 1')",
        "SELECT dblink('postgresql://u:sesame@h/d', 'SELECT 1')",
        "CREATE USER MAPPING FOR u SERVER s OPTIONS (user 'u', password 'sesame')",
        "ALTER ROLE r PASSWORD $$sesame$$",
        "ALTER ROLE r PASSWORD $x$it's sesame$x$ VALID UNTIL 'x'",
        "ALTER ROLE r PASSWORD $x$sesame and then it was cut",
        "ALTER ROLE r PASSWORD'sesame'",
        "ALTER ROLE r PASSWORD /* new */ -- today\n 'sesame'",
        "ALTER ROLE r PASSWORD 'x'\n'sesame'",
        r"ALTER ROLE r PASSWORD E'it\'s sesame'",
        r"CREATE SUBSCRIPTION s CONNECTION E'password=\'it is sesame\''",
        "UPDATE users SET \"password\" = 'sesame'",
        "UPDATE users SET passwd = md5('sesame')",
        "SELECT 1 FROM users WHERE hash = crypt('sesame', hash)",
    ],
)
def test_a_password_is_not_shown_and_the_rest_is(statement: str):
    shown = str(without_secrets(statement))
    assert "sesame" not in shown
    assert "***" in shown
    assert shown.split()[0] == statement.split()[0]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1",
        "SELECT password FROM users",
        "UPDATE users SET name = 'a' WHERE password IS NULL",
        "SELECT 'http://host/path', a@b",
        "ALTER ROLE r PASSWORD NULL",
        "",
    ],
)
def test_what_holds_no_password_is_shown_as_it_is(statement: str):
    assert without_secrets(statement) == statement


def test_no_statement_takes_long():
    for statement in ("password" + "/**/" * 2500, "password " * 1000, "password $$" * 900):
        without_secrets(statement)


def test_what_may_not_be_seen_stays_unknown():
    assert without_secrets(None) is None


@pytest.mark.parametrize(
    ("value", "encoding", "shown"),
    [
        ("café".encode(), "LATIN1", "café"),
        (b"caf\xe9", "LATIN1", "café"),
        (b"caf\xe9 \x80", "WIN1252", "café €"),
        (b"caf\xe9", "UTF8", "caf\ufffd"),
        (b"caf\xe9", "SQL_ASCII", "caf\ufffd"),
        ([b"caf\xe9", 1], "LATIN1", ["café", 1]),
        (None, "UTF8", None),
    ],
)
def test_text_that_was_not_converted_is_readable_as_far_as_can_be(value, encoding, shown):
    assert readable(value, encoding) == shown
