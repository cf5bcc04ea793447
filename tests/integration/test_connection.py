"""Connecting: what a failure says, and what a connection may not need."""

import socket
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from helena_cli.database import embedded, schema
from helena_cli.database.connection import Target, connect, translate
from helena_cli.errors import (
    DatabaseRefused,
    DatabaseUnreachable,
    ExitCode,
    HelenaError,
    SchemaMissing,
)
from tests.cluster import Cluster

WRONG = "wr0ng-passw0rd"


def target(dsn: str, **more) -> Target:
    return Target(dsn=dsn, label="me@there/shop", key="k", **more)


@pytest.fixture(scope="module", params=["embedded", "installed"])
def guarded(request) -> Iterator[Cluster]:
    """Servers of two releases with roles and databases that cannot be had."""
    if request.param == "embedded":
        binaries = embedded.binaries()
    else:
        binaries = next(Path("/usr/lib/postgresql").glob("*/bin"), None)
    if binaries is None:
        pytest.skip("The binaries are not installed.")
    cluster = Cluster(binaries, tcp=True, settings={"max_connections": "8"})
    try:
        cluster.start()
        with psycopg.connect(cluster.dsn, autocommit=True) as connection:
            for statement in (
                "CREATE ROLE plain LOGIN",
                "CREATE ROLE full_up LOGIN CONNECTION LIMIT 0",
                "CREATE ROLE sleeper NOLOGIN",
                "CREATE DATABASE shut ALLOW_CONNECTIONS false",
                "CREATE DATABASE private",
                "REVOKE CONNECT ON DATABASE private FROM PUBLIC",
            ):
                connection.execute(statement)
        yield cluster
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("parameters", "said", "remedy"),
    [
        ({"password": WRONG}, "password authentication failed", "~/.pgpass"),
        ({"dbname": "nope"}, '"nope" does not exist', "createdb"),
        ({"host": "", "user": "nope"}, '"nope" does not exist', "CREATE ROLE"),
        ({"host": "", "user": "sleeper"}, "not permitted to log in", "LOGIN"),
        ({"host": "", "user": "full_up"}, "too many connections", "helena clear-locks"),
        ({"dbname": "shut"}, "not currently accepting", "closed for now"),
        ({"host": "", "user": "plain", "dbname": "private"}, "permission", "GRANT CONNECT"),
        ({"port": "1"}, "Connection refused", "No server listens there"),
        ({"host": "/nowhere"}, "No such file", "No server listens there"),
        ({"host": "no.such.host.invalid"}, "no.such.host.invalid", "name of the host is unknown"),
        ({"host": "x" * 70 + ".invalid"}, "too long", "name of the host is unknown"),
        ({"sslmode": "require"}, "SSL was required", "sslmode"),
        ({"target_session_attrs": "standby"}, "not in hot standby mode", "target_session_attrs"),
    ],
)
def test_a_failed_connection_says_why_and_what_to_do(guarded, parameters, said, remedy):
    # host="" here: the socket, where nobody is asked for a password.
    if parameters.get("host") == "":
        parameters = parameters | {"host": str(guarded.folder)}
    dsn = make_conninfo(guarded.tcp_dsn, **parameters)
    with pytest.raises(DatabaseUnreachable) as failure:
        connect(target(dsn, connect_timeout=10), application="test")
    error = failure.value
    assert said in str(error)
    assert "me@there/shop" in str(error)
    assert remedy in error.remedy
    assert error.exit_code is ExitCode.UNREACHABLE
    assert WRONG not in str(error)
    assert guarded.password not in str(error)
    # Nor in the chain of causes.
    assert error.__cause__ is None
    assert error.__suppress_context__


def test_taken_connections_are_told_from_other_failures_in_both_wordings(guarded):
    holders: list[psycopg.Connection] = []
    try:
        for user, wording in (("plain", "reserved"), ("postgres", "too many clients")):
            dsn = make_conninfo(guarded.dsn, user=user)
            with pytest.raises(DatabaseUnreachable, match=wording) as failure:
                for _ in range(9):
                    holders.append(connect(target(dsn), application="test"))
            assert "All connections are taken" in failure.value.remedy
    finally:
        for holder in holders:
            holder.close()


def test_a_server_that_accepts_and_says_nothing_is_given_up(guarded):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        dsn = make_conninfo(guarded.tcp_dsn, port=silent.getsockname()[1])
        with pytest.raises(DatabaseUnreachable, match="timeout") as failure:
            connect(target(dsn, connect_timeout=0.1), application="test")
    assert "connect_timeout" in failure.value.remedy


def test_a_password_in_the_words_of_the_server_is_blotted_out(guarded):
    dsn = make_conninfo(guarded.tcp_dsn, dbname="hunter22", password="hunter22")
    with pytest.raises(DatabaseUnreachable) as failure:
        connect(target(make_conninfo(dsn, user="hunter22")), application="test")
    assert "hunter22" not in str(failure.value)


def test_the_first_of_several_hosts_that_answers_is_taken(guarded):
    dsn = make_conninfo(
        guarded.tcp_dsn,
        host="127.0.0.1,127.0.0.1",
        port=f"1,{guarded.port}",
        target_session_attrs="read-write",
    )
    with connect(target(dsn), application="test") as connection:
        assert connection.info.port == guarded.port


def test_a_connection_says_who_it_is_and_keeps_no_state(guarded):
    dsn = make_conninfo(guarded.tcp_dsn, application_name="mine", client_encoding="latin1")
    with connect(target(dsn), application="flush") as connection:
        assert connection.autocommit
        assert connection.prepare_threshold is None
        assert connection.info.encoding == "utf-8"
        assert connection.info.get_parameters()["application_name"] == "helena flush"
        assert "options" not in connection.info.get_parameters()
        sent = connection.execute("SHOW application_name").fetchone()
        assert sent == ("helena flush",)
    with connect(target(dsn), application="flush", autocommit=False) as connection:
        assert not connection.autocommit


def test_keepalives_of_the_address_win_over_ours(guarded):
    dsn = make_conninfo(guarded.tcp_dsn, keepalives_idle=77)
    with connect(target(dsn), application="test") as connection:
        parameters = connection.info.get_parameters()
    assert parameters["keepalives_idle"] == "77"
    assert parameters["tcp_user_timeout"] == "30000"


def test_the_embedded_target_is_never_taken_for_libpqs_defaults():
    with pytest.raises(RuntimeError, match="not started"):
        connect(target("", embedded=True), application="test")


def _translated(connection: psycopg.Connection, statement: str) -> HelenaError:
    with pytest.raises(psycopg.Error) as failure:
        connection.execute(statement)
    return translate(failure.value)


def test_refusals_carry_sqlstate_and_remedy(guarded):
    with connect(target(guarded.dsn), application="test") as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS secret (id serial)")
        connection.execute("SET ROLE plain")
        error = _translated(connection, "SELECT * FROM secret")
        assert isinstance(error, DatabaseRefused)
        assert error.sqlstate == "42501"
        assert "GRANT SELECT, INSERT, UPDATE ON TABLE secret" in error.remedy
        error = _translated(connection, "SELECT nextval('secret_id_seq')")
        assert "GRANT USAGE ON SEQUENCE secret_id_seq" in error.remedy
        connection.execute("RESET ROLE")
        for statement, sqlstate, remedy in (
            ("SELECT * FROM nowhere", "42P01", "Create the table"),
            ("SET statement_timeout = '1ms'; SELECT pg_sleep(1)", "57014", "clear-locks"),
            ("RESET statement_timeout; SELECT 1/0", "22012", "mend the value"),
            ("SELECT FROM nonsense nonsense nonsense", "42601", "PostgreSQL's own"),
            ("BEGIN READ ONLY; CREATE TABLE t ()", "25006", "target_session_attrs"),
        ):
            error = _translated(connection, statement)
            assert isinstance(error, DatabaseRefused)
            assert (error.sqlstate, remedy in error.remedy) == (sqlstate, True), statement


def test_a_lost_connection_is_unreachable_however_it_was_lost(helena_dsn, proxy):
    with connect(target(helena_dsn), application="test") as killer:
        with connect(target(helena_dsn), application="test") as victim:
            killer.execute("SELECT pg_terminate_backend(%s)", [victim.info.backend_pid])
            assert isinstance(_translated(victim, "SELECT 1"), DatabaseUnreachable)
            # And once more on the connection that is known to be broken.
            assert isinstance(_translated(victim, "SELECT 1"), DatabaseUnreachable)
        with connect(target(proxy.dsn), application="test") as victim:
            proxy.cut()
            assert isinstance(_translated(victim, "SELECT 1"), DatabaseUnreachable)


def test_helenas_own_tables_missing_means_init(dsn):
    with connect(target(dsn), application="test") as connection:
        assert isinstance(_translated(connection, "SELECT * FROM helena.meta"), SchemaMissing)
        connection.execute("CREATE SCHEMA helena")
        assert isinstance(_translated(connection, "SELECT * FROM helena.meta"), SchemaMissing)
        error = _translated(connection, "SELECT * FROM nohelena.meta")
        assert isinstance(error, DatabaseRefused)


def test_the_proxy_loses_the_answer_to_a_commit_that_happened(helena_dsn, proxy):
    with connect(target(proxy.dsn), application="test", autocommit=False) as connection:
        connection.execute("INSERT INTO documents (file_path) VALUES ('x')")
        proxy.drop_next_answer(b"COMMIT")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    assert proxy.dropped.wait(10)
    with connect(target(helena_dsn), application="test") as connection:
        assert connection.execute("SELECT file_path FROM documents").fetchone() == ("x",)


def test_the_proxy_stops_and_comes_back_on_the_same_port(proxy):
    proxy.stop()
    with pytest.raises(DatabaseUnreachable, match="refused"):
        connect(target(proxy.dsn), application="test")
    proxy.start()
    proxy.stalled = True
    with pytest.raises(DatabaseUnreachable, match="timeout"):
        connect(target(proxy.dsn, connect_timeout=2), application="test")
    proxy.stalled = False
    with connect(target(proxy.dsn), application="test") as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_everything_works_through_a_pooler_in_transaction_mode(pgbouncer):
    first = connect(target(pgbouncer), application="flush")
    second = connect(target(pgbouncer), application="maintenance")
    with first, second:
        assert schema.initialise(first)
        assert schema.initialise(second) == []
        for number in range(20):
            # One server connection for both: a prepared statement of one would trip the other.
            for connection in (first, second):
                with connection.transaction():
                    row = connection.execute("SELECT %s::int + 1", [number]).fetchone()
                    assert row == (number + 1,)


def test_a_full_pooler_is_told_from_other_failures(pgbouncer):
    holders: list[psycopg.Connection] = []
    with pytest.raises(DatabaseUnreachable, match="no more connections allowed") as failure:
        for _ in range(5):
            holders.append(connect(target(pgbouncer), application="test"))
    assert "All connections are taken" in failure.value.remedy
    for holder in holders:
        holder.close()
