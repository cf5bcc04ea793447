"""`helena init`: what it makes, what it leaves alone, and who may run it."""

import secrets
import shutil
import subprocess
import threading
from collections.abc import Iterator
from importlib import resources

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli.database import embedded, schema
from helena_cli.errors import ConfigurationError, DatabaseRefused, SchemaMissing

EVERYTHING = ["schema helena, version 2", *(f"table {name}" for name in schema.TABLES)]


def connect(dsn: str, **more) -> psycopg.Connection:
    return psycopg.connect(dsn, autocommit=True, **more)


@pytest.fixture
def role(dsn) -> Iterator[str]:
    """A role that may connect and nothing more."""
    name = f"helena_test_{secrets.token_hex(4)}"
    with connect(dsn) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    yield name
    with connect(dsn) as connection:
        connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


@pytest.fixture
def as_role(dsn, role) -> Iterator[psycopg.Connection]:
    with connect(dsn) as connection:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
        yield connection


def psql(dsn: str, script: str) -> subprocess.CompletedProcess[str]:
    binaries = embedded.binaries()
    program = shutil.which("psql") or (binaries and binaries / "psql")
    if not program:
        pytest.skip("There is no psql.")
    return subprocess.run(
        [program, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", dsn],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
    )


def catalog(dsn: str) -> list[tuple[object, ...]]:
    """Everything that makes a table what it is, without oids."""
    with connect(dsn) as connection:
        return connection.execute("""
            SELECT 'column', table_schema || '.' || table_name, column_name, ordinal_position::text,
                   data_type, column_default, is_nullable, character_maximum_length::text
            FROM information_schema.columns WHERE table_schema IN ('public', 'helena')
            UNION ALL
            SELECT 'index', schemaname, tablename, indexname, indexdef, '', '', ''
            FROM pg_indexes WHERE schemaname IN ('public', 'helena')
            UNION ALL
            SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid),
                   '', '', '', ''
            FROM pg_constraint WHERE connamespace::regnamespace::text IN ('public', 'helena')
            UNION ALL
            SELECT 'right', relname, relacl::text, '', '', '', '', ''
            FROM pg_class WHERE relnamespace::regnamespace::text = 'helena'
            UNION ALL
            SELECT 'schema', nspname, nspacl::text, '', '', '', '', ''
            FROM pg_namespace WHERE nspname = 'helena'
            ORDER BY 1, 2, 3, 4, 5
        """).fetchall()


def test_tables_are_made_once_and_then_left_alone(dsn):
    with connect(dsn) as connection:
        assert schema.initialise(connection) == EVERYTHING
        identity = schema.target_id(connection)
        assert schema.initialise(connection) == []
        assert schema.target_id(connection) == identity


def test_it_commits_on_a_connection_without_autocommit_too(dsn):
    with psycopg.connect(dsn) as connection:
        assert schema.initialise(connection) == EVERYTHING
        connection.rollback()
        assert schema.initialise(connection) == []


def test_it_works_on_the_oldest_server_at_hand(postgres15):
    name = f"helena_{secrets.token_hex(4)}"
    with connect(postgres15) as admin:
        admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    with connect(postgres15, dbname=name) as connection:
        assert schema.initialise(connection) == EVERYTHING
        assert schema.initialise(connection) == []


def test_several_at_once_make_one_schema(dsn):
    barrier = threading.Barrier(6)
    results: list[list[str]] = []
    identities: set[str] = set()

    def work() -> None:
        with connect(dsn) as connection:
            barrier.wait(30)
            results.append(schema.initialise(connection))
            identities.add(schema.target_id(connection))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 6
    assert len(identities) == 1
    assert [result for result in results if result] == [EVERYTHING]


def test_the_printed_script_makes_what_init_makes(dsn, helena_dsn):
    for _ in range(2):
        result = psql(dsn, schema.sql())
        assert (result.returncode, result.stderr) == (0, "")
    assert catalog(dsn) == catalog(helena_dsn)
    with connect(dsn) as connection:
        assert schema.initialise(connection) == []


def test_the_tables_have_the_promised_defaults_and_rules(helena_dsn):
    with connect(helena_dsn) as connection:
        row = connection.execute(
            "INSERT INTO es_document_references (es_index, es_doc_id) VALUES ('i', 'd')"
            " RETURNING data_classification, indexed_at IS NOT NULL, id"
        ).fetchone()
        assert row == ("public", True, 1)
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("UPDATE es_document_references SET data_classification = 'x'")
        connection.execute(
            "INSERT INTO es_document_usage_log (es_doc_id, accessed_by) VALUES ('d', 'a')"
        )
        connection.execute("DELETE FROM es_document_references")
        assert connection.execute("SELECT count(*) FROM es_document_usage_log").fetchone() == (0,)
        connection.execute(
            "INSERT INTO messages (id, sender, message_type, content, response_to)"
            " VALUES ('1', 's', 't', 'c', NULL), ('2', 's', 't', 'c', '1')"
        )
        connection.execute("DELETE FROM messages WHERE id = '1'")
        row = connection.execute("SELECT response_to, importance FROM messages").fetchone()
        assert row == (None, 0.5)
        gin = connection.execute(
            "SELECT tablename, indexname FROM pg_indexes WHERE indexdef LIKE '%USING gin%'"
            " ORDER BY 2"
        ).fetchall()
        assert gin == [
            ("es_document_references", "es_document_references_metadata_idx"),
            ("es_document_references", "es_document_references_tags_idx"),
            ("messages", "messages_context_idx"),
            ("messages", "messages_tags_idx"),
        ]


@pytest.mark.parametrize(
    "existing",
    [
        "TABLE es_document_references (es_doc_id text, other text)",
        "TABLE es_document_references (es_doc_id integer UNIQUE, other text)",
        "TABLE es_document_references (other text)",
        "VIEW es_document_references AS SELECT ''::text AS es_doc_id, ''::text AS other",
    ],
)
def test_an_existing_table_of_another_shape_is_left_alone(dsn, caplog, existing):
    with connect(dsn) as connection:
        connection.execute(f"CREATE {existing}")
        connection.execute("CREATE TABLE messages (id text)")
        before = catalog(dsn)
        ours = ("table es_document_references", "table messages")
        assert schema.initialise(connection) == [e for e in EVERYTHING if e not in ours]
        assert set(before) <= set(catalog(dsn))
        assert ("index", "public", "messages") not in [row[:3] for row in catalog(dsn)]
        # The usage log cannot refer to such a table, and says so.
        assert "es_document_usage_log has no foreign key" in caplog.text
        connection.execute("INSERT INTO es_document_usage_log (accessed_by) VALUES ('a')")


def test_a_table_elsewhere_in_the_search_path_is_used(dsn):
    with connect(dsn, options="-csearch_path=app,public") as connection:
        connection.execute("CREATE SCHEMA app")
        connection.execute("CREATE TABLE public.documents (file_path text)")
        created = schema.initialise(connection)
        assert "table documents" not in created
        assert connection.execute("SELECT to_regclass('app.documents')").fetchone() == (None,)
        assert connection.execute("SELECT to_regclass('app.messages')").fetchone() != (None,)


def test_a_newer_schema_is_refused_with_upgrade_as_the_remedy(helena_dsn):
    with connect(helena_dsn) as connection:
        connection.execute("UPDATE helena.meta SET version = 99")
        for attempt in (schema.initialise, schema.target_id):
            with pytest.raises(SchemaMissing, match="version 99") as refusal:
                attempt(connection)
            assert "Upgrade Helena" in refusal.value.remedy
            assert isinstance(refusal.value, ConfigurationError)
    result = psql(helena_dsn, schema.sql())
    assert result.returncode != 0
    assert "version 99" in result.stderr


def test_an_older_schema_asks_for_init(helena_dsn):
    with connect(helena_dsn) as connection:
        connection.execute("UPDATE helena.meta SET version = 0")
        with pytest.raises(SchemaMissing, match="needs 2") as refusal:
            schema.target_id(connection)
        assert "helena init" in refusal.value.remedy


def test_version_1_is_brought_up_to_date_and_keeps_its_rows(dsn, as_role):
    with connect(dsn) as connection:
        for name in ("01_helena.sql", "tables.sql"):
            connection.execute((resources.files("helena_cli.database") / "sql" / name).read_text())
        connection.execute(
            "INSERT INTO helena.roots (namespace, host, path) VALUES ('n', 'h', 'p')"
        )
        before = connection.execute("SELECT id, version FROM helena.meta").fetchone()
        assert before and before[1] == 1
        with pytest.raises(SchemaMissing, match="has version 1; this Helena needs 2"):
            schema.target_id(connection)
        # Its owner can, others cannot.
        with pytest.raises(DatabaseRefused) as refusal:
            schema.initialise(as_role)
        assert "helena init --print" in refusal.value.remedy
        assert schema.initialise(connection) == ["schema helena, version 2"]
        assert schema.target_id(connection) == str(before[0])
        assert connection.execute("SELECT count(*) FROM helena.roots").fetchone() == (1,)
        assert schema.initialise(connection) == []
    assert schema.target_id(as_role) == str(before[0])


def test_any_role_records_the_files_it_applies_and_changes_no_record(dsn, as_role):
    with connect(dsn) as connection:
        schema.initialise(connection)
    record = "INSERT INTO helena.applied_files VALUES ('a.sql', 'hash', 1, 1, 'host')"
    as_role.execute(record)
    with pytest.raises(psycopg.errors.UniqueViolation):
        as_role.execute(record)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role.execute("DELETE FROM helena.applied_files")


def test_a_database_without_the_schema_asks_for_init(dsn):
    with connect(dsn) as connection, pytest.raises(SchemaMissing) as refusal:
        schema.target_id(connection)
    assert refusal.value.remedy == "Run: helena init."


def test_a_role_that_may_not_create_is_told_of_the_script(dsn, as_role):
    with pytest.raises(DatabaseRefused, match="permission denied") as refusal:
        schema.initialise(as_role)
    assert "helena init --print" in refusal.value.remedy
    assert refusal.value.sqlstate == "42501"
    assert catalog(dsn) == []


def test_a_role_that_may_create_tables_but_no_schema_leaves_nothing_half_made(dsn, role, as_role):
    with connect(dsn) as connection:
        connection.execute(
            sql.SQL("GRANT CREATE ON SCHEMA public TO {}").format(sql.Identifier(role))
        )
    with pytest.raises(DatabaseRefused):
        schema.initialise(as_role)
    assert catalog(dsn) == []


def test_a_schema_made_for_a_role_is_enough_for_it(dsn, role, as_role):
    with connect(dsn) as connection:
        grant = "CREATE SCHEMA helena AUTHORIZATION {0}; GRANT CREATE ON SCHEMA public TO {0}"
        connection.execute(sql.SQL(grant).format(sql.Identifier(role)))
    assert schema.initialise(as_role) == EVERYTHING


def test_any_role_may_use_what_somebody_else_has_made(dsn, as_role):
    with connect(dsn) as connection:
        schema.initialise(connection)
    assert schema.initialise(as_role) == []
    assert schema.target_id(as_role)
    as_role.execute(
        "INSERT INTO helena.spool_position (spool_id, table_name) VALUES ('s', 't')"
        " ON CONFLICT DO NOTHING"
    )
    as_role.execute("SELECT 1 FROM helena.spool_position FOR UPDATE")
    as_role.execute("INSERT INTO helena.roots (namespace, host, path) VALUES ('n', 'h', 'p')")
    as_role.execute("DELETE FROM helena.roots")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        as_role.execute("UPDATE helena.meta SET version = 2")


def test_init_waits_for_another_one_but_not_for_ever(dsn, monkeypatch):
    # The first ten seconds are not for a test.
    monkeypatch.setattr(schema, "_LOCK_TIMEOUT", "100ms")
    with psycopg.connect(dsn) as other, connect(dsn) as connection:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [schema._LOCK])
        with pytest.raises(DatabaseRefused, match="lock timeout") as refusal:
            schema.initialise(connection)
        assert refusal.value.sqlstate == "55P03"
        other.rollback()
        schema.initialise(connection)
        # With nothing to do it does not even ask for the lock.
        other.execute("SELECT pg_advisory_xact_lock(%s)", [schema._LOCK])
        assert schema.initialise(connection) == []


def test_each_copy_of_the_template_is_a_database_of_its_own(helena_dsn, _template, postgres):
    with (
        connect(helena_dsn) as copy,
        connect(make_conninfo(postgres, dbname=_template)) as template,
    ):
        assert schema.target_id(copy) != schema.target_id(template)


def test_where_pgstattuple_cannot_be_added_nothing_else_is_lost(as_role):
    schema.add_inspection(as_role)
    assert as_role.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    assert as_role.execute("SELECT count(*) FROM pg_extension").fetchone() == (1,)
