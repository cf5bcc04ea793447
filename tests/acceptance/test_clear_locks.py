"""`helena clear-locks` as a person and a script meet it: what it shows, asks, and how it ends."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.blockade import Blockade, done, emergency, fresh_database
from tests.cluster import Cluster
from tests.commands import Program

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]


@pytest.fixture
def newest(postgres: str) -> Iterator[Blockade]:
    """A fresh database."""
    with fresh_database(postgres) as dsn, Blockade(dsn) as blockade:
        yield blockade


def program(blockade: Blockade, state_dir: Path, **parameters: str) -> Program:
    return Program(state_dir, state_dir, make_conninfo(blockade.dsn, **parameters))


def test_an_idle_root_is_terminated_and_everybody_behind_it_goes_on(newest, state_dir):
    bystander = newest.session("SELECT 1")
    sleeper = newest.run("SELECT pg_sleep(60)")
    root, alter, readers = emergency(newest, "ACCESS EXCLUSIVE")
    before = newest.pids()
    document = program(newest, state_dir).json("clear-locks", "--yes")
    assert [(one["pid"], one["action"], one["frees"]) for one in document["plan"]] == [
        (root, "terminate", 21)
    ]
    assert done(document) == [(root, "terminate", "terminated")]
    assert document["remaining"] == 0
    assert all(waiter.succeeded for waiter in (alter, *readers))
    assert before - newest.pids() == {root}
    assert not sleeper.done.is_set()
    assert bystander.execute("SELECT 2").fetchone() == (2,)


def test_without_yes_nothing_is_done_where_nobody_can_be_asked(newest, state_dir):
    root, _, _ = emergency(newest, "ACCESS EXCLUSIVE", readers=3)
    before = newest.pids()
    document = program(newest, state_dir).json("clear-locks", code=5)
    assert [one["pid"] for one in document["plan"]] == [root]
    assert (document["applied"], document["remaining"]) == ([], 4)
    result = program(newest, state_dir).run("clear-locks")
    assert result.returncode == 5
    assert f"terminate {root}" in result.stdout.decode()
    assert "--yes" in result.stderr.decode()
    assert program(newest, state_dir).run("clear-locks", "--dry-run").returncode == 0
    assert newest.pids() == before


@pytest.mark.parametrize(("answer", "code", "gone"), [("n", 5, 0), ("y", 0, 1)])
def test_a_person_is_shown_the_tree_and_asked(newest, state_dir, answer, code, gone):
    root, alter, readers = emergency(newest, "ACCESS EXCLUSIVE")
    before = newest.pids()
    caller = program(newest, state_dir)
    shown, found = on_terminal(caller, "clear-locks", "--no-vacuum", answer=answer)
    assert found == code, shown
    for text in (
        f"{root} postgres (a program), idle in transaction",
        f"└── {alter.pid} postgres (a program), waits",
        "20 sessions wait up to",
        "LOCK TABLE goods IN ACCESS EXCLUSIVE MODE",
        "End 1 session as planned? [y/N]",
    ):
        assert text in shown
    assert ("Nothing is blocked any more" in shown) == bool(gone)
    assert max(map(len, shown.splitlines())) <= 80
    if gone:
        assert all(reader.succeeded for reader in readers)
    assert len(before - newest.pids()) == gone


def on_terminal(caller: Program, *arguments: str, answer: str) -> tuple[str, int]:
    """What a person sees on a terminal of 80 columns who gives this answer; the exit code."""
    mine, theirs = pty.openpty()
    variables = caller.variables | {"TERM": "dumb", "COLUMNS": "80"}
    with subprocess.Popen(
        [sys.executable, "-m", "helena_cli", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=caller.folder,
        env=variables,
    ) as process:
        os.close(theirs)
        shown = b""
        while piece := _read(mine):
            shown += piece
            if shown.endswith(b"[y/N] "):
                os.write(mine, f"{answer}\n".encode())
        os.close(mine)
    return shown.decode().replace("\r\n", "\n"), process.returncode


def _read(terminal: int) -> bytes:
    assert select.select([terminal], [], [], 40)[0], "nothing is said any more"
    try:
        return os.read(terminal, 65536)
    except OSError:
        # Linux: the other side was closed.
        return b""


def test_a_healthy_database_needs_nothing(newest, state_dir):
    result = program(newest, state_dir).run("clear-locks")
    assert result.returncode == 0
    assert "Nothing is blocked." in result.stdout.decode()


def test_a_record_that_cannot_be_written_stops_nothing(newest, state_dir):
    (state_dir / "clear-locks.log").mkdir()
    newest.session("LOCK TABLE goods")
    reader = newest.run("SELECT count(*) FROM goods")
    result = program(newest, state_dir).run("clear-locks", "--yes", "--no-vacuum")
    assert result.returncode == 0
    assert "could not be noted" in result.stderr.decode()
    assert reader.succeeded


@pytest.fixture
def special(own_server: Cluster) -> Iterator[Blockade]:
    """A server with few connections."""
    own_server.settings |= {"max_connections": "12"}
    own_server.start()
    with fresh_database(own_server.dsn) as dsn, Blockade(dsn) as blockade:
        yield blockade


def test_with_all_slots_taken_a_superuser_still_gets_in_and_others_are_told(special, state_dir):
    user = special.role()
    root = special.session("LOCK TABLE goods", user=special.role("SUPERUSER"))
    with pytest.raises(psycopg.OperationalError):
        while True:
            special.session("SELECT 1", user=user)
    result = program(special, state_dir, user=user).run("clear-locks", "--yes")
    assert result.returncode == 4
    assert "superuser" in result.stderr.decode()
    pid = root.info.backend_pid
    document = program(special, state_dir).json("clear-locks", "--yes", f"--pid={pid}")
    assert done(document) == [(pid, "terminate", "terminated")]


def test_when_nobody_can_log_in_at_all_a_person_is_told_what_is_left(special, state_dir):
    special.session("LOCK TABLE pg_database")
    result = program(special, state_dir).run("clear-locks", "--yes")
    assert result.returncode == 4
    assert result.stdout == b""
    assert "kill -TERM, never -9" in result.stderr.decode()


def test_a_database_that_is_away_is_4(state_dir):
    away = "host=127.0.0.1 port=1 user=nobody dbname=none"
    result = Program(state_dir, state_dir, away).run("clear-locks", "--yes")
    assert result.returncode == 4
    assert result.stdout == b""
    assert "No server listens there" in result.stderr.decode()
