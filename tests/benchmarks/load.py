"""What writers cost the server, and somebody who reads meanwhile; an idle database to compare."""

import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from helena_cli.runtime import Runtime
from tests.benchmarks import held, operations, server
from tests.benchmarks.operations import TABLE, make_row
from tests.benchmarks.reader import Reader
from tests.hosts import wait_until

#: Rows that are there before.
HELD = 100_000

#: Real-time writers at one time.
WRITERS = 4

#: Operations per second of the way which does not write as fast as it can.
RATE = 500

#: So many operations wait at most: else all would be queued at once, and writing be the rest.
BACKLOG = 10_000

#: Writes rows with these numbers for so many seconds; how many it wrote.
Way = Callable[[str, Iterator[int], float], int]


def idle(_dsn: str, _numbers: Iterator[int], seconds: float) -> int:
    """Nobody writes."""
    time.sleep(seconds)
    return 0


def busy(_dsn: str, _numbers: Iterator[int], seconds: float) -> int:
    """Nobody writes, but every core has other work: what a reader waits for the machine alone."""
    endless = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(endless) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return 0


def helena_paced(dsn: str, numbers: Iterator[int], seconds: float) -> int:
    """`add_operation` at a steady rate."""
    count = int(seconds * RATE)
    with server.settings(dsn) as settings, Runtime(settings) as runtime:
        started = time.perf_counter()
        for done, n in enumerate(itertools.islice(numbers, count)):
            runtime.engine.add_operation("insert", TABLE, make_row(n))
            time.sleep(max(0.0, started + done / RATE - time.perf_counter()))
        runtime.drain()
    return count


def helena_full_speed(dsn: str, numbers: Iterator[int], seconds: float) -> int:
    """`add_operations` as fast as they are written."""
    count = 0
    with server.settings(dsn) as settings, Runtime(settings) as runtime:
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            if runtime.spool.queue().total >= BACKLOG:
                time.sleep(0.005)
                continue
            part = [make_row(n) for n in itertools.islice(numbers, 1000)]
            runtime.engine.add_operations(("insert", TABLE, row) for row in part)
            count += len(part)
        runtime.drain()
    return count


def copy_full_speed(dsn: str, numbers: Iterator[int], seconds: float) -> int:
    """COPY without upsert: what a reader notices of any writer that never pauses."""
    count, deadline = 0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        part = [make_row(n) for n in itertools.islice(numbers, BACKLOG)]
        operations.plain_copy(dsn, part, 1000)
        count += len(part)
    return count


def connection_per_operation(dsn: str, numbers: Iterator[int], seconds: float) -> int:
    """What the real-time writers did, some at one time."""
    deadline = time.perf_counter() + seconds

    def work(_writer: int) -> int:
        count = 0
        while time.perf_counter() < deadline:
            operations.connection_per_operation(dsn, [make_row(next(numbers))], 1)
            count += 1
        return count

    with ThreadPoolExecutor(WRITERS) as threads:
        return sum(threads.map(work, range(WRITERS)))


IDLE = "nobody"
WAYS: dict[str, Way] = {
    IDLE: idle,
    f"{IDLE}, busy machine": busy,
    f"Helena, {RATE}/s": helena_paced,
    "Helena, full speed": helena_full_speed,
    "plain COPY, full speed": copy_full_speed,
    f"{WRITERS} with a connection per operation": connection_per_operation,
}

#: Figure → value: `rate`, `commits` and `wal` per operation, and of each query `median`, `p99` in
#: milliseconds and `times` that p99 on the idle database.
Figures = dict[str, float]


def measure(admin: str, seconds: float, runs: int) -> dict[str, Figures]:
    """Who writes → the figures, each the median of `runs` rounds; ratios are within a round."""
    rounds: dict[str, list[Figures]] = {name: [] for name in WAYS}
    # New rows only, and of those no number twice.
    numbers = itertools.count(HELD)
    with server.database(admin) as dsn, psycopg.connect(admin, autocommit=True) as observer:
        with psycopg.connect(dsn, autocommit=True) as connection:
            held.fill(connection, HELD)
        for _ in range(runs):
            for name, way in WAYS.items():
                figures = _one(observer, dsn, partial(way, dsn, numbers, seconds))
                base = rounds[IDLE][-1] if name != IDLE else figures
                for query in ("by key", "by tags"):
                    figures[f"{query} times"] = figures[f"{query} p99"] / base[f"{query} p99"]
                rounds[name].append(figures)
    return {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in rounds.items()
    }


def _one(observer: psycopg.Connection[Any], dsn: str, write: Callable[[], int]) -> Figures:
    with psycopg.connect(dsn, autocommit=True) as connection:
        held.settle(connection)
    commits, wal = _counters(observer, dsn)
    reader = Reader(dsn, HELD)
    started = time.perf_counter()
    try:
        count = write()
        seconds = time.perf_counter() - started
    finally:
        readings = reader.stop()
    commits_after, wal_after = _counters(observer, dsn)
    figures = {
        "rate": count / seconds,
        "commits": (commits_after - commits - readings.commits) / max(1, count),
        "wal": (wal_after - wal) / max(1, count),
    }
    for query, latency in readings.latencies.items():
        figures |= {f"{query} median": latency.median, f"{query} p99": latency.p99}
    return figures


def _counters(observer: psycopg.Connection[Any], dsn: str) -> tuple[int, int]:
    """Commits of this database and bytes of write-ahead log of the server, so far."""
    name = conninfo_to_dict(dsn)["dbname"]

    def ended() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s"
        return observer.execute(query, [name]).fetchone() == (0,)

    # A session tells its last commits when it ends.
    wait_until(ended, "all sessions have ended")
    query = (
        "SELECT xact_commit, (pg_current_wal_insert_lsn() - '0/0'::pg_lsn)::int8"
        " FROM pg_stat_database WHERE datname = %s"
    )
    row = observer.execute(query, [name]).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])
