"""`helena test`: it passes where all is well, says what is wrong, and leaves nothing behind."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.commands import Program
from tests.hosts import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

STEPS = [
    *("connection", "tables of Helena", "keys of the known tables", "nobody in the way"),
    *("place of the queue", "scratch schema", "write and read back", "update", "message"),
    *("bad row among good ones", "parent that comes late", "killed process", "lost connection"),
    *("lock, seen and cleared", "GIN pending list"),
]


@pytest.fixture
def admin(helena_dsn: str) -> Iterator["psycopg.Connection"]:
    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def temporary(state_dir: Path) -> Path:
    path = state_dir / "tmp"
    path.mkdir()
    return path


@pytest.fixture
def program(helena_dsn: str, state_dir: Path, temporary: Path) -> Program:
    program = Program(state_dir, state_dir, helena_dsn)
    program.variables["TMPDIR"] = str(temporary)
    program.variables["HELENA_BATCH_INTERVAL"] = "1"
    return program


def left_behind(admin: "psycopg.Connection", temporary: Path) -> list[str]:
    """Schemas, position rows and folders of a trial that are still there."""
    schemas = admin.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'helena_test_%'")
    spools = admin.execute("SELECT spool_id FROM helena.spool_position")
    return [*(n for (n,) in schemas), *(n for (n,) in spools), *os.listdir(temporary)]


#: What depends on how busy the machine is: it is shown, and no test relies upon it.
OF_TIME = {"written within the interval", "throughput", "no long query", "response time"}


def prove(program: Program, *arguments: str, dsn: str = "") -> dict[str, Any]:
    """The document of a short trial; its exit code says whether everything passed."""
    dsn = dsn or program.variables["HELENA_DSN"]
    result = program.run("test", "--quick", *arguments, "--json", HELENA_DSN=dsn)
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == (0 if document["passed"] else 1), result.stderr.decode()
    return document


def failed(document: dict[str, Any]) -> list[str]:
    return [step["name"] for step in document["steps"] if not step["passed"]]


def test_everything_passes_on_a_sound_database_and_nothing_is_left_behind(
    program, admin, temporary
):
    document = prove(program, "--ops", "100")
    assert [step["name"] for step in document["steps"]] == STEPS
    assert failed(document) == []
    before, after = document["before"], document["after"]
    assert before["operations"] == after["operations"] == 100
    assert (before["commits_per_operation"], before["connections_opened"]) == (1.0, 100)
    assert after["commits_per_operation"] < 0.2
    assert after["connections_at_once"] <= 3
    promises = [*document["guarantees"], *document["criteria"]]
    assert len(promises) == 10
    assert [one for one in promises if one["kept"] is False and one["name"] not in OF_TIME] == []
    assert left_behind(admin, temporary) == []


def test_the_tables_of_a_person_are_not_touched(program, admin):
    admin.execute(
        "INSERT INTO messages (id, sender, message_type, content) VALUES ('a','b','c','d')"
    )
    assert failed(prove(program, "--ops", "20")) == []
    assert admin.execute("SELECT id FROM messages").fetchall() == [("a",)]
    assert admin.execute("SELECT count(*) FROM es_document_references").fetchone() == (0,)


def test_a_person_sees_each_step_and_both_ways_side_by_side(program):
    result = program.run("test", "--quick", "--ops", "20")
    shown = result.stdout.decode()
    assert all(step in shown for step in STEPS)
    assert "connection per operation" in shown
    assert "verything passed" in shown
    assert result.stderr == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_behind(program, admin, temporary, number):
    with program.start("test", "--ops", "100000") as process:
        wait_until(lambda: left_behind(admin, temporary), "the trial began")
        wait_until(
            lambda: admin.execute(
                "SELECT 1 FROM pg_stat_activity WHERE application_name = 'helena test before'"
            ).fetchall(),
            "the old way began",
        )
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert left_behind(admin, temporary) == []


def test_what_a_killed_trial_left_is_dropped_by_a_later_one(program, admin, temporary):
    old = f"helena_test_{int(time.time()) - 4000}_abc"
    admin.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(old)))
    assert failed(prove(program, "--ops", "20")) == []
    assert left_behind(admin, temporary) == []


# What is wrong


def test_a_key_that_is_missing_is_named(program, admin):
    admin.execute("ALTER TABLE messages DROP CONSTRAINT messages_pkey CASCADE")
    document = prove(program, "--ops", "20")
    assert failed(document) == ["keys of the known tables"]
    assert not document["passed"]
    (step,) = [step for step in document["steps"] if not step["passed"]]
    assert "CREATE UNIQUE INDEX ON messages (id)" in step["detail"]


def test_a_role_that_may_only_read_is_told_so(program, admin, helena_dsn):
    role = f"reader_{secrets.token_hex(4)}"
    admin.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(role)))
    try:
        admin.execute(sql.SQL("GRANT pg_read_all_data TO {}").format(sql.Identifier(role)))
        only_reads = make_conninfo(helena_dsn, user=role)
        document = prove(program, dsn=only_reads)
        assert failed(document)[0] == "scratch schema"
        (detail,) = [s["detail"] for s in document["steps"] if s["name"] == "scratch schema"]
        assert "permission denied for database" in detail
        # What the role lacks, and not what it has.
        assert "GRANT CREATE ON DATABASE" in detail
        assert document["after"] == {}
    finally:
        admin.execute(sql.SQL("REVOKE pg_read_all_data FROM {}").format(sql.Identifier(role)))
        admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_a_table_that_is_locked_for_long_is_named_with_its_holder(program, admin, helena_dsn):
    with psycopg.connect(helena_dsn) as holder:
        pid = holder.info.backend_pid
        holder.execute("LOCK TABLE messages IN ACCESS EXCLUSIVE MODE")
        wait_until(
            lambda: admin.execute(
                "SELECT 1 FROM pg_stat_activity WHERE pid = %s"
                " AND xact_start < clock_timestamp() - interval '1.1 s'",
                [pid],
            ).fetchall(),
            "the lock to be old",
        )
        document = prove(program, "--ops", "20")
    (step,) = [step for step in document["steps"] if not step["passed"]]
    assert step["name"] == "nobody in the way"
    assert str(pid) in step["detail"]
    assert "clear-locks" in step["detail"]


def test_a_database_without_the_tables_of_helena_says_how_to_get_them(program, dsn):
    document = prove(program, dsn=dsn)
    assert not document["passed"]
    assert failed(document)[0] == "tables of Helena"
    assert "helena init" in document["steps"][1]["detail"]


def test_a_state_directory_that_cannot_be_used_is_a_step_that_fails(program, state_dir):
    # No folder can be made below a file, not even by root.
    (state_dir / "file").touch()
    program.variables["HELENA_STATE_DIR"] = str(state_dir / "file" / "state")
    document = prove(program, "--ops", "20")
    assert failed(document) == ["place of the queue"]
    (step,) = [step for step in document["steps"] if not step["passed"]]
    assert "HELENA_STATE_DIR" in step["detail"]


def test_the_process_that_is_killed_takes_no_modules_from_the_current_folder(program, state_dir):
    (state_dir / "signal.py").write_text("raise SystemExit('not this one')")
    code = (
        "import pathlib, sys; from helena_cli.proof.trial import Trial;"
        " status = Trial.killed_writer(None, pathlib.Path('spool'), 't', 1); sys.exit(-status)"
    )
    process = subprocess.run(
        [sys.executable, "-P", "-c", code], check=False, cwd=state_dir, env=program.variables
    )
    assert process.returncode == signal.SIGKILL


def test_no_database_is_exit_code_4(program):
    result = program.run("test", "--json", HELENA_DSN="host=127.0.0.1 port=1 dbname=none")
    assert (result.returncode, result.stdout) == (4, b"")
