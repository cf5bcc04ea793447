"""How long things took, for the whole host: how many took at most so many seconds, and their sum.

Counted in the spool, so that any process can tell it, also of flushes of others long gone.
"""

import math
import sqlite3
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from msgspec import Struct

from helena_cli.batch.flush import Outcome

FLUSH = "flush"
COMMIT_DELAY = "commit_delay"

#: Upper bounds in seconds. A new release may have others: what was counted stays true of them.
BOUNDS: Mapping[str, tuple[float, ...]] = {
    #: One flush that succeeded.
    FLUSH: (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, math.inf),
    #: From the acceptance of an operation to the commit that holds it.
    COMMIT_DELAY: (
        *(0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 5.5, 6.0, 7.5, 10.0),
        *(30.0, 60.0, 300.0, 900.0, 3600.0, 86_400.0, math.inf),
    ),
}


class Bin(NamedTuple):
    """How many lie below this bound and above the one before it, and their sum in seconds."""

    bound: float
    observed: int
    seconds: float


class Histogram(Struct, frozen=True):
    """Each bound with how many were no longer than that, the last without bound; seconds."""

    buckets: tuple[tuple[float, int], ...]
    sum: float


def of_flush(seconds: float) -> list[Bin]:
    """One flush, for `add`."""
    bounds = BOUNDS[FLUSH]
    return [Bin(bounds[bisect_left(bounds, seconds)], 1, seconds)]


def of_delays(committed: float, due: Iterable[int], outcome: Outcome) -> list[Bin]:
    """The delays of what a flush settled in the database, for `add`.

    `committed` is the Unix time of the commit, `due` the ids that were to be written, in order. An
    id is the time of its acceptance in µs.
    """
    ids = list(due)
    settled = (outcome.written, outcome.coalesced, outcome.skipped)
    if len(ids) != sum(map(len, settled)):
        known = frozenset().union(*settled)
        ids = [identifier for identifier in ids if identifier in known]
    return _bins(committed, ids)


def _bins(now: float, ids: Sequence[int]) -> list[Bin]:
    """Found by bisection: a batch has thousands of ids, and lies in few bins."""
    bins, end = [], len(ids)
    for bound in BOUNDS[COMMIT_DELAY]:
        if not end:
            break
        start = 0 if bound == math.inf else bisect_left(ids, (now - bound) * 1e6, hi=end)
        if start < end:
            seconds = (end - start) * now - sum(ids[start:end]) / 1e6
            # A clock that was set back would take something away.
            bins.append(Bin(bound, end - start, max(0.0, seconds)))
        end = start
    return bins


def add(connection: sqlite3.Connection, name: str, bins: Iterable[Bin]) -> None:
    """Count these too."""
    connection.executemany(
        "INSERT INTO histograms VALUES (?, ?, ?, ?) ON CONFLICT (name, bound) DO UPDATE SET"
        " count = count + excluded.count, seconds = seconds + excluded.seconds",
        [(name, *bin) for bin in bins],
    )


def read(connection: sqlite3.Connection) -> dict[str, Histogram]:
    """All of them by name."""
    # Numbers whatever a damaged file holds.
    rows = connection.execute(
        "SELECT name, CAST(bound AS REAL), CAST(count AS INTEGER), CAST(seconds AS REAL)"
        " FROM histograms"
    ).fetchall()
    found = {}
    for name, bounds in BOUNDS.items():
        bins = [Bin(*row[1:]) for row in rows if row[0] == name]
        below = ((bound, sum(b.observed for b in bins if b.bound <= bound)) for bound in bounds)
        found[name] = Histogram(tuple(below), math.fsum(b.seconds for b in bins))
    return found
