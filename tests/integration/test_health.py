"""The probe of the database: true on a busy server, bounded on a locked one, honest when blind."""

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli.database import schema
from helena_cli.database.health import Health, TableState
from helena_cli.database.probe import probe
from tests import databases
from tests.cluster import Cluster
from tests.sessions import Session, await_waiting, holding, running, session, stuck

pytestmark = pytest.mark.postgres


def until(found: Callable[[], bool]) -> None:
    """Wait for a condition of the server."""
    pause = threading.Event()
    for _ in range(600):
        if found():
            return
        pause.wait(0.05)
    raise AssertionError("it did not happen")


@pytest.fixture(params=["the usual server", "the oldest server at hand"])
def helena_dsn(request: pytest.FixtureRequest, helena_dsn: str) -> Iterator[str]:
    """Each test on both servers."""
    if request.param == "the usual server":
        yield helena_dsn
        return
    server, name = request.getfixturevalue("postgres15"), f"helena_{secrets.token_hex(6)}"
    with session(server) as admin:
        databases.create(admin, name)
        dsn = make_conninfo(server, dbname=name)
        with session(dsn) as connection:
            schema.initialise(connection)
        yield dsn
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


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


def test_sessions_of_another_database_are_not_counted_as_queries(own: Session, helena_dsn: str):
    dsn = make_conninfo(helena_dsn, dbname="postgres")
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
    index = next(one for one in probe(own, ["tagged"]).gin if one.index == "tagged_tags")
    assert index.table == "tagged"
    assert (index.pending_pages or 0) > 0
    assert index.limit_pages == 8


@pytest.mark.usefixtures("pgstattuple")
def test_a_locked_index_is_unknown_and_the_others_are_read(own: Session, helena_dsn: str):
    with session(helena_dsn) as holder, holder.transaction():
        holder.execute("TRUNCATE messages CASCADE")
        culprit = holder.info.backend_pid
        gin = {index.index: index for index in probe(own).gin}
    assert gin["messages_tags_idx"].pending_pages is None
    assert gin["messages_tags_idx"].reason == f"locked by pid {culprit}"
    assert gin["es_document_references_tags_idx"].pending_pages == 0


def test_a_role_that_may_not_look_gets_unknown_and_not_zero(own: Session, helena_dsn: str):
    role = f"helena_blind_{own.info.backend_pid}"
    own.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    own.execute("REVOKE ALL ON SCHEMA helena FROM PUBLIC")
    try:
        with session(helena_dsn), session(helena_dsn) as blind:
            blind.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            health = probe(blind)
    finally:
        own.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert health.active_queries is None
    assert health.longest_query_seconds is None
    assert "pg_monitor" in health.unknown["active_queries"]
    assert (health.hosts, health.prepared) == ((), None)
    for name in ("hosts", "prepared"):
        assert health.unknown[name] == "permission denied for schema helena"
    assert health.lock_waits == 0
    assert health.connections.used


def test_of_who_holds_others_up_a_blind_role_sees_no_age_and_not_zero(
    own: Session, helena_dsn: str
):
    role = f"helena_blind_{own.info.backend_pid}"
    own.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    try:
        with (
            holding(helena_dsn, "LOCK TABLE messages") as culprit,
            running(helena_dsn, "SELECT count(*) FROM messages"),
            session(helena_dsn) as blind,
        ):
            await_waiting(own, 1)
            blind.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            (blocking,) = probe(blind).blocking
    finally:
        own.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert (blocking.pid, blocking.holds_up) == (culprit, 1)
    assert (blocking.state, blocking.seconds) == (None, None)


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


# Who waits for whom


def waits(own: Session, count: int) -> Health:
    until(lambda: probe(own).lock_waits == count)
    return probe(own)


def test_the_root_of_a_chain_is_named_with_all_that_wait_behind_it(own: Session, helena_dsn: str):
    with ExitStack() as stack:
        middle = stack.enter_context(session(helena_dsn))
        root = stack.enter_context(holding(helena_dsn, "SELECT count(*) FROM messages"))
        alter = stack.enter_context(running(helena_dsn, "ALTER TABLE messages ADD COLUMN more int"))
        await_waiting(own, 1)
        middle.execute("BEGIN; LOCK TABLE documents")
        stack.enter_context(stuck(middle, "SELECT count(*) FROM messages"))
        await_waiting(own, 2)
        last = stack.enter_context(running(helena_dsn, "SELECT count(*) FROM documents"))
        health, pid = waits(own, 3), middle.info.backend_pid
    (found,) = health.blocking
    assert (found.pid, found.holds_up) == (root, 3)
    assert (found.state, found.query) == ("idle in transaction", "SELECT count(*) FROM messages")
    # The second reader waits for the ALTER before it in the queue, which holds nothing itself.
    assert {one.pid: one.blocked_by for one in health.waiting} == {
        alter: (root,),
        pid: (alter,),
        last: (pid,),
    }
    assert all(one.seconds is not None for one in health.waiting)


def test_a_waiting_lock_keeps_readers_off_as_a_held_one_does(own: Session, helena_dsn: str):
    with session(helena_dsn) as reader, reader.transaction():
        reader.execute("SELECT count(*) FROM messages")
        with running(helena_dsn, "ALTER TABLE messages ADD COLUMN more int"):
            health = waits(own, 1)
    (messages,) = [table for table in health.tables if table.table == "messages"]
    assert messages.locked == f"pid {health.waiting[0].pid} waits for its lock"


def test_statistics_of_a_locked_table_are_read_all_the_same(own: Session, helena_dsn: str):
    own.execute("INSERT INTO documents (file_path) SELECT n::text FROM generate_series(1, 500) n")
    own.execute("DELETE FROM documents WHERE file_path LIKE '%9'")
    own.execute("VACUUM ANALYZE documents")
    with session(helena_dsn) as holder, holder.transaction():
        holder.execute("LOCK TABLE documents")
        culprit = holder.info.backend_pid
        until(lambda: state(own, "documents").last_vacuum is not None)
        found = state(own, "documents")
    assert (found.rows, found.dead_rows) == (450, 0)
    assert found.bytes is not None
    assert found.bytes > 8192
    assert found.last_analyze is not None
    assert found.locked == f"locked by pid {culprit}"


def state(own: Session, table: str) -> TableState:
    return next(one for one in probe(own, [table]).tables if one.table == table)


def test_the_tables_of_the_positions_and_of_the_caller_are_watched_too(own: Session):
    own.execute("CREATE SCHEMA side; CREATE TABLE side.one (n int); CREATE TABLE two (n int)")
    own.execute("CREATE TABLE parted (n int) PARTITION BY LIST (n)")
    own.execute("CREATE TABLE part PARTITION OF parted DEFAULT")
    own.execute("INSERT INTO helena.spool_position (spool_id, table_name) VALUES ('a', 'side.one')")
    seen = {table.table for table in probe(own, ["two", "parted", "absent"]).tables}
    assert {"side.one", "two", "part", "messages", "helena.spool_position"} <= seen
    assert "parted" not in seen


def test_locked_positions_leave_the_rest_readable(own: Session, helena_dsn: str):
    with session(helena_dsn) as holder, holder.transaction():
        holder.execute("LOCK TABLE helena.spool_position")
        health = probe(own)
        assert dict(health.unknown) == {"hosts": f"locked by pid {holder.info.backend_pid}"}
    assert health.prepared
    assert health.gin


def test_a_prepared_transaction_is_named_as_the_culprit(postgres: str, own_server: Cluster):
    own_server.settings["max_prepared_transactions"] = "2"
    own_server.start()
    with session(own_server.dsn) as connection:
        connection.execute("CREATE TABLE documents (file_path text)")
        connection.execute("BEGIN; LOCK TABLE documents; PREPARE TRANSACTION 'forgotten'")
        with running(own_server.dsn, "SELECT count(*) FROM documents"):
            health = waits(connection, 1)
        connection.execute("ROLLBACK PREPARED 'forgotten'")
    (found,) = health.blocking
    assert (found.pid, found.state, found.holds_up) == (0, "prepared transaction", 1)
    assert "forgotten" in str(found.query)
    assert health.tables[0].locked == "locked by a prepared transaction"


# Connections


def test_the_limits_of_role_and_database_are_read(own: Session, helena_dsn: str):
    role = f"helena_few_{own.info.backend_pid}"
    name = sql.Identifier(own.info.dbname)
    own.execute(
        sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'x' CONNECTION LIMIT 4").format(sql.Identifier(role))
    )
    own.execute(sql.SQL("ALTER DATABASE {} CONNECTION LIMIT 9").format(name))
    with session(make_conninfo(helena_dsn, user=role, password="x")) as plain:
        slots = probe(plain).connections
    own.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert (slots.role_used, slots.role_max) == (1, 4)
    assert (slots.database_used, slots.database_max) == (2, 9)


def test_who_holds_the_connections_is_named(own: Session, helena_dsn: str):
    with ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(session(helena_dsn, "greedy"))
        (first, *_) = probe(own).holders
    assert (first.application, first.count) == ("greedy", 4)


# GIN


@pytest.mark.usefixtures("pgstattuple")
def test_each_pending_list_is_seen_against_the_limit_of_its_own_index(own: Session):
    own.execute("CREATE TABLE tagged (a text[], b text[], c text[])")
    own.execute("CREATE INDEX own_limit ON tagged USING gin (a) WITH (gin_pending_list_limit=64)")
    own.execute("CREATE INDEX usual ON tagged USING gin (b)")
    own.execute("CREATE INDEX never ON tagged USING gin (c) WITH (fastupdate = off)")
    own.execute("SET gin_pending_list_limit = '128kB'")
    own.execute("INSERT INTO tagged VALUES ('{a,b}', '{c,d}', '{e,f}')")
    found = {index.index: index for index in probe(own, ["tagged"]).gin}
    assert (found["own_limit"].limit_pages, found["usual"].limit_pages) == (8, 16)
    assert (found["own_limit"].pending_pages, found["usual"].pending_pages) == (1, 1)
    assert (found["never"].pending_pages, found["never"].fastupdate) == (0, False)


def test_a_superuser_without_pgstattuple_reads_them_by_pageinspect(own: Session):
    try:
        own.execute("CREATE SCHEMA tools; CREATE EXTENSION pageinspect SCHEMA tools")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("This server has no pageinspect.")
    own.execute(
        "INSERT INTO messages (id, sender, message_type, content, tags)"
        " VALUES ('a', 'b', 'c', 'd', '{e}')"
    )
    found = {index.index: index.pending_pages for index in probe(own).gin}
    assert found["messages_tags_idx"] == 1


@pytest.mark.usefixtures("pgstattuple")
def test_a_role_that_may_not_use_pgstattuple_is_told_what_it_needs(own: Session, helena_dsn: str):
    role = f"helena_plain_{own.info.backend_pid}"
    own.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        for grant, reason in (
            (None, "permission denied for schema tools"),
            ("GRANT USAGE ON SCHEMA tools TO {}", "needs pg_monitor"),
            ("GRANT pg_monitor TO {}", ""),
        ):
            if grant:
                own.execute(sql.SQL(grant).format(sql.Identifier(role)))
            with session(helena_dsn) as plain:
                plain.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
                (index, *_) = probe(plain).gin
            assert reason in str(index.reason)
            assert (index.pending_pages is None) == bool(reason)
    finally:
        own.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(role)))


# Whatever happens


def test_without_time_left_every_question_says_so(own: Session):
    health = probe(own, seconds=0)
    assert health.response_ms is None
    assert {*health.unknown} >= {"active_queries", "lock_waits", "connections", "tables", "gin"}
    assert {*health.unknown.values()} == {"there was no time left to ask"}


def test_a_question_that_does_not_end_leaves_the_others_their_time(own: Session):
    own.execute("ALTER TABLE helena.spool_position RENAME TO moved")
    own.execute(
        "CREATE VIEW helena.spool_position AS"
        " SELECT m.* FROM pg_sleep(60) s LEFT JOIN helena.moved m ON true"
    )
    health = probe(own, seconds=10)
    assert health.unknown == {"hosts": "it took too long and was given up"}
    assert health.tables
    assert health.gin


def test_a_question_that_runs_into_a_lock_does_not_wait_for_it(own: Session, helena_dsn: str):
    """Not for as long as would make the server cancel an autovacuum."""
    own.execute("ALTER TABLE helena.spool_position RENAME TO moved")
    # The lock is not on what is asked, so that nothing warns of it.
    own.execute("CREATE VIEW helena.spool_position AS SELECT * FROM helena.moved")
    with holding(helena_dsn, "LOCK TABLE helena.moved IN ACCESS EXCLUSIVE MODE"):
        health = probe(own, seconds=10)
    assert health.unknown == {"hosts": "it waits for a lock"}
    assert health.tables


def test_what_is_known_is_published_at_once(own: Session):
    seen: list[Health] = []
    last = probe(own, publish=seen.append)
    assert seen[-1] == last
    assert seen[0].response_ms is not None
    assert seen[0].unknown["gin"] == "it did not answer in time"
    assert len(seen[0].unknown) > len(seen[-2].unknown) > len(last.unknown) == 0


def test_queries_that_the_server_does_not_track_are_unknown(own: Session, helena_dsn: str):
    with session(make_conninfo(helena_dsn, options="-c track_activities=off")):
        health = probe(own)
    assert health.active_queries is None
    assert "track_activities" in health.unknown["active_queries"]
