"""The probe of the database: true on a busy server, bounded on a locked one, honest when blind."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli.database.health import probe

pytestmark = pytest.mark.postgres

Session = psycopg.Connection[tuple[object, ...]]


@contextmanager
def session(dsn: str, application: str = "other") -> Iterator[Session]:
    with psycopg.connect(dsn, autocommit=True, application_name=application) as connection:
        yield connection


@contextmanager
def running(dsn: str, statement: str) -> Iterator[None]:
    """A session that runs a statement until the block ends."""
    with session(dsn) as connection:

        def run() -> None:
            with pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute(statement)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            connection.cancel_safe()
            thread.join(30)


def until(found: Callable[[], bool]) -> None:
    """Wait for a condition of the server."""
    pause = threading.Event()
    for _ in range(600):
        if found():
            return
        pause.wait(0.05)
    raise AssertionError("it did not happen")


@pytest.fixture
def own(helena_dsn: str) -> Iterator[Session]:
    with session(helena_dsn, "helena status") as connection:
        yield connection


def test_a_quiet_database_answers_everything(own: Session):
    health = probe(own)
    assert health.prepared
    assert health.response_ms is not None
    assert health.response_ms > 0
    assert (health.active_queries, health.longest_query_seconds) == (0, 0.0)
    assert (health.lock_waits, health.idle_in_transaction) == (0, 0)
    assert health.connections.used is not None
    assert 0 < health.connections.used < (health.connections.max or 0)
    assert health.unknown == {}
    assert health.server_version


def test_a_database_without_helenas_tables_says_so(dsn: str):
    with session(dsn) as connection:
        health = probe(connection)
    assert health.prepared is False
    assert (health.hosts, health.unknown) == ((), {})


def test_a_long_query_and_a_lock_wait_are_seen(own: Session, helena_dsn: str):
    with session(helena_dsn) as holder, holder.transaction():
        holder.execute("LOCK TABLE messages")
        with (
            running(helena_dsn, "SELECT pg_sleep(100)"),
            running(helena_dsn, "SELECT count(*) FROM messages"),
        ):
            until(lambda: probe(own).lock_waits == 1)
            until(lambda: probe(own).active_queries == 2)
            health = probe(own)
    assert health.longest_query_seconds is not None
    assert health.longest_query_seconds > 0
    assert health.idle_in_transaction == 1


def test_sessions_of_another_database_are_not_counted_as_queries(own: Session, dsn: str):
    with running(dsn, "SELECT pg_sleep(100)"), session(dsn) as look:
        until(lambda: probe(look).active_queries == 1)
        assert probe(own).active_queries == 0


def test_only_the_writers_of_helena_count_as_its_connections(own: Session, helena_dsn: str):
    def count() -> int:
        return probe(own).connections.helena or 0

    before = count()
    names = ("helena flush", "helena maintenance", "helena init", "something else")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(session(helena_dsn, name))
        assert count() - before == 2


def test_the_hosts_that_write_are_listed(own: Session):
    own.execute(
        "INSERT INTO helena.spool_position (spool_id, table_name, host)"
        " VALUES ('a', 't1', 'one'), ('a', 't2', 'one'), ('b', 't1', 'two')"
    )
    rows = [(row.host, row.spools, row.tables) for row in probe(own).hosts]
    assert rows == [("one", 1, 2), ("two", 1, 1)]


def test_pending_pages_are_unknown_without_pgstattuple(own: Session):
    gin = probe(own).gin
    assert {index.table for index in gin} >= {"messages", "es_document_references"}
    assert {index.pending_pages for index in gin} == {None}
    assert all("pgstattuple" in str(index.reason) for index in gin)


@pytest.fixture
def pgstattuple(own: Session) -> None:
    try:
        own.execute("CREATE SCHEMA tools")
        own.execute("CREATE EXTENSION pgstattuple SCHEMA tools")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("This server has no pgstattuple.")


@pytest.mark.usefixtures("pgstattuple")
def test_pending_pages_are_read_wherever_pgstattuple_lives(own: Session):
    own.execute("CREATE TABLE tagged (tags text[])")
    own.execute(
        "CREATE INDEX tagged_tags ON tagged USING gin (tags)"
        " WITH (fastupdate = on, gin_pending_list_limit = 64)"
    )
    own.execute("INSERT INTO tagged SELECT ARRAY[n::text] FROM generate_series(1, 100) n")
    index = next(index for index in probe(own).gin if index.index == "tagged_tags")
    assert index.table == "tagged"
    assert (index.pending_pages or 0) > 0
    assert index.limit_pages == 8


@pytest.mark.usefixtures("pgstattuple")
def test_a_locked_index_is_unknown_and_the_others_are_read(own: Session, helena_dsn: str):
    with session(helena_dsn) as holder, holder.transaction():
        holder.execute("TRUNCATE messages CASCADE")
        gin = {index.index: index for index in probe(own).gin}
    assert gin["messages_tags_idx"].pending_pages is None
    assert gin["messages_tags_idx"].reason == "locked by another session"
    assert gin["es_document_references_tags_idx"].pending_pages == 0


def test_a_role_that_may_not_look_gets_unknown_and_not_zero(own: Session, helena_dsn: str):
    role = f"helena_blind_{own.info.backend_pid}"
    own.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    own.execute("REVOKE ALL ON SCHEMA helena FROM PUBLIC")
    try:
        with session(helena_dsn) as blind:
            blind.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            health = probe(blind)
    finally:
        own.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert health.active_queries is None
    assert health.longest_query_seconds is None
    assert "pg_read_all_stats" in health.unknown["active_queries"]
    assert (health.hosts, health.prepared) == ((), None)
    assert health.unknown["hosts"] == health.unknown["prepared"] == "permission denied"
    assert health.lock_waits == 0
    assert health.connections.used


def test_a_connection_that_is_lost_meanwhile_leaves_reasons(own: Session, helena_dsn: str):
    with session(helena_dsn) as killer:
        killer.execute("SELECT pg_terminate_backend(%s)", [own.info.backend_pid])
        until(
            lambda: (
                killer.execute(
                    "SELECT 1 FROM pg_stat_activity WHERE pid = %s", [own.info.backend_pid]
                ).fetchone()
                is None
            )
        )
    health = probe(own)
    assert health.response_ms is None
    assert health.prepared is None
    assert health.unknown["active_queries"] == "the connection was lost"


def test_a_probe_leaves_no_trace_in_the_session(own: Session):
    before = own.execute("SHOW statement_timeout").fetchone()
    probe(own)
    assert own.execute("SHOW statement_timeout").fetchone() == before
    assert own.info.transaction_status == psycopg.pq.TransactionStatus.IDLE


def test_the_probe_works_on_the_oldest_server_at_hand(postgres15: str):
    with session(make_conninfo(postgres15)) as connection:
        health = probe(connection)
    assert health.unknown == {}
    assert health.server_version.startswith("15")
