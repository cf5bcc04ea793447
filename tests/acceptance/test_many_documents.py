"""`process-pending` with so many documents that more processes read them, and those get killed."""

import contextlib
import signal
import subprocess
from pathlib import Path

import psutil
import psycopg
import pytest

from helena_cli.batch.spool import Spool
from helena_cli.documents.crew import ALONE
from tests.commands import Program
from tests.hosts import wait_until
from tests.spools import assert_law

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.postgres,
    pytest.mark.skipif(psutil.cpu_count() == 1, reason="one processor has no room for more"),
]

MANY = 12 * ALONE


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    for number in range(MANY):
        place = folder / f"{number // 100:03}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05}.md").write_text(f"---\ntitle: Note {number}\n---\n" + "word " * 200)
    return folder


@pytest.fixture
def helena(tmp_path: Path, state_dir: Path, helena_dsn: str) -> Program:
    return Program(tmp_path, state_dir, helena_dsn)


def readers(program: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    """The processes that read for this one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(program.pid).children()
    return []


def titles(dsn: str) -> list[str]:
    query = "SELECT metadata ->> 'title' FROM es_document_references ORDER BY es_doc_id"
    with psycopg.connect(dsn) as connection:
        return [title for (title,) in connection.execute(query)]


def assert_all_are_there(dsn: str, state_dir: Path) -> None:
    assert titles(dsn) == [f"Note {number}" for number in range(MANY)]
    with contextlib.closing(Spool.open(next(state_dir.glob("*.spool")))) as spool:
        assert_law(spool)
        assert spool.dead_letters() == []


def test_a_killed_reader_costs_no_document(
    helena: Program, notes: Path, state_dir: Path, helena_dsn: str
):
    with helena.start("process-pending", str(notes)) as program:
        for reader in wait_until(lambda: readers(program), "a process that reads"):
            reader.send_signal(signal.SIGKILL)
        output, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (0, b"")
    assert f"{MANY:,}".encode() in output
    assert_all_are_there(helena_dsn, state_dir)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_the_next_one_does_the_rest(
    number: signal.Signals, helena: Program, notes: Path, state_dir: Path, helena_dsn: str
):
    command = ["process-pending", str(notes)]
    with helena.start(*command) as program:
        begun = wait_until(lambda: readers(program), "a process that reads")
        if number == signal.SIGKILL:
            program.kill()
        else:
            # As from a terminal, or a supervisor: the readers get it too.
            for process in (*begun, psutil.Process(program.pid)):
                process.send_signal(number)
        _, errors = program.communicate(timeout=60)
    assert program.returncode != 0
    assert b"Traceback" not in errors
    wait_until(lambda: not any(process.is_running() for process in begun), "their end")
    assert helena.run(*command).returncode == 0
    assert_all_are_there(helena_dsn, state_dir)
