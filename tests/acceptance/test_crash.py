"""Processes die at random moments; what they had been promised is in the tables, exactly once."""

import json
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

pytestmark = [pytest.mark.acceptance, pytest.mark.postgres]

KILLS = 20

#: Adds operations one by one and says so after each call; an answer means "accepted".
PRODUCER = """
import sys
from helena_cli import add_operation
run, n = int(sys.argv[1]), 0
while True:
    add_operation("insert", "crash_log", {"run": run, "n": n})
    print(n, flush=True)
    add_operation("update", "crash_keys", {"k": n % 7, "run": run, "n": n})
    n += 1
"""


@pytest.fixture
def environment(helena_dsn: str, state_dir: Path) -> dict[str, str]:
    return {
        **os.environ,
        "HELENA_DSN": helena_dsn,
        "HELENA_STATE_DIR": str(state_dir),
        "HELENA_BATCH_SIZE": "25",
        "HELENA_BATCH_INTERVAL": "0.05",
        "PYTHONPATH": os.getcwd(),
    }


@pytest.fixture
def database(helena_dsn: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(helena_dsn, autocommit=True) as connection:
        # No unique key: the database could not tell a row that was written twice.
        connection.execute("CREATE TABLE crash_log (run int, n int)")
        connection.execute("CREATE TABLE crash_keys (k int PRIMARY KEY, run int, n int)")
        yield connection


def drain(environment: dict[str, str]) -> dict[str, int]:
    """Run `helena process-pending` and return what it says of the operations."""
    command = [sys.executable, "-m", "helena_cli", "process-pending", "--json"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    operations: dict[str, int] = json.loads(answer.stdout)["operations"]
    return operations


def acknowledged_before_kill(run: int, environment: dict[str, str], chance: random.Random) -> int:
    """Start a producer, kill it after some of its answers; how many it gave."""
    command = [sys.executable, "-c", PRODUCER, str(run)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answers = chance.randrange(1, 600)
        for _ in range(answers):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        return answers + len(process.stdout.read().splitlines())


@pytest.mark.slow
def test_after_kill_9_every_acknowledged_operation_is_there_exactly_once(
    environment: dict[str, str], database: psycopg.Connection
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    acknowledged = {run: acknowledged_before_kill(run, environment, chance) for run in range(KILLS)}
    remaining = drain(environment)["remaining"]

    assert remaining == 0
    rows = Counter(database.execute("SELECT run, n FROM crash_log").fetchall())
    assert max(rows.values()) == 1
    for run, count in acknowledged.items():
        written = sorted(n for row_run, n in rows if row_run == run)
        # Of the last operation the answer may have been lost on its way to the pipe.
        assert written in (list(range(count)), list(range(count + 1)))
    _assert_last_update_wins(database, acknowledged)
    _assert_law(environment)


def _assert_last_update_wins(database: psycopg.Connection, acknowledged: dict[int, int]) -> None:
    """Each key holds the last update of the last run that reached it."""
    for k, run, n in database.execute("SELECT k, run, n FROM crash_keys").fetchall():
        newest = max(run for run, count in acknowledged.items() if count - 1 > k)
        assert run >= newest
        if run == newest:
            # The update follows the answer, so that the last one may or may not have been made.
            assert n >= max(i for i in range(acknowledged[run] - 1) if i % 7 == k)


def _assert_law(environment: dict[str, str]) -> None:
    from helena_cli import config
    from helena_cli.runtime import Runtime

    with Runtime(config.load(environ=environment)) as runtime:
        law = runtime.spool.conservation()
    assert law.accepted == law.written + law.coalesced + law.dead + law.dropped + law.spooled
    assert law.spooled == law.dead == law.dropped == 0
