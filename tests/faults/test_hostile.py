"""Whatever strangers put into files, names, addresses and settings: no crash, no hang, no escape.

The clock of "no hang" is the thread's own processor time: others may use the machine too.
"""

import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import hypothesis
import psycopg
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from helena_cli import config
from helena_cli.batch.intake import read_object
from helena_cli.batch.operation import encode
from helena_cli.database import allowlist, target
from helena_cli.database.script import Unfinished, statements
from helena_cli.documents.extract import TEXT_BYTES, Source, document_id, extract
from helena_cli.documents.filter import IGNORE_FILE, Filter
from helena_cli.documents.json_files import Content
from helena_cli.documents.names import escape, unescape
from helena_cli.documents.pending import operation_of
from helena_cli.errors import ConfigurationError, InvalidOperation
from helena_cli.settings import DocumentSettings
from tests.commands import Program
from tests.hosts import Host

#: Seconds of processor time that stop a hopeless case; the promise is one, on a machine at rest.
LIMIT = 5.0

#: A character from each plane of Unicode, and those that break programs most often.
PLANES = "".join(chr((plane << 16) + 0x1F3) for plane in range(17))
ODD = "\u202e\u0301\ufeff\ufffe\U0010ffff\x1b[2J\x7f\x85\u2028'\"\\%{}$;--/*\u00df\u0130"
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\0") | st.sampled_from(PLANES + ODD)


Fuzz = Callable[[st.SearchStrategy[Any], Callable[[Any], object]], None]


@pytest.fixture
def fuzz(seed: int, minutes: float, figures: Counter[str]) -> Fuzz:
    """Runs a check with ever new inputs until the time is over."""

    def run(strategy: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
        def one(value: Any) -> None:
            figures["inputs tried"] += 1
            begun = time.thread_time()
            check(value)
            assert time.thread_time() - begun < LIMIT, f"{value!r:.500} took too long"

        deadline = time.monotonic() + minutes * 60 / 8
        for number in count():
            settings = hypothesis.settings(
                max_examples=100,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate, Phase.shrink],
            )
            hypothesis.seed(seed + number)(settings(given(strategy)(one)))()
            if time.monotonic() > deadline:
                break

    return run


def pieces(*words: str, size: int = 40) -> st.SearchStrategy[str]:
    """Texts made of these words, with anything else in between."""
    return st.lists(st.sampled_from(words) | st.text(CHARACTERS, max_size=4), max_size=size).map(
        "".join
    )


# Documents

YAML = pieces(
    *("---\n", "+++\n", "{\n", "}\n", "...\n", "\n", ": ", "- ", "? ", "[", "]", "{", "}", "title"),
    *("tags", "&a ", "*a", "<<: *a\n", "!!binary ", "!!timestamp ", "!!int ", "!!python/name:os "),
    *("9" * 5000, "-1e999", ".nan", "a.b.c = ", "2024-13-45", "\t", "'", '"', "|\n", "\ud800"),
)

BOMBS = {
    "aliases": "---\na: &a [x,x]\n"
    + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(20)
    )
    + "---\n",
    "merges": "---\n"
    + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 60)}]\n" for n in range(1, 60))
    + "---\n",
    "flow": "---\na: " + "[" * 30_000 + "\n---\n",
    "closed flow": "---\na: " + "[" * 5_000 + "]" * 5_000 + "\n---\n",
    "blocks": "---\n" + "".join(" " * n + "- \n" for n in range(300)) + "---\n",
    "keys": "---\n" + "? " * 20_000 + "\n---\n",
    "json": "{\n" + '"a":{' * 20_000 + "\n}\n",
    "toml dots": "+++\n" + "a." * 20_000 + "b = 1\n+++\n",
    "toml arrays": "+++\na = " + "[" * 20_000 + "\n+++\n",
    "toml tables": "+++\n" + "".join(f"[{'a.' * 100}b{n}]\n" for n in range(300)) + "+++\n",
    "digits": "---\na: " + "9" * 60_000 + "\n---\n",
    "hexadecimal": "---\na: 0x" + "f" * 60_000 + "\n---\n",
    "sexagesimal": "---\na: 1" + ":59" * 20_000 + "\n---\n",
    "many keys": "---\n" + "".join(f"k{n}: {n}\n" for n in range(5_000)) + "---\n",
    "fences": "---\n" * 200_000,
    "plus fences": "+++\n" * 200_000,
    "headings": "# " * 400_000,
    "spaces": "#" + " \t" * 400_000 + "x",
    "links": "[](" * 300_000,
    "wiki links": "[[" * 400_000,
    "addresses": "<http://" * 100_000,
    "code": "```\n~~~\n" * 100_000,
    "underlines": "a\n" + "=" * 900_000 + "x\n",
    "quotes": '---\na: "' + "\\" * 60_000 + "\n---\n",
    "planes": PLANES * 10_000,
    "one line": "x" * 1_000_000,
}


def row_of(content: bytes, path: str = "note.md") -> dict[str, Any]:
    """What would be stored of a document."""
    begin = content[:TEXT_BYTES]
    source = Source("docs", path, begin, len(content), "0" * 64, 1, 2, 3)
    document = extract(source, DocumentSettings())
    encoded = encode("insert", "es_document_references", document.row, max_bytes=500_000)
    row: dict[str, Any] = json.loads(encoded, parse_constant=pytest.fail)
    return row


@pytest.mark.parametrize("bomb", BOMBS)
def test_no_document_takes_long_or_grows(bomb: str):
    begun = time.thread_time()
    row_of(BOMBS[bomb].encode())
    assert time.thread_time() - begun < LIMIT


def test_any_document_becomes_a_row(fuzz: Fuzz):
    fuzz(YAML, lambda text: row_of(text.encode("utf-8", "surrogatepass")))


def test_any_path_becomes_one_identifier_and_back(fuzz: Fuzz):
    def check(name: bytes) -> None:
        path = os.fsdecode(name.replace(b"\0", b"") or b"x")
        assert unescape(escape(path)) == path
        assert document_id("docs", escape(path)).encode()
        row_of(b"x", escape(path))

    names = st.binary(min_size=1, max_size=255) | pieces("..", "/", "\\x2e", "~").map(str.encode)
    fuzz(names, check)


def test_no_pattern_of_an_ignore_file_takes_long(tmp_path: Path, fuzz: Fuzz):
    def check(text: str) -> None:
        (tmp_path / IGNORE_FILE).write_text(text, encoding="utf-8")
        with suppress(ConfigurationError):
            documents = Filter(tmp_path, DocumentSettings())
            for path in ("a" * 252 + ".md", "a/" * 1_000 + "a.md", f"{'ab' * 120}/" * 8 + "c.md"):
                documents.ignores(path)

    words = ("*", "**", "/", "a", "b", "?", "[!b]", "[a-c]", "!", "\\", "\n", "*a*a", "**/a/")
    fuzz(pieces(*words, size=30), check)
    check("*" + "a*" * 100 + "b\n")
    check("*" + "?*" * 100 + "b\n")


@pytest.mark.parametrize(
    ("pattern", "ignored", "left"),
    [
        ("*a*b*c", ["aXbXc", "abc", "abcabc", "x/aabbcc"], ["abd", "acb", "a/b/c"]),
        ("a*?*b", ["axb", "aaab", "axyzb"], ["ab", "a/b"]),
        ("x*a/*b*c", ["xa/bc", "xaa/abbc"], ["xa/b/c", "a/bc"]),
        ("*.*.md", ["a.b.md", "x/a.b.c.md"], ["a.md"]),
        ("**/a*b*/c", ["ab/c", "x/y/aabb/c"], ["a/b/c"]),
        ("[[!b]*.md", ["[a.md", "!a.md", "b.md"], ["a.md"]),
    ],
)
def test_patterns_with_many_stars_still_mean_what_they_say(
    tmp_path: Path, pattern: str, ignored: list[str], left: list[str]
):
    (tmp_path / IGNORE_FILE).write_text(pattern)
    documents = Filter(tmp_path, DocumentSettings())
    assert [path for path in (*ignored, *left) if documents.ignores(path)] == ignored


# Operation files

JSON = pieces(
    *('{"type": "message", "data": {', '"content": ', '"sender": "s", ', '"message_type": "m", '),
    *("{", "}", "[", "]", ":", ",", '"', "\\u0000", "\\ud800", "1e999", "-0", "9" * 5000, "null"),
    *("NaN", "0.1e-400", "\ufeff", "true", '"tags"', '"type"', '"data"', '"timestamp"', "[" * 2000),
)


def test_any_operation_file_is_accepted_or_refused_with_a_reason(fuzz: Fuzz):
    def check(content: bytes) -> None:
        try:
            values = read_object(content)
            triple = operation_of(Content(values, "", 0.0))
            encode(*triple, max_bytes=100_000)
        except InvalidOperation as error:
            assert error.remedy
            str(error).encode()

    texts = JSON.map(lambda text: text.encode("utf-8", "surrogatepass"))
    fuzz(texts | st.binary(max_size=200), check)
    for bomb in (b'{"a":' * 100_000, b'{"a":1' + b"0" * 1_000_000 + b"}", b"[" * 1_000_000):
        check(bomb)


# The SQL backlog

SQL = pieces(
    *("INSERT INTO ", "documents ", "(file_path) ", "VALUES (", "'a'", ")", ";", "SELECT ", "--"),
    *("/*", "*/", "$$", "$a$", "E'", "U&'", "'", '"', "\\", "::text", "WITH x AS (", "COPY ", "||"),
    *("pg_read_file(", "secrets", "UPDATE ", " SET ", "DELETE FROM ", "COMMIT", "\n", ",", "FROM "),
    *("(" * 200, "9" * 5000, "ON CONFLICT (file_path) DO UPDATE SET title = ", "NOW()", "[1]"),
    *("1e", "0x1", "$1", "@>", "CASE WHEN ", " END", "INTERVAL ", "CAST(", " AS "),
)

SQL_BOMBS = {
    "parentheses": f"INSERT INTO documents VALUES ({'(' * 50_000}",
    "closed": f"INSERT INTO documents VALUES ({'(' * 20_000}1{')' * 20_000})",
    "comments": "/*" * 300_000,
    "dollars": "$a$ $b$ " * 100_000,
    "strings": "'\n" * 300_000,
    "continued": "SELECT 'a'" + "\n'a'" * 200_000,
    "casts": "UPDATE documents SET title = 'a'" + "::text" * 20_000,
    "joins": "DELETE FROM documents WHERE 1=1" + " AND 1=1" * 5_000,
    "nots": "DELETE FROM documents WHERE " + "NOT " * 30_000 + "true",
    "minus": "UPDATE documents SET line_count = " + "- " * 40_000 + "1",
    "arrays": "UPDATE documents SET title = " + "ARRAY[" * 10_000,
}


def looked_at(text: str) -> list[str]:
    """The statements of a script, when all of them are let through; else none."""
    try:
        found = list(statements(text))
        for statement in found:
            allowlist.check(statement, {(None, "documents")})
    except (Unfinished, allowlist.NotAllowed):
        return []
    return [statement.text for statement in found]


def test_any_sql_is_let_through_or_refused(fuzz: Fuzz):
    looked_at("INSERT INTO documents (file_path) VALUES ('the parser is imported on first use')")
    fuzz(SQL, looked_at)


@pytest.mark.parametrize("bomb", SQL_BOMBS)
def test_no_sql_takes_long(bomb: str):
    looked_at("INSERT INTO documents (file_path) VALUES ('the parser is imported on first use')")
    begun = time.thread_time()
    looked_at(SQL_BOMBS[bomb])
    assert time.thread_time() - begun < LIMIT


# Configuration and addresses

TOML = pieces(
    *("[batch]\n", "[documents]\n", "[database]\n", "[pending]\n", "[[documents.rules.tags]]\n"),
    *("size", "dsn", "roots", "rules", "tables", "content", "tag", " = ", "[", "]", "{", "}", '"'),
    *("9" * 5000, "0x" + "f" * 5000, "inf", "nan", "1e999", "2024-01-01", "true", "\n", "\\u0000"),
    *('"~nobody-at-all/x"', '"a{99999999999999}"', '"("', "[" * 3000, "''", "'''", "#", ","),
)

CONFIGURATIONS = {
    "deep": "a = " + "[" * 100_000,
    "digits": "[batch]\nsize = " + "9" * 5_000,
    "hexadecimal": "[batch]\nsize = 0x" + "f" * 5_000,
    "unknown home": '[documents]\nroots = ["~nobody-at-all/docs"]',
    "unknown home of pending files": '[pending]\nbacklog = "~nobody-at-all/sql"',
    "NUL in a root": '[documents]\nroots = ["a\\u0000b"]',
    "NUL in a namespace": '[documents]\nnamespace = "a\\u0000b"',
    "NUL in a host": '[metrics]\nhost = "a\\u0000b"',
    "NUL in an address": '[database]\ndsn = "host=h\\u0000 password=x"',
    "repetition": '[[documents.rules.tags]]\ntag = "x"\ncontent = "a{99999999999999999999}"',
    "groups": f'[[documents.rules.tags]]\ntag = "x"\ncontent = "{"(" * 5_000}{")" * 5_000}"',
    "port": '[database]\ndsn = "host=h port=²"',
    "port in a URI": '[database]\ndsn = "postgresql://h:²/d"',
    "long port": f'[database]\ndsn = "host=h port={"9" * 5_000}"',
}


def resolved(text: str, path: Path, **environ: str) -> target.Target | None:
    """What a configuration file and variables lead to; None when they are refused properly."""
    path.write_text(text, encoding="utf-8")
    try:
        settings = config.load(file=path, environ=environ)
        return None if settings.database.dsn is None else target.resolve(settings)
    except ConfigurationError as error:
        assert error.remedy
        return None


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_hostile_setting_is_refused_with_a_remedy(tmp_path: Path, name: str):
    assert resolved(CONFIGURATIONS[name], tmp_path / "helena.toml") is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HELENA_DSN", "host=\udce9"),
        ("HELENA_DSN", "host=h connect_timeout=²"),
        ("HELENA_CONFIG", "~nobody-at-all/helena.toml"),
        ("HELENA_STATE_DIR", "~nobody-at-all/state"),
        ("HELENA_DOCUMENTS_ROOTS", "~nobody-at-all/docs"),
        ("HELENA_BATCH_INTERVAL", "\udcff"),
        ("HELENA_BATCH_SIZE", "9" * 5_000),
        ("HELENA_DOCUMENTS_RULES", "[" * 100_000),
    ],
)
def test_hostile_variable_is_refused_or_understood(variable: str, value: str):
    with suppress(ConfigurationError):
        settings = config.load(environ={variable: value})
        if settings.database.dsn is not None:
            target.resolve(settings)


def test_no_message_moves_the_cursor(tmp_path: Path, state_dir: Path):
    (tmp_path / "helena.toml").write_text('["\\u001b[2J\\u202e\\u009b1m"]\n', encoding="utf-8")
    result = Program(tmp_path, state_dir, "host=h").run("status", "-v")
    assert result.returncode == 3
    assert b"there is no section" in result.stderr
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", result.stderr.decode())


def test_any_configuration_is_understood_or_refused(tmp_path: Path, fuzz: Fuzz):
    def check(text: str) -> None:
        resolved(text.replace("\ud800", ""), tmp_path / "helena.toml")

    fuzz(TOML, check)


#: The keywords of libpq that hold a secret; older releases know fewer.
SECRETS = {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}

ADDRESSES = pieces(
    *("postgresql://", "postgres://", "user", ":", "@", "/", "?", "&", "=", "#", "%", "%40", "%2F"),
    *(
        "host",
        "port",
        "password",
        " = ",
        "'",
        "\\",
        ",",
        "[::1]",
        "²",
        "connect_timeout",
        "service",
    ),
    *("sslpassword", "passfile", "options", "dbname", "5432", " ", "%00", "\ud800", "pass%77ord"),
    size=12,
)


def test_any_address_is_understood_or_refused(fuzz: Fuzz):
    def check(dsn: str) -> None:
        with suppress(ConfigurationError):
            settings = config.load(environ={"HELENA_DSN": dsn})
            if settings.database.dsn is not None:
                assert target.resolve(settings).label

    fuzz(ADDRESSES, check)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_every_kind_of_secret_is_refused_on_a_command_line(name: str):
    for dsn in (f"host=h {name}=x", f"host=h {name} = 'x'", f"postgresql://h/d?{name}=x"):
        assert config.has_password(dsn)
    assert not config.has_password(f"host={name} user=u")


def test_a_password_is_recognised_wherever_libpq_finds_one(fuzz: Fuzz):
    def check(dsn: str) -> None:
        with suppress(psycopg.Error, UnicodeEncodeError):
            given = conninfo_to_dict(dsn)
            if given.keys() & SECRETS:
                assert config.has_password(dsn)

    fuzz(ADDRESSES, check)


# All of it together, and the database that it leads to

#: What the backlog may not reach: its rows tell, and so does the list of what there is.
CANARY = "CREATE TABLE secrets (word text); INSERT INTO secrets VALUES ('untouched')"
INVENTORY = """\
SELECT (SELECT array_agg(word) FROM secrets), (SELECT count(*) FROM pg_class),
       (SELECT count(*) FROM pg_proc), (SELECT count(*) FROM pg_roles)"""

ATTACKS = (
    "INSERT INTO documents (file_path) VALUES ('a'); DROP TABLE secrets",
    "INSERT INTO documents (file_path) SELECT word FROM secrets",
    "UPDATE documents SET title = (SELECT word FROM public.secrets)",
    "DELETE FROM documents USING secrets WHERE true RETURNING word",
    "WITH x AS (DELETE FROM secrets RETURNING word) INSERT INTO documents (file_path) TABLE x",
    "INSERT INTO documents (file_path) VALUES (pg_read_file('/etc/passwd'))",
    "COPY secrets TO PROGRAM 'cat'",
    "DO $$ BEGIN DELETE FROM secrets; END $$",
    "INSERT INTO documents (file_path) VALUES (E'\\'); DELETE FROM secrets; --')",
    "INSERT INTO documents (file_path) VALUES ('a\\'); DELETE FROM secrets; --')",
    "/* /* */ DELETE FROM secrets; /* */ */ INSERT INTO documents (file_path) VALUES ('b')",
    'INSERT INTO documents (file_path) VALUES ($a$;$b$;$a$); DELETE FROM "secrets"; --$b$',
    "COMMIT; DELETE FROM secrets",
    "SET standard_conforming_strings = off; DELETE FROM secrets",
    "INSERT INTO documents (file_path) VALUES (U&'\\0027); DELETE FROM secrets; --')",
    "INSERT INTO documents AS secrets (file_path) VALUES ('c') ON CONFLICT DO NOTHING; VACUUM",
    "\\! touch escaped",
)


def leave_files(folder: Path, chance: random.Random) -> int:
    """Fill a folder with documents of all bad kinds; how many of them are documents."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "private.md").write_text("do-not-publish")
    docs = folder / "docs"
    docs.mkdir(parents=True)
    contents = [text.encode()[:300_000] for text in BOMBS.values()]
    contents += [chance.randbytes(chance.randrange(3_000)) for _ in range(40)]
    contents += [chr(plane << 16 | 0x41).encode() * 100 for plane in range(17)]
    for number, content in enumerate(contents):
        odd = bytes(chance.choice([*range(1, 47), *range(48, 256)]) for _ in range(12))
        (docs / os.fsdecode(b"%03d" % number + odd + b".md")).write_bytes(content)
    (docs / "link.md").symlink_to(outside / "private.md")
    (docs / "folder").symlink_to(outside)
    (docs / "around").symlink_to(docs)
    os.mkfifo(docs / "pipe.md")
    return len(contents)


@pytest.mark.postgres
def test_a_folder_full_of_attacks_does_no_harm(
    tmp_path: Path, state_dir: Path, helena_dsn: str, seed: int
):
    folder, chance = tmp_path / "run", random.Random(seed)
    expected = leave_files(folder, chance)
    backlog, operations = folder / "sql/realtime_updates", folder / "helena_batch_pending"
    backlog.mkdir(parents=True)
    operations.mkdir()
    for number, text in enumerate((*ATTACKS, *(text[:200_000] for text in SQL_BOMBS.values()))):
        (backlog / f"{number:03}\x1b[2J\n.sql").write_text(text)
    for number in range(60):
        text = "".join(
            chance.choices(['{"type": "message", "data": {', '"', "}", "[", "\\u0000"], k=9)
        )
        (operations / f"{number:03}\x1b[31m\n.json").write_text(text)
    program = Program(folder, state_dir, helena_dsn)
    with psycopg.connect(helena_dsn, autocommit=True) as database:
        database.execute(CANARY)
        before = database.execute(INVENTORY).fetchone()
        result = program.run("process-pending", "docs", "--json")
        assert database.execute(INVENTORY).fetchone() == before
        rows = database.execute("SELECT count(*) FROM es_document_references").fetchone()
        found = database.execute(
            "SELECT es_doc_id FROM es_document_references r WHERE r::text LIKE '%do-not-publish%'"
        ).fetchall()
    report = json.loads(result.stdout)
    assert result.returncode == 1, result.stderr
    assert (rows, found) == ((expected,), [])
    assert report["documents"]["failed"] == 0
    assert report["operation_files"]["failed"] == report["operation_files"]["found"] == 60
    assert not (folder / "escaped").exists()
    shown = program.run("process-pending", "docs")
    for output in (result.stderr, shown.stdout, shown.stderr):
        assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", output)


@pytest.mark.postgres
def test_names_of_tables_and_columns_are_never_sql(host: Host, seed: int):
    chance = random.Random(seed)
    letters = PLANES + ODD.replace(".", "") + "ab "
    host.sql("CREATE TABLE canary (n int); INSERT INTO canary VALUES (1)")
    names = [
        'a"; DROP TABLE canary; --',
        "a') ; DELETE FROM canary --",
        "%s",
        "{0}",
        "$1",
        "select",
    ]
    names += ["".join(chance.choices(letters, k=12)) for _ in range(12)]
    for name in names:
        columns = sql.SQL("CREATE TABLE {} ({} text PRIMARY KEY, {} text)")
        quoted = sql.Identifier(name), sql.Identifier(name), sql.Identifier(f"{name}2")
        host.admin.execute(columns.format(*quoted))
    with host.runtime() as runtime:
        for name in names:
            for kind, value in (("insert", "first"), ("update", "second"), ("message", "third")):
                runtime.engine.add_operation(kind, name, {name: name, f"{name}2": value})
        runtime.engine.add_operation("insert", "canary; DROP TABLE canary", {"n": 2})
        assert runtime.engine.flush(60)
    for name in names:
        query = sql.SQL("SELECT * FROM {}").format(sql.Identifier(name))
        assert host.admin.execute(query).fetchall() == [(name, "second")]
    assert host.sql("SELECT n FROM canary") == [(1,)]
