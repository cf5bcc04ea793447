"""`helena status` when the database is in trouble: it answers, and says who and what to do."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from helena_cli.batch.spool import Spool
from helena_cli.database import schema
from helena_cli.errors import ExitCode
from tests.cluster import Cluster
from tests.commands import Program
from tests.hosts import wait_until
from tests.proxy import Proxy
from tests.sessions import emergency, holding, running, session

pytestmark = [pytest.mark.postgres, pytest.mark.acceptance]

ORDINARY = "ordinary"


@pytest.fixture
def program(tmp_path: Path, state_dir: Path, helena_dsn: str) -> Program:
    return Program(tmp_path, state_dir, helena_dsn)


def checks(document: Any) -> dict[str, Any]:
    return {check["name"]: check for check in document["checks"]}


# The night when everything hangs. Who waits for one of the locks here would wait for ever.


def test_it_answers_behind_a_lock_a_queued_alter_and_twenty_readers(
    program: Program, helena_dsn: str
):
    with emergency(helena_dsn) as (root, alter):
        document = program.json("status", HELENA_CHECKS_LONGEST_QUERY_SECONDS="0.01")
        said = program.run("status").stdout.decode()
    database = document["database"]
    assert database["reachable"]
    assert database["lock_waits"] == 21
    assert database["active_queries"] == 21
    assert database["idle_in_transaction"] == 1
    (culprit,) = database["blocking"]
    assert (culprit["pid"], culprit["holds_up"]) == (root, 21)
    assert culprit["query"] == "LOCK TABLE messages IN ACCESS EXCLUSIVE MODE"
    assert {waiter["pid"]: waiter["blocked_by"] for waiter in database["waiting"]}[alter] == [root]
    (messages,) = [table for table in database["tables"] if table["table"] == "messages"]
    assert messages["locked"] == f"locked by pid {root}"
    assert messages["rows"] is not None
    longest = checks(document)["longest_query"]
    assert longest["status"] == "critical"
    assert f"pid {alter} has waited" in longest["message"]
    assert f"for pid {root}" in longest["message"]
    assert "clear-locks" in longest["remedy"]
    assert f"locked by pid {root}" in said
    assert "21 sessions" in said


def test_it_names_who_holds_the_system_catalog(program: Program, helena_dsn: str):
    with holding(helena_dsn, "LOCK TABLE pg_class IN ACCESS EXCLUSIVE MODE") as culprit:
        document = program.json("status", code=ExitCode.UNREACHABLE)
        said = program.run("status").stdout.decode()
    assert not document["database"]["reachable"]
    assert f"pg_class is locked by pid {culprit}" in document["database"]["reason"]
    assert document["database"]["via"] == "postgres"
    assert f"pg_class is locked by pid {culprit}" in said
    assert "helena clear-locks" in said


def test_with_all_connections_taken_it_says_so_and_shows_the_queue(
    program: Program, own_server: Cluster
):
    own_server.settings |= {"max_connections": "8", "superuser_reserved_connections": "2"}
    own_server.start()
    with session(own_server.dsn) as admin, ExitStack() as stack:
        admin.execute(f"CREATE ROLE {ORDINARY} LOGIN".encode())
        schema.initialise(admin)
        dsn = make_conninfo(own_server.dsn, user=ORDINARY)
        # The administrator's own is the sixth of six.
        greedy = [stack.enter_context(session(dsn, "greedy")) for _ in range(5)]
        document = program.json("status", code=ExitCode.UNREACHABLE, HELENA_DSN=dsn)
        reserved = program.json("status", HELENA_DSN=own_server.dsn)
        for one in greedy:
            one.close()
    pool = checks(document)["pool"]
    assert (pool["status"], pool["message"]) == ("critical", "all connections are taken")
    assert "superuser" in pool["remedy"]
    assert checks(document)["queue_age"]["status"] == "ok"
    pool = checks(reserved)["pool"]
    assert pool["status"] == "critical"
    assert pool["limit"] == 6
    assert "5 by ordinary (greedy)" in pool["remedy"]


def test_an_ordinary_role_gets_what_it_may_see_and_is_told_what_it_lacks(
    program: Program, helena_dsn: str
):
    role = f"helena_ordinary_{os.getpid()}"
    with session(helena_dsn) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
        try:
            dsn = make_conninfo(helena_dsn, user=role)
            with emergency(helena_dsn, readers=1) as (root, _):
                document = program.json("status", HELENA_DSN=dsn)
                blind = program.json(
                    "status", HELENA_DSN=dsn, HELENA_CHECKS_LONGEST_QUERY_SECONDS="0.001"
                )
        finally:
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    database = document["database"]
    assert database["active_queries"] is None
    assert "needs pg_monitor" in database["unknown"]["active_queries"]
    assert database["lock_waits"] == 2
    assert [one["pid"] for one in database["blocking"]] == [root]
    assert database["connections"]["used"] >= 3
    assert checks(document)["longest_query"]["status"] == "unknown"
    # A wait shows to everybody, and one that is too long is not unknown.
    assert checks(blind)["longest_query"]["status"] == "critical"


def test_a_pending_list_is_judged_against_the_limit_of_its_index(program: Program, helena_dsn: str):
    found, codes = [], []
    with session(helena_dsn) as admin:
        admin.execute("CREATE EXTENSION pgstattuple")
        # Some ten pages of them.
        admin.execute(
            "INSERT INTO messages (id, sender, message_type, content, tags)"
            " SELECT n::text, 'a', 'b', 'c', ARRAY['t' || n] FROM generate_series(1, 4000) n"
        )
        for kilobytes in (4096, 128, 64):
            admin.execute(
                f"ALTER INDEX messages_tags_idx SET (gin_pending_list_limit = {kilobytes})".encode()
            )
            found.append(checks(program.json("status"))["gin_pending"])
            codes.append(program.run("status", "--check").returncode)
    assert [check["status"] for check in found] == ["ok", "warn", "critical"]
    assert [check["limit"] for check in found] == [512, 16, 8]
    # The worst is the one that is fullest by its own limit, not the longest.
    assert found[0]["value"] > found[1]["value"] == found[2]["value"] > 8
    assert "messages_tags_idx" in found[2]["message"]
    assert "VACUUM messages" in found[2]["remedy"]
    assert codes == [0, 0, ExitCode.PARTIAL]


def test_without_pgstattuple_pending_lists_are_unknown_with_the_cure(program: Program):
    gin = checks(program.json("status"))["gin_pending"]
    assert gin["status"] == "unknown"
    assert "CREATE EXTENSION pgstattuple" in gin["remedy"]
    said = program.run("status").stdout.decode()
    assert "messages_context_idx, messages_tags_idx (the extension pgstattuple" in said
    # Beside the lists, and among the checks: not for each index.
    assert said.count("pgstattuple is not installed") == 2


# No database


def test_a_database_that_hangs_costs_its_part_and_not_the_answer(
    program: Program, proxy: Proxy, state_dir: Path
):
    program.run("status", HELENA_DSN=proxy.dsn)
    (path,) = state_dir.glob("*.spool")
    spool = Spool.open(path)
    spool.append("insert", "messages", {"id": "waits"})
    spool.close()
    proxy.stalled = True
    result = program.run("status", HELENA_DSN=proxy.dsn)
    document = program.json("status", code=ExitCode.UNREACHABLE, HELENA_DSN=proxy.dsn)
    assert result.returncode == ExitCode.UNREACHABLE
    assert "did not answer within 2 s" in result.stdout.decode()
    assert result.stderr == b""
    assert "1 operation" in result.stdout.decode()
    assert document["queue"]["total"] == 1
    assert document["database"]["reachable"] is False
    found = {name: check["status"] for name, check in checks(document).items()}
    assert found["response_time"] == "critical"
    assert found["queue_age"] == "ok"
    for name in ("pool", "longest_query", "gin_pending"):
        assert found[name] == "unknown"


# --check and its limits


def test_check_fails_when_a_query_runs_longer_than_the_limit_that_was_set(
    program: Program, helena_dsn: str
):
    program.variables["HELENA_CHECKS_LONGEST_QUERY_SECONDS"] = "0.2"
    usual = "10"
    with running(helena_dsn, "SELECT pg_sleep(600)") as pid, session(helena_dsn) as look:

        def has_run_long() -> bool:
            query = "SELECT now() - query_start > '0.3 s' FROM pg_stat_activity WHERE pid = %s"
            return look.execute(query, [pid]).fetchone() == (True,)

        wait_until(has_run_long, "the query has run for a while")
        result = program.run("status", "--check", HELENA_CHECKS_LONGEST_QUERY_SECONDS=usual)
        # Silent: cron sends mail about what is printed.
        assert (result.returncode, result.stdout) == (0, b"")
        assert program.run("status").returncode == 0
        result = program.run("status", "--check")
    assert result.returncode == ExitCode.PARTIAL
    assert f"pid {pid}" in result.stdout.decode()
    assert "queue_age" not in result.stdout.decode()
    assert "(limit 0.2 s)" in result.stdout.decode()
    assert "clear-locks --all" in result.stdout.decode()


def test_check_says_4_when_there_is_no_database(program: Program):
    away = "host=127.0.0.1 port=1 user=x dbname=y"
    result = program.run("status", "--check", HELENA_DSN=away)
    assert result.returncode == ExitCode.UNREACHABLE


# --watch


def test_watch_prints_one_document_per_look_and_ends_well(program: Program, helena_dsn: str):
    with program.start("status", "--watch", "--json", "--interval", "0.5") as process:
        assert process.stdout and process.stderr
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        with session(helena_dsn) as look:
            query = (
                "SELECT count(DISTINCT backend_start) FROM pg_stat_activity WHERE"
                " application_name = 'helena status' AND datname = current_database()"
            )
            assert look.execute(query).fetchone() == (1,)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
    assert first.keys() == second.keys() >= {"queue", "flusher", "flushes", "database", "checks"}


def test_watch_on_a_pipe_repeats_the_page(program: Program):
    with program.start("status", "--watch", "--interval", "0.5") as process:
        assert process.stdout
        seen = 0
        while seen < 2:
            seen += process.stdout.readline().startswith(b"Target")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)


def test_watch_draws_on_a_terminal_until_ctrl_c(program: Program, terminal: tuple[int, int]):
    ours, theirs = terminal
    process = subprocess.Popen(
        [sys.executable, "-m", "helena_cli", "status", "--watch", "--interval", "0.5"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=program.folder,
        env=program.variables | {"TERM": "xterm", "COLUMNS": "160", "LINES": "50"},
        start_new_session=True,
    )
    os.close(theirs)
    drawn = _read(ours, lambda text: text.count("Ctrl-C ends") >= 2)
    process.send_signal(signal.SIGINT)
    drawn += _read(ours, lambda _: process.poll() is not None)
    assert process.wait(60) == 0
    assert "gin_pending" in drawn
    assert "Traceback" not in drawn
    # The cursor is there again.
    assert drawn.rindex("\x1b[?25h") > drawn.rfind("\x1b[?25l")


def _read(terminal: int, enough: Callable[[str], bool]) -> str:
    """What a program wrote to its terminal."""
    text = ""

    def look() -> bool:
        nonlocal text
        try:
            while select.select([terminal], [], [], 0)[0]:
                text += os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            # The program has closed it.
            return True
        return enough(text)

    wait_until(look, "the program draws")
    return text


def test_watch_outlives_the_database(program: Program, proxy: Proxy):
    with program.start(
        "status", "--watch", "--json", "--interval", "0.5", HELENA_DSN=proxy.dsn
    ) as process:
        assert process.stdout

        def look() -> bool:
            assert process.stdout
            return bool(json.loads(process.stdout.readline())["database"]["reachable"])

        assert look()
        proxy.stop()
        wait_until(lambda: not look(), "the database is away")
        proxy.start()
        wait_until(look, "the database is back")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--watch", "--check"), "contradict"),
        (("--interval", "0"), "interval"),
        (("--interval", "soon"), "interval"),
    ],
)
def test_what_makes_no_sense_is_refused(program: Program, arguments: tuple[str, ...], words: str):
    result = program.run("status", *arguments)
    assert result.returncode == ExitCode.USAGE
    assert words in result.stderr.decode()


# The hosts


def test_every_host_that_writes_is_shown_with_its_positions(program: Program, helena_dsn: str):
    with session(helena_dsn) as admin:
        admin.execute(
            "INSERT INTO helena.spool_position"
            " (spool_id, table_name, host, last_operation_id, held)"
            " VALUES ('a', 'messages', 'one', 7, '{3,4}'), ('b', 'elsewhere', 'two', 9, '{}')"
        )
    document = program.json("status")
    said = program.run("status").stdout.decode()
    one, two = document["hosts"]
    assert (one["host"], one["held"], two["host"], two["held"]) == ("one", 2, "two", 0)
    assert one["positions"][0]["last_operation_id"] == 7
    assert {"table", "spool", "updated_at"} <= one["positions"][0].keys()
    assert "Hosts that write" in said
