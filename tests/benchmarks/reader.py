"""Reads what others write, again and again: a process of its own, held up only by the server."""

import json
import random
import select
import subprocess
import sys
import time
from typing import Any

import psycopg
from msgspec import Struct

from tests.benchmarks.operations import TABLE, make_row

#: What somebody would look for: one document, and those with two tags.
KEY = f"SELECT filename, metadata FROM {TABLE} WHERE es_doc_id = %s".encode()
TAGS = f"SELECT es_doc_id FROM {TABLE} WHERE tags @> ARRAY['tag-7', 'topic-3']".encode()

#: Seconds between two looks.
PAUSE = 0.002

#: Looks that do not count: caches and plans are cold.
WARM_UP = 20


class Latency(Struct, frozen=True):
    """How long queries took, in milliseconds."""

    median: float
    p99: float


class Readings(Struct, frozen=True):
    """What a reader saw, and how many transactions of the server were its own."""

    latencies: dict[str, Latency]
    commits: int


class Reader:
    """Reads the first `held` rows from its start until `stop`."""

    def __init__(self, dsn: str, held: int) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.reader", dsn, str(held)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "reading\n"

    def stop(self) -> Readings:
        """Let it end, and say what it saw."""
        output, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0
        taken: dict[str, list[float]] = json.loads(output)
        return Readings(
            {name: _latency(values) for name, values in taken.items()},
            # One more is the connection itself.
            1 + sum(len(values) + WARM_UP for values in taken.values()),
        )


def _latency(values: list[float]) -> Latency:
    values.sort()
    return Latency(values[len(values) // 2], values[int(len(values) * 0.99)])


def _read(connection: psycopg.Connection[Any], held: int, taken: dict[str, list[float]]) -> None:
    key = make_row(random.randrange(held))["es_doc_id"]
    for name, query, values in (("by key", KEY, [key]), ("by tags", TAGS, None)):
        started = time.perf_counter()
        connection.execute(query, values).fetchall()
        taken[name].append((time.perf_counter() - started) * 1000)


def main() -> None:
    """Read until standard input ends, then print all times."""
    dsn, held = sys.argv[1], int(sys.argv[2])
    taken: dict[str, list[float]] = {"by key": [], "by tags": []}
    with psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(WARM_UP):
            _read(connection, held, taken)
        print("reading", flush=True)
        while not select.select([sys.stdin], [], [], PAUSE)[0]:
            _read(connection, held, taken)
    print(json.dumps({name: values[WARM_UP:] for name, values in taken.items()}))


if __name__ == "__main__":
    main()
