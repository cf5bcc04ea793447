"""`process-pending` and the files that the old programs left behind."""

import contextlib
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from helena_cli.batch.spool import Spool
from tests.commands import Program
from tests.spools import assert_law

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

LONG_AGO = 1_700_000_000

KILLS = 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def helena(folder: Path, state_dir: Path, helena_dsn: str) -> Program:
    return Program(folder, state_dir, helena_dsn)


@pytest.fixture
def database(helena_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        yield connection


def leave(folder: Path, name: str, content: object) -> Path:
    """A file that was complete long ago; anything but text is written as JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


def leave_messages(folder: Path, count: int, first: int = 0) -> None:
    """Messages without an id: one that is accepted twice is there twice."""
    for number in range(first, first + count):
        data = {"sender": "test", "content": str(number)}
        name = f"helena_batch_pending/{number:05}.json"
        leave(folder, name, {"type": "message", "data": data})


def rows(database: psycopg.Connection, query: str) -> list[Any]:
    return [row[0] for row in database.execute(query.encode())]


def messages(database: psycopg.Connection) -> list[int]:
    return rows(database, "SELECT content::int FROM messages WHERE sender = 'test' ORDER BY 1")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*") if path.is_file())


NOTHING = {"found": 0, "accepted": 0, "failed": 0, "skipped": 0}


def test_operation_files_are_drained_once_and_broken_ones_stop_none(
    helena: Program, folder: Path, database: psycopg.Connection
):
    pending = folder / "helena_batch_pending"
    leave_messages(folder, 100)
    for number in range(10):
        data: dict[str, Any] = {"es_doc_id": f"d{number}", "metadata": {"pages": number}}
        leave(pending, f"r{number}.json", {"type": "document_reference", "data": data})
    for number in range(5):
        keys = {"agent_name": "a", "project_id": "p", "context_key": "k"}
        data = {**keys, "context_value": number}
        leave(pending, f"c{number}.json", {"type": "agent_context", "data": data})
    broken = ["", "{", '{"type": "mesage"}', '{"type": "message", "data": {}}', "[]"]
    for number, content in enumerate(broken):
        leave(pending, f"b{number}.json", content)

    first = helena.json("process-pending", code=1)
    assert first["operation_files"] == {**NOTHING, "found": 120, "accepted": 115, "failed": 5}
    assert [Path(one["path"]).name for one in first["failures"]] == [
        f"b{number}.json" for number in range(5)
    ]
    assert first["operations"]["accepted"] == 115
    assert first["operations"]["remaining"] == first["operations"]["dead"] == 0
    assert first["flushes"] < 20
    assert names(pending) == []
    assert len(names(pending / "done")) == 115
    assert len(names(pending / "failed")) == 10
    assert messages(database) == list(range(100))
    assert len(rows(database, "SELECT id FROM es_document_references")) == 10
    assert rows(database, "SELECT context_value FROM agent_contexts") == [4]

    second = helena.json("process-pending")
    assert second["operation_files"] == NOTHING
    assert (second["operations"]["accepted"], second["failures"]) == (0, [])


@pytest.mark.slow
def test_after_kill_9_in_the_middle_no_operation_file_is_lost_or_doubled(
    helena: Program, folder: Path, state_dir: Path, database: psycopg.Connection
):
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    pending = folder / "helena_batch_pending"
    alive = 0
    for run in range(KILLS):
        leave_messages(folder, 60, first=60 * run)
        enough = len(names(pending / "done")) + chance.randrange(1, 60)
        with helena.start("process-pending") as process:
            while len(names(pending / "done")) < enough and process.poll() is None:
                pass
            alive += process.poll() is None
            process.send_signal(signal.SIGKILL)
    assert alive >= KILLS // 2
    last = helena.json("process-pending")
    assert last["operation_files"]["failed"] == last["operations"]["remaining"] == 0
    assert messages(database) == list(range(60 * KILLS))
    assert names(pending) == names(pending / "processing") == []
    assert len(names(pending / "done")) == 60 * KILLS
    with contextlib.closing(Spool.open(next(state_dir.glob("*.spool")))) as spool:
        assert_law(spool)
        assert spool.conservation().accepted == 60 * KILLS
        assert spool.accepted_files(str(pending)) == []


def test_two_runs_at_once_take_each_file_once(
    helena: Program, folder: Path, database: psycopg.Connection
):
    leave_messages(folder, 200)
    with (
        helena.start("process-pending", "--json") as one,
        helena.start("process-pending", "--json") as other,
    ):
        answers = [json.loads(process.communicate(timeout=60)[0]) for process in (one, other)]
    assert sum(answer["operation_files"]["accepted"] for answer in answers) == 200
    assert messages(database) == list(range(200))


def test_tasks_index_their_documents_below_the_configuration_file(
    helena: Program, folder: Path, database: psycopg.Connection
):
    project = folder / "project"
    leave(project, "helena.toml", "[batch]\nsize = 50\n")
    for name in ("docs/one/a.md", "docs/deep/er/b.md", "docs/one/bad.md"):
        leave(project, name, "---\ntitle: [\n---\n" if "bad" in name else "# Text\n")
    for number, name in enumerate(["one/a.md", "deep/er/b.md", "one/bad.md", "nowhere.md"]):
        queue = "realtime_queue" if number % 2 else "batch_queue"
        leave(project, f"helena_tasks/{queue}/{number}.json", {"file_path": f"docs/{name}"})

    first = helena.json("process-pending", "--config", "project/helena.toml", code=1)
    assert first["operation_files"] == {**NOTHING, "found": 4, "accepted": 3, "failed": 1}
    assert first["documents"]["new"] == 3
    failed = {Path(one["path"]).name: one for one in first["failures"]}
    assert failed.keys() == {"3.json", "bad.md"}
    assert "docs/nowhere.md" in failed["3.json"]["reason"]
    assert failed["bad.md"]["indexed"] is True
    known = rows(database, "SELECT es_doc_id FROM es_document_references ORDER BY 1")
    assert known == ["docs:deep/er/b.md", "docs:one/a.md", "docs:one/bad.md"]
    assert names(project / "helena_tasks" / "batch_queue" / "done") == ["0.json", "2.json"]

    second = helena.json("process-pending", "--config", "project/helena.toml")
    assert (second["operation_files"], second["operations"]["accepted"]) == (NOTHING, 0)


def test_a_task_for_a_document_of_the_places_is_done_with_them(
    helena: Program, folder: Path, database: psycopg.Connection
):
    leave(folder, "notes/sub/a.md", "# Text\n")
    leave(folder, "notes/b.md", "# Text\n")
    leave(folder, "helena_tasks/batch_queue/1.json", {"file_path": "notes/sub/a.md"})
    answer = helena.json("process-pending", ".")
    assert answer["operation_files"]["accepted"] == 1
    assert (answer["documents"]["found"], answer["documents"]["new"]) == (2, 2)
    assert rows(database, "SELECT namespace FROM helena.roots") == [folder.name]


UPSERT = (
    "INSERT INTO documents (file_path, title, indexed_at) VALUES ('{path}', '{title}', NOW())"
    " ON CONFLICT (file_path) DO UPDATE SET title = EXCLUDED.title;"
)


def test_the_backlog_is_applied_in_few_transactions_and_once(
    helena: Program, folder: Path, database: psycopg.Connection
):
    backlog = folder / "sql" / "realtime_updates"
    for number in range(30):
        leave(backlog, f"{number:02}.sql", UPSERT.format(path=f"{number}.md", title="It''s\nä 🎉"))
    leave(backlog, "broken.sql", "INSERT INTO documents (file_path) VALUES ('x")
    leave(backlog, "other.sql", "CREATE TABLE other (n int);")
    first = helena.json("process-pending", code=1)
    numbers = {name: first["backlog"][name] for name in ("found", "applied", "failed")}
    assert numbers == {"found": 32, "applied": 30, "failed": 2}
    assert first["backlog"]["transactions"] < 5
    assert [Path(one["path"]).name for one in first["failures"]] == ["broken.sql", "other.sql"]
    assert len(rows(database, "SELECT file_path FROM documents")) == 30

    (backlog / "failed" / "other.sql").rename(backlog / "other.sql")
    second = helena.json("process-pending", "--allow-any-sql")
    assert (second["backlog"]["found"], second["backlog"]["applied"]) == (1, 1)
    assert rows(database, "SELECT count(*) FROM other") == [0]


def test_a_dry_run_touches_no_file(helena: Program, folder: Path, database: psycopg.Connection):
    leave_messages(folder, 3)
    leave(folder, "helena_batch_pending/bad.json", "{")
    leave(folder, "docs/a.md", "# Text\n")
    leave(folder, "helena_tasks/batch_queue/1.json", {"file_path": "docs/a.md"})
    leave(folder, "sql/realtime_updates/1.sql", UPSERT.format(path="a", title="b"))
    before = sorted(folder.rglob("*"))
    answer = helena.json("process-pending", "--dry-run", code=1)
    assert answer["operation_files"] == {**NOTHING, "found": 5, "accepted": 4, "failed": 1}
    assert (answer["documents"]["new"], answer["backlog"]["applied"]) == (1, 1)
    assert answer["operations"]["accepted"] == 0
    assert sorted(folder.rglob("*")) == before
    assert rows(database, "SELECT count(*) FROM documents") == [0]
    assert messages(database) == []


def test_without_pending_files_nothing_is_made(helena: Program, folder: Path):
    assert helena.json("process-pending")["operation_files"] == NOTHING
    assert list(folder.iterdir()) == []


def test_without_a_database_the_files_stay_where_they_are(helena: Program, folder: Path):
    leave_messages(folder, 3)
    away = "host=127.0.0.1 port=1 user=nobody dbname=none connect_timeout=2"
    answer = helena.json("process-pending", code=4, HELENA_DSN=away)
    assert answer["operation_files"] == NOTHING
    assert len(names(folder / "helena_batch_pending")) == 3


def test_a_person_is_told_what_became_of_the_files_and_why(helena: Program, folder: Path):
    leave_messages(folder, 3)
    leave(folder, "helena_batch_pending/bad.json", '{"type": "message", "data": {"sendr": "a"}}')
    leave(folder, "sql/realtime_updates/1.sql", UPSERT.format(path="a", title="b"))
    result = helena.run("process-pending")
    shown = result.stdout.decode()
    assert result.returncode == 1
    assert "4 found: 3 accepted, 1 failed" in shown
    assert "1 found: 1 applied, 0 failed; 1 transaction" in shown
    assert f"{folder}/helena_batch_pending/bad.json" in shown
    assert "Did you mean 'sender'?" in shown
    assert result.stderr == b""
