"""What a spool says of itself to other programs: one snapshot, and its JSON."""

import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from msgspec import Struct, to_builtins

from helena_cli.batch import histogram, ledger
from helena_cli.batch.histogram import Histogram
from helena_cli.batch.ledger import Conservation, Flusher, Flushes, Queue
from helena_cli.batch.tally import Tally


class Report(Struct, frozen=True):
    """A spool at one moment. `waiting` counts the tables whose lanes wait."""

    queue: Queue
    conservation: Conservation
    flusher: Flusher | None
    flushes: Flushes
    histograms: Mapping[str, Histogram]
    lost: int
    waiting: int


def read(connection: sqlite3.Connection, fresh: Tally, now: float) -> Report:
    """All of it from one transaction, so that the numbers agree."""
    query = "SELECT lost, (SELECT count(*) FROM lanes WHERE reason IS NOT NULL) FROM counters"
    lost, waiting = connection.execute(query).fetchone()
    return Report(
        queue=ledger.queue(connection, fresh, now),
        conservation=ledger.conservation(connection, fresh),
        flusher=ledger.flusher(connection),
        flushes=ledger.flushes(connection),
        histograms=histogram.read(connection),
        lost=lost,
        waiting=waiting,
    )


def document(
    queue: Queue, lost: int, flusher: Flusher | None, running: bool, flushes: Flushes
) -> dict[str, Any]:
    """`queue`, `flusher` and `flushes` as a contract with other programs.

    Keys may be added, never renamed. `flusher` is who flushed last, `running` whether one does now.
    """
    now = flusher if running else None
    last = flushes.last and {**to_builtins(flushes.last), "at": instant(flushes.last.at)}
    return {
        "queue": {**to_builtins(queue), "lost": lost},
        "flusher": {
            "running": running,
            "pid": now and now.pid,
            "since": now and instant(now.since),
            "heartbeat": now and instant(now.heartbeat),
        },
        "flushes": {**to_builtins(flushes), "last": last},
    }


def instant(seconds: float | None) -> str | None:
    """A Unix time as ISO 8601 in UTC, for JSON."""
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
