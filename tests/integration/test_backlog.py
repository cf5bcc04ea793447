"""The SQL backlog: each file once, the bad ones aside with the reason, whatever else happens."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli.batch import claims
from helena_cli.database import allowlist, applying, backlog, schema
from helena_cli.database.applying import Applying
from helena_cli.database.backlog import BacklogReport, drain_backlog
from helena_cli.database.script import Statement
from helena_cli.errors import DatabaseRefused, DatabaseUnreachable, SchemaMissing
from tests.proxy import Proxy

pytestmark = pytest.mark.postgres

MIB = 1024 * 1024

#: Without a key, so that a file that is applied twice shows.
LOG = "CREATE TABLE log (line text)"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "REST", 0.0)
    monkeypatch.setattr(claims, "REST_EMPTY", 0.0)
    monkeypatch.setattr(backlog, "PAUSE", 0.01)


@pytest.fixture(scope="module")
def shared_dsn(postgres: str, _template: str) -> Iterator[str]:
    """One database for all tests of this file: to make one takes longer than most of them."""
    name = sql.Identifier(f"helena_backlog_{os.getpid()}")
    with psycopg.connect(postgres, autocommit=True) as server:
        make = sql.SQL("CREATE DATABASE {} TEMPLATE {}")
        server.execute(make.format(name, sql.Identifier(_template)))
        yield make_conninfo(postgres, dbname=name.as_string().strip('"'))
        server.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
def admin(shared_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(shared_dsn, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS test CASCADE; CREATE SCHEMA test")
        connection.execute("SET search_path = test, public")
        connection.execute(f"TRUNCATE helena.applied_files, {', '.join(schema.TABLES)}")
        connection.execute(LOG)
        yield connection


@pytest.fixture
def connection(shared_dsn: str) -> Iterator[psycopg.Connection]:
    with connect(shared_dsn) as connection:
        yield connection


def connect(dsn: str) -> psycopg.Connection:
    """Where the tables of a test are found without their schema."""
    connection = psycopg.connect(dsn, autocommit=True)
    connection.execute("SET search_path = test, public")
    return connection


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "realtime_updates"
    path.mkdir()
    return path


@pytest.fixture
def drain(
    admin: psycopg.Connection, connection: psycopg.Connection, folder: Path
) -> Callable[..., BacklogReport]:
    def drain(**options: Any) -> BacklogReport:
        given = {"tables": ["log"], "max_bytes": MIB, **options}
        return drain_backlog(folder, connection, **given)

    return drain


Drain = Callable[..., BacklogReport]


def put(folder: Path, **files: str) -> None:
    for name, text in files.items():
        (folder / f"{name}.sql").write_text(text, encoding="utf-8")


def line(text: object) -> str:
    return f"INSERT INTO log (line) VALUES ('{text}');\n"


def lines(admin: psycopg.Connection) -> list[str]:
    return [row[0] for row in admin.execute("SELECT line FROM log ORDER BY ctid").fetchall()]


def tree(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir() and path.name != ".lock")
    return sorted(str(path.relative_to(folder)) for path in files)


def reason(folder: Path, name: str) -> str:
    return (folder / f"failed/{name}.sql.reason.txt").read_text()


def test_files_are_applied_in_the_order_of_their_names_and_recorded(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    put(folder, c=line(3), a=line(1), b=line(2) + line("2b"))
    report = drain()
    assert report == BacklogReport(found=3, applied=3, transactions=1)
    assert lines(admin) == ["1", "2", "2b", "3"]
    assert tree(folder) == ["done/a.sql", "done/b.sql", "done/c.sql"]
    records = admin.execute(
        "SELECT file_name, statements, rows, length(content_hash), host <> ''"
        " FROM helena.applied_files ORDER BY 1"
    ).fetchall()
    assert records == [
        ("a.sql", 1, 1, 64, True),
        ("b.sql", 2, 2, 64, True),
        ("c.sql", 1, 1, 64, True),
    ]


def test_the_usual_file_arrives_as_it_was_written(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    text = "It's\nseveral lines; -- no comment\r\n\twith 🎉, \\n, $$ and %s"
    put(
        folder,
        usual=f"""
        INSERT INTO documents (file_path, title, content_preview, line_count, created_at)
        VALUES ('docs/a.md', 'Old', '{text.replace("'", "''")}', 3, NOW())
        ON CONFLICT (file_path) DO UPDATE SET title = EXCLUDED.title;""",
    )
    (folder / "usual.sql").write_bytes(b"\xef\xbb\xbf" + (folder / "usual.sql").read_bytes())
    assert drain().applied == 1
    row = admin.execute("SELECT content_preview, created_at IS NOT NULL FROM documents").fetchone()
    assert row == (text, True)


def test_a_bad_file_harms_no_other_and_is_moved_aside_with_the_databases_words(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    admin.execute("ALTER TABLE log ADD UNIQUE (line)")
    put(folder, a=line(1), b=line(2) + "\n\n" + line(1), c=line(3), d="INSERT INTO log (line) 'x'")
    put(
        folder,
        e="INSERT INTO log (nothing)\nVALUES\n(1)",
        f="INSERT INTO log VALUES ('x",
        g=line(4),
    )
    report = drain()
    assert (report.applied, report.failed, report.transactions) == (3, 4, 1)
    assert lines(admin) == ["1", "3", "4"]
    assert "duplicate key value" in reason(folder, "b")
    assert "Key (line)=(1) already exists" in reason(folder, "b")
    assert reason(folder, "b").startswith("Line 4: ")
    assert "SQLSTATE 23505" in reason(folder, "b")
    assert "not understood" in reason(folder, "d")
    assert reason(folder, "e").startswith("Line 1: column")
    assert "Add the column" in reason(folder, "e")
    assert "begins here and does not end" in reason(folder, "f")
    assert [failure.path for failure in report.failures] == [
        str(folder / f"{name}.sql") for name in "bdef"
    ]
    assert all(
        failure.reason.strip() == reason(folder, failure.path[-5]).strip()
        for failure in report.failures
    )


def test_a_hundred_files_are_one_transaction(admin: psycopg.Connection, folder: Path, drain: Drain):
    for number in range(250):
        put(folder, **{f"{number:03}": line(number)})
    assert drain().transactions == 3
    assert lines(admin) == [str(number) for number in range(250)]
    # What was written without a savepoint has the number of the transaction itself.
    row = admin.execute("SELECT count(DISTINCT xmin::text) FROM helena.applied_files").fetchone()
    assert row == (3,)


def test_large_files_share_no_transaction(folder: Path, drain: Drain):
    put(folder, a=line("x" * 600), b=line("y" * 600), c=line("z"))
    assert drain(max_bytes=1000) == BacklogReport(found=3, applied=3, transactions=2)


def test_what_was_applied_before_is_moved_without_applying_it_again(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    put(folder, a=line(1))
    drain()
    shutil.copy(folder / "done/a.sql", folder)
    put(folder, b=line(1))
    assert drain() == BacklogReport(found=2, applied=1, skipped=1, transactions=1)
    # Another content makes another file.
    put(folder, a=line(2))
    assert drain().applied == 1
    assert lines(admin) == ["1", "1", "2"]
    assert drain() == BacklogReport()


def test_a_file_that_was_applied_is_not_refused_afterwards(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    put(folder, a="CREATE TABLE made ()")
    drain(allow_any_sql=True)
    (folder / "done/a.sql").rename(folder / "processing/a.sql")
    assert drain() == BacklogReport(found=1, skipped=1, transactions=1)


def test_a_commit_whose_answer_was_lost_is_found_in_the_record(
    admin: psycopg.Connection,
    folder: Path,
    drain: Drain,
    shared_dsn: str,
    make_proxy: Callable[[str], Proxy],
):
    put(folder, a=line(1), b=line(2))
    proxy = make_proxy(shared_dsn)
    with connect(proxy.dsn) as far:
        proxy.drop_next_answer(containing=b"COMMIT\0")
        with pytest.raises(DatabaseUnreachable):
            drain_backlog(folder, far, tables=["log"], max_bytes=MIB)
    assert lines(admin) == ["1", "2"]
    assert tree(folder) == ["a.sql", "b.sql"]
    assert drain() == BacklogReport(found=2, skipped=2, transactions=1)
    assert lines(admin) == ["1", "2"]


def test_a_connection_that_is_lost_in_the_middle_leaves_the_files_where_they_were(
    admin: psycopg.Connection, folder: Path, drain: Drain, connection: psycopg.Connection
):
    admin.execute(
        "CREATE FUNCTION kill() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END';"
        "CREATE TRIGGER kill BEFORE INSERT ON log FOR EACH ROW WHEN (NEW.line = '2')"
        " EXECUTE FUNCTION kill()"
    )
    put(folder, a=line(1), b=line(2), c=line(3))
    with pytest.raises(DatabaseUnreachable):
        drain()
    assert connection.closed
    assert (lines(admin), tree(folder)) == ([], ["a.sql", "b.sql", "c.sql"])


def test_two_hosts_with_the_same_files_apply_each_once(
    admin: psycopg.Connection, folder: Path, shared_dsn: str, tmp_path: Path
):
    for number in range(60):
        put(folder, **{f"{number:03}": line(number)})
    shutil.copytree(folder, tmp_path / "copy")
    reports: list[BacklogReport] = []
    barrier = threading.Barrier(2)

    def work(place: Path) -> None:
        with connect(shared_dsn) as own:
            barrier.wait(10)
            reports.append(drain_backlog(place, own, tables=["log"], max_bytes=500))

    threads = [
        threading.Thread(target=work, args=(place,)) for place in (folder, tmp_path / "copy")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(lines(admin)) == sorted(str(number) for number in range(60))
    assert sum(report.applied for report in reports) == 60
    assert sum(report.skipped for report in reports) == 60


def test_only_one_host_applies_files_at_a_time(
    folder: Path, drain: Drain, shared_dsn: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Applying, "LOCK_TIMEOUT", 20)
    put(folder, a=line(1))
    with psycopg.connect(shared_dsn) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [applying.LOCK])
        with pytest.raises(DatabaseRefused, match="lock timeout"):
            drain()
    assert tree(folder) == ["a.sql"]
    assert drain().applied == 1


# What does not lie in the file


def test_files_before_a_locked_table_are_applied_and_the_rest_waits_for_the_next_run(
    admin: psycopg.Connection,
    folder: Path,
    drain: Drain,
    shared_dsn: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(Applying, "LOCK_TIMEOUT", 50)
    put(folder, a=line(1), b="UPDATE documents SET title = 'x'", c=line(3))
    with psycopg.connect(shared_dsn) as other:
        other.execute("LOCK TABLE documents")
        with pytest.raises(DatabaseRefused, match="lock timeout") as refused:
            drain()
        assert refused.value.sqlstate == "55P03"
    assert lines(admin) == ["1"]
    assert tree(folder) == ["b.sql", "c.sql", "done/a.sql"]
    assert drain().applied == 2
    assert lines(admin) == ["1", "3"]


def test_a_lock_that_goes_away_is_waited_for(
    folder: Path, drain: Drain, shared_dsn: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Applying, "LOCK_TIMEOUT", 50)
    put(folder, a=line(1), b="UPDATE documents SET title = 'x'", c=line(3))
    with psycopg.connect(shared_dsn) as other:
        other.execute("LOCK TABLE documents")

        def let_go(seconds: float) -> None:
            if seconds:
                other.rollback()

        monkeypatch.setattr(time, "sleep", let_go)
        report = drain()
    # The one before it, itself, and the one behind it.
    assert (report.applied, report.failed, report.transactions) == (3, 0, 3)


def test_a_file_that_takes_too_long_is_failed_alone(
    admin: psycopg.Connection, folder: Path, drain: Drain, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Applying, "STATEMENT_TIMEOUT", 100)
    admin.execute(
        "CREATE FUNCTION nap() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(10); RETURN NEW; END';"
        "CREATE TRIGGER nap BEFORE INSERT ON log FOR EACH ROW WHEN (NEW.line = '2')"
        " EXECUTE FUNCTION nap()"
    )
    put(folder, a=line(1), b=line(2), c=line(3))
    report = drain()
    assert (report.applied, report.failed) == (2, 1)
    assert lines(admin) == ["1", "3"]
    assert "statement timeout" in reason(folder, "b")
    assert "in parts" in reason(folder, "b")


def test_a_server_that_is_read_only_fails_no_file(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    admin.execute(
        "CREATE FUNCTION standby() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE 'read-only' USING ERRCODE = '25006'; END$$;"
        "CREATE TRIGGER standby BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION standby()"
    )
    put(folder, a=line(1))
    with pytest.raises(DatabaseRefused) as refused:
        drain()
    assert "standby" in refused.value.remedy
    assert tree(folder) == ["a.sql"]


def test_a_file_that_makes_the_commit_fail_is_found(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    admin.execute(
        "CREATE TABLE parent (id int PRIMARY KEY);"
        "CREATE TABLE child (id int REFERENCES parent DEFERRABLE);"
        "CREATE FUNCTION defer() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN SET CONSTRAINTS ALL DEFERRED; RETURN NEW; END';"
        "CREATE TRIGGER defer BEFORE INSERT ON child FOR EACH ROW EXECUTE FUNCTION defer()"
    )
    for number in range(7):
        put(folder, **{f"{number}": line(number)})
    put(folder, **{"4": "INSERT INTO child VALUES (1)"})
    report = drain(tables=["log", "child"])
    assert (report.applied, report.failed) == (6, 1)
    assert lines(admin) == ["0", "1", "2", "3", "5", "6"]
    assert "foreign key" in reason(folder, "4")
    # By halves, not one by one: 0-2, 3, and 5-6.
    assert report.transactions == 3


def test_constraints_are_checked_behind_the_files_own_savepoint(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    admin.execute("ALTER TABLE log ADD UNIQUE (line) DEFERRABLE INITIALLY DEFERRED")
    put(folder, a=line(1), b=line(1), c=line(2))
    report = drain()
    assert (report.applied, report.failed, report.transactions) == (2, 1, 1)


def test_missing_tables_and_rights_fail_the_file_with_the_remedy(
    admin: psycopg.Connection, folder: Path, connection: psycopg.Connection, drain: Drain
):
    admin.execute("CREATE ROLE helena_backlog_test")
    try:
        admin.execute("GRANT INSERT ON log TO helena_backlog_test")
        admin.execute("GRANT USAGE ON SCHEMA test TO helena_backlog_test")
        connection.execute("SET ROLE helena_backlog_test")
        put(folder, a=line(1), b="DELETE FROM messages", c="DELETE FROM gone", d=line(2))
        report = drain(tables=["log", "gone"])
        connection.execute("RESET ROLE")
    finally:
        admin.execute("DROP OWNED BY helena_backlog_test; DROP ROLE helena_backlog_test")
    assert (report.applied, report.failed) == (2, 2)
    assert "GRANT" in reason(folder, "b") and "42501" in reason(folder, "b")
    assert "Create the table" in reason(folder, "c") and "42P01" in reason(folder, "c")


def test_a_database_without_the_record_asks_for_init(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    admin.execute("ALTER TABLE helena.applied_files RENAME TO away")
    put(folder, a=line(1))
    try:
        for dry_run in (False, True):
            with pytest.raises(SchemaMissing) as refused:
                drain(dry_run=dry_run)
            assert "helena init" in refused.value.remedy
    finally:
        admin.execute("ALTER TABLE helena.away RENAME TO applied_files")
    assert (lines(admin), tree(folder)) == ([], ["a.sql"])


def test_a_record_that_may_not_be_written_fails_no_file(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    admin.execute("ALTER TABLE helena.applied_files ADD CONSTRAINT no CHECK (statements = 0)")
    put(folder, a=line(1))
    try:
        with pytest.raises(DatabaseRefused, match="check constraint"):
            drain()
    finally:
        admin.execute("ALTER TABLE helena.applied_files DROP CONSTRAINT no")
    assert (lines(admin), tree(folder)) == ([], ["a.sql"])


def test_an_interrupt_leaves_files_and_connection_as_they_were(
    admin: psycopg.Connection,
    folder: Path,
    drain: Drain,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
):
    put(folder, a=line(1))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Applying, "_record", interrupt)
        drain()
    assert connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    assert (lines(admin), tree(folder)) == ([], ["a.sql"])


# What a file may be and hold


def test_what_cannot_be_read_as_text_fails_with_the_reason(folder: Path, drain: Drain):
    (folder / "latin.sql").write_bytes("INSERT INTO log VALUES ('ä')".encode("latin-1"))
    (folder / "nul.sql").write_bytes(b"INSERT INTO log VALUES ('a\0')")
    (folder / "wide.sql").write_text(line(1), encoding="utf-16")
    (folder / "huge.sql").write_text(line("x" * 2000))
    (folder / "link.sql").symlink_to("/etc/passwd")
    os.mkfifo(folder / "pipe.sql")
    report = drain(max_bytes=1000)
    assert (report.applied, report.failed) == (0, 6)
    assert reason(folder, "latin") == "It is not UTF-8: byte 25 is 0xe4.\n"
    assert "NUL" in reason(folder, "nul")
    assert "UTF-8" in reason(folder, "wide")
    assert reason(folder, "huge") == "It has more than 1,000 bytes.\n"
    assert "symbolic link" in reason(folder, "link")
    assert "not a regular file" in reason(folder, "pipe")


def test_a_file_without_a_statement_is_done_and_counted_apart(
    folder: Path, drain: Drain, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    put(folder, a="", b="-- nothing\n;;\n")
    assert drain() == BacklogReport(found=2, empty=2, transactions=1)
    assert tree(folder) == ["done/a.sql", "done/b.sql"]
    assert "b.sql holds no statement" in caplog.text


def test_what_is_not_allowed_is_refused_unless_it_is_asked_for(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    put(folder, a=line(1) + "CREATE TABLE made (); INSERT INTO made DEFAULT VALUES")
    assert drain().failed == 1
    assert "CREATE is not allowed" in reason(folder, "a")
    assert "--allow-any-sql" in reason(folder, "a")
    assert reason(folder, "a").startswith("Line 2: ")
    assert lines(admin) == []
    (folder / "failed/a.sql").rename(folder / "a.sql")
    assert drain(allow_any_sql=True).applied == 1
    assert admin.execute("SELECT count(*) FROM made").fetchone() == (1,)


@pytest.mark.parametrize("statement", ["COMMIT", "SET search_path = x", "COPY log FROM stdin"])
def test_even_with_any_sql_a_file_cannot_reach_the_others(
    admin: psycopg.Connection, folder: Path, drain: Drain, statement: str
):
    put(folder, a=line(1), b=f"{statement};\n{line(2)}", c=line(3))
    report = drain(allow_any_sql=True)
    assert (report.applied, report.failed, report.transactions) == (2, 1, 1)
    assert lines(admin) == ["1", "3"]


def test_any_sql_that_no_transaction_can_hold_fails_its_file_only(folder: Path, drain: Drain):
    put(folder, a=line(1), b="VACUUM log", c="DO 'BEGIN COMMIT; END'", d="SELECT 1/0", e=line(2))
    report = drain(allow_any_sql=True)
    assert (report.applied, report.failed, report.transactions) == (2, 3, 1)
    assert "cannot run inside a transaction block" in reason(folder, "b")
    assert "invalid transaction termination" in reason(folder, "c")


def test_the_server_itself_takes_one_statement_at_a_time(
    admin: psycopg.Connection, folder: Path, drain: Drain, monkeypatch: pytest.MonkeyPatch
):
    def blind(script: str) -> Iterator[Statement]:
        yield Statement(script, 1, ())

    monkeypatch.setattr(backlog, "statements", blind)
    monkeypatch.setattr(allowlist, "check", lambda *_: None)
    put(folder, a=line(1) + "DROP TABLE log")
    assert drain().failed == 1
    assert "multiple commands" in reason(folder, "a")
    assert lines(admin) == []


def test_a_backslash_is_a_backslash_whatever_the_database_is_set_to(
    admin: psycopg.Connection, folder: Path, drain: Drain, connection: psycopg.Connection
):
    connection.execute("SET standard_conforming_strings = off")
    put(folder, a="INSERT INTO log VALUES ('\\'), (' ; DELETE FROM log; --')")
    assert drain().applied == 1
    assert lines(admin) == ["\\", " ; DELETE FROM log; --"]


def test_a_known_table_may_be_called_by_its_schema_and_no_other_may(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    admin.execute(
        "DROP SCHEMA IF EXISTS other CASCADE; CREATE SCHEMA other;"
        "CREATE TABLE other.log (line text); CREATE TABLE other.extra (a int);"
        "CREATE TABLE other.documents (a int)"
    )
    put(folder, a=line(1).replace("log", "test.log"), b=line(2).replace("log", "other.log"))
    put(folder, c="INSERT INTO other.extra VALUES (1)", d="INSERT INTO extra VALUES (1)")
    put(folder, e="INSERT INTO public.documents (file_path) VALUES ('x')")
    put(folder, f="INSERT INTO other.documents VALUES (1)")
    report = drain(tables=["log", "other.extra"])
    assert sorted(Path(failure.path).stem for failure in report.failures) == ["b", "d", "f"]
    assert "the table other.log is not known" in reason(folder, "b")


def test_a_table_that_was_named_with_its_schema_can_be_called_without_when_it_is_seen(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    put(folder, a=line(1))
    assert drain(tables=["test.log"]).applied == 1


# A look, and nothing


def test_a_dry_run_tells_what_would_happen_and_touches_nothing(
    admin: psycopg.Connection, folder: Path, drain: Drain
):
    put(folder, a=line(1))
    drain()
    shutil.move(folder / "done/a.sql", folder)
    put(folder, b=line(2), c="DROP TABLE log", d="")
    before = tree(folder)
    report = drain(dry_run=True)
    assert report.transactions == 0
    assert (report.found, report.applied, report.failed) == (4, 1, 1)
    assert (report.skipped, report.empty) == (1, 1)
    assert "DROP is not allowed" in report.failures[0].reason
    assert tree(folder) == before
    assert lines(admin) == ["1"]


def test_without_files_nothing_is_asked_of_the_database(folder: Path, shared_dsn: str):
    connection = psycopg.connect(shared_dsn)
    connection.close()
    for place in (folder, folder / "absent"):
        assert drain_backlog(place, connection, tables=[], max_bytes=1) == BacklogReport()
    assert list(folder.iterdir()) == []


def test_progress_is_told_file_by_file(folder: Path, drain: Drain):
    put(folder, a=line(1), b="SELECT 1", c=line(2))
    told: list[tuple[int, int | None, str]] = []
    drain(progress=lambda *facts: told.append(facts))
    assert told == [(1, 3, "a.sql"), (2, 3, "b.sql"), (3, 3, "c.sql")]


def test_helenas_own_tables_are_known_by_themselves(folder: Path, drain: Drain):
    for name in schema.TABLES:
        put(folder, **{name: f"DELETE FROM {name}"})
    assert drain(tables=[]).applied == len(schema.TABLES)
