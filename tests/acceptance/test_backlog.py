"""SQL files that were left behind: few transactions, and each file once, also after kill -9."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.commands import Program

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

KILLS = 10

#: A new row for each time a file is applied: without a key, nothing hides a second one.
LOG = "CREATE TABLE backlog_log (line int, transaction bigint DEFAULT txid_current())"

BODY = """# It's the guide to "{path}"

Several lines; some with -- dashes, /* comments */, $$dollars$$ and \\backslashes\\n,
	a tab, %s, {{braces}}, 🎉 and 日本語.
"""

UPSERT = """-- left behind by the old program
INSERT INTO documents (
    file_path, document_type, title, content_preview, line_count, created_at, indexed_at
) VALUES (
    '{path}', 'guide', 'It''s {path}', '{body}', 5, NOW(), NOW()
)
ON CONFLICT (file_path) DO UPDATE SET
    title = EXCLUDED.title,
    content_preview = EXCLUDED.content_preview,
    indexed_at = NOW();
INSERT INTO backlog_log (line) VALUES ({number});
"""

BROKEN = {
    "017": "INSERT INTO documents (file_path) VALUES ('it's broken');",
    "099": "INSERT INTO documents (file_path, line_count) VALUES ('a', 'many');",
    "120": "INSERT INTO documents (file_path",
    "150": "DROP TABLE documents; INSERT INTO backlog_log (line) VALUES (150);",
}


@pytest.fixture
def helena(tmp_path: Path, state_dir: Path, helena_dsn: str) -> Program:
    program = Program(tmp_path, state_dir, helena_dsn)
    program.variables["HELENA_PENDING_TABLES"] = "backlog_log"
    return program


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "sql" / "realtime_updates"
    path.mkdir(parents=True)
    return path


@pytest.fixture
def database(helena_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        connection.execute(LOG)
        yield connection


def body(path: str) -> str:
    return BODY.format(path=path)


def leave(folder: Path, number: int) -> None:
    path = f"docs/{number:03}.md"
    text = UPSERT.format(path=path, number=number, body=body(path).replace("'", "''"))
    (folder / f"{number:03}.sql").write_text(BROKEN.get(f"{number:03}", text), encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def applied(database: psycopg.Connection) -> Counter[int]:
    return Counter(row[0] for row in database.execute("SELECT line FROM backlog_log").fetchall())


def test_180_files_are_drained_in_a_few_transactions_and_only_once(
    helena: Program, folder: Path, database: psycopg.Connection
):
    for number in range(180):
        leave(folder, number)
    bad = [int(name) for name in BROKEN]
    good = set(range(180)) - set(bad)

    answer = helena.json("process-pending", code=1)
    assert {name: answer["backlog"][name] for name in ("found", "applied", "failed")} == {
        "found": 180,
        "applied": 176,
        "failed": 4,
    }
    used = database.execute("SELECT count(DISTINCT transaction) FROM backlog_log").fetchone()
    assert used is not None and used[0] <= 5
    assert applied(database) == Counter(good)
    rows = database.execute("SELECT file_path, content_preview FROM documents").fetchall()
    assert sorted(rows) == [
        (path, body(path)) for path in (f"docs/{n:03}.md" for n in sorted(good))
    ]
    assert names(folder / "done") == [f"{number:03}.sql" for number in sorted(good)]
    assert names(folder / "failed") == sorted(
        name for bad in BROKEN for name in (f"{bad}.sql", f"{bad}.sql.reason.txt")
    )
    assert "invalid input syntax" in (folder / "failed/099.sql.reason.txt").read_text()
    assert "DROP is not allowed" in (folder / "failed/150.sql.reason.txt").read_text()
    assert names(folder) == ["done", "failed", "processing"]

    again = helena.json("process-pending")
    assert again["backlog"]["found"] == 0
    for number in (0, 1):
        (folder / f"done/{number:03}.sql").rename(folder / f"{number:03}.sql")
    once_more = helena.json("process-pending")
    assert (once_more["backlog"]["found"], once_more["backlog"]["applied"]) == (2, 0)
    assert applied(database) == Counter(good)


@pytest.mark.slow
def test_after_kill_9_each_file_is_applied_once_and_none_is_lost(
    helena: Program, folder: Path, database: psycopg.Connection
):
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    total = 0
    for _ in range(KILLS):
        # More than one transaction takes, so that there is a moment between two of them too.
        for number in range(total, total + 120):
            leave_line(folder, number)
        total += 120
        goal = count(folder / "done") + chance.randrange(120)
        with helena.start("process-pending", "--json") as process:
            # Mostly in the middle of the moving: what was committed and what is in done/ differ.
            while process.poll() is None and count(folder / "done") < goal:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.001)
            if chance.random() < 0.3:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(chance.uniform(0, 0.2))
            process.kill()
            process.communicate()
    helena.json("process-pending")
    assert applied(database) == Counter(range(total))
    assert names(folder / "done") == sorted(f"{number:04}.sql" for number in range(total))
    assert names(folder) == ["done", "processing"]
    assert names(folder / "processing") == []


def leave_line(folder: Path, number: int) -> None:
    text = f"INSERT INTO backlog_log (line) VALUES ({number});"
    (folder / f"{number:04}.sql").write_text(text)


def count(folder: Path) -> int:
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as listing:
        return sum(1 for _ in listing)
    return 0


#: Applies the backlog and dies at the named place, before what is there happens.
VICTIM = """
import importlib, os, sys
from pathlib import Path
from helena_cli import config
from helena_cli.database.backlog import drain_backlog
from helena_cli.runtime import Runtime

module, owner, name = sys.argv[1].split(":")
place = getattr(importlib.import_module(module), owner)
setattr(place, name, lambda *_, **__: os.kill(os.getpid(), 9))
with Runtime(config.load()) as runtime, runtime.connection("process-pending") as connection:
    drain_backlog(Path("sql/realtime_updates"), connection, tables=["backlog_log"], max_bytes=9999)
"""


@pytest.mark.parametrize(
    ("place", "committed"),
    [
        ("helena_cli.batch.claims:Claims:read", False),
        ("helena_cli.database.applying:Applying:commit", False),
        ("helena_cli.database.applying:Applying:_record", False),
        ("helena_cli.database.applying:Applying:_commit", False),
        ("helena_cli.batch.claims:Claims:done", True),
    ],
)
def test_whichever_step_is_the_last_the_next_run_finishes_the_work(
    helena: Program, folder: Path, database: psycopg.Connection, place: str, committed: bool
):
    for number in range(3):
        leave_line(folder, number)
    died = subprocess.run(
        [sys.executable, "-c", VICTIM, place], cwd=helena.folder, env=helena.variables, timeout=60
    )
    assert died.returncode == -signal.SIGKILL
    assert names(folder / "processing") == ["0000.sql", "0001.sql", "0002.sql"]
    assert sum(applied(database).values()) == (3 if committed else 0)

    answer = helena.json("process-pending")
    assert answer["backlog"]["found"] == 3
    assert answer["backlog"]["applied"] == (0 if committed else 3)
    assert applied(database) == Counter(range(3))
    assert names(folder / "done") == ["0000.sql", "0001.sql", "0002.sql"]
