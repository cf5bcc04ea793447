"""One host as the tests see it: its queue, its scripts, and the database they all write to."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

import helena_cli
from helena_cli import config
from helena_cli.batch.ledger import Conservation
from helena_cli.batch.spool import Spool
from helena_cli.runtime import Runtime

PROJECT = Path(helena_cli.__file__).parent.parent


def wait_until(condition: Callable[[], Any], what: str, *, limit: float = 90.0) -> Any:
    """Wait for a condition, and return what it returned; the limit is for hopeless cases."""
    deadline = time.monotonic() + limit
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)
    return found


class Host:
    """Processes with one state directory. `dsn` is theirs, `admin` the test's own way in.

    The table `numbers` has no unique key: it shows a row that was written twice.
    """

    def __init__(self, dsn: str, state_dir: Path, *, admin: str | None = None) -> None:
        self.variables = {
            "PATH": os.environ["PATH"],
            "HOME": str(state_dir),
            "PYTHONPATH": str(PROJECT),
            # Newer releases warn of every fork of a process with threads.
            "PYTHONWARNINGS": "ignore:This process:DeprecationWarning",
            "HELENA_DSN": dsn,
            "HELENA_STATE_DIR": str(state_dir),
            "HELENA_BATCH_INTERVAL": "0.2",
        }
        self.state_dir = state_dir
        self.admin = psycopg.connect(admin or dsn, autocommit=True)
        self.admin.execute("CREATE TABLE IF NOT EXISTS numbers (n int, note text)")

    def close(self) -> None:
        self.admin.close()

    def runtime(self, **variables: str) -> Runtime:
        """What a process of this host would use. A context manager."""
        return Runtime(config.load(environ=self.variables | variables))

    def start(self, script: str, *arguments: object, **variables: str) -> "subprocess.Popen[str]":
        """Start a Python script; its stdin, stdout and stderr are pipes."""
        # A file, because the children of multiprocessing import it.
        path = self.state_dir / f"script_{hashlib.sha256(script.encode()).hexdigest()[:8]}.py"
        if not path.exists():
            # Once: another process may be reading it.
            path.write_text(script)
        return subprocess.Popen(
            [sys.executable, path, *map(str, arguments)],
            env=self.variables | variables,
            cwd=self.state_dir,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(
        self, script: str, *arguments: object, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a Python script to its end."""
        with self.start(script, *arguments, **variables) as process:
            try:
                output, errors = process.communicate(timeout=60)
            finally:
                # Without effect unless it hangs.
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def numbers(self) -> list[int]:
        """The numbers in the table, sorted; a doubled one shows twice."""
        return sorted(n for (n,) in self.sql("SELECT n FROM numbers"))

    def sql(self, query: str) -> Sequence[tuple[Any, ...]]:
        """Run SQL as the administrator; the rows."""
        cursor = self.admin.execute(query.encode())
        return cursor.fetchall() if cursor.description else []

    def spools(self) -> list[Path]:
        return sorted(self.state_dir.glob("*.spool"))

    def spool(self) -> Spool:
        """The only spool of the host; the caller closes it."""
        (path,) = self.spools()
        return Spool.open(path)

    def law(self) -> Conservation:
        """The counters, after a look that they add up."""
        spool = self.spool()
        try:
            law = spool.conservation()
        finally:
            spool.close()
        assert law.accepted == law.written + law.coalesced + law.dead + law.dropped + law.spooled
        return law

    def assert_written_once(self, count: int) -> None:
        """All numbers from 0 are in the table, each once, and the books agree."""
        law, numbers = self.law(), self.numbers()
        doubled = [n for n, times in Counter(numbers).items() if times > 1]
        assert not doubled, f"written twice: {doubled}; {law}"
        missing = sorted({*range(count)} - {*numbers})
        assert not missing, f"not written: {missing}; {law}"
        assert len(numbers) == law.accepted == count, law
        assert law.spooled == law.dead == 0, law


@contextmanager
def watched_connections(dsn: str) -> Iterator[list[list[str]]]:
    """Collects what Helena's connections to this database are called, again and again."""
    seen: list[list[str]] = []
    stop = threading.Event()

    def look() -> None:
        query = (
            "SELECT application_name FROM pg_stat_activity"
            " WHERE application_name LIKE 'helena%' AND datname = current_database()"
        )
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not stop.is_set():
                seen.append([name for (name,) in connection.execute(query)])

    thread = threading.Thread(target=look, name="watch connections")
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


#: Adds numbers until it is told to end, and says after each that it was accepted.
PRODUCE = """
import pathlib, sys, time
from helena_cli import add_operation
end, n = pathlib.Path(sys.argv[1]), 0
while not end.exists():
    add_operation("insert", "numbers", {"n": n})
    print(n, flush=True)
    n += 1
    time.sleep(0.001)
"""


class Producer:
    """A process that adds numbers until `finish`."""

    def __init__(self, host: Host, **variables: str) -> None:
        self._end = host.state_dir / "end"
        self.process = host.start(PRODUCE, self._end, **variables)
        self.accepted = 0

    def produce(self, count: int = 100) -> None:
        """Wait until so many more numbers are accepted."""
        assert self.process.stdout is not None
        for _ in range(count):
            assert int(self.process.stdout.readline()) == self.accepted
            self.accepted += 1

    def finish(self) -> int:
        """Let it end; how many numbers were accepted."""
        self._end.touch()
        assert self.process.stdout is not None
        # Not `communicate`, which passes by what was read ahead.
        rest = self.process.stdout.read().splitlines()
        assert self.process.wait(60) == 0
        return self.accepted + len(rest)
