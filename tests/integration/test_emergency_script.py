"""scripts/emergency_fix.sh against real servers that really hang, and real processes."""

import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from helena_cli.database import schema
from tests import databases
from tests.cluster import Cluster
from tests.hosts import PROJECT, wait_until
from tests.proxy import Proxy

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed."),
]

SCRIPT = PROJECT / "scripts" / "emergency_fix.sh"
LOCK = "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"
MESSAGE = "INSERT INTO messages (id, sender, message_type, content, tags) "


def shell(name: str, *arguments: str) -> Any:
    absent = pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed.")
    return pytest.param((name, *arguments), marks=absent, id=name)


SHELLS = [
    *(shell("dash"), shell("bash"), shell("bash", "--posix"), shell("busybox", "sh")),
    *(shell("mksh"), shell("ksh93"), shell("yash")),
]


class Scene:
    """A database with Helena's tables, sessions in it, and the script that puts it right."""

    def __init__(self, server: str, folder: Path) -> None:
        self.folder = folder
        self.server = psycopg.connect(server, autocommit=True)
        self.name = f"helena_{secrets.token_hex(6)}"
        databases.create(self.server, self.name)
        self.dsn = make_conninfo(server, dbname=self.name)
        self.admin = psycopg.connect(self.dsn, autocommit=True)
        schema.initialise(self.admin)
        self.sessions = [self.admin]
        self.roles: list[str] = []

    def close(self) -> None:
        for role in self.roles:
            self.admin.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        for session in self.sessions:
            session.close()
        drop = sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self.name))
        self.server.execute(drop)
        for role in self.roles:
            self.server.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
        self.server.close()

    def connect(self, *statements: str, dsn: str | None = None, **options: Any) -> Any:
        """A session in which these statements were run."""
        session = psycopg.connect(dsn or self.dsn, **options)
        self.sessions.append(session)
        for statement in statements:
            session.execute(statement.encode())
        return session

    def start(self, statement: str, **options: Any) -> Any:
        """A session that runs a statement whose end is not waited for."""
        session = self.connect(autocommit=True, **options)
        session.pgconn.send_query(statement.encode())
        return session

    def role(self, *grants: str, dsn: str | None = None) -> str:
        """The conninfo of a new role, with the membership in these."""
        name = f"helena_{secrets.token_hex(6)}"
        password = secrets.token_hex(8)
        self.admin.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'".encode())
        self.roles.append(name)
        for grant in grants:
            self.admin.execute(f"GRANT {grant} TO {name}".encode())
        return make_conninfo(dsn or self.dsn, user=name, password=password)

    def one(self, query: str) -> Any:
        row = self.admin.execute(query.encode()).fetchone()
        return row[0] if row else None

    def waiting(self) -> int:
        return int(self.one("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"))

    def wait_for_waiting(self, number: int) -> None:
        wait_until(lambda: self.waiting() == number, f"{number} sessions wait")

    def hang(self, waiters: int = 20) -> tuple[Any, list[Any]]:
        """Who holds up everybody else, and everybody else, a queued ALTER TABLE first."""
        root = self.connect(LOCK)
        others = [self.start("ALTER TABLE messages ADD COLUMN IF NOT EXISTS more int")]
        self.wait_for_waiting(1)
        others += [self.start("SELECT count(*) FROM messages") for _ in range(waiters)]
        self.wait_for_waiting(1 + waiters)
        return root, others

    def pending(self, index: str = "messages_tags_idx") -> int:
        self.admin.execute("CREATE EXTENSION IF NOT EXISTS pgstattuple")
        return int(self.one(f"SELECT pending_tuples FROM pgstatginindex('{index}')"))

    def run(self, *arguments: str, code: int = 0, dsn: str | None = None, **options: Any) -> str:
        """Run the script on this database to its end; what it prints."""
        return run(self.folder, *arguments, code=code, dsn=dsn or self.dsn, **options)


def run(
    folder: Path,
    *arguments: str,
    code: int = 0,
    interpreter: tuple[str, ...] = ("sh",),
    dsn: str = "",
    **variables: str,
) -> str:
    """Run the script to its end with nothing but these variables; what it prints."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "DATABASE_URL": dsn,
        "HELENA_EMERGENCY_WAIT": "0",
        # Nobody's processes but the test's.
        "HELENA_REALTIME_PROCESSES": "no_such_writer",
    }
    result = subprocess.run(
        [*interpreter, SCRIPT, *arguments],
        env=environment | variables,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
    )
    assert result.returncode == code, result.stdout
    return result.stdout


@pytest.fixture(params=["postgres", "postgres15"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(request.getfixturevalue(request.param), tmp_path)
    yield scene
    scene.close()


@pytest.fixture
def quiet_scene(postgres: str, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(postgres, tmp_path)
    yield scene
    scene.close()


def answer(session: Any) -> Any:
    """Waits for the answer to a statement that was started: its SQLSTATE, or None for success."""
    result = session.pgconn.get_result()
    state = result.error_field(psycopg.pq.DiagnosticField.SQLSTATE)
    while session.pgconn.get_result():
        pass
    return state.decode() if state else None


def hurried(folder: Path) -> str:
    """A PATH on which the script's seconds pass sooner: for waits that are known to be in vain."""
    tools = folder / "hurried"
    tools.mkdir()
    (tools / "sleep").write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 0.3\n")
    (tools / "sleep").chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


def alive(session: Any) -> bool:
    try:
        session.execute("SELECT 1")
    except psycopg.Error:
        return False
    return True


# Ending sessions


def test_all_who_are_held_up_are_freed_and_nobody_else_is_touched(scene: Scene):
    bystanders = [
        scene.connect(autocommit=True),
        scene.connect("SELECT 1"),
        scene.connect("SELECT count(*) FROM agent_contexts"),
        scene.connect("SELECT pg_advisory_lock(4711)"),
    ]
    candidate = scene.start("SELECT pg_advisory_lock(4711)")
    scene.wait_for_waiting(1)
    bystanders[3].commit()
    root = scene.connect(LOCK)
    others = [scene.start("ALTER TABLE messages ADD COLUMN more int")]
    scene.wait_for_waiting(2)
    others += [scene.start("SELECT count(*) FROM messages") for _ in range(20)]
    scene.wait_for_waiting(22)
    output = scene.run("activity", "sessions", "result")
    assert f"{root.info.backend_pid} terminated: idle in transaction for" in output
    assert f"held up 21 ({root.info.user})\n        {LOCK}" in output
    assert output.count("terminated:") == 1
    assert "cancelled:" not in output
    assert not alive(root)
    assert {answer(session) for session in others} == {None}
    assert all(alive(session) for session in bystanders)
    bystanders[3].execute("SELECT pg_advisory_unlock(4711)")
    assert answer(candidate) is None


def test_a_queued_alter_is_cancelled_and_who_reads_goes_on(scene: Scene):
    reader = scene.connect("SELECT count(*) FROM messages")
    alter = scene.start("ALTER TABLE messages ADD COLUMN more int")
    scene.wait_for_waiting(1)
    others = [scene.start("SELECT count(*) FROM messages") for _ in range(5)]
    scene.wait_for_waiting(6)
    output = scene.run("sessions")
    assert f"{alter.info.backend_pid} cancelled:" in output
    assert output.count("cancelled:") == 1
    assert "terminated:" not in output
    assert answer(alter) == "57014"
    assert {answer(session) for session in others} == {None}
    assert alive(reader)


def test_of_a_chain_only_the_first_one_is_ended(scene: Scene):
    scene.admin.execute(
        f"{MESSAGE} SELECT n::text, 's', 't', '', '{{}}' FROM generate_series(1, 2) n"
    )
    root = scene.connect("DELETE FROM messages WHERE id = '1'")
    middle = scene.connect("DELETE FROM messages WHERE id = '2'")
    middle.pgconn.send_query(b"UPDATE messages SET sender = 'm' WHERE id = '1'")
    scene.wait_for_waiting(1)
    last = scene.start("UPDATE messages SET sender = 'l' WHERE id = '2'")
    scene.wait_for_waiting(2)
    # The one in the middle is given time to commit.
    wait_until(lambda: longest(scene) > 2, "they wait for two seconds")
    output = scene.run("sessions", HELENA_EMERGENCY_WAIT="2")
    assert f"{root.info.backend_pid} terminated:" in output
    assert not alive(root)
    assert "cancelled:" not in output
    assert output.count("terminated:") == 1
    assert answer(middle) is None
    middle.commit()
    assert answer(last) is None


def test_who_has_waited_for_a_moment_only_is_not_held_up(quiet_scene: Scene):
    root = quiet_scene.connect(LOCK)
    age = (
        "SELECT extract(epoch FROM clock_timestamp() - state_change)"
        f" FROM pg_stat_activity WHERE pid = {root.info.backend_pid}"
    )
    wait_until(lambda: quiet_scene.one(age) >= 4, "the session idles for four seconds")
    waiter = quiet_scene.start("SELECT count(*) FROM messages")
    quiet_scene.wait_for_waiting(1)
    assert "nothing to end" in quiet_scene.run("sessions", HELENA_EMERGENCY_WAIT="4")
    assert alive(root)
    root.rollback()
    assert answer(waiter) is None


def test_a_query_that_runs_too_long_is_cancelled_and_its_session_stays(scene: Scene):
    root = scene.connect(LOCK)
    victim = scene.start("SELECT count(*) FROM messages")
    scene.wait_for_waiting(1)
    sleeper = scene.start("SELECT pg_sleep(300)")
    short = scene.connect(autocommit=True)
    wait_until(lambda: longest(scene, "%sleep%") >= 2, "a query runs for two seconds")
    output = scene.run("sessions", HELENA_EMERGENCY_SECONDS="1", HELENA_EMERGENCY_WAIT="60")
    assert f"{sleeper.info.backend_pid} cancelled: active for" in output
    assert "SELECT pg_sleep(300)" in output
    assert output.count("cancelled:") == 1
    assert answer(sleeper) == "57014"
    assert alive(sleeper)
    assert alive(short)
    assert alive(root)
    root.rollback()
    assert answer(victim) is None


def longest(scene: Scene, query: str = "%") -> float:
    return float(
        scene.one(
            "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - query_start)), 0)"
            "  FROM pg_stat_activity"
            " WHERE state = 'active' AND datname = current_database() AND pid <> pg_backend_pid()"
            f"  AND query LIKE '{query}'"
        )
    )


def test_a_query_that_swallows_the_cancel_is_terminated(quiet_scene: Scene):
    deaf = quiet_scene.start(
        "DO $$BEGIN LOOP BEGIN PERFORM pg_sleep(300);"
        " EXCEPTION WHEN query_canceled THEN NULL; END; END LOOP; END$$"
    )
    wait_until(lambda: longest(quiet_scene) >= 2, "a query runs for two seconds")
    path = hurried(quiet_scene.folder)
    output = quiet_scene.run("sessions", HELENA_EMERGENCY_SECONDS="1", PATH=path)
    assert f"{deaf.info.backend_pid} cancelled:" in output
    assert f"{deaf.info.backend_pid} terminated:" in output
    assert answer(deaf) == "57P01"


def test_a_running_vacuum_is_left_alone(scene: Scene):
    scene.admin.execute(
        f"{MESSAGE} SELECT n::text, 's', 't', 'c', '{{}}' FROM generate_series(1, 5000) n"
    )
    session = scene.connect(
        "SET vacuum_cost_delay = 100", "SET vacuum_cost_limit = 1", autocommit=True
    )
    session.pgconn.send_query(b"/* nightly */ VACUUM messages")
    wait_until(lambda: longest(scene) >= 2, "the VACUUM runs for two seconds")
    assert "nothing to end" in scene.run("sessions", HELENA_EMERGENCY_SECONDS="1")
    alter = scene.start("ALTER TABLE messages ADD COLUMN more int")
    scene.wait_for_waiting(1)
    output = scene.run("sessions", code=1, HELENA_EMERGENCY_SECONDS="1")
    assert f"{session.info.backend_pid} holds others up, but it is a VACUUM" in output
    assert scene.waiting() == 1
    scene.admin.execute("SELECT pg_cancel_backend(%s)", [session.info.backend_pid])
    assert answer(session) == "57014"
    assert answer(alter) is None


def test_another_database_is_not_touched(quiet_scene: Scene, tmp_path: Path):
    other = Scene(quiet_scene.dsn, tmp_path)
    try:
        root, others = other.hang(2)
        assert "nothing to end" in quiet_scene.run("sessions")
        assert other.waiting() == 3
        root.rollback()
        assert {answer(session) for session in others} == {None}
    finally:
        other.close()


def test_queries_in_another_encoding_do_not_stop_it(quiet_scene: Scene):
    name = f"{quiet_scene.name}_latin"
    databases.create(quiet_scene.server, name, encoding="LATIN1")
    dsn = make_conninfo(quiet_scene.dsn, dbname=name)
    with psycopg.connect(dsn, client_encoding="latin1") as session:
        session.execute("SELECT 'caf\xe9'")
        root, others = quiet_scene.hang(1)
        quiet_scene.run("activity", "sessions", "result")
        assert not alive(root)
        assert {answer(session) for session in others} == {None}
    quiet_scene.server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def test_a_second_run_finds_nothing_to_do(quiet_scene: Scene):
    _, others = quiet_scene.hang(2)
    assert "terminated:" in quiet_scene.run()
    assert {answer(session) for session in others} == {None}
    output = quiet_scene.run()
    assert "nothing to end" in output
    assert "Everything was done." in output


def test_a_dry_run_changes_nothing(quiet_scene: Scene):
    quiet_scene.admin.execute(
        f"{MESSAGE} SELECT n::text, 's', 't', '', ARRAY[n::text] FROM generate_series(1, 500) n"
    )
    pending = quiet_scene.pending()
    root, others = quiet_scene.hang(2)
    with Process(quiet_scene.folder / "some_writer.py") as writer:
        output = quiet_scene.run("--dry-run", HELENA_REALTIME_PROCESSES="some_writer")
        assert f"{writer.pid} would be stopped" in output
        assert writer.poll() is None
    assert f"{root.info.backend_pid} would be terminated" in output
    assert "messages_tags_idx would be emptied" in output
    assert "messages would be vacuumed" in output
    assert "Nothing was changed" in output
    assert quiet_scene.waiting() == 3
    root.rollback()
    assert {answer(session) for session in others} == {None}
    assert quiet_scene.pending() == pending > 0
    assert (
        quiet_scene.one("SELECT last_vacuum FROM pg_stat_user_tables WHERE relname = 'messages'")
        is None
    )


# What a role may do


def test_without_privileges_it_says_what_it_cannot_see_and_who_could_end_it(quiet_scene: Scene):
    root, others = quiet_scene.hang(1)
    dsn = quiet_scene.role()
    mine = quiet_scene.connect("SELECT 1", dsn=dsn)
    output = quiet_scene.run("activity", "sessions", "result", code=1, dsn=dsn)
    assert "Not a member of pg_read_all_stats" in output
    assert f"{root.info.backend_pid} holds others up, but what it does cannot be seen" in output
    assert f"SELECT pg_terminate_backend({root.info.backend_pid});" in output
    assert alive(mine)
    root.rollback()
    assert {answer(session) for session in others} == {None}


def test_a_role_ends_its_own_sessions_and_nobody_elses(quiet_scene: Scene):
    mine, theirs = quiet_scene.role("pg_read_all_stats"), quiet_scene.role()
    quiet_scene.admin.execute("CREATE TABLE a (); CREATE TABLE b (); GRANT ALL ON a, b TO PUBLIC")
    lock = "LOCK TABLE {} IN ACCESS EXCLUSIVE MODE"
    my_root = quiet_scene.connect(lock.format("a"), dsn=mine)
    their_root = quiet_scene.connect(lock.format("b"), dsn=theirs)
    freed, stuck = (
        quiet_scene.start("SELECT count(*) FROM a"),
        quiet_scene.start("SELECT count(*) FROM b"),
    )
    quiet_scene.wait_for_waiting(2)
    output = quiet_scene.run("sessions", code=1, dsn=mine)
    assert not alive(my_root)
    assert answer(freed) is None
    assert f"{their_root.info.backend_pid} holds others up, but it belongs to somebody" in output
    signaller = quiet_scene.role("pg_read_all_stats", "pg_signal_backend")
    quiet_scene.run("sessions", dsn=signaller)
    assert not alive(their_root)
    assert answer(stuck) is None


def test_a_superusers_session_is_ended_by_superusers_only(quiet_scene: Scene):
    root, others = quiet_scene.hang(1)
    dsn = quiet_scene.role("pg_read_all_stats", "pg_signal_backend")
    output = quiet_scene.run("sessions", code=1, dsn=dsn)
    assert f"{root.info.backend_pid} holds others up, but it belongs to a superuser" in output
    assert output.count(LOCK) == 1
    root.rollback()
    assert {answer(session) for session in others} == {None}


# Cleaning up


def test_the_owner_empties_pending_lists_and_vacuums(scene: Scene):
    scene.admin.execute(
        f"{MESSAGE} SELECT n::text, 's', 't', '', ARRAY[n::text] FROM generate_series(1, 10000) n"
    )
    scene.admin.execute("DELETE FROM messages WHERE id LIKE '1%'")
    scene.admin.execute('CREATE TABLE "my |""\\ table" (t text[])')
    scene.admin.execute('CREATE INDEX "my gin" ON "my |""\\ table" USING gin (t)')
    assert scene.pending() >= 8000
    output = scene.run("gin", HELENA_EMERGENCY_TABLES='"my |""\\ table"')
    assert re.search(r"messages_tags_idx: [1-9]\d* pages", output)
    assert "indexes with an empty list: 3" in output
    assert scene.pending() == 0
    output = scene.run("vacuum", HELENA_EMERGENCY_TABLES='"my |""\\ table"')
    assert '"my |""\\ table": done in' in output
    assert "messages: done in" in output
    dead = scene.one("SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'messages'")
    assert dead == 0
    visited = scene.one(
        "SELECT last_vacuum IS NOT NULL AND last_analyze IS NOT NULL"
        "  FROM pg_stat_user_tables WHERE relname = 'messages'"
    )
    assert visited


def test_who_owns_neither_indexes_nor_tables_is_told_so(quiet_scene: Scene):
    quiet_scene.admin.execute(f"{MESSAGE} VALUES ('1', 's', 't', '', '{{a}}')")
    output = quiet_scene.run("gin", "vacuum", code=1, dsn=quiet_scene.role("pg_read_all_data"))
    assert "messages_tags_idx: its pending list can be emptied by its owner only" in output
    assert "messages: VACUUM is up to its owner" in output
    assert output.count("messages_tags_idx") == 2, "not in the list at the end"
    assert quiet_scene.pending() == 1


def test_a_locked_table_does_not_keep_the_others_from_their_vacuum(quiet_scene: Scene):
    root = quiet_scene.connect(LOCK)
    output = quiet_scene.run("gin", "vacuum", code=1)
    assert "FAILED: messages: somebody has it locked" in output
    assert "documents: done in" in output
    assert "indexes with an empty list: 4" in output
    assert alive(root)


# The database is away


def test_a_database_that_is_away_is_exit_4_with_a_remedy(quiet_scene: Scene, make_proxy: Any):
    proxy: Proxy = make_proxy(quiet_scene.dsn)
    proxy.stop()
    output = quiet_scene.run(code=4, dsn=proxy.dsn)
    assert "Connection refused" in output
    assert "Check the address (from DATABASE_URL)" in output
    assert "Stopping the real-time writers" in output


def test_a_database_that_does_not_answer_is_exit_4(quiet_scene: Scene, make_proxy: Any):
    proxy: Proxy = make_proxy(quiet_scene.dsn)
    proxy.stalled = True
    output = quiet_scene.run("activity", code=4, dsn=proxy.dsn)
    assert "timeout expired" in output


@pytest.fixture
def cluster(own_server: Cluster) -> Cluster:
    own_server.settings["max_prepared_transactions"] = "2"
    own_server.settings["max_connections"] = "10"
    own_server.start()
    return own_server


@pytest.fixture
def own_scene(cluster: Cluster, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(cluster.dsn, tmp_path)
    yield scene
    scene.close()


def test_with_the_catalog_locked_it_works_from_another_database(own_scene: Scene):
    scene = own_scene
    root = scene.connect("LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE")
    output = scene.run()
    assert "It lets nobody in; working from the database postgres:" in output
    assert f"{root.info.backend_pid} terminated:" in output
    assert "messages: done in" in output
    assert not alive(root)


def test_a_prepared_transaction_is_named_with_the_commands_to_type(own_scene: Scene):
    scene = own_scene
    scene.connect("BEGIN", LOCK, "PREPARE TRANSACTION 'it''s mine'", autocommit=True)
    waiter = scene.start("SELECT count(*) FROM messages")
    scene.wait_for_waiting(1)
    output = scene.run("activity", "sessions", code=1)
    assert "COMMIT PREPARED 'it''s mine';  ROLLBACK PREPARED 'it''s mine';" in output
    scene.admin.execute("ROLLBACK PREPARED 'it''s mine'")
    assert answer(waiter) is None


def test_the_name_of_a_prepared_transaction_is_no_command_and_no_row(own_scene: Scene):
    scene = own_scene
    row = (
        "session",
        "cancel",
        "1;touch pwned;",
        "mark",
        "holds",
        "active",
        "9",
        "1",
        "who",
        "",
        "",
    )
    name = "x" + "\x1f" * 12 + "\n@\x1f" + "\x1f".join(row)
    scene.connect("BEGIN", LOCK, f"PREPARE TRANSACTION '{name}'", autocommit=True)
    waiter = scene.start("SELECT count(*) FROM messages")
    scene.wait_for_waiting(1)
    output = scene.run("activity", "sessions", code=1)
    assert "pwned" in output
    assert not (scene.folder / "pwned").exists()
    assert "pwned; cancelled" not in output
    scene.admin.execute(f"ROLLBACK PREPARED '{name}'".encode())
    assert answer(waiter) is None


def test_writers_that_have_all_the_connections_are_stopped_first(own_scene: Scene):
    scene = own_scene
    dsn = scene.role()
    script = scene.folder / "greedy_writer.py"
    source = "\n".join(
        [
            "import psycopg, signal, sys",
            "kept = []",
            "try:",
            "    while True: kept.append(psycopg.connect(sys.argv[1]))",
            "except psycopg.OperationalError: print('full', flush=True)",
            "signal.pause()",
        ]
    )
    with Process(script, dsn, source=source) as writer:
        assert writer.stdout and writer.stdout.readline() == b"full\n"
        output = scene.run(
            "activity", "writers", dsn=dsn, HELENA_REALTIME_PROCESSES="greedy_writer"
        )
    assert "The database cannot be reached:" in output
    assert f"{writer.pid} sent TERM" in output
    assert "Database helena_" in output


def test_a_password_is_on_no_command_line_and_in_no_output(own_server: Cluster, tmp_path: Path):
    own_server.start()
    scene = Scene(own_server.dsn, tmp_path)
    dsn = scene.role(dsn=make_conninfo(own_server.tcp_dsn, dbname=scene.name))
    parts = conninfo_to_dict(dsn)
    password = parts["password"]
    url = f"postgresql://{parts['user']}:{password}@127.0.0.1:{parts['port']}/{scene.name}"
    seen: set[bytes] = set()
    stop = threading.Event()
    watcher = threading.Thread(target=watch_command_lines, args=(seen, stop))
    watcher.start()
    try:
        outputs = [scene.run("activity", dsn=given) for given in (url, dsn)]
    finally:
        stop.set()
        watcher.join()
    assert all(f"as {parts['user']} (from DATABASE_URL)" in output for output in outputs)
    assert any(b"helena_emergency_fix" in line for line in seen), "psql was never seen"
    assert not [line for line in seen if str(password).encode() in line]
    assert not [output for output in outputs if str(password) in output]
    scene.close()


def watch_command_lines(seen: set[bytes], stop: threading.Event) -> None:
    while not stop.is_set():
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.add(path.read_bytes())
            except OSError:
                # It has ended.
                continue


# The real-time writers

SLEEP = "import time\nprint('up', flush=True)\ntime.sleep(300)\n"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP


class Process(subprocess.Popen[bytes]):
    """A Python script that runs; ended with the block."""

    def __init__(self, script: Path, *arguments: str, source: str = SLEEP) -> None:
        script.parent.mkdir(exist_ok=True)
        script.write_text(source)
        super().__init__([sys.executable, str(script), *arguments], stdout=subprocess.PIPE)

    def __exit__(self, *details: Any) -> None:
        self.kill()
        super().__exit__(*details)


def run_command(
    stack: ExitStack, *command: str | Path, **options: Any
) -> "subprocess.Popen[bytes]":
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, **options))
    stack.callback(process.kill)
    return process


def test_writers_are_stopped_by_what_they_run_and_bystanders_live(quiet_scene: Scene):
    folder = quiet_scene.folder / "with a blank"
    folder.mkdir()
    script = folder / "realtime_md_watcher.py"
    script.write_text(SLEEP)
    module = folder / "tools" / "morning_brief"
    module.mkdir(parents=True)
    (module / "__main__.py").write_text(SLEEP)
    program = folder / "helena-realtime-processor"
    program.write_text(f"#!{sys.executable}\n{DEAF}")
    program.chmod(0o755)
    editor = folder / "editor.py"
    editor.write_text(SLEEP)
    code = f"{SLEEP}# realtime_md_watcher.py"
    python = sys.executable
    with ExitStack() as stack:
        writers = [
            run_command(stack, python, script),
            run_command(
                stack, python, "-u", "-W", "error", "-m", "tools.morning_brief", cwd=folder
            ),
            run_command(stack, program),
        ]
        bystanders = [
            run_command(stack, python, editor, script),
            run_command(stack, python, "-c", code, script),
            run_command(stack, "sh", "-c", "echo up; sleep 300; : realtime_md_watcher.py"),
            run_command(
                stack, "sh", "-c", "echo up; exec tail -f realtime_md_watcher.py", cwd=folder
            ),
            run_command(stack, "sh", "-c", "echo up; exec grep -r realtime_md_watcher -", stdin=-1),
        ]
        for process in (*writers, *bystanders):
            assert process.stdout and process.stdout.readline() == b"up\n"
        names = "helena_realtime_processor,realtime_md_watcher,morning_brief"
        path = hurried(quiet_scene.folder)
        output = quiet_scene.run("writers", HELENA_REALTIME_PROCESSES=names, PATH=path)
        assert [process.wait(10) for process in writers] == [-15, -15, -9]
        assert [process.poll() for process in bystanders] == [None] * 5
        for process in bystanders:
            assert f" {process.pid} sent" not in output
            for child in children(process):
                os.kill(child, 9)
    assert "run helena stop-realtime to keep them stopped" in output


def children(process: "subprocess.Popen[bytes]") -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def test_a_writer_that_is_started_again_is_reported(quiet_scene: Scene):
    script = quiet_scene.folder / "stubborn_writer.py"
    script.write_text(SLEEP)
    with ExitStack() as stack:
        # What a supervisor does.
        again = f'while :; do "{sys.executable}" "{script}"; done'
        supervisor = run_command(stack, "sh", "-c", again)
        assert supervisor.stdout and supervisor.stdout.readline() == b"up\n"
        output = quiet_scene.run("writers", code=1, HELENA_REALTIME_PROCESSES="stubborn_writer")
        (child,) = children(supervisor)
        supervisor.kill()
        os.kill(child, 9)
    assert f"Something starts the writers again (now {child}): run helena stop-realtime" in output


# The script itself


@pytest.mark.parametrize("interpreter", SHELLS)
def test_it_works_in_every_shell(quiet_scene: Scene, interpreter: tuple[str, ...]):
    with Process(quiet_scene.folder / "some_writer.py") as writer:
        assert writer.stdout and writer.stdout.readline() == b"up\n"
        names = "other,some_writer"
        output = quiet_scene.run(
            "writers", "--dry-run", interpreter=interpreter, HELENA_REALTIME_PROCESSES=names
        )
        assert f"{writer.pid} would be stopped" in output
    root, others = quiet_scene.hang(2)
    output = quiet_scene.run("sessions", "gin", "vacuum", "result", interpreter=interpreter)
    assert f"{root.info.backend_pid} terminated:" in output
    assert "messages: done in" in output
    assert "Everything was done." in output
    assert {answer(session) for session in others} == {None}


@pytest.mark.skipif(shutil.which("busybox") is None, reason="busybox is not installed.")
def test_it_needs_no_tools_but_those_of_busybox(quiet_scene: Scene):
    tools = quiet_scene.folder / "tools"
    tools.mkdir()
    for name in ("awk", "date", "id", "kill", "ps", "sed", "sleep", "tr", "cat"):
        (tools / name).symlink_to(str(shutil.which("busybox")))
    (tools / "psql").write_text(f'#!/bin/sh\nPATH={os.environ["PATH"]} exec psql "$@"\n')
    (tools / "psql").chmod(0o755)
    root, others = quiet_scene.hang(1)
    with Process(quiet_scene.folder / "some_writer.py") as writer:
        assert writer.stdout and writer.stdout.readline() == b"up\n"
        quiet_scene.run(
            interpreter=(str(shutil.which("busybox")), "sh"),
            PATH=str(tools),
            HELENA_REALTIME_PROCESSES="some_writer",
        )
        assert writer.wait(10) == -15
    assert not alive(root)
    assert {answer(session) for session in others} == {None}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed.")
def test_shellcheck_finds_nothing():
    result = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_help_and_wrong_usage(tmp_path: Path):
    help_text = run(tmp_path, "--help")
    assert "Usage: emergency_fix.sh" in help_text
    assert max(map(len, help_text.splitlines())) <= 100
    assert "--forec is neither" in run(tmp_path, "--forec", code=2)
    assert "not a number" in run(tmp_path, "activity", code=3, HELENA_EMERGENCY_SECONDS="5m")


def test_without_psql_it_says_what_to_install(tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("awk", "printf"):
        (tools / name).symlink_to(str(shutil.which(name)))
    shell_path = (str(shutil.which("sh")),)
    output = run(tmp_path, code=3, interpreter=shell_path, PATH=str(tools))
    assert "psql is not installed" in output


DSNS = [
    "postgresql://u:p%40%2F%25%C3%A9'x@h1:5433,[::1]:5434/my%20db?sslmode=require&options=-c%20a%3Db",
    "postgres://%2Ftmp%2Fsocket/db",
    "postgresql:///db?host=/tmp/x&port=7&user=a@b",
    "postgresql://u:p?w@h/d",
    "postgresql://u:@h",
    r"host=h user = 'a b\'c' password=x\ y dbname=d target_session_attrs=read-write",
]


@pytest.mark.parametrize("dsn", DSNS)
def test_a_dsn_means_what_libpq_takes_it_for(tmp_path: Path, dsn: str):
    variables = {"dbname": "PGDATABASE"}
    told = asked_with(tmp_path, dsn)
    for key, value in conninfo_to_dict(dsn).items():
        name = variables.get(key, "PG" + key.upper().replace("_", ""))
        assert told.get(name, "") == value


def asked_with(folder: Path, dsn: str) -> dict[str, str]:
    """The variables of libpq that psql is called with."""
    fake = folder / "psql"
    fake.write_text(f'#!/bin/sh\nenv -0 > "{folder}/variables"\nexit 2\n')
    fake.chmod(0o755)
    run(folder, "activity", code=4, dsn=dsn, PATH=f"{folder}:{os.environ['PATH']}")
    text = (folder / "variables").read_text()
    return dict(item.split("=", 1) for item in text.split("\0") if item.startswith("PG"))


@pytest.mark.parametrize(
    ("dsn", "reason"),
    [
        ("postgresql://u:secret@b@c/d", "write @ as %40"),
        ("postgresql://u:secret/b@c/d", "write @ as %40 and / as %2F"),
        ("postgresql://u:secret%@c/d", "write % as %25"),
        ("mysql://u:secret@c/d", "neither postgresql://"),
        ("password='secret", "a quote in it is not closed"),
    ],
)
def test_a_dsn_that_cannot_be_read_is_refused_with_the_reason(
    tmp_path: Path, dsn: str, reason: str
):
    output = run(tmp_path, "activity", code=3, dsn=dsn)
    assert reason in output
    assert "secret" not in output
