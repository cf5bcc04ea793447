"""`helena enqueue`: programs in any language queue operations by writing lines."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from helena_cli.batch.spool import Spool
from tests.commands import Program
from tests.hosts import wait_until, watched_connections
from tests.spools import assert_law

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

AWAY = "host=127.0.0.1 port=1 user=nobody dbname=none connect_timeout=2"


@pytest.fixture
def helena(tmp_path: Path, state_dir: Path, helena_dsn: str) -> Program:
    return Program(tmp_path, state_dir, helena_dsn)


@pytest.fixture
def database(helena_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        # No unique key: a row that is written twice is there twice.
        connection.execute("CREATE TABLE numbers (n bigint, note text, exact numeric)")
        yield connection


def numbers(database: psycopg.Connection) -> list[int]:
    return [n for (n,) in database.execute("SELECT n FROM numbers ORDER BY n")]


def lines(*rows: object) -> bytes:
    """JSON lines; bytes are lines already."""
    texts = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    return b"".join(text + b"\n" for text in texts)


@contextlib.contextmanager
def spool_of(state_dir: Path) -> Iterator[Spool]:
    (path,) = state_dir.glob("*.spool")
    with contextlib.closing(Spool.open(path)) as spool:
        yield spool


@contextlib.contextmanager
def flusher(helena: Program) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process that flushes, until its input ends."""
    script = """
import sys
from helena_cli import add_operation
add_operation("insert", "numbers", {"n": -1})
print(flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=helena.folder,
        env=helena.variables | {"HELENA_BATCH_INTERVAL": "0.1"},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        yield process
        process.communicate(timeout=60)


def test_what_is_piped_in_is_in_the_table_afterwards(helena: Program, database: psycopg.Connection):
    text = "Übung\n\"quoted\" 'it''s' \\ 🎉"
    stdin = lines({"n": 1, "note": text}, b'{"n": 2, "exact": 0.1234567890123456789}', b"  ")
    result = helena.run("enqueue", "insert", "numbers", stdin=stdin)
    assert (result.returncode, result.stdout) == (0, b"2 operations accepted.\n")
    assert result.stderr == b""
    rows = database.execute("SELECT n, note, exact::text FROM numbers ORDER BY n").fetchall()
    assert rows == [(1, text, None), (2, None, "0.1234567890123456789")]


def test_all_kinds_are_queued(helena: Program, database: psycopg.Connection):
    key = {"agent_name": "a", "project_id": "p", "context_key": "k"}
    for kind, value in (("insert", 1), ("update", 2)):
        stdin = lines({**key, "context_value": value})
        assert helena.json("enqueue", kind, "public.agent_contexts", stdin=stdin)["accepted"] == 1
    stdin = lines({"id": "m", "sender": "a", "message_type": "b", "content": "c"})
    for _ in range(2):
        assert helena.json("enqueue", "message", "messages", stdin=stdin)["accepted"] == 1
    assert database.execute("SELECT context_value FROM agent_contexts").fetchall() == [(2,)]
    assert database.execute("SELECT count(*) FROM messages").fetchall() == [(1,)]


def test_ten_thousand_lines_arrive_once(
    helena: Program, database: psycopg.Connection, state_dir: Path
):
    stdin = lines(*({"n": n, "note": "x" * 50} for n in range(10_000)))
    answer = helena.json("enqueue", "insert", "numbers", stdin=stdin)
    assert answer == {"accepted": 10_000, "rejected": [], "rejected_total": 0}
    helena.json("process-pending")
    assert numbers(database) == list(range(10_000))
    with spool_of(state_dir) as spool:
        assert_law(spool)


def test_what_the_database_refuses_meanwhile_is_said(helena: Program, database: psycopg.Connection):
    rows = lines({"n": 1}, {"n": "many"}, {"none": 1})
    result = helena.run("enqueue", "insert", "numbers", stdin=rows)
    assert (result.returncode, result.stdout) == (0, b"3 operations accepted.\n")
    assert b"refused 2 operations. Why: helena dead-letters list" in result.stderr
    assert numbers(database) == [1]


def test_bad_lines_are_listed_and_the_others_accepted(
    helena: Program, database: psycopg.Connection
):
    bad: dict[int, bytes] = {2: b"{", 4: b'{"note": "\\u0000"}', 5: b"[]"}
    stdin = lines(*(bad.get(number, {"n": number}) for number in range(1, 8)))
    answer = helena.json("enqueue", "insert", "numbers", stdin=stdin, code=1)
    assert answer["accepted"] == 4
    assert [(one["line"], one["field"]) for one in answer["rejected"]] == [
        *((2, "data"), (4, "note"), (5, "data"))
    ]
    assert "NUL" in answer["rejected"][1]["reason"]
    assert numbers(database) == [1, 3, 6, 7]


def test_the_first_bad_lines_are_told_in_full_and_the_rest_counted(
    helena: Program, database: psycopg.Connection
):
    stdin = lines(*(b"{" for _ in range(33)), {"n": 1})
    result = helena.run("enqueue", "insert", "numbers", stdin=stdin)
    assert result.returncode == 1
    assert result.stdout == b"1 operation accepted, 33 lines rejected.\n"
    told = result.stderr.decode().splitlines()
    assert [line.partition(":")[0] for line in told[:20]] == [f"line {n}" for n in range(1, 21)]
    assert told[20] == "and 13 more lines rejected."


def test_without_a_database_the_operations_are_kept_and_said_where(
    helena: Program, state_dir: Path
):
    stdin = lines({"n": 1}, {"n": 2})
    result = helena.run("enqueue", "insert", "numbers", stdin=stdin, HELENA_DSN=AWAY)
    assert (result.returncode, result.stdout) == (0, b"2 operations accepted.\n")
    said = result.stderr.decode()
    assert f"2 operations, in {state_dir}" in said
    assert "helena process-pending" in said
    assert "Traceback" not in said
    with spool_of(state_dir) as spool:
        assert spool.queue().total == 2


def test_beside_a_flusher_it_opens_no_connection(
    helena: Program, database: psycopg.Connection, helena_dsn: str
):
    with flusher(helena):
        wait_until(lambda: numbers(database) == [-1], "the other process flushes")
        with watched_connections(helena_dsn) as seen:
            result = helena.run("enqueue", "insert", "numbers", stdin=lines({"n": 1}))
            wait_until(lambda: numbers(database) == [-1, 1], "it writes this one too")
        assert (result.returncode, result.stdout) == (0, b"1 operation accepted.\n")
        assert result.stderr == b"The running flusher writes what is queued.\n"
        assert max(map(len, seen)) <= 2


def test_alone_it_needs_one_connection(helena: Program, helena_dsn: str):
    with watched_connections(helena_dsn) as seen:
        wait_until(lambda: seen, "somebody looks")
        assert helena.run("enqueue", "insert", "numbers", stdin=lines({"n": 1})).returncode == 0
    assert max(map(len, seen)) <= 1


def _await_numbers(database: psycopg.Connection, count: int) -> None:
    wait_until(lambda: len(numbers(database)) == count, "the line is written")


def test_a_slow_writer_need_not_end_for_its_lines_to_be_written(
    helena: Program, database: psycopg.Connection
):
    with helena.start("enqueue", "insert", "numbers", HELENA_BATCH_INTERVAL="0.1") as process:
        assert process.stdin is not None
        for number in range(3):
            process.stdin.write(lines({"n": number}))
            process.stdin.flush()
            _await_numbers(database, number + 1)
        output, _ = process.communicate(timeout=60)
    assert output == b"3 operations accepted.\n"


def test_a_line_that_was_cut_off_is_rejected_and_those_before_it_accepted(
    helena: Program, database: psycopg.Connection
):
    stdin = lines({"n": 1}, {"n": 2})[:-5]
    answer = helena.json("enqueue", "insert", "numbers", stdin=stdin, code=1)
    assert (answer["accepted"], answer["rejected"][0]["line"]) == (1, 2)
    assert numbers(database) == [1]


def test_after_kill_9_what_was_read_is_kept(
    helena: Program, database: psycopg.Connection, state_dir: Path
):
    with helena.start("enqueue", "insert", "numbers") as process:
        assert process.stdin is not None
        process.stdin.write(lines({"n": 1}, {"n": 2}) + b'{"n": 3')
        process.stdin.flush()

        def accepted() -> int:
            if not list(state_dir.glob("*.spool")):
                return 0
            with spool_of(state_dir) as spool:
                return spool.conservation().accepted

        wait_until(lambda: accepted() == 2, "two lines are accepted")
        process.send_signal(signal.SIGKILL)
    helena.json("process-pending")
    assert numbers(database) == [1, 2]


def test_a_reader_of_the_result_that_has_gone_away_is_told_nothing(
    helena: Program, database: psycopg.Connection
):
    with helena.start("enqueue", "insert", "numbers", "--json") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(lines({"n": 1}))
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
    assert numbers(database) == [1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("delete", "numbers"), "kind: 'delete' is not one of insert, update, message"),
        (("insert", "a.b.c"), "neither a table's name nor schema.name"),
        (("insert",), "Missing argument"),
    ],
)
def test_wrong_usage_is_2_and_queues_nothing(
    helena: Program, arguments: tuple[str, ...], says: str
):
    result = helena.run("enqueue", *arguments, stdin=lines({"n": 1}))
    assert (result.returncode, result.stdout) == (2, b"")
    assert says in result.stderr.decode()


def test_a_terminal_is_refused_with_a_hint(helena: Program):
    controller, terminal = pty.openpty()
    try:
        result = subprocess.run(
            [sys.executable, "-m", "helena_cli", "enqueue", "insert", "numbers"],
            stdin=terminal,
            capture_output=True,
            cwd=helena.folder,
            env=helena.variables,
            timeout=60,
        )
    finally:
        os.close(controller)
        os.close(terminal)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"| helena enqueue" in result.stderr


def test_a_full_queue_is_1_and_says_how_much_was_accepted(helena: Program):
    big: Any = {"note": "x" * 100_000}
    stdin = lines(*(big for _ in range(30)))
    variables = {"HELENA_SPOOL_MAX_BYTES": str(1024 * 1024), "HELENA_DSN": AWAY}
    result = helena.run("enqueue", "insert", "numbers", "--json", stdin=stdin, **variables)
    assert result.returncode == 1
    assert 0 < json.loads(result.stdout)["accepted"] < 30
    assert b"half of the spool" in result.stderr or b"is full" in result.stderr
