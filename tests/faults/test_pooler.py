"""A pooler in front of the server, and servers that restart, change over or change the password."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from helena_cli.database import schema
from tests.cluster import Cluster
from tests.commands import Program
from tests.hosts import PROJECT, Host, Producer, wait_until
from tests.ports import free_port

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres, pytest.mark.slow]

#: All that writes into a database, by its own tests.
INGEST = [
    "test_exactly_once",
    "test_writer",
    "test_writer_failures",
    "test_operation_values",
    "test_records",
    "test_engine",
    "test_bulk_load",
    "test_straight",
]

#: What these tests themselves do to a session cannot be done through a pooler: SET ROLE, logins
#: of other roles, looks at the session and at its name, the same look so often that it is prepared.
NEED_A_SESSION = [
    "a_seal_that_fails_leaves_the_database_as_it_was",
    "leaves_nothing_in_the_session",
    "a_role_that_may_not_create_anything",
    "a_missing_right",
    "may_not_be_used",
    "policy",
    "for_a_right",
    "rights_on_the_given_columns",
    "the_right_to_insert_is_enough",
    "forbidden",
    "a_role_without_rights",
    "a_lost_connection_is_replaced",
    "connections_say_who_they_are",
    "a_missing_table_waits_and_says_so",
    "a_child_that_comes_before_its_parent",
    "written_after_the_interval_without_another_call",
]

SMALL = {"HELENA_BATCH_SIZE": "20", "HELENA_BATCH_INTERVAL": "0.05"}


@contextmanager
def traffic(host: Host) -> Iterator[Producer]:
    going = Producer(host, **SMALL)
    with going.process:
        try:
            yield going
        finally:
            going.process.kill()


def assert_written(host: Host, count: int, figures: Counter[str], what: str) -> None:
    """All numbers are there, once, after another process has written what was left."""
    with host.runtime() as runtime:
        assert runtime.engine.flush(60), runtime.engine.failure
    host.assert_written_once(count)
    figures[f"operations checked: {what}"] += count


@pytest.fixture
def server(own_server: Cluster) -> Cluster:
    own_server.start()
    initialise(own_server.dsn)
    return own_server


def initialise(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        schema.initialise(connection)


class Pooler:
    """A PgBouncer in transaction mode in front of a server."""

    def __init__(self, server: Cluster, folder: Path) -> None:
        self._server, self._folder = server, folder
        self.port = free_port()
        self.dsn = make_conninfo(
            server.tcp_dsn, port=self.port, password="", sslmode="disable", gssencmode="disable"
        )

    def __enter__(self) -> "Pooler":
        config = self._folder / "pgbouncer.ini"
        password, port = self._server.password, self._server.port
        config.write_text(
            f"[databases]\n* = host=127.0.0.1 port={port} user=postgres password={password}\n"
            "[pgbouncer]\npool_mode = transaction\ndefault_pool_size = 20\n"
            "server_idle_timeout = 1\nserver_login_retry = 1\nauth_type = any\n"
            # The tests send it, Helena does not.
            "ignore_startup_parameters = options\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
        )
        account: dict[str, Any] = {}
        if os.geteuid() == 0:
            account = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid}
            self._folder.chmod(0o755)
            os.chown(config, *pwd.getpwnam("nobody")[2:4])
        self._log = (self._folder / "pgbouncer.log").open("w")
        self._process = subprocess.Popen(
            ["pgbouncer", config], stdout=self._log, stderr=self._log, **account
        )
        wait_until(lambda: answers(self.port), "PgBouncer")
        return self

    def __exit__(self, *_: object) -> None:
        with self._process, self._log:
            self._process.terminate()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def pooler(server: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pooler]:
    if shutil.which("pgbouncer") is None:
        pytest.skip("PgBouncer is not installed.")
    folder = tmp_path_factory.mktemp("pooler")
    for parent in (folder.parent, folder.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o011)
    with Pooler(server, folder) as pooler:
        yield pooler


def test_the_tests_of_writing_pass_through_a_pooler_in_transaction_mode(
    pooler: Pooler, minutes: float, figures: Counter[str]
):
    # In the short form those of which most depends on the session.
    names = INGEST if minutes > 0.5 else INGEST[:1]
    files = [str(PROJECT / "tests" / "integration" / f"{name}.py") for name in names]
    without = " and ".join(f"not {name}" for name in NEED_A_SESSION)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", without],
        env=os.environ | {"HELENA_TEST_DSN": pooler.dsn},
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    passed = result.stdout.split(" passed")[0].split()[-1]
    figures["tests passed through a pooler"] += int(passed)


def test_a_trial_through_a_pooler_passes_and_says_what_it_could_not_try(
    pooler: Pooler, state_dir: Path
):
    program = Program(state_dir, state_dir, pooler.dsn)
    program.variables["HELENA_BATCH_INTERVAL"] = "1"
    document = json.loads(program.run("test", "--ops", "20", "--json").stdout)
    steps = document["steps"]
    assert "through a pooler" in steps[0]["detail"]
    assert [step for step in steps if not step["passed"]] == []
    assert [step["name"] for step in steps if not step["tried"]] == ["lost connection"]


def test_a_server_behind_a_pooler_that_restarts_loses_and_doubles_nothing(
    pooler: Pooler, server: Cluster, state_dir: Path, figures: Counter[str]
):
    host = Host(pooler.dsn, state_dir, admin=server.dsn)
    host.close()
    with traffic(host) as going:
        for mode in ("fast", "immediate"):
            going.produce()
            server.restart(mode)
        going.produce()
        count = going.finish()
    host = Host(pooler.dsn, state_dir, admin=server.dsn)
    assert_written(host, count, figures, "restarts behind a pooler")
    host.close()


def test_a_session_that_the_server_ends_for_idleness_costs_nothing(
    server: Cluster, state_dir: Path, figures: Counter[str]
):
    host = Host(server.tcp_dsn, state_dir, admin=server.dsn)
    host.sql("ALTER DATABASE postgres SET idle_session_timeout = '50ms'")
    host.sql("SET idle_session_timeout = 0")
    ours = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'helena flush'"
    with host.runtime() as runtime:
        for number in range(5):
            runtime.engine.add_operation("insert", "numbers", {"n": number})
            assert runtime.engine.flush(60), runtime.engine.failure
            wait_until(lambda: host.sql(ours) == [(0,)], "the end of the idle session")
    assert_written(host, 5, figures, "idle sessions that were ended")
    host.close()


def test_a_password_that_changes_is_read_anew_without_a_restart(
    server: Cluster, state_dir: Path, figures: Counter[str]
):
    passwords = state_dir / "passwords"

    def tell(password: str) -> None:
        passwords.touch(0o600)
        passwords.write_text(f"127.0.0.1:{server.port}:*:postgres:{password}\n")

    parameters = conninfo_to_dict(server.tcp_dsn)
    del parameters["password"]
    dsn = make_conninfo("", **parameters, passfile=str(passwords))
    tell(server.password)
    host = Host(dsn, state_dir, admin=server.dsn)
    others = "pid <> pg_backend_pid() AND usename IS NOT NULL"
    with traffic(host) as going:
        going.produce()
        host.sql("ALTER ROLE postgres PASSWORD 'sesame'")
        host.sql(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")
        going.produce()
        tell("sesame")
        going.produce()
        count = going.finish()
    assert_written(host, count, figures, "a changed password")
    host.close()


@pytest.fixture
def standby(server: Cluster) -> Iterator[Cluster]:
    """A second server that has all that the first one has committed."""
    standby = Cluster(server.binaries, tcp=True)
    try:
        # The server's log and data of the first are its own user's, as those of the copy will be.
        standby._run(
            "pg_basebackup", "-D", "data", "-d", server.dsn, "-R", "-X", "stream", "-c", "fast"
        )
        with (standby.folder / "data" / "postgresql.conf").open("a") as conf:
            conf.write(f"port = {standby.port}\nunix_socket_directories = '{standby.folder}'\n")
        standby.start()
        with psycopg.connect(server.dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
        yield standby
    finally:
        standby.close()


def test_a_failover_to_a_standby_loses_and_doubles_nothing(
    server: Cluster, standby: Cluster, state_dir: Path, figures: Counter[str]
):
    dsn = make_conninfo(
        server.tcp_dsn,
        host="127.0.0.1,127.0.0.1",
        port=f"{server.port},{standby.port}",
        target_session_attrs="read-write",
    )
    host = Host(dsn, state_dir, admin=server.dsn)
    host.close()
    with traffic(host) as going:
        going.produce()
        server.stop("immediate")
        going.produce()
        standby._run("pg_ctl", "-D", "data", "-w", "promote")
        with psycopg.connect(standby.dsn, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")
        going.produce()
        count = going.finish()
    host = Host(dsn, state_dir, admin=standby.dsn)
    assert_written(host, count, figures, "a failover")
    host.close()
