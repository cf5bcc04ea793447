"""The SQL backlog writes rows to known tables; whatever else a file holds is refused."""

import contextlib
import time

import pytest

from helena_cli.database.allowlist import MOST_TOKENS, NotAllowed, check, check_control
from helena_cli.database.script import Kind, Unfinished, statements

TABLES = {(None, "documents"), (None, "messages"), ("public", "documents"), ("archive", "Notes")}


def examine(script: str) -> None:
    for statement in statements(script):
        check(statement, TABLES)


def refusal(script: str) -> str:
    with pytest.raises(NotAllowed) as refused:
        examine(script)
    return str(refused.value)


USUAL = """
-- written by the old program; don't edit
INSERT INTO documents (file_path, document_type, title, content_preview, line_count, created_at)
VALUES (
    'docs/it''s.md', 'guide', E'Tab\\tand \\'quote\\'', $$Several
lines; with $1 and a "quote" and -- no comment 🎉$$, 12, NOW()
) /* a comment /* in a comment; */ '; */
ON CONFLICT (file_path) DO UPDATE SET
    title = EXCLUDED.title,
    line_count = EXCLUDED.line_count,
    indexed_at = CURRENT_TIMESTAMP
WHERE documents.title IS DISTINCT FROM EXCLUDED.title
RETURNING file_path;
"""


@pytest.mark.parametrize(
    "script",
    [
        USUAL,
        "INSERT INTO public.documents AS d (file_path) VALUES ('a'), ('b') ON CONFLICT DO NOTHING",
        'insert into "documents" ("file_path") values (\'a\')',
        'INSERT INTO archive."Notes" VALUES (1, -1, +1, 1.5e10, DEFAULT, NULL, true)',
        "INSERT INTO documents DEFAULT VALUES",
        "INSERT INTO documents (a) VALUES (1) ON CONFLICT ON CONSTRAINT documents_pkey DO NOTHING",
        "INSERT INTO documents (a) VALUES (1) ON CONFLICT (lower(a)) WHERE b > 1 DO NOTHING",
        "INSERT INTO documents (a) SELECT title FROM messages m WHERE id = 'x' ORDER BY 1 LIMIT 1",
        "UPDATE documents SET title = 'x', (a, b) = (1, 2) WHERE file_path LIKE 'a%' AND NOT b",
        "UPDATE documents d SET title = m.content FROM messages m WHERE m.id = d.file_path",
        "UPDATE documents SET n = (SELECT count(*) FROM messages), tags = array_append(tags, 'x')",
        "UPDATE documents SET metadata = metadata || '{\"a\": 1}'::jsonb, t = metadata ->> 'k'",
        "UPDATE documents SET a = coalesce(metadata -> 'k' -> 'l', '{}')::text",
        "UPDATE documents SET a = CASE WHEN b IN (1, 2) THEN 'x' ELSE 'y' END",
        "UPDATE documents SET a = CAST('1' AS varchar(10)), b = date '2025-1-1', c = '{}'::text[]",
        "UPDATE documents SET a = now() AT TIME ZONE 'UTC' - interval '1 day', tags[1] = 'a'",
        "UPDATE documents SET a = jsonb_build_object('k', gen_random_uuid(), 'l', md5('x'))",
        "UPDATE documents SET a = ARRAY['a'], b = trim(both ' ' from c), d = extract(epoch from e)",
        "DELETE FROM documents WHERE file_path = ANY (ARRAY['a', 'b']) OR a BETWEEN 1 AND 2",
        "DELETE FROM ONLY documents USING messages WHERE messages.id = documents.file_path",
        "WITH x AS (DELETE FROM messages RETURNING id), y AS (SELECT id FROM x) "
        "INSERT INTO documents (file_path) SELECT id FROM y",
        "INSERT INTO documents (a) VALUES ('one '\n  'string')",
        "; ;",
        "",
    ],
)
def test_writing_rows_to_known_tables_is_allowed(script: str):
    examine(script)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("CREATE TABLE x (a int)", "CREATE is not allowed, only INSERT, UPDATE and DELETE"),
        ("DROP TABLE documents", "DROP is not allowed"),
        ("TRUNCATE documents", "TRUNCATE is not allowed"),
        ("ALTER TABLE documents ADD a int", "ALTER is not allowed"),
        ("COPY documents FROM '/etc/passwd'", "COPY is not allowed"),
        ("COPY documents TO PROGRAM 'sh'", "COPY is not allowed"),
        ("SELECT 1", "SELECT is not allowed"),
        ("TABLE documents", "TABLE is not allowed"),
        ("VALUES (1)", "VALUES is not allowed"),
        ("BEGIN", "BEGIN is not allowed"),
        ("COMMIT", "COMMIT is not allowed"),
        ("ROLLBACK", "ROLLBACK is not allowed"),
        ("SAVEPOINT a", "SAVEPOINT is not allowed"),
        ("SET search_path = x", "SET is not allowed"),
        ("DO $$ BEGIN PERFORM 1; END $$", "DO is not allowed"),
        ("CALL p()", "CALL is not allowed"),
        ("GRANT ALL ON documents TO PUBLIC", "GRANT is not allowed"),
        ("MERGE INTO documents USING messages ON true WHEN MATCHED THEN DELETE", "MERGE is not"),
        ("EXPLAIN ANALYZE DELETE FROM documents", "EXPLAIN is not allowed"),
        ("WITH x AS (SELECT 1) SELECT * FROM x", "only INSERT, UPDATE and DELETE are allowed"),
        ("INSERT INTO documents (a) VALUES (1); DROP TABLE documents", "DROP is not allowed"),
        ("hello world", "HELLO is not allowed"),
        ("'INSERT'", "'INSERT' is not allowed"),
    ],
)
def test_any_other_statement_is_refused(script: str, reason: str):
    assert reason in refusal(script)


@pytest.mark.parametrize(
    "call",
    [
        "pg_sleep(100)",
        "PG_SLEEP (100)",
        "pg_sleep/* */(100)",
        '"pg_sleep"(100)',
        "pg_catalog.pg_sleep(100)",
        "pg_catalog . now()",
        "public.now()",
        '"public"."now"()',
        "pg_read_file('/etc/passwd')",
        "lo_import('/etc/passwd')",
        "dblink('host=x', 'DROP TABLE y')",
        "query_to_xml('select 1', true, true, '')",
        "set_config('search_path', 'x', false)",
        "pg_terminate_backend(1)",
        "nextval('s')",
        "nvl(1, 2)",
        "repeat('a', 1000000000)",
        "lower(pg_sleep(1)::text)",
        "(SELECT pg_sleep(1))",
        "now() + pg_sleep(1)",
        "1 OPERATOR(pg_catalog.+) 2",
        "'x'::text || coalesce(NULL, pg_ls_dir('/')::text)",
        "XMLPARSE(DOCUMENT '<a/>')",
        "current_setting('x')",
    ],
)
@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO documents (a) VALUES ({})",
        "INSERT INTO documents (a) VALUES (1) ON CONFLICT (a) DO UPDATE SET a = {}",
        "UPDATE documents SET a = {}",
        "DELETE FROM documents WHERE a = {}",
        "DELETE FROM documents RETURNING {}",
    ],
)
def test_functions_outside_of_the_list_are_refused(statement: str, call: str):
    assert "is not on the list" in refusal(statement.format(call))


@pytest.mark.parametrize(
    ("script", "table"),
    [
        ("INSERT INTO pg_authid (a) VALUES (1)", "pg_authid"),
        ("INSERT INTO other.documents (a) VALUES (1)", "other.documents"),
        ("INSERT INTO helena.applied_files VALUES (1)", "helena.applied_files"),
        ('INSERT INTO "Documents" (a) VALUES (1)', "Documents"),
        ("UPDATE archive.notes SET a = 1", "archive.notes"),
        ("DELETE FROM secrets", "secrets"),
        ("INSERT INTO documents (a) SELECT rolpassword FROM pg_authid", "pg_authid"),
        ("INSERT INTO documents (a) SELECT 1 FROM documents, pg_user", "pg_user"),
        ("INSERT INTO documents (a) SELECT 1 FROM documents JOIN pg_user ON true", "pg_user"),
        ("INSERT INTO documents (a) TABLE pg_user", "pg_user"),
        ("INSERT INTO documents (a) VALUES ((SELECT max(x) FROM pg_user))", "pg_user"),
        ("INSERT INTO documents (a) SELECT 1 UNION SELECT x FROM pg_user", "pg_user"),
        ("UPDATE documents SET a = 1 FROM pg_user", "pg_user"),
        ("UPDATE documents SET a = 1 WHERE EXISTS (SELECT 1 FROM pg_user)", "pg_user"),
        ("DELETE FROM documents USING pg_user", "pg_user"),
        ("DELETE FROM documents RETURNING (SELECT max(x) FROM pg_user)", "pg_user"),
        (
            "INSERT INTO documents (a) VALUES (1) ON CONFLICT (a) DO UPDATE SET a = "
            "(SELECT max(x) FROM pg_user)",
            "pg_user",
        ),
        # What WITH names is no table that can be written to, and is seen only by what follows it.
        ("WITH secrets AS (SELECT 1) DELETE FROM secrets", "secrets"),
        (
            "WITH a AS (SELECT * FROM pg_user), pg_user AS (SELECT 1) "
            "INSERT INTO documents (a) SELECT 1 FROM a",
            "pg_user",
        ),
        ("WITH a AS (DELETE FROM secrets) DELETE FROM documents", "secrets"),
    ],
)
def test_other_tables_are_neither_written_nor_read(script: str, table: str):
    assert f"the table {table} is not known" in refusal(script)


@pytest.mark.parametrize(
    "script",
    [
        # Two scanners or two parsers could see different things here.
        "INSERT INTO documents (a) VALUES (U&'\\0041')",
        'INSERT INTO U&"documents" (a) VALUES (1)',
        "INSERT INTO documents (a) VALUES (B'101')",
        "INSERT INTO documents (a) VALUES (X'1F')",
        "INSERT INTO documents (a) VALUES (N'x')",
        "INSERT INTO documents (a) VALUES ('a' 'b')",
        "INSERT INTO documents (a) VALUES (\"x\" 'b')",
        "INSERT INTO documents (a) VALUES (regclass 'pg_user')",
        "INSERT INTO documents (a) VALUES ('pg_user'::regclass)",
        "INSERT INTO documents (a) VALUES ('x'::public.mytype)",
        "INSERT INTO documents (a) VALUES (CAST('x' AS mytype))",
        "INSERT INTO documents (a) VALUES ($1)",
        "INSERT INTO documents (a) VALUES (:name)",
        "INSERT INTO documents (a) VALUES ({{ name }})",
        "INSERT INTO documents (a) VALUES (`a`)",
        "INSERT INTO documents (a) VALUES (1a)",
        "INSERT INTO documents (a) VALUES (0x1F)",
        "INSERT INTO documents (a) VALUES (1..2)",
        "INSERT INTO documents (a) VALUES (a ### b)",
        "INSERT INTO documents (größe) VALUES (1)",
        "INSERT INTO documents\u00a0(a) VALUES (1)",
        "INSERT INTO documents (a) VALUES ((documents).evil)",
        "INSERT INTO documents (a) VALUES (a.b.c.d.e)",
        "INSERT INTO a.b.documents (a) VALUES (1)",
        "INSERT INTO documents (a) SELECT 1 INTO x",
        "INSERT INTO documents (a) SELECT 1 FROM documents FOR UPDATE",
        "INSERT INTO documents (a) SELECT 1 FROM documents TABLESAMPLE SYSTEM (1)",
        "INSERT INTO documents (a) WITH secrets AS (SELECT 1) SELECT 1 FROM secrets",
        "WITH RECURSIVE x AS (SELECT 1 UNION ALL SELECT 1 FROM x) INSERT INTO documents TABLE x",
        "INSERT INTO documents (a) VALUES (1",
        "INSERT documents (a) VALUES (1)",
        "INSERT INTO documents (a) VALUES (1)) ; (",
        "INSERT OVERWRITE TABLE documents (a) VALUES (1) FORMAT x",
        "DELETE FROM documents WHERE CURRENT OF c",
        "INSERT INTO documents (a) VALUES (" + "(" * 5000 + "1" + ")" * 5001,
        "UPDATE documents SET a = " + "NOT " * 5000 + "b",
    ],
)
def test_what_is_not_surely_understood_is_refused(script: str):
    assert refusal(script)


def test_a_statement_too_long_to_check_is_refused_at_once():
    started = time.process_time()
    assert "too many to check" in refusal(
        "INSERT INTO documents (a) VALUES " + "(1)," * MOST_TOKENS + "(1)"
    )
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    "script",
    [
        *("BEGIN", "START TRANSACTION", "COMMIT", "END", "ROLLBACK TO a", "ABORT", "SAVEPOINT a"),
        *("RELEASE a", "PREPARE TRANSACTION 'x'", "COMMIT PREPARED 'x'", "/* */ commit"),
        *("SET role = x", "RESET ALL", "DISCARD ALL", "COPY a FROM stdin", "copy a to STDOUT"),
    ],
)
def test_even_when_any_sql_is_allowed_a_file_leaves_the_transaction_alone(script: str):
    with pytest.raises(NotAllowed):
        check_control(next(statements(script)))


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE a ()",
        "SELECT 1",
        "COPY a FROM '/x'",
        "UPDATE a SET b = 1",
        "PREPARE x AS TABLE a",
    ],
)
def test_everything_else_is_then_let_through(script: str):
    check_control(next(statements(script)))


# Where a statement ends


def texts(script: str) -> list[str]:
    return [statement.text for statement in statements(script)]


@pytest.mark.parametrize(
    "string",
    [
        "'a;b'",
        "'it''s;'",
        r"'a\'",
        r"E'it\'s;'",
        r"e'\\'",
        "E'a'\n -- x'\n 'b\\';'",
        "'a'\n';b'",
        "$$a;b$$",
        "$x$ $$ ; $y$ ; $x$",
        "$é$;$é$",
        '"a;b"',
        '"a"";b"',
        r"U&'\0041;'",
        "/* ; */ 1",
        "/* /* ; */ ; */ 1",
        "-- ; ' \n 1",
        '-- ; " \r 1',
        "a/* ; */",
        "1 +-- ; \n 2",
        "2 */* ; */ 3",
        "(1; 2)",
    ],
)
def test_a_semicolon_inside_of_something_ends_no_statement(string: str):
    found = texts(f"SELECT {string}; DELETE")
    assert len(found) == 2
    assert found[0].startswith("SELECT")
    assert found[1] == "DELETE"


def test_a_statement_is_the_text_of_the_file_and_knows_its_line():
    first, second = statements(
        "-- x\n\n INSERT  INTO\ta; /* y\n*/ ;\n\nDELETE -- z\n FROM b -- end"
    )
    assert (first.text, first.line) == ("INSERT  INTO\ta", 3)
    assert (second.text, second.line) == ("DELETE -- z\n FROM b", 6)


def test_a_dollar_inside_of_a_name_quotes_nothing():
    assert texts("a$b$; c$b$") == ["a$b$", "c$b$"]


@pytest.mark.parametrize(
    ("operators", "first"),
    [("*-1", "*"), ("@-1", "@-"), ("+-1", "+"), ("=-1", "="), ("->-1", "->"), ("%-1", "%-")],
)
def test_operators_end_where_those_of_postgresql_do(operators: str, first: str):
    token = next(statements(operators)).tokens[0]
    assert (token.kind, token.text) == (Kind.OPERATOR, first)


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("'a", 1),
        ("\n'a''", 2),
        ("\n\n$$a$", 3),
        ("/* /* */", 1),
        ('"a', 1),
        (r"E'a\'", 1),
        ("E'a'\n'b\\'", 1),
        ("$a$$b$", 1),
    ],
)
def test_what_does_not_end_is_told_with_its_line(script: str, line: int):
    with pytest.raises(Unfinished, match=f"line {line}: .* does not end"):
        list(statements(script))


@pytest.mark.parametrize(
    "piece", ["-- ", "/*", "'' ", "'a' -- ", "$a", "(", "E'\\'", "'a'\n", "- -", "$$ $"]
)
def test_no_text_makes_the_scanner_slow(piece: str):
    started = time.process_time()
    with contextlib.suppress(Unfinished):
        list(statements("'a'" + piece * 20_000))
    assert time.process_time() - started < 10
